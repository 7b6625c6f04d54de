package crash_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// lab is a node with readers, and what has been done to it.
type lab struct {
	t      *testing.T
	node   *kit.Node
	reg    *depot
	watch  *watch
	random *rand.Rand
	books  books
	begun  time.Time

	mu      sync.Mutex
	history []string
}

// depot is a registry that takes its time, and knows how many wait for it.
type depot struct {
	*kit.Registry
	picture  *picture
	inFlight atomic.Int64
	copies   int
}

// fetchTime is how long a request for a piece of a blob takes.
const fetchTime = 150 * time.Millisecond

func newDepot(t *testing.T) *depot {
	t.Helper()
	d := &depot{Registry: kit.NewRegistry(t, kit.RegistryOptions{}), picture: newPicture(t)}
	d.SetHook(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Header.Get("Range") != "" {
			d.inFlight.Add(1)
			defer d.inFlight.Add(-1)
			timer := time.NewTimer(fetchTime)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-r.Context().Done():
			}
		}
		next.ServeHTTP(w, r)
	})
	return d
}

// fresh pushes the image under a name of its own, with a bootstrap layer of its own:
// nothing of it is cached, and containerd takes it for another image.
func (d *depot) fresh(t *testing.T) string {
	t.Helper()
	d.copies++
	name := fmt.Sprintf("copy-%d", d.copies)
	boot, err := d.picture.BootstrapBytes()
	must(t, err)
	img, err := d.picture.Hostile(t.TempDir(), kit.FileLayer(kit.File{Name: "image/"},
		kit.File{Name: "image/image.boot", Data: string(boot)}, kit.File{Name: "image/name", Data: name}))
	must(t, err)
	return d.MustPush(t, img, name+":nydus")
}

// setup is how a node is set up.
type setup struct{ daemon, style, mode string }

func (s setup) String() string { return s.daemon + "-" + s.style + "-" + s.mode }

// succeeds tells whether another daemon can go on where one stopped.
func (s setup) succeeds() bool { return s.daemon == daemonNew }

// newLab starts a node and the reader process.
func newLab(t *testing.T, s setup, reg *depot, random *rand.Rand, bin string) *lab {
	t.Helper()
	if s.daemon == daemonOld {
		t.Setenv("NYDUS_DAEMON", "old")
	} else {
		t.Setenv("NYDUS_DAEMON", "current")
	}
	config := map[string]any{"daemon.recover_policy": "failover", "mount.idle_linger": "300ms"}
	for key, value := range modes[s.mode] {
		config[key] = value
	}
	l := &lab{t: t, reg: reg, random: random, begun: time.Now()}
	l.node = kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Hook: true, Style: s.style, Config: config, Bin: bin})
	t.Cleanup(func() {
		if t.Failed() {
			l.testify()
		}
	})
	l.watch = newWatch(t)
	l.must("read the books", func(ctx context.Context) (err error) {
		l.books, err = l.readBooks(ctx)
		return err
	})
	return l
}

// did adds to the history.
func (l *lab) did(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.history = append(l.history, fmt.Sprintf("%9.3fs ", time.Since(l.begun).Seconds())+fmt.Sprintf(format, args...))
}

// testify shows all that a failure can be understood by. The kit adds the logs of
// snapshotter and containerd.
func (l *lab) testify() {
	l.mu.Lock()
	history := strings.Join(l.history, "\n  ")
	l.mu.Unlock()
	l.t.Logf("--- history\n  %s", history)
	logs, _ := filepath.Glob(filepath.Join(l.node.SnapshotterRoot(), "instances", "*", "nydusd.log"))
	for _, path := range append(logs, filepath.Join(l.node.SnapshotterRoot(), "holder.log")) {
		text, err := os.ReadFile(path)
		lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
		l.t.Logf("--- %s (%v)\n%s", path, err, bytes.Join(lines[max(0, len(lines)-60):], []byte("\n")))
	}
	records, _ := filepath.Glob(filepath.Join(l.node.RunDir(), "i", "*", "record.json"))
	for _, path := range records {
		text, err := os.ReadFile(path)
		l.t.Logf("--- %s (%v)\n%s", path, err, text)
	}
}

// bounded runs f, which gets a context that ends. One that does not return even
// so is stuck on a filesystem: then these are aborted.
func (l *lab) bounded(what string, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	select {
	case err := <-done:
		return l.note(what, began, err)
	case <-ctx.Done():
	}
	timer := time.NewTimer(hangs)
	defer timer.Stop()
	select {
	case err := <-done:
		return l.note(what, began, err)
	case <-timer.C:
	}
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	l.t.Errorf("%s is stuck\n%s\n%s", what, abortAll(), stacks)
	timer.Reset(hangs)
	select {
	case err := <-done:
		return l.note(what, began, err)
	case <-timer.C:
		return l.note(what, began, errors.New("stuck, even after its filesystems were aborted"))
	}
}

func (l *lab) note(what string, began time.Time, err error) error {
	took := time.Since(began).Round(time.Millisecond)
	if err != nil {
		l.did("%s: failed after %v: %v", what, took, err)
		return fmt.Errorf("%s: %w", what, err)
	}
	l.did("%s: done, took %v", what, took)
	return nil
}

