package mount_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// recoverer is a running recovery, as in the snapshotter.
type recoverer struct {
	t      *testing.T
	log    *logBook
	cancel context.CancelFunc
	done   chan error
}

func (e *env) recover(policy recovery.Policy, spare bool) *recoverer {
	e.t.Helper()
	r := &recoverer{t: e.t, log: &logBook{}, done: make(chan error, 1)}
	cfg := recovery.Config{RunDir: runDir, Policy: policy, StartTimeout: startTimeout, Log: slog.New(slog.NewTextHandler(r.log, nil))}
	if spare {
		cfg.Spare = e.spare
	}
	ctx, cancel := context.WithCancel(e.t.Context())
	r.cancel = cancel
	go func() { r.done <- recovery.New(cfg).Run(ctx) }()
	e.t.Cleanup(func() {
		cancel()
		if e.t.Failed() {
			e.t.Logf("--- recovery\n%s", r.log)
		}
	})
	return r
}

// stop ends it, as at the end of the snapshotter.
func (r *recoverer) stop() {
	r.t.Helper()
	r.cancel()
	select {
	case err := <-r.done:
		must(r.t, err)
	case <-time.After(soon):
		r.t.Fatal("recovery does not end")
	}
}

// spare starts a holder, or finds it.
func (e *env) spare(_ context.Context, start bool) (recovery.Spare, error) {
	socket := filepath.Join(runDir, "holder.sock")
	s, err := custody.Connect(socket)
	if err != nil && !start {
		return nil, recovery.ErrNoSpare
	}
	if err != nil {
		_ = os.Remove(socket)
		log, err := os.OpenFile(filepath.Join(e.t.TempDir(), "holder.log"), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		p, err := nydusd.Start(nydusd.Command{Path: filepath.Join(e.bin, "nydus-shim-hook"), Args: []string{"holder", socket}, Log: log})
		if err != nil {
			return nil, err
		}
		go func() {
			p.Wait(time.Time{})
			p.Exit()
			p.Close()
		}()
		if err := p.WaitFile(socket, time.Now().Add(soon)); err != nil {
			return nil, err
		}
		s, err = custody.Connect(socket)
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// within waits until what says so; nothing tells when a record changes.
func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	kit.Eventually(t, what, soon, ok)
}

// current is the generation in use, or a zero one.
func (e *env) current() instance.Generation {
	keys, _ := instance.Keys(runDir)
	for _, key := range keys {
		if r, err := instance.ReadRecord(runDir, key); err == nil && r.Current != nil {
			return *r.Current
		}
	}
	return instance.Generation{}
}

// readers read all files below target again and again, past the page cache, and
// compare them.
type readers struct {
	stop  chan struct{}
	all   sync.WaitGroup
	reads atomic.Int64
	mu    sync.Mutex
	fault error
}

func (e *env) read(target string, n int) *readers {
	e.t.Helper()
	want, err := kit.Contents(target, 10_000)
	must(e.t, err)
	r := &readers{stop: make(chan struct{})}
	for range n {
		r.all.Go(func() {
			for {
				for path, text := range want {
					select {
					case <-r.stop:
						return
					default:
					}
					if err := kit.ReadPast(path, text); err != nil {
						r.mu.Lock()
						r.fault = errors.Join(r.fault, err)
						r.mu.Unlock()
						return
					}
					r.reads.Add(1)
				}
			}
		})
	}
	return r
}

func (r *readers) end(t *testing.T) {
	t.Helper()
	close(r.stop)
	done := make(chan struct{})
	go func() {
		r.all.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(soon):
		t.Fatal("readers hang")
	}
	if r.fault != nil {
		t.Errorf("after %d reads: %v", r.reads.Load(), r.fault)
	}
}

// succeeds tells whether the nydusd under test can be succeeded.
func (e *env) succeeds() bool {
	shares, err := nydusd.SharesCache(e.t.Context(), e.tools.Nydusd)
	must(e.t, err)
	if !shares {
		e.t.Log("this nydusd cannot be succeeded: what needs that is tested with the other one")
	}
	return shares
}

// What containers read goes on when their daemon is killed, and killed again.
func TestFailover(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		r := e.restarts(recovery.PolicyFailover)
		if want := "cannot hand a filesystem over"; strings.Count(r.log.String(), want) != 1 {
			t.Errorf("the log does not say once that nydusd %s:\n%s", want, r.log)
		}
		return
	}
	r := e.recover(recovery.PolicyFailover, true)
	target := e.mustMount(e.spec(odd(t)))
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	kept, err := os.Open(filepath.Join(target, "usr"))
	if err != nil {
		kept, err = os.Open(target)
	}
	must(t, err)
	defer kept.Close()
	readers := e.read(target, 4)
	const kills = 20
	for n := range kills {
		<-time.After(150 * time.Millisecond) // what dies sooner crashes
		before := e.current()
		must(t, unix.Kill(before.PID, unix.SIGKILL))
		within(t, fmt.Sprintf("a successor after kill %d", n), func() bool { return e.current().Restarts == before.Restarts+1 })
	}
	readers.end(t)
	if _, err := kept.ReadDir(-1); err != nil {
		t.Errorf("read a directory that was opened before: %v", err)
	}
	if g := e.current(); g.Restarts != kills || g.Number != 1 {
		t.Errorf("%d restarts of generation %d, want %d of the first", g.Restarts, g.Number, kills)
	}
	e.daemons(1)
	// The record comes before the line.
	within(t, "all successors are logged", func() bool { return strings.Count(r.log.String(), "nydusd was succeeded") >= kills })
	if text := r.log.String(); strings.Count(text, "nydusd has died") != kills || strings.Count(text, "nydusd was succeeded") != kills {
		t.Errorf("the log has not %d deaths and successors:\n%s", kills, text)
	}
	must(t, kept.Close())
	e.unmount(target)
	must(t, e.tidy(soon))
	e.daemons(0)
	r.stop()
	e.holderEnds()
}

// holderEnds waits for the end of the holder, which nobody needs any more.
func (e *env) holderEnds() {
	e.t.Helper()
	within(e.t, "the holder ends", func() bool { return !exists(filepath.Join(runDir, "holder.sock")) })
}

// kept mounts an image that is read, waits until its daemon can be succeeded, and ends
// the snapshotter.
func (e *env) kept(img *fixture) (target string, readers *readers, g instance.Generation) {
	e.t.Helper()
	r := e.recover(recovery.PolicyFailover, true)
	target = e.mustMount(e.spec(img))
	within(e.t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	readers, g = e.read(target, 2), e.current()
	r.stop()
	return target, readers, g
}

// Snapshotter and daemon killed together: the holder keeps what the next
// snapshotter's successor needs.
func TestFailoverAfterTheSnapshotter(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestFailover
	}
	img := small(t, "one")
	target, readers, before := e.kept(img)
	// As if it had been killed before it wrote that down.
	must(t, instance.Change(t.Context(), runDir, e.record().Key, before.Number, func(g *instance.Generation) { g.Kept = false }))
	e.kill(before.PID)
	// As a snapshotter leaves it that was killed while it recovered.
	half := e.half(before)
	r := e.recover(recovery.PolicyFailover, true)
	within(t, "a successor", func() bool { return e.current().Restarts == before.Restarts+1 })
	if now := e.daemons(1)[0].PID; now == half.PID {
		t.Error("the successor that was left half way still runs")
	}
	readers.end(t)
	e.holds(img, target)
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// The holder is lost while there is no snapshotter: the next one asks the living
// daemon, and its new holder has a copy again.
func TestFailoverFromTheLivingDaemon(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestFailover
	}
	img := small(t, "one")
	target, readers, before := e.kept(img)
	e.killHolder()
	r := e.recover(recovery.PolicyFailover, true)
	within(t, "the new holder has a copy", func() bool { return e.holderHas() == 1 })
	// It is all that is left.
	r.stop()
	e.kill(before.PID)
	r = e.recover(recovery.PolicyFailover, true)
	within(t, "a successor", func() bool { return e.current().Restarts == before.Restarts+1 })
	readers.end(t)
	e.holds(img, target)
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// holder finds the process.
func (e *env) holder() (found []kit.Process) {
	e.t.Helper()
	all, err := kit.Processes()
	must(e.t, err)
	for _, p := range all {
		if filepath.Base(p.Exe) == "nydus-shim-hook" {
			found = append(found, p)
		}
	}
	return found
}

func (e *env) killHolder() {
	e.t.Helper()
	all := e.holder()
	if len(all) != 1 {
		e.t.Fatalf("%d holders run, want 1", len(all))
	}
	e.kill(all[0].PID)
}

// holderHas counts the filesystems of which the holder has a copy.
func (e *env) holderHas() (n int) {
	for _, p := range e.holder() {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
		for _, link := range links {
			if to, err := os.Readlink(link); err == nil && to == "/dev/fuse" {
				n++
			}
		}
	}
	return n
}

// The death of what was released and cannot be succeeded is told: its users get
// errors.
func TestDeathOfWhatIsReleased(t *testing.T) {
	e := newEnv(t)
	r := e.recover(recovery.PolicyRestart, false)
	target := e.mustMount(e.spec(small(t, "one")))
	key, g := e.record().Key, e.current()
	must(t, instance.Retire(t.Context(), runDir, key, g.Number))
	e.kill(g.PID)
	within(t, "the death is logged", func() bool { return strings.Contains(r.log.String(), "nydusd has died") })
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
}

// half starts a successor and leaves it, as somebody does who is killed then.
func (e *env) half(g instance.Generation) *nydusd.Process {
	e.t.Helper()
	s, err := instance.LockSuccession(e.t.Context(), runDir, e.record().Key, g.Number)
	must(e.t, err)
	defer s.Close()
	p, _, err := s.Start(g.Nydusd)
	must(e.t, err)
	e.t.Cleanup(func() { p.Close() })
	return p
}

// A daemon that dies just before the snapshotter is told to end is brought back: the
// second keeper may have nothing.
func TestFailoverAtTheEnd(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestFailover
	}
	r := e.recover(recovery.PolicyFailover, false)
	img := small(t, "one")
	target := e.mustMount(e.spec(img))
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	e.kill(e.current().PID)
	r.stop()
	if g := e.current(); g.Restarts != 1 {
		t.Errorf("%d successors, want one before the end", g.Restarts)
	}
	e.holds(img, target)
	e.unmount(target)
	must(t, e.tidy(soon))
}

// A daemon that cannot be succeeded: what lies on it fails, and what comes finds
// another at once, which is not stacked on the dead mount.
func TestRestart(t *testing.T) { newEnv(t).restarts(recovery.PolicyRestart) }

func (e *env) restarts(policy recovery.Policy) *recoverer {
	t := e.t
	t.Helper()
	r := e.recover(policy, false)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)
	before := e.current()
	if policy == recovery.PolicyFailover {
		within(t, "it was asked to hand its filesystem over", func() bool { return strings.Contains(r.log.String(), "hand a filesystem over") })
	}
	must(t, unix.Kill(before.PID, unix.SIGKILL))
	within(t, "a new generation", func() bool { g := e.current(); return g.Number == before.Number+1 && g.Ready })
	if _, err := os.ReadFile(filepath.Join(target, "name")); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("what was mounted on the dead daemon says %v, want ENOTCONN", err)
	}
	pid := e.daemons(1)[0].PID
	again := e.mustMount(e.another(s))
	e.holds(img, again)
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d", now, pid)
	}
	e.unmount(target)
	e.unmount(again)
	must(t, e.tidy(soon))
	r.stop()
	return r
}

