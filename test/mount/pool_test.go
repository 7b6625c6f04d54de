package mount_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// newSharedEnv is newEnv for options that ask for a shared daemon.
func newSharedEnv(t *testing.T) *env {
	t.Helper()
	e := newEnv(t)
	e.mode = mountspec.ModeShared
	return e
}

// tiny is an image of two files that no other image has.
func tiny(t *testing.T, name string) *fixture {
	t.Helper()
	return makeFixture(t, "tiny-"+name, kit.NydusOptions{}, func(tb kit.TB) *kit.Image {
		return kit.MustBuildImage(tb, nil, kit.FileLayer(
			kit.File{Name: "./"}, kit.File{Name: "name", Data: name},
			kit.File{Name: "dir/"}, kit.File{Name: "dir/" + name, Data: strings.Repeat(name, 5000)},
		))
	})
}

// apart is the same image from another place: an instance of its own.
func (e *env) apart(s *mountspec.Spec, n int) *mountspec.Spec {
	e.t.Helper()
	c := e.another(s)
	c.CacheDir = fmt.Sprintf("%s-%d", s.CacheDir, n)
	c.Instance = mountspec.InstanceKey(c.BootstrapDigest, c.Host, c.Repository, c.CacheDir)
	return c
}

// released waits until nothing is left of an image, though its daemon may live.
func (e *env) released(key string) {
	e.t.Helper()
	within(e.t, "instance "+key+" ends", func() bool { return !exists(filepath.Join(runDir, "i", key)) })
}

func TestSharedDaemonServesManyImages(t *testing.T) {
	e := newSharedEnv(t)
	const images = 20
	targets := map[string]*fixture{}
	for n := range images {
		img := tiny(t, fmt.Sprintf("image-%d", n))
		targets[e.mustMount(e.spec(img))] = img
	}
	complex := odd(t)
	targets[e.mustMount(e.spec(complex))] = complex
	pid := e.daemons(1)[0].PID
	for target, img := range targets {
		e.holds(img, target)
	}
	list, err := instance.List(runDir)
	must(t, err)
	pool := e.pool()
	for _, s := range list {
		if s.PID != pid || s.Pool != pool.Key || s.State != instance.StateServing {
			t.Errorf("%s: nydusd %d in %s, %s; want %d in %s, serving", s.Image, s.PID, s.Pool, s.State, pid, pool.Key)
		}
	}
	if len(list) != images+2 || pool.Current.Revision != images+1 {
		t.Errorf("%d rows, %d images given to the daemon; want %d and %d", len(list), pool.Current.Revision, images+2, images+1)
	}
	text, err := os.ReadFile(filepath.Join(runDir, "i", pool.Key, "record.json"))
	if err != nil || strings.Contains(string(text), "backend") {
		t.Errorf("the pool's record, %v, holds a configuration: %s", err, text)
	}
	// A signal to all, as from a unit's end, takes nothing.
	must(t, unix.Kill(pid, unix.SIGTERM))
	must(t, unix.Kill(pid, unix.SIGINT))
	for target, img := range targets {
		e.holds(img, target)
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	e.daemons(0)
}

// An image that was released comes back to the daemon that has it, and takes no
// second place there.
func TestSharedDaemonKnowsItsImages(t *testing.T) {
	e := newSharedEnv(t)
	one, two := tiny(t, "one"), tiny(t, "two")
	stays := e.mustMount(e.spec(one))
	s := e.spec(two)
	r := e.reconcile(0)
	for range 3 {
		target := e.mustMount(e.another(s))
		e.holds(two, target)
		e.unmount(target)
		e.released(s.Instance)
	}
	must(t, r.stop())
	e.daemons(1)
	if n := len(e.pool().Current.Passengers); n != 2 {
		t.Errorf("the daemon was given %d images, want 2", n)
	}
	e.holds(one, stays)
	e.unmount(stays)
}

// One image's fault is that image's alone.
func TestSharedDaemonRefusesBrokenImages(t *testing.T) {
	e := newSharedEnv(t)
	img := tiny(t, "one")
	target := e.mustMount(e.spec(img))
	pid := e.daemons(1)[0].PID
	before := mounted(t, e.root)
	for name, c := range map[string]struct {
		spoil func(s *mountspec.Spec)
		want  string
	}{
		"configuration": {func(s *mountspec.Spec) {
			s.Config = `{"device":{"backend":{"type":"registry","config":{"scheme":"ftp-canary","host":7}}},"mode":"direct"}`
		}, "status 500"},
		"backend": {func(s *mountspec.Spec) {
			s.Config = `{"device":{"backend":{"type":"nothing","config":{}}},"mode":"direct"}`
		}, "shared nydusd"},
		"digest": {func(s *mountspec.Spec) {
			s.BootstrapDigest = "sha256:" + strings.Repeat("0", 64)
		}, "it was changed after the image was pulled"},
		"truncated": {func(s *mountspec.Spec) {
			must(t, os.Truncate(s.Bootstrap, 5000))
			s.BootstrapDigest = digestOf(t, s.Bootstrap)
		}, "bootstrap"},
		"no root inode": {func(s *mountspec.Spec) { spoil(t, s, 1024+14, []byte{0xff, 0xff}) }, "status 500"},
	} {
		s := e.spec(tiny(t, "two"))
		c.spoil(s)
		s.Instance = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
		r := e.mount(s, e.target())
		t.Logf("%s: %s", name, r.out)
		e.fails(r, failure{code: exitFailure, want: []string{c.want}, mounts: true})
		if strings.Contains(r.out, "canary") {
			t.Errorf("%s: the error repeats the configuration: %s", name, r.out)
		}
		if now := mounted(t, e.root); !slices.Equal(now, before) {
			t.Errorf("%s: mounted %v, was %v", name, now, before)
		}
		if exists(filepath.Join(runDir, "i", s.Instance)) {
			t.Errorf("%s: its instance is left", name)
		}
		e.holds(img, target)
	}
	two := e.mustMount(e.spec(tiny(t, "two")))
	e.holds(tiny(t, "two"), two)
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d", now, pid)
	}
	e.unmount(target)
	e.unmount(two)
}

