package snapshot

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// Credentials in labels are ignored, which is said once for an image, and are in none
// of our files.
func TestCredentialsInLabelsAreIgnored(t *testing.T) {
	n := newNode(t)
	const secret = "s3cr3t-canary"
	var said bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&said)
	n.ctx = log.WithLogger(n.ctx, logrus.NewEntry(logger))
	n.top = n.sn // in this process, with its log
	with := func(l layer, image string) layer {
		labels := map[string]string{labelUser: secret, labelSecret: secret}
		for k, v := range l.labels {
			labels[k] = v
		}
		labels[labelImage] = image
		l.labels = labels
		return l
	}
	secrets := snapshots.WithLabels(map[string]string{labelUser: secret, labelSecret: secret, labelImage: testImage})
	if _, err := n.sn.Prepare(n.ctx, "container", "", secrets); err != nil {
		t.Fatal(err)
	}
	if _, err := n.sn.View(n.ctx, "view", "", secrets); err != nil {
		t.Fatal(err)
	}
	for i, image := range []string{testImage, testImage, "registry.example/other:v1"} {
		l := with(n.plain("a"), image)
		l.labels["containerd.io/snapshot/number"] = fmt.Sprint(i)
		if _, err := n.tryPull(n.ctx, l); err != nil {
			t.Fatal(err)
		}
	}
	info, err := n.sn.Stat(n.ctx, "container")
	if err != nil {
		t.Fatal(err)
	}
	info.Labels[labelSecret] = secret
	if _, err := n.sn.Update(n.ctx, info); err != nil {
		t.Fatal(err)
	}
	if info, err := n.sn.Stat(n.ctx, "container"); err != nil || info.Labels[labelImage] != testImage || info.Labels[labelSecret] != "" {
		t.Errorf("%v, %v", info.Labels, err)
	}
	if count := strings.Count(said.String(), "are ignored"); count != 2 || !strings.Contains(said.String(), "credentials.cri") || strings.Contains(said.String(), secret) {
		t.Errorf("said %d times: %s", count, said.String())
	}
	text, err := os.ReadFile(filepath.Join(n.root, "metadata.db"))
	if err != nil || !bytes.Contains(text, []byte(testImage)) {
		t.Fatal(err, "the database has no labels at all")
	}
	if bytes.Contains(text, []byte(secret)) {
		t.Error("the database has the secret")
	}
}