// A node whose daemons all die at once starts a few at a time.
func TestStartsAreBounded(t *testing.T) {
	const images, atATime = 7, 4
	e := newEnv(t)
	gate := t.TempDir()
	armed, started, passed := filepath.Join(gate, "armed"), filepath.Join(gate, "started"), filepath.Join(gate, "passed")
	must(t, unix.Mkfifo(filepath.Join(gate, "fifo"), 0o600))
	fifo, err := os.OpenFile(filepath.Join(gate, "fifo"), os.O_RDWR, 0)
	must(t, err)
	defer fifo.Close()
	path := e.wrapper(fmt.Sprintf(`if [ -e %q ]; then echo >>%q; read -r -N1 <%q; echo >>%q; fi; exec "$REAL" "$@"`, armed, started, fifo.Name(), passed))
	img := small(t, "one")
	var targets []string
	for n := range images {
		s := e.spec(img)
		s.Daemon.Path, s.Host = path, fmt.Sprintf("host-%d", n)
		s.CacheDir = mountspec.CacheDir(e.root, s.Host, s.Repository)
		s.Config, err = nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: img.blobs}, CacheDir: s.CacheDir}.FuseDev()
		must(t, err)
		s.Instance = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
		targets = append(targets, e.mustMount(s))
	}
	r := e.recover(recovery.PolicyRestart, false)
	must(t, os.WriteFile(armed, nil, 0o600))
	for _, p := range e.daemons(images) {
		e.kill(p.PID)
	}
	for n := range images {
		within(t, fmt.Sprintf("start %d", min(n+atATime, images)), func() bool { return size(started) >= min(n+atATime, images) })
		// While another image is mounted those that have to wait would have come.
		e.unmount(e.mustMount(e.spec(img)))
		if begun := size(started) - size(passed); begun > atATime {
			t.Errorf("%d start at a time, want %d", begun, atATime)
		}
		_, err := fifo.WriteString("1")
		must(t, err)
		within(t, fmt.Sprintf("restart %d", n+1), func() bool { return strings.Count(r.log.String(), "event=restart") > n })
	}
	must(t, os.Remove(armed))
	for _, target := range targets {
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	r.stop()
}