// A broken image that comes first leaves no daemon.
func TestSharedDaemonEndsWithItsOnlyImage(t *testing.T) {
	e := newSharedEnv(t)
	s := e.spec(tiny(t, "one"))
	s.Config = `{"device":{"backend":{"type":"nothing","config":{}}},"mode":"direct"}`
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"shared nydusd"}})

	// Nor does one whose overlay cannot be made.
	s = e.spec(tiny(t, "one"))
	must(t, os.Remove(filepath.Join(s.SnapshotDir, "work")))
	must(t, os.WriteFile(filepath.Join(s.SnapshotDir, "work"), nil, 0o600))
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"mount overlay"}})
}

// A daemon gets so many images and no more: those of which a successor can be told
// all.
func TestSharedDaemonIsNotOverloaded(t *testing.T) {
	for name, padding := range map[string]int{"count": 0, "state": 1500} {
		t.Run(name, func(t *testing.T) {
			e := newSharedEnv(t)
			img := tiny(t, "one")
			s := e.spec(img)
			// nydusd passes over what it does not know.
			s.Config = strings.Replace(s.Config, "{", `{"padding":"`+strings.Repeat("x", padding)+`",`, 1)
			targets, first := e.fill(s)
			const most, few = 64, 10
			if n := len(first.Passengers); n != len(targets)-1 || n > most || n < few {
				t.Errorf("the daemon has %d images, %d were mounted; want all but the last, %d to %d", n, len(targets), few, most)
			}
			pool := e.pool()
			if pool.Current.PID == first.PID || len(pool.Retired) != 1 || pool.Retired[0].PID != first.PID {
				t.Errorf("the pool is %+v, want %d retired and another daemon in use", pool, first.PID)
			}
			// An image of the full one goes on there.
			targets = append(targets, e.mustMount(e.apart(s, 0)))
			e.daemons(2)
			if e.succeeds() {
				e.succeed(pool, first)
			}
			for _, target := range targets {
				e.holds(img, target)
				e.unmount(target)
			}
			must(t, e.tidy(soon))
			e.daemons(0)
		})
	}
}

