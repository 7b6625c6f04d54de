package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestCredentialsOfKubelet reads an image with what kubelet pulled it with, and with
// nothing else: its image calls go through the snapshotter to containerd.
func TestCredentialsOfKubelet(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{User: user, Password: password})
	open := kit.NewRegistry(t, kit.RegistryOptions{})
	p := &pods{registry: r, app: kit.SmallImage(t, "app").MustNydus(t, kit.NydusOptions{})}
	p.ref = r.MustPush(t, p.app, "app:nydus")
	pause := open.MustPush(t, kit.SmallImage(t, "pause"), "pause:plain")
	n := managed24.node(t, kit.NodeConfig{CRI: true, SandboxImage: pause, Env: []string{"DOCKER_CONFIG=" + t.TempDir()}})
	socket := filepath.Join(n.Dir(), "cri.sock")
	n.Configure("credentials.cri", map[string]any{"address": socket, "containerd": n.ContainerdAddress()})
	if err := n.RestartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	images := cri.NewImageServiceClient(conn)
	pull := func(password string) error {
		_, err := images.PullImage(t.Context(), &cri.PullImageRequest{
			Image: &cri.ImageSpec{Image: p.ref}, Auth: &cri.AuthConfig{Username: user, Password: password},
		}, grpc.WaitForReady(true))
		return err
	}
	kept := func(want int) {
		t.Helper()
		files, err := os.ReadDir(filepath.Join(n.RunDir(), "credentials"))
		if err != nil || len(files) != want {
			t.Errorf("kept is %v, %v; want %d files", files, err, want)
		}
	}
	if err := pull("wrong"); err == nil {
		t.Fatal("the registry takes any password")
	}
	kept(0)
	if err := pull(password); err != nil {
		t.Fatal(err)
	}
	kept(1)
	list, err := images.ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil || len(list.Images) == 0 {
		t.Errorf("%v, %v", list, err)
	}
	// They outlive the process.
	if err := n.KillSnapshotter(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	check, err := n.Command(t.Context(), "nydus-snapshotter", "registry", "check", "--config", n.SnapshotterConfig(), p.ref).CombinedOutput()
	if err != nil || !strings.Contains(string(check), "kubelet's pull of "+r.Host+"/app") {
		t.Errorf("registry check: %v\n%s", err, check)
	}
	pod := runPod(t, n, "pod")
	c := p.create(t, n, pod, "one", "")
	p.start(t, n, pod, &c)
	podExec(t, pod, c.id, "app", "busybox", "cat", "/name")
	if err := pod.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	for _, file := range []string{n.SnapshotterLog(), n.ContainerdLog()} {
		text, err := os.ReadFile(file)
		if err != nil || strings.Contains(string(text), password) {
			t.Errorf("%s tells the password, or cannot be read: %v", file, err)
		}
	}
}
