package e2e_test

import (
	"errors"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// The kit's nodes serve images by nydusd, since most tests look at daemons. These do what
// users do on a node with the default driver, with an image that is complete.

// auto is a node's configuration with the default driver, and a nydusd that completes images.
func auto(t *testing.T) map[string]any {
	t.Helper()
	return map[string]any{"mount.driver": "auto", "daemon.nydusd_path": shares(t), "daemon.config_template": prefetchAll(t)}
}

// completed pulls an image and runs it until its next start needs no daemon.
func completed(t *testing.T, n *kit.Node, ref string) containerd.Image {
	t.Helper()
	img := pull(t, n, ref)
	c := run(t, n, img, "completing", kit.RunOptions{})
	daemonsNow(t, n, 1)
	awaitProof(t, n, 1)
	remove(t, c)
	wantDaemons(t, n, 0, soon)
	return img
}

// TestCompleteImage goes through a complete image's life.
func TestCompleteImage(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "ctr") // the name that runCtr expects
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Hook: s.mount == "helper", Config: auto(t)})
		img := completed(t, n, ref)
		const containers = 16
		list := make([]*kit.Container, containers)
		parallel(t, containers, func(i int) (err error) {
			list[i], err = tryRun(t, n, img, "c"+string(rune('a'+i)), kit.RunOptions{})
			return err
		})
		daemonsNow(t, n, 0)
		imageMounts(t, 1)
		kit.EqualTrees(t, "the container's view", want, kit.MustWalk(t, list[0].Root()))
		parallel(t, containers-1, func(i int) error { return list[i+1].Remove(t.Context()) })

		// Nothing that runs depends on containerd or the snapshotter.
		if err := n.KillSnapshotter(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(n.KillContainerd(), n.StartContainerd(t.Context())); err != nil {
			t.Fatal(err)
		}
		if out := exec(t, list[0], "busybox", "sha256sum", "/data"); out != want["data"].SHA256+"  /data\n" {
			t.Errorf("without snapshotter a container reads %s", out)
		}
		startSnapshotter(t, n, img)
		exec(t, list[0], "busybox", "sh", "-c", "echo changed > /name")
		if s.mount == "helper" { // the other has a mount that only containerd's mount manager knows
			again := commit(t, n, list[0], img, r.Ref("ctr:committed"))
			c := run(t, n, pull(t, n, again), "committed", kit.RunOptions{})
			if out := exec(t, c, "busybox", "cat", "/name"); out != "changed\n" {
				t.Errorf("the committed image has %q", out)
			}
			daemonsNow(t, n, 0) // it is the same bootstrap
			remove(t, c)
			forget(t, n, again)
		}
		remove(t, list[0])
		if s != helper16 {
			runCtr(t, n, ref)
			daemonsNow(t, n, 0)
		}
		if err := n.WaitRunEntries(soon); err != nil {
			t.Error(err)
		}
		imageMounts(t, 0)
		noSnapshots(t, n, ref)
	})
}

// TestCompleteImageInPods runs pods of a complete image as kubelet does.
func TestCompleteImageInPods(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{User: user, Password: password})
	open := kit.NewRegistry(t, kit.RegistryOptions{})
	p := &pods{registry: r, app: kit.SmallImage(t, "app").MustNydus(t, kit.NydusOptions{})}
	p.ref = r.MustPush(t, p.app, "app:nydus")
	p.plainPause = open.MustPush(t, kit.SmallImage(t, "pause"), "pause:plain")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{CRI: true, SandboxImage: p.plainPause, Env: dockerConfig(t, r), Config: auto(t)})
		if err := n.CRIPull(t.Context(), p.ref, user, password); err != nil {
			t.Fatal(err)
		}
		for _, complete := range []bool{false, true} {
			pod := runPod(t, n, "pod")
			c := p.create(t, n, pod, "first", "app")
			p.start(t, n, pod, &c)
			if complete {
				daemonsNow(t, n, 0)
			} else {
				daemonsNow(t, n, 1)
				awaitProof(t, n, 1)
			}
			podExec(t, pod, c.id, "1000\n", "busybox", "id", "-u")
			podExec(t, pod, c.id, "app", "busybox", "cat", "/name")
			if err := pod.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			wantDaemons(t, n, 0, soon)
			if err := n.WaitRunEntries(soon); err != nil {
				t.Error(err)
			}
		}
	})
}