// fill mounts images until a second daemon starts, and returns what the first one is.
func (e *env) fill(s *mountspec.Spec) (targets []string, first instance.Generation) {
	e.t.Helper()
	for n := 0; ; n++ {
		targets = append(targets, e.mustMount(e.apart(s, n)))
		pool := e.pool()
		if n > 80 {
			e.t.Fatalf("one daemon has %d images", n)
		}
		if len(pool.Retired) > 0 {
			return targets, pool.Retired[0]
		}
	}
}

// succeed replaces a daemon, as recovery does, by one that knows all its images.
func (e *env) succeed(pool *instance.Record, g instance.Generation) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), soon)
	defer cancel()
	c, err := custody.Receive(ctx, g.Supervisor, client.New(g.Socket).SendFD)
	must(e.t, err)
	defer c.Close()
	size := 0
	for _, p := range g.Passengers {
		size += p.Size
	}
	e.t.Logf("the state of %d images has %d bytes, %d were reckoned with", len(g.Passengers), len(c.State), size)
	if len(c.State) > custody.MaxState || len(c.State) > size+512 {
		e.t.Errorf("the state has %d bytes, %d were reckoned with; a successor reads %d", len(c.State), size, custody.MaxState)
	}
	e.kill(g.PID)
	must(e.t, c.Resend())
	s, err := instance.LockSuccession(ctx, runDir, pool.Key, g.Number)
	must(e.t, err)
	defer s.Close()
	p, socket, err := s.Start(g.Nydusd)
	must(e.t, err)
	e.t.Cleanup(func() {
		p.Wait(time.Now().Add(soon))
		p.Exit()
		p.Close()
	})
	must(e.t, p.WaitFile(socket, time.Now().Add(soon)))
	api := client.New(socket)
	within(e.t, "the successor listens", func() bool { _, err := api.Info(ctx); return err == nil })
	must(e.t, custody.Give(ctx, g.Supervisor, c, api.Takeover))
	must(e.t, api.Start(ctx))
	must(e.t, instance.Change(ctx, runDir, pool.Key, g.Number, func(g *instance.Generation) {
		g.PID, g.StartTime, g.Socket, g.Restarts = p.PID, p.StartTime, socket, g.Restarts+1
	}))
}