// must runs f, which has to succeed.
func (l *lab) must(what string, f func(ctx context.Context) error) {
	l.t.Helper()
	must(l.t, l.bounded(what, f))
}

// until repeats a question for whose answer no event exists.
func (l *lab) until(what string, ask func(ctx context.Context) error) {
	l.t.Helper()
	must(l.t, l.wait(what, ask))
}

func (l *lab) wait(what string, ask func(ctx context.Context) error) error {
	return l.bounded(what, func(ctx context.Context) error {
		tick := time.NewTicker(glance)
		defer tick.Stop()
		last := errors.New("it was never asked")
		for {
			err := ask(ctx)
			if err == nil {
				return nil
			}
			if ctx.Err() == nil {
				last = err // and not that the time is over
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("not within %v: %w", patience, last)
			}
		}
	})
}

// moment lets some time pass: the chances' choice of a moment.
func (l *lab) moment(upTo time.Duration) {
	l.pass(time.Duration(l.random.Int64N(int64(upTo))))
}

// pass lets some time pass.
func (l *lab) pass(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.t.Context().Done():
	}
}

// pull makes a fresh copy of the image and pulls it.
func (l *lab) pull() (img containerd.Image) {
	l.t.Helper()
	ref := l.reg.fresh(l.t)
	l.must("pull "+ref, func(ctx context.Context) (err error) {
		img, err = l.node.Pull(ctx, ref, kit.PullOptions{})
		return err
	})
	return img
}

// run starts a container.
func (l *lab) run(img containerd.Image, id string) (c *kit.Container) {
	l.t.Helper()
	l.must("run "+id, func(ctx context.Context) (err error) {
		c, err = l.node.Run(ctx, img, id, kit.RunOptions{})
		return err
	})
	return c
}

// read begins to read through a container in every way.
func (l *lab) read(c *kit.Container, ways ...string) {
	l.t.Helper()
	l.watch.start(c.ID(), c.Root(), l.reg.picture.source, ways...)
}

// remove removes a container that nobody reads.
func (l *lab) remove(c *kit.Container) {
	l.t.Helper()
	l.must("remove "+c.ID(), func(ctx context.Context) error { return c.Remove(ctx) })
}

// forget removes an image, and its snapshots and content.
func (l *lab) forget(img containerd.Image) {
	l.t.Helper()
	l.must("forget "+img.Name(), func(ctx context.Context) error { return l.node.RemoveImage(ctx, img.Name()) })
}

// kept waits until the living daemon of an image can be succeeded: one that dies
// before that is a daemon that died during the mount.
func (l *lab) kept(img containerd.Image) {
	l.t.Helper()
	l.until("what serves "+img.Name()+" is kept", func(context.Context) error {
		g, err := l.serving(img)
		if err == nil && (!g.Kept || g.KeptRevision != g.Revision) {
			err = errors.New("it is not")
		}
		return err
	})
}

var errNone = errors.New("there is none")

// serving is the generation with the daemon that serves an image.
func (l *lab) serving(img containerd.Image) (instance.Generation, error) {
	g, err := l.mounted(img)
	if err != nil || g.Berth == nil {
		return g, err
	}
	pool, err := instance.ReadRecord(l.node.RunDir(), g.Berth.Pool)
	if err != nil {
		return g, err
	}
	for _, of := range pool.Generations() {
		if of.Number == g.Berth.Generation {
			return of, nil
		}
	}
	return g, fmt.Errorf("shared nydusd of %s: %w", img.Name(), errNone)
}

// mounted is an image's own generation.
func (l *lab) mounted(img containerd.Image) (instance.Generation, error) {
	keys, err := instance.Keys(l.node.RunDir())
	if err != nil {
		return instance.Generation{}, err
	}
	for _, key := range keys {
		rec, err := instance.ReadRecord(l.node.RunDir(), key)
		if err == nil && rec.Image == img.Name() && rec.Current != nil {
			return *rec.Current, nil
		}
	}
	return instance.Generation{}, fmt.Errorf("instance of %s: %w", img.Name(), errNone)
}

// found waits until containerd, which backs off from a snapshotter that died, has
// found it again.
func (l *lab) found() {
	l.t.Helper()
	l.until("containerd finds the snapshotter", func(ctx context.Context) error {
		const key = "probe"
		s := l.node.Client().SnapshotService(l.node.SnapshotterName())
		if _, err := s.Prepare(ctx, key, ""); err != nil && !errdefs.IsAlreadyExists(err) {
			return err
		}
		return s.Remove(ctx, key)
	})
}

// scrub removes what is left of a container whose creation or removal was
// interrupted, as kubelet does: again and again until it is gone.
func (l *lab) scrub(id string) {
	l.t.Helper()
	l.until("scrub "+id, func(ctx context.Context) error {
		c, err := l.node.Client().LoadContainer(ctx, id)
		if err == nil {
			task, err := c.Task(ctx, nil)
			if err == nil {
				_, err = task.Delete(ctx, containerd.WithProcessKill)
			}
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			err = c.Delete(ctx, containerd.WithSnapshotCleanup)
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		} else if !errdefs.IsNotFound(err) {
			return err
		}
		err = l.node.Client().SnapshotService(l.node.SnapshotterName()).Remove(ctx, id)
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
}
