// Package e2e_test runs the whole system on real parts: containerd, runc,
// nydusd, a registry and the project's own binaries, as an operator would put
// them together. Each test says what must be true for somebody who uses it; none
// looks into a package of the project. It needs root and what `make tools` and
// `make build` leave.
package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m) }

// style is one way to use the snapshotter: which containerd, and how the mount
// is handed over.
type style struct {
	name    string
	version kit.Version
	mount   string
}

var (
	helper24  = style{"containerd-2.4-helper", kit.V24, "helper"}
	managed24 = style{"containerd-2.4-managed", kit.V24, "managed"}
	helper16  = style{"containerd-1.6-helper", kit.V16, "helper"}

	styles = []style{helper24, managed24, helper16}
)

// eachStyle runs a test for every style.
func eachStyle(t *testing.T, test func(t *testing.T, s style)) {
	t.Helper()
	for _, s := range styles {
		t.Run(s.name, func(t *testing.T) { test(t, s) })
	}
}

// soon is how long things may take that have nothing to wait for.
const soon = 15 * time.Second

// node starts a node of a style with the snapshotter.
func (s style) node(t *testing.T, cfg kit.NodeConfig) *kit.Node {
	t.Helper()
	cfg.Containerd, cfg.Style, cfg.Snapshotter = s.version, s.mount, true
	n := kit.NewNode(t, cfg)
	// containerd's client makes temporary mounts in its own process.
	path, ok := strings.CutPrefix(n.Env()[0], "PATH=")
	if !ok {
		t.Fatalf("the node's environment has no PATH in front: %q", n.Env())
	}
	t.Setenv("PATH", path)
	return n
}

// linger is a node's configuration with another idle linger than the kit's.
func linger(d string) map[string]any { return map[string]any{"mount.idle_linger": d} }

// endLinger makes the snapshotter let go of what has been kept by a long linger.
func endLinger(t *testing.T, n *kit.Node) {
	t.Helper()
	n.Configure("mount.idle_linger", "10ms")
	if err := n.RestartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantDaemons(t, n, 0, soon)
}

// starts counts how often nydusd was started to serve an image.
type starts struct{ dir, path string }

// countStarts returns a counter and a nydusd_path for the snapshotter's
// configuration that counts and then becomes the real nydusd.
func countStarts(t *testing.T) starts {
	t.Helper()
	c := starts{dir: filepath.Join(t.TempDir(), "starts")}
	c.path = filepath.Join(filepath.Dir(c.dir), "nydusd")
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nif [ \"$1\" = fuse ]; then : > %s/$$; fi\nexec %s \"$@\"\n", c.dir, kit.MustTools(t).Nydusd)
	if err := os.WriteFile(c.path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c starts) want(t *testing.T, n int) {
	t.Helper()
	list, err := os.ReadDir(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != n {
		t.Errorf("nydusd was started %d times, want %d", len(list), n)
	}
}

// wantDaemons waits until exactly n nydusd run.
func wantDaemons(t *testing.T, node *kit.Node, n int, within time.Duration) {
	t.Helper()
	if err := node.WaitDaemons(n, within); err != nil {
		t.Error(err)
		// What keeps a daemon is a mount.
		for _, m := range kit.Mounts(t, "") {
			if strings.HasPrefix(m.FSType, "fuse") || m.FSType == "overlay" || m.FSType == "erofs" {
				t.Logf("mounted: %s on %s, %d:%d", m.FSType, m.Mountpoint, m.Major, m.Minor)
			}
		}
	}
}

// daemonsNow checks how many nydusd run at this moment.
func daemonsNow(t *testing.T, node *kit.Node, n int) {
	t.Helper()
	if list := node.Daemons(); len(list) != n {
		t.Errorf("%d nydusd run, want %d: %v", len(list), n, list)
	}
}

// imageMounts checks how many image filesystems are mounted, however often each.
// The machine's own do not count.
func imageMounts(t *testing.T, want int) {
	t.Helper()
	devices := map[string][]string{}
	for _, m := range kit.Mounts(t, "") {
		ours := strings.HasPrefix(m.Mountpoint, "/run/") || strings.HasPrefix(m.Mountpoint, kit.Scratch()+"/")
		if ours && (strings.HasPrefix(m.FSType, "fuse") || m.FSType == "erofs") {
			dev := fmt.Sprintf("%d:%d", m.Major, m.Minor)
			devices[dev] = append(devices[dev], m.Mountpoint)
		}
	}
	if len(devices) != want {
		t.Errorf("%d images are mounted, want %d: %v", len(devices), want, devices)
	}
}

func pull(t *testing.T, n *kit.Node, ref string) containerd.Image {
	t.Helper()
	img, err := n.Pull(t.Context(), ref, kit.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func run(t *testing.T, n *kit.Node, img containerd.Image, id string, opts kit.RunOptions) *kit.Container {
	t.Helper()
	c, err := tryRun(t, n, img, id, opts)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tryRun is run for other goroutines than the test's.
func tryRun(t *testing.T, n *kit.Node, img containerd.Image, id string, opts kit.RunOptions) (c *kit.Container, err error) {
	err = again(t, n, func() error {
		c, err = n.Run(t.Context(), img, id, opts)
		return err
	})
	return c, err
}

// again repeats f as kubelet would when containerd 1.6 lost the exit status of
// the mount helper: its shim reaps every child, and now and then faster than the
// code that waits for this one, which tries ten times and gives up. Busy machines
// get there. It is the only failure that is not taken for one, and only as long as
// it stays rare.
func again(t *testing.T, n *kit.Node, f func() error) error {
	for {
		err := f()
		if err == nil || !lostStatus(n, err.Error()) {
			return err
		}
		count := lostStatuses.Add(1)
		t.Logf("containerd 1.6 lost the mount helper's exit status ten times in a row, for the %d. time in this run", count)
		if count > maxLostStatuses {
			return fmt.Errorf("more than %d starts of this run lost the mount helper's exit status: %w", maxLostStatuses, err)
		}
	}
}

// maxLostStatuses is how many starts of a run containerd 1.6 may lose.
const maxLostStatuses = 8

var lostStatuses atomic.Int32

func lostStatus(n *kit.Node, text string) bool {
	tools, err := kit.FindTools()
	return err == nil && n.ContainerdBin() == tools.Containerd16Bin && strings.Contains(text, "failed with ECHILD (retired 10 times)")
}

// exec runs a command that must succeed and returns its output.
func exec(t *testing.T, c *kit.Container, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, code, err := c.Exec(ctx, args...)
	if err != nil || code != 0 {
		t.Fatalf("%q in %s: code %d, %v: %s", args, c.ID(), code, err, out)
	}
	return out
}

func remove(t *testing.T, c *kit.Container) {
	t.Helper()
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// parallel calls f for 0 to n-1 at once and fails the test with their errors.
func parallel(t *testing.T, n int, f func(i int) error) {
	t.Helper()
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = f(i) })
	}
	all.Wait()
	failed := 0
	for i, err := range errs {
		if err != nil {
			failed++
			t.Errorf("%d of %d: %v", i, n, err)
		}
	}
	if failed > 0 {
		t.FailNow()
	}
}

// tree is the content that an image must show.
func tree(t *testing.T, img *kit.Image) kit.Tree {
	t.Helper()
	want, err := img.Tree()
	if err != nil {
		t.Fatal(err)
	}
	return want
}