// The mode may change while images of either are mounted: an image that is served
// stays where it is.
func TestModeChangesWhileMounted(t *testing.T) {
	e := newEnv(t)
	one, two, three := tiny(t, "one"), tiny(t, "two"), tiny(t, "three")
	dedicated := e.mustMount(e.spec(one))
	e.mode = mountspec.ModeShared
	dedicatedToo := e.mustMount(e.spec(one))
	e.daemons(1)
	shared := e.mustMount(e.spec(two))
	e.daemons(2)
	e.mode = mountspec.ModeDedicated
	sharedToo := e.mustMount(e.spec(two))
	e.daemons(2)
	third := e.mustMount(e.spec(three))
	e.daemons(3)
	for target, img := range map[string]*fixture{dedicated: one, dedicatedToo: one, shared: two, sharedToo: two, third: three} {
		e.holds(img, target)
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	e.daemons(0)
}

// Without recovery the images of a daemon that died fail, and each gets another
// place with its next mount.
func TestSharedDaemonDies(t *testing.T) {
	e := newSharedEnv(t)
	one, two := tiny(t, "one"), tiny(t, "two")
	s1, s2 := e.spec(one), e.spec(two)
	old := []string{e.mustMount(s1), e.mustMount(s2)}
	e.kill(e.pool().Current.PID)
	fresh := []string{e.mustMount(e.another(s1)), e.mustMount(e.another(s2))}
	e.holds(one, fresh[0])
	e.holds(two, fresh[1])
	e.daemons(1)
	for _, target := range old {
		if _, err := os.ReadFile(filepath.Join(target, "name")); !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("what was mounted on the dead daemon says %v, want ENOTCONN", err)
		}
	}
	for _, target := range append(old, fresh...) {
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	e.daemons(0)
}

// An image that was given to a shared daemon after what is kept of it is unknown to
// its successor. Its users get errors, and never another image's files, which would
// have its place there.
func TestSuccessorOfASharedDaemonDoesNotKnowAll(t *testing.T) {
	e := newSharedEnv(t)
	if !e.succeeds() {
		return // see TestSharedDaemonDies
	}
	r := e.recover(recovery.PolicyFailover, true)
	one, two, three := tiny(t, "one"), tiny(t, "two"), tiny(t, "three")
	known := e.mustMount(e.spec(one))
	within(t, "the daemon's descriptor is kept, with its image", func() bool { g := e.pool().Current; return g.Kept && g.KeptRevision == g.Revision })
	r.stop()
	lost := e.spec(two)
	unknown := e.mustMount(lost)
	e.holds(two, unknown)
	before := e.pool().Current
	e.kill(before.PID)
	r = e.recover(recovery.PolicyFailover, true)
	within(t, "a successor", func() bool { return e.pool().Current.Restarts == 1 })
	e.holds(one, known)
	fresh := e.mustMount(e.spec(three))
	again := e.mustMount(e.another(lost))
	e.holds(three, fresh)
	e.holds(two, again)
	if text, err := os.ReadFile(filepath.Join(unknown, "name")); err == nil && string(text) != "two" {
		t.Errorf("an image that is lost reads as %q", text)
	}
	e.holds(one, known)
	for _, target := range []string{known, unknown, fresh, again} {
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// Images are given to a shared daemon while it is replaced, again and again.
func TestUpgradeOfASharedDaemonThatGetsImages(t *testing.T) {
	e := newSharedEnv(t)
	if !e.succeeds() {
		return // see TestUpgrade
	}
	r := e.recover(recovery.PolicyFailover, true)
	first := tiny(t, "first")
	targets := map[string]*fixture{e.mustMount(e.spec(first)): first}
	within(t, "the daemon's descriptor is kept", func() bool { return e.pool().Current.Kept })
	key, generation := e.pool().Key, e.pool().Current.Number
	stop, done := make(chan struct{}), make(chan error, 1)
	upgrades := 0
	go func() {
		var err error
		for err == nil {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			_, err = e.upgradeOf(key, generation)
			upgrades++
		}
		done <- err
	}()
	for n := range 12 {
		img := tiny(t, fmt.Sprintf("img%d", n))
		targets[e.mustMount(e.spec(img))] = img
	}
	close(stop)
	must(t, <-done)
	t.Logf("%d upgrades", upgrades)
	for target, img := range targets {
		e.holds(img, target)
	}
	if now := e.pool().Current; now.Number != generation || now.Failed || len(now.Passengers) != len(targets) {
		t.Errorf("the pool is at generation %d with %d images, want %d with %d", now.Number, len(now.Passengers), generation, len(targets))
	}
	for target := range targets {
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// With restart they have it before that.
func TestSharedDaemonIsRestarted(t *testing.T) {
	e := newSharedEnv(t)
	r := e.recover(recovery.PolicyRestart, false)
	one, two := tiny(t, "one"), tiny(t, "two")
	s1, s2 := e.spec(one), e.spec(two)
	targets := []string{e.mustMount(s1), e.mustMount(s2)}
	e.kill(e.pool().Current.PID)
	within(t, "both images are served again", func() bool {
		images, _ := e.records()
		n := 0
		for _, rec := range images {
			if g := rec.Current; g != nil && g.Number == 2 && g.Ready {
				n++
			}
		}
		return n == 2
	})
	pid := e.daemons(1)[0].PID
	for s, img := range map[*mountspec.Spec]*fixture{s1: one, s2: two} {
		target := e.mustMount(e.another(s))
		e.holds(img, target)
		targets = append(targets, target)
	}
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d", now, pid)
	}
	for _, target := range targets {
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	r.stop() // it is the parent of what it started
	e.daemons(0)
}

// The snapshotter's end takes what only lingers, and nothing else.
func TestEndShared(t *testing.T) {
	e := newSharedEnv(t)
	one, two := tiny(t, "one"), tiny(t, "two")
	target := e.mustMount(e.spec(one))
	e.unmount(e.mustMount(e.spec(two)))
	must(t, instance.EndShared(t.Context(), runDir))
	if images, _ := e.records(); len(images) != 1 {
		t.Errorf("%d images are left, want the one that is used", len(images))
	}
	e.daemons(1)
	e.holds(one, target)
	e.unmount(target)
	must(t, instance.EndShared(t.Context(), runDir))
	e.daemons(0)
	if keys, err := instance.Keys(runDir); err != nil || len(keys) > 0 {
		t.Errorf("instances %v are left (%v)", keys, err)
	}
}

// The hook lets a shared daemon go with the last container on it.
func TestHookReleasesTheSharedDaemon(t *testing.T) {
	e := newSharedEnv(t)
	s := e.spec(small(t, "one"))
	other := e.mustMount(e.spec(tiny(t, "two")))
	b := e.bundle()
	b.mountOn(e.mount(s, b.rootfs))
	b.printed(b.start(), "one")
	if e.pool().Current == nil {
		t.Error("the shared daemon was released, which another image uses")
	}
	e.unmount(b.rootfs)
	e.daemons(1)

	last := e.bundle()
	last.mountOn(e.mount(e.another(s), last.rootfs))
	e.unmount(other)
	must(t, e.tidyImage(e.spec(tiny(t, "two")).Instance))
	last.printed(last.start(), "one")
	e.daemons(1)
	e.unmount(last.rootfs)
	e.daemons(0)
}

// tidyImage releases one image as the reconciler does.
func (e *env) tidyImage(key string) error {
	r := e.reconcile(0)
	e.released(key)
	return r.stop()
}

// A daemon that shares no cache directory has one of its own in each.
func TestOldSharedDaemonsDoNotShareACache(t *testing.T) {
	e := newSharedEnv(t)
	one, two := tiny(t, "one"), tiny(t, "two")
	old := e.versioned(oldVersion)
	spec := func(f *fixture) *mountspec.Spec {
		s := e.spec(f)
		s.Daemon.Path = old
		return s
	}
	s := spec(one)
	first := e.mustMount(s)
	pool := e.pool()
	// Released too early: the first one still serves when the second starts.
	must(t, rootfs.Detach(pool.Current.Mountpoint))
	images, _ := e.records()
	must(t, rootfs.Detach(images[0].Current.Mountpoint))
	second, third := e.mustMount(e.another(s)), e.mustMount(spec(two))
	var slots []string
	for _, p := range e.daemons(2) {
		slots = append(slots, filepath.Base(e.cacheOf(p.PID)))
	}
	slices.Sort(slots)
	if want := []string{"slot0", "slot1"}; !slices.Equal(slots, want) {
		t.Errorf("the daemons have locked %v, want %v", slots, want)
	}
	for _, private := range []string{pool.Key + ".0", pool.Key + ".1"} {
		if dir := filepath.Join(s.CacheDir, "private", private, s.Instance); !exists(dir) {
			t.Errorf("there is no %s", dir)
		}
	}
	e.holds(one, first)
	e.holds(one, second)
	e.holds(two, third)
	for _, target := range []string{first, second, third} {
		e.unmount(target)
	}
}

// spoil writes into a bootstrap, as whoever made the image may have.
func spoil(t *testing.T, s *mountspec.Spec, at int64, text []byte) {
	t.Helper()
	f, err := os.OpenFile(s.Bootstrap, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(text, at)
	must(t, err)
	s.BootstrapDigest = digestOf(t, s.Bootstrap)
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return digest.FromBytes(text).String()
}

// A shared daemon that hangs gets no new images, and keeps those it has.
func TestHungSharedDaemonIsReplaced(t *testing.T) {
	e := newSharedEnv(t)
	one, two := tiny(t, "one"), tiny(t, "two")
	old := e.mustMount(e.spec(one))
	hung := e.daemons(1)[0].PID
	kit.Stop(t, hung)
	t.Cleanup(func() { _ = unix.Kill(hung, unix.SIGCONT) })
	other := e.mustMount(e.spec(two))
	e.daemons(2)
	e.holds(two, other)
	again := e.mustMount(e.spec(one))
	e.daemons(2)
	e.holds(one, again)
	must(t, unix.Kill(hung, unix.SIGCONT))
	e.holds(one, old)
	e.unmount(old)
	e.daemons(1)
	e.unmount(other)
	e.unmount(again)
}
