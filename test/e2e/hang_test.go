package e2e_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// hangBound is the nodes' daemon.hang_timeout; beyond it nothing may take longer than
// hangSlack, which a busy machine needs.
const (
	hangBound = 2 * time.Second
	hangSlack = 5 * time.Second
)

// TestHungDaemon stops nydusd while it has a container's request. The container can
// be deleted, another of the image can be started, and the snapshotter be restarted,
// none of which waits for longer than the bound.
func TestHungDaemon(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	// nydusd fetches more than it is asked for: the end of a large file it has not yet.
	data := make([]byte, 16<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	plain := kit.MustBuildImage(t, kit.Pause, kit.BusyboxLayer(kit.MustTools(t)),
		kit.FileLayer(kit.File{Name: "name", Data: "hung"}, kit.File{Name: "data", Data: string(data)}))
	ref := r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "hung:nydus")
	eachStyle(t, func(t *testing.T, s style) {
		r.SetHook(nil)
		n := s.node(t, kit.NodeConfig{Hook: true, Config: map[string]any{"daemon.hang_timeout": hangBound.String(), "mount.idle_linger": "500ms"}})
		img := pull(t, n, ref)
		c := run(t, n, img, "first", kit.RunOptions{})
		exec(t, c, "busybox", "true") // so that what is asked for below is the file
		gate, asked := make(chan struct{}), make(chan struct{}, 64)
		r.SetHook(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
			asked <- struct{}{}
			<-gate
			next.ServeHTTP(w, req)
		})
		// Past the page cache: a process that waits for a page can be killed, one that
		// waits for the answer to a request of its own cannot.
		reading := make(chan error, 1)
		go func() {
			_, _, err := c.Exec(context.WithoutCancel(t.Context()), "busybox", "dd", "if=/data", "of=/dev/null", "iflag=direct", "bs=65536", "skip=240")
			reading <- err
		}()
		select {
		case <-asked:
		case err := <-reading:
			t.Fatalf("nothing was fetched from the registry: %v", err)
		}
		hung := n.Daemons()[0].PID
		kit.Stop(t, hung)
		t.Cleanup(func() { _ = unix.Kill(hung, unix.SIGCONT) })
		r.SetHook(nil)
		close(gate)

		timed(t, "ps", func() error {
			out, err := n.Command(t.Context(), "nydus-snapshotter", "ps", "--run-dir", n.RunDir()).CombinedOutput()
			if err != nil || !strings.Contains(string(out), ref) {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		timed(t, "deletion of the container", func() error { return c.Remove(t.Context()) })
		<-reading
		timed(t, "start of another", func() error {
			again := run(t, n, img, "second", kit.RunOptions{})
			if out := exec(t, again, "busybox", "cat", "/name"); out != "hung" {
				t.Errorf("/name is %q", out)
			}
			return again.Remove(t.Context())
		})
		timed(t, "restart of the snapshotter", func() error { return n.RestartSnapshotter(t.Context()) })
		wantDaemons(t, n, 0, soon)
		log, err := os.ReadFile(n.SnapshotterLog())
		if err != nil || !strings.Contains(string(log), "nydusd hangs and ") || !strings.Contains(string(log), ref) {
			t.Errorf("the snapshotter's log does not say that nydusd of %s hung (%v):\n%s", ref, err, log)
		}
	})
}

// TestStartOnHungDaemon starts a container on an image whose nydusd was stopped
// while nobody waited for it.
func TestStartOnHungDaemon(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "idle")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Hook: true, Config: map[string]any{"daemon.hang_timeout": hangBound.String(), "mount.idle_linger": "500ms"}})
		img := pull(t, n, ref)
		c := run(t, n, img, "first", kit.RunOptions{})
		hung := n.Daemons()[0].PID
		kit.Stop(t, hung)
		t.Cleanup(func() { _ = unix.Kill(hung, unix.SIGCONT) })
		timed(t, "start of another", func() error {
			again := run(t, n, img, "second", kit.RunOptions{})
			if out := exec(t, again, "busybox", "cat", "/name"); out != "idle" {
				t.Errorf("/name is %q", out)
			}
			return again.Remove(t.Context())
		})
		timed(t, "deletion of the first", func() error { return c.Remove(t.Context()) })
		wantDaemons(t, n, 0, soon)
	})
}

// timed bounds what must not wait for a daemon that hangs.
func timed(t *testing.T, what string, f func() error) {
	t.Helper()
	started := time.Now()
	if err := f(); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	took := time.Since(started)
	t.Logf("%s took %v; the bound is %v", what, took.Round(time.Millisecond), hangBound)
	if took > hangBound+hangSlack {
		t.Errorf("%s took %v", what, took)
	}
}