// size is a file's size, 0 when there is none.
func size(path string) int {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return int(info.Size())
}

// The registry is away while a daemon is replaced, by death and by upgrade: what is
// cached is read on, what is not fails within its bound, and all is well when it is
// back.
func TestRegistryGoneDuringTakeover(t *testing.T) {
	for name, mode := range map[string]mountspec.Mode{"dedicated": mountspec.ModeDedicated, "shared": mountspec.ModeShared} {
		t.Run(name, func(t *testing.T) {
			reg := kit.NewRegistry(t, kit.RegistryOptions{})
			e := newEnv(t)
			if !e.succeeds() {
				return // see TestFailover
			}
			e.mode = mode
			img := odd(t)
			reg.MustPush(t, img.Image, "away/image:1")
			s := e.registrySpec(img, reg, "away/image")
			s.Config = strings.Replace(s.Config, `"retry_limit":2`, `"retry_limit":0`, 1)
			r := e.recover(recovery.PolicyFailover, true)
			target := e.mustMount(s)
			served := func() (key string, g instance.Generation) {
				rec := e.record()
				if mode == mountspec.ModeShared {
					rec = e.pool()
				}
				return rec.Key, *rec.Current
			}
			within(t, "the daemon's descriptor is kept, with its image", func() bool { _, g := served(); return g.Kept && g.KeptRevision == g.Revision })
			cached := filepath.Join(target, "odd/modes")
			readers := e.read(cached, 2) // they have read all of it once
			reg.SetHook(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				w.WriteHeader(http.StatusServiceUnavailable)
			})
			key, before := served()
			e.kill(before.PID)
			within(t, "a successor", func() bool { _, g := served(); return g.Restarts == 1 })
			if _, err := e.upgradeOf(key, before.Number); err != nil {
				t.Errorf("an upgrade while the registry is away: %v", err)
			}
			readers.end(t)
			reg.SetHook(nil)
			e.holds(img, target)
			if _, g := served(); g.Restarts != 2 || g.Failed {
				t.Errorf("in the end %+v serves, want two successors", g)
			}
			e.unmount(target)
			must(t, e.tidy(soon))
			r.stop()
			e.holderEnds()
		})
	}
}

// A recovery that could not work and runs again, as the snapshotter lets it, follows
// what it followed before.
func TestRecoveryRunsAgain(t *testing.T) {
	e := newEnv(t)
	log := &logBook{said: make(chan struct{}, 1)}
	r := recovery.New(recovery.Config{RunDir: runDir, Policy: recovery.PolicyRestart, StartTimeout: startTimeout, Log: slog.New(slog.NewTextHandler(log, nil))})
	run := func() (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		return func() {
			cancel()
			must(t, <-done)
		}
	}
	stop := run()
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	first := e.current()
	e.kill(first.PID)
	within(t, "it is restarted", func() bool { g := e.current(); return g.Number == 2 && g.Ready })
	second := e.mustMount(e.another(s))
	// So that it is followed for certain before it stops.
	e.kill(e.current().PID)
	within(t, "it is restarted again", func() bool { g := e.current(); return g.Number == 3 && g.Ready })
	<-time.After(100 * time.Millisecond)
	stop()
	stop = run()
	e.kill(e.current().PID)
	within(t, "it is restarted by the next run", func() bool { g := e.current(); return g.Number == 4 && g.Ready })
	e.unmount(target)
	e.unmount(second)
	must(t, e.tidy(soon))
	stop()
}
