package e2e_test

import (
	"fmt"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestEveryCombination starts an image, reads it, starts it once more and removes it, in each
// combination of driver, mode of the daemon and style. The tests are run with each
// version of nydusd.
func TestEveryCombination(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	tools := kit.MustTools(t)
	// One that keeps its cache to itself leaves nothing to be proven.
	shared := tools.Nydusd != tools.NydusdOld
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: map[string]any{
			"mount.idle_linger": "10ms", "daemon.config_template": prefetchAll(t),
		}})
		ref, _ := smallNydus(t, r, s.name+"-first")
		first := pull(t, n, ref)
		for i, c := range []struct{ driver, mode string }{
			{"fuse", "dedicated"}, {"fuse", "shared"}, {"auto", "dedicated"}, {"auto", "shared"},
			{"erofs", "dedicated"}, {"erofs", "shared"},
		} {
			name := c.driver + "-" + c.mode
			ref, want := smallNydus(t, r, s.name+"-"+name) // of equal ones containerd would take the first
			n.Configure("mount.driver", c.driver)
			n.Configure("daemon.daemon_mode", c.mode)
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			startSnapshotter(t, n, first)
			img := pull(t, n, ref)
			if c.driver == "erofs" {
				completeOnly(t, n, img, name, want, shared)
				forgotten(t, n, ref, name)
				continue
			}
			cold := run(t, n, img, fmt.Sprintf("cold-%d", i), kit.RunOptions{})
			daemonsNow(t, n, 1)
			kit.EqualTrees(t, name+", cold", want, kit.MustWalk(t, cold.Root()))
			// Also what no file of the image shows.
			if shared {
				awaitComplete(t, n, ref)
			}
			remove(t, cold)
			wantDaemons(t, n, 0, soon)
			if list, failed := proofs(t, n, ref); failed == shared || len(list) != 1 || list[0].Proven != shared {
				t.Errorf("%s: after all was read `cache prove` says %+v", name, list)
			}
			daemons := 1
			if c.driver == "auto" && shared {
				daemons = 0
			}
			r.ResetRequests()
			warm := run(t, n, img, fmt.Sprintf("warm-%d", i), kit.RunOptions{})
			daemonsNow(t, n, daemons)
			imageMounts(t, 1)
			kit.EqualTrees(t, name+", warm", want, kit.MustWalk(t, warm.Root()))
			writes(t, warm, name)
			if got := r.BlobTotal(); got > 0 && shared {
				t.Errorf("%s: %d bytes were fetched once more", name, got)
			}
			remove(t, warm)
			forgotten(t, n, ref, name)
		}
	})
}

// completeOnly starts an image where no daemon may serve it: it has to be complete, for which
// it takes a nydusd that shares its cache.
func completeOnly(t *testing.T, n *kit.Node, img containerd.Image, name string, want kit.Tree, shared bool) {
	t.Helper()
	if c, err := tryRun(t, n, img, name+"-cold", kit.RunOptions{}); err == nil || !strings.Contains(err.Error(), "not proven") {
		t.Errorf("%s: what nobody has proven: %v, %v", name, c, err)
	}
	daemonsNow(t, n, 0)
	out, err := fetching{n, t}.fetch(img.Name())
	if !shared {
		if err == nil || !strings.Contains(out, "install 2.3 or newer") {
			t.Errorf("%s: image fetch: %v: %s", name, err, out)
		}
		return
	}
	if err != nil {
		t.Errorf("%s: image fetch: %v: %s", name, err, out)
		return
	}
	c := run(t, n, img, name+"-warm", kit.RunOptions{})
	daemonsNow(t, n, 0)
	imageMounts(t, 1)
	kit.EqualTrees(t, name, want, kit.MustWalk(t, c.Root()))
	writes(t, c, name)
	remove(t, c)
}

func writes(t *testing.T, c *kit.Container, name string) {
	t.Helper()
	if out := exec(t, c, "busybox", "sh", "-c", "echo written > /new && cat /new"); out != "written\n" {
		t.Errorf("%s: the container writes and reads %q", name, out)
	}
}

// forgotten removes an image, of which nothing is left then.
func forgotten(t *testing.T, n *kit.Node, ref, name string) {
	t.Helper()
	if err := n.RemoveImage(t.Context(), ref); err != nil {
		t.Error(err)
	}
	if err := n.WaitRunEntries(soon); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	wantDaemons(t, n, 0, soon)
}
