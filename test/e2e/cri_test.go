package e2e_test

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const user, password = "kubelet", "not-so-secret"

// dockerConfig writes docker's configuration with the registry's credentials and
// returns the environment that points to it.
func dockerConfig(t *testing.T, r *kit.Registry) []string {
	t.Helper()
	dir := t.TempDir()
	auth := base64.StdEncoding.EncodeToString([]byte(r.User + ":" + r.Password))
	text := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, r.Host, auth)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"DOCKER_CONFIG=" + dir}
}

// TestPods runs pods as kubelet does, from a registry that asks for a password.
func TestPods(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{User: user, Password: password})
	open := kit.NewRegistry(t, kit.RegistryOptions{})
	p := &pods{registry: r, app: kit.SmallImage(t, "app").MustNydus(t, kit.NydusOptions{})}
	p.ref = r.MustPush(t, p.app, "app:nydus")
	plainPause := kit.SmallImage(t, "pause")
	p.plainPause = open.MustPush(t, plainPause, "pause:plain")
	p.nydusPause = open.MustPush(t, plainPause.MustNydus(t, kit.NydusOptions{}), "pause:nydus")
	eachStyle(t, func(t *testing.T, s style) {
		t.Run("without hook", func(t *testing.T) { p.withoutHook(t, s) })
		t.Run("with hook", func(t *testing.T) { p.withHook(t, s) })
	})
}

type pods struct {
	registry               *kit.Registry
	app                    *kit.Image
	ref                    string
	plainPause, nydusPause string
}

// withoutHook has a nydus sandbox image as well. CRI reads /etc/passwd through a
// temporary mount when it creates a container: thanks to the linger the container
// finds the same daemon, however much later it is started.
func (p *pods) withoutHook(t *testing.T, s style) {
	count := countStarts(t)
	n := s.node(t, kit.NodeConfig{CRI: true, SandboxImage: p.nydusPause, Env: dockerConfig(t, p.registry),
		Config: map[string]any{"daemon.nydusd_path": count.path, "mount.idle_linger": "1h"}})
	p.registry.ResetRequests()
	if err := n.CRIPull(t.Context(), p.ref, user, password); err != nil {
		t.Fatal(err)
	}
	pulledWithoutData(t, p.registry, p.app)
	daemonsNow(t, n, 0)
	pod := runPod(t, n, "pod")
	daemonsNow(t, n, 1)
	first := p.create(t, n, pod, "first", "app")
	other := runPod(t, n, "other") // meanwhile
	p.start(t, n, pod, &first)
	second := p.create(t, n, pod, "second", "")
	p.start(t, n, pod, &second)
	daemonsNow(t, n, 2)
	imageMounts(t, 2)
	for id, want := range map[string]string{first.id: "1000\n", second.id: "0\n"} {
		podExec(t, pod, id, want, "busybox", "id", "-u")
		podExec(t, pod, id, "app", "busybox", "cat", "/name")
	}
	if err := pod.Stop(t.Context(), first.id); err != nil {
		t.Error(err)
	}
	daemonsNow(t, n, 2)
	for _, p := range []*kit.Pod{pod, other} {
		if err := p.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	count.want(t, 2)
	endLinger(t, n)
}

// withHook has a linger that never ends: the hook lets go, although nobody else
// is there to do it. containerd gives its base specification, and so the hook, to
// containers only, not to sandboxes.
func (p *pods) withHook(t *testing.T, s style) {
	n := s.node(t, kit.NodeConfig{CRI: true, Hook: true, SandboxImage: p.plainPause, Env: dockerConfig(t, p.registry),
		Config: linger("1h")})
	if err := n.CRIPull(t.Context(), p.ref, user, password); err != nil {
		t.Fatal(err)
	}
	pod := runPod(t, n, "pod")
	first, second := p.create(t, n, pod, "first", "app"), p.create(t, n, pod, "second", "")
	p.start(t, n, pod, &first)
	p.start(t, n, pod, &second)
	daemonsNow(t, n, 1)
	podExec(t, pod, first.id, "app", "busybox", "cat", "/name")
	if err := n.KillSnapshotter(); err != nil {
		t.Fatal(err)
	}
	if err := pod.Stop(t.Context(), first.id); err != nil {
		t.Error(err)
	}
	podExec(t, pod, second.id, "app", "busybox", "cat", "/name")
	daemonsNow(t, n, 1)
	if err := pod.Stop(t.Context(), second.id); err != nil {
		t.Error(err)
	}
	wantDaemons(t, n, 0, soon)
	if err := pod.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

func runPod(t *testing.T, n *kit.Node, name string) *kit.Pod {
	t.Helper()
	var pod *kit.Pod
	err := again(t, n, func() (err error) {
		pod, err = n.RunPod(t.Context(), name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// appContainer is a container of the application's image in a pod.
type appContainer struct{ id, name, username string }

// create creates a container that runs as a user of the image if one is named.
func (p *pods) create(t *testing.T, n *kit.Node, pod *kit.Pod, name, username string) appContainer {
	t.Helper()
	runtime, _ := n.CRI()
	created, err := runtime.CreateContainer(t.Context(), &cri.CreateContainerRequest{
		PodSandboxId: pod.ID, SandboxConfig: pod.Config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: p.ref}, LogPath: name + ".log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: pod.Config.Linux.SecurityContext.NamespaceOptions, RunAsUsername: username,
			}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return appContainer{created.ContainerId, name, username}
}

// start starts a container; where that has to be done again, with a new container
// in its place as kubelet does.
func (p *pods) start(t *testing.T, n *kit.Node, pod *kit.Pod, c *appContainer) {
	t.Helper()
	runtime, _ := n.CRI()
	first := true
	err := again(t, n, func() error {
		if !first {
			if err := pod.Stop(t.Context(), c.id); err != nil {
				return err
			}
			*c = p.create(t, n, pod, c.name, c.username)
		}
		first = false
		_, err := runtime.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: c.id})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func podExec(t *testing.T, pod *kit.Pod, id, want string, args ...string) {
	t.Helper()
	out, code, err := pod.Exec(t.Context(), id, args...)
	if err != nil || code != 0 || out != want {
		t.Errorf("%q: %q, code %d, %v; want %q", args, out, code, err, want)
	}
}
