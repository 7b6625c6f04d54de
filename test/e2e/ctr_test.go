package e2e_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestCtr pulls and runs an image with the real ctr, whose pull goes through the
// transfer service, configured as the README says.
func TestCtr(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	nydus := kit.SmallImage(t, "ctr").MustNydus(t, kit.NydusOptions{})
	ref := r.MustPush(t, nydus, "ctr:nydus")
	for _, s := range []style{helper24, managed24} {
		t.Run(s.name, func(t *testing.T) {
			n := s.node(t, kit.NodeConfig{})
			r.ResetRequests()
			if _, err := n.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "nydus", ref); err != nil {
				t.Fatal(err)
			}
			pulledWithoutData(t, r, nydus)
			daemonsNow(t, n, 0)
			for range 2 {
				runCtr(t, n, ref)
			}
			wantDaemons(t, n, 0, soon)
		})
	}
	t.Run(helper16.name, func(t *testing.T) {
		n := helper16.node(t, kit.NodeConfig{})
		// This ctr passes no labels at all, so the snapshotter cannot know.
		out, err := n.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "nydus", ref)
		if err == nil || !strings.Contains(out, "nydus.blob.v1") {
			t.Errorf("ctr of containerd 1.6 pulled a nydus image, or failed for another reason: %v", err)
		}
		// What another client pulled it runs.
		pull(t, n, ref)
		runCtr(t, n, ref)
		wantDaemons(t, n, 0, soon)
	})
}

// runCtr runs a container of the image with ctr.
func runCtr(t *testing.T, n *kit.Node, ref string) {
	t.Helper()
	var out []byte
	err := again(t, n, func() (err error) {
		cmd := n.Command(t.Context(), filepath.Join(n.ContainerdBin(), "ctr"), "--address", n.ContainerdAddress(), "--namespace", kit.Namespace,
			"run", "--rm", "--snapshotter", "nydus", "--cgroup", kit.CgroupRoot()+"/ctr", ref, "one", "/usr/bin/busybox", "cat", "/name")
		var stderr strings.Builder
		cmd.Stderr = &stderr
		if out, err = cmd.Output(); err != nil {
			err = fmt.Errorf("%w: %s", err, stderr.String())
		}
		return err
	})
	if err != nil || string(out) != "ctr" {
		t.Errorf("ctr run: %q, %v", out, err)
	}
}

// TestPullWithoutAnnotations pulls as a client does that does not say which image
// a layer belongs to: the answer says what to change.
func TestPullWithoutAnnotations(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref := r.MustPush(t, kit.SmallImage(t, "unlabelled").MustNydus(t, kit.NydusOptions{}), "unlabelled:nydus")
	n := helper24.node(t, kit.NodeConfig{})
	_, err := n.Pull(t.Context(), ref, kit.PullOptions{NoAnnotations: true})
	if err == nil || !strings.Contains(err.Error(), "disable_snapshot_annotations = false") {
		t.Errorf("pulling without annotations: %v", err)
	}
}
