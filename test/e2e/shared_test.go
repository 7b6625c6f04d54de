package e2e_test

import (
	"fmt"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestSharedDaemon runs containers of several images on one daemon, which outlives
// the snapshotter while it serves, and ends with it at the latest when it does not.
func TestSharedDaemon(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	const images = 4
	refs, trees := make([]string, images), make([]kit.Tree, images)
	for i := range refs {
		refs[i], trees[i] = smallNydus(t, r, fmt.Sprintf("shared-%d", i))
	}
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: map[string]any{"daemon.daemon_mode": "shared", "mount.idle_linger": "1h"}})
		list := make([]*kit.Container, images)
		var last containerd.Image
		for i := range refs {
			last = pull(t, n, refs[i])
			list[i] = run(t, n, last, fmt.Sprintf("c%d", i), kit.RunOptions{})
		}
		daemonsNow(t, n, 1)
		content := func() {
			t.Helper()
			for i, c := range list {
				kit.EqualTrees(t, "the view of "+c.ID(), trees[i], kit.MustWalk(t, c.Root()))
			}
		}
		content()
		if err := n.StopSnapshotter(); err != nil {
			t.Fatal(err)
		}
		daemonsNow(t, n, 1)
		content()
		startSnapshotter(t, n, last)
		for _, c := range list {
			remove(t, c)
		}
		daemonsNow(t, n, 1) // it lingers
		if err := n.StopSnapshotter(); err != nil {
			t.Fatal(err)
		}
		wantDaemons(t, n, 0, soon)
		if left := n.RunEntries(); len(left) > 0 {
			t.Errorf("the end of the snapshotter left %v in the run directory", left)
		}
		startSnapshotter(t, n, last)
	})
}

// TestModeChangesBetweenStarts restarts the snapshotter with another mode while
// containers of either run.
func TestModeChangesBetweenStarts(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	const images = 4
	refs := make([]string, images)
	for i := range refs {
		refs[i], _ = smallNydus(t, r, fmt.Sprintf("mode-%d", i))
	}
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: linger("10ms")})
		pulled, list := make([]containerd.Image, images), make([]*kit.Container, images)
		for i := range refs {
			pulled[i] = pull(t, n, refs[i])
		}
		// Two of the four share one.
		for i, mode := range []string{"dedicated", "shared", "shared", "dedicated"} {
			n.Configure("daemon.daemon_mode", mode)
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			startSnapshotter(t, n, pulled[i])
			list[i] = run(t, n, pulled[i], fmt.Sprintf("c%d", i), kit.RunOptions{})
			daemonsNow(t, n, []int{1, 2, 2, 3}[i])
		}
		for i, c := range list {
			if out := exec(t, c, "busybox", "cat", "/name"); out != fmt.Sprintf("mode-%d", i) {
				t.Errorf("/name of %s is %q", c.ID(), out)
			}
		}
		for i, c := range list {
			remove(t, c)
			wantDaemons(t, n, []int{2, 2, 1, 0}[i], soon)
		}
	})
}
