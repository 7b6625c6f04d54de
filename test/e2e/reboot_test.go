package e2e_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestReboot takes away what a reboot takes away: processes, mounts and /run.
func TestReboot(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "reboot")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		old := run(t, n, img, "old", kit.RunOptions{})
		exec(t, old, "busybox", "sh", "-c", "echo written > /before")
		crash(t, n)
		if err := n.StartSnapshotter(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := n.StartContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		daemonsNow(t, n, 0)
		c := run(t, n, img, "new", kit.RunOptions{})
		kit.EqualTrees(t, "a new container's view", want, kit.MustWalk(t, c.Root()))
		if err := again(t, n, func() error { return old.Start(t.Context()) }); err != nil {
			t.Fatal(err)
		}
		if out := exec(t, old, "busybox", "cat", "/before", "/name"); out != "written\nreboot" {
			t.Errorf("the old container reads %q", out)
		}
		daemonsNow(t, n, 1)
		imageMounts(t, 1)
		remove(t, c)
		remove(t, old)
		wantDaemons(t, n, 0, soon)
	})
}

// crash ends everything of a node at once and wipes what lies on its /run. The
// configuration files there stay, which on a real node lie on disk.
func crash(t *testing.T, n *kit.Node) {
	t.Helper()
	procs, err := kit.Processes()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	if err := n.KillSnapshotter(); err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		switch name := filepath.Base(p.Exe); {
		case p.PPID == os.Getpid(): // the registry
		case name == "containerd-shim-runc-v2" || name == "nydusd" || name == "busybox":
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && err != unix.ESRCH {
				t.Fatal(err)
			}
		}
	}
	wantDaemons(t, n, 0, soon)
	state := filepath.Join(n.Dir(), "state")
	mounts := kit.Mounts(t, "")
	slices.Reverse(mounts) // the latest first
	for _, m := range mounts {
		for _, dir := range []string{n.RunDir(), state, n.Data()} {
			if m.Mountpoint == dir || strings.HasPrefix(m.Mountpoint, dir+"/") {
				if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
					t.Fatalf("unmount %s: %v", m.Mountpoint, err)
				}
			}
		}
	}
	// /run/containerd holds what runc and the shims keep, whatever containerd's state.
	for _, dir := range []string{n.RunDir(), state, "/run/containerd", n.ContainerdAddress(), n.ContainerdAddress() + ".ttrpc", n.SnapshotterAddress()} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}
