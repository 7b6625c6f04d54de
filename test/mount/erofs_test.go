package mount_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// provable is the spec of an image whose daemon fetches all of it, into a cache that
// daemons share.
func (e *env) provable(f *fixture) *mountspec.Spec {
	e.t.Helper()
	s := e.spec(f)
	s.Daemon.Path = e.versioned(newVersion)
	var config map[string]any
	must(e.t, json.Unmarshal([]byte(s.Config), &config))
	config["fs_prefetch"] = map[string]any{"enable": true, "threads_count": 2, "merging_size": 1 << 20, "prefetch_all": true}
	text, err := json.Marshal(config)
	must(e.t, err)
	s.Config = string(text)
	return s
}

// prove waits until the image of s is proven. Nothing tells when its last chunk is there.
func (e *env) prove(s *mountspec.Spec) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := new(prove.Prover).Prove(ctx, s.CacheDir, s.Bootstrap, s.BootstrapDigest)
		if err == nil {
			return
		}
		if !errors.Is(err, prove.ErrIncomplete) {
			e.t.Fatal(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			e.t.Fatal(err)
		}
	}
}

// complete makes an image complete and proven by reading it through a daemon, of which
// nothing is left then.
func (e *env) complete(f *fixture, s *mountspec.Spec) {
	e.t.Helper()
	target := e.mustMount(s)
	e.holds(f, target)
	e.daemons(1)
	e.prove(s)
	e.unmount(target)
	must(e.t, e.tidy(soon))
	e.daemons(0)
}

// served checks by which driver the only instance is served, and returns its status.
func (e *env) served(by mountspec.Driver) instance.Status {
	e.t.Helper()
	list, err := instance.List(runDir)
	must(e.t, err)
	if len(list) != 1 || list[0].Driver != by {
		e.t.Fatalf("instances %+v, want one by %s", list, by)
	}
	if daemon := list[0].PID > 0; daemon != (by == mountspec.DriverFUSE) {
		e.t.Fatalf("an instance by %s has the daemon %d", by, list[0].PID)
	}
	return list[0]
}

// by is s with a driver, for another container.
func (e *env) by(driver mountspec.Driver, s *mountspec.Spec) *mountspec.Spec {
	e.t.Helper()
	c := e.another(s)
	c.Driver = driver
	return c
}

func TestDaemonless(t *testing.T) {
	e := newEnv(t)
	img := odd(t)
	s := e.provable(img)
	e.complete(img, s)
	for _, driver := range []mountspec.Driver{mountspec.DriverAuto, mountspec.DriverEROFS} {
		first := e.mustMount(e.by(driver, s))
		e.holds(img, first)
		second := e.mustMount(e.by(mountspec.DriverFUSE, s)) // it stays as it is
		e.holds(img, second)
		view := e.by(driver, s)
		view.Kind = mountspec.KindImage
		third := e.mustMount(view)
		e.holds(img, third)
		e.daemons(0)
		if got := e.served(mountspec.DriverEROFS); got.State != instance.StateServing || got.Mounts != 3 {
			t.Errorf("%s: %+v", driver, got)
		}
		if key, err := instance.FindByTarget(runDir, third); err != nil || key != s.Instance {
			t.Errorf("beneath a mount of the image lies %q, %v", key, err)
		}
		must(t, os.WriteFile(filepath.Join(first, "written"), nil, 0o600))
		e.unmount(first)
		e.unmount(second)

		// Released while a bind of the image is left: that goes on, and is told.
		must(t, instance.Retire(t.Context(), runDir, s.Instance, e.record().Current.Number))
		instance.Sweep(t.Context(), runDir)
		e.holds(img, third)
		if got := e.served(mountspec.DriverEROFS); got.State != instance.StateRetired || got.Mounts != 1 {
			t.Errorf("%s, released: %+v", driver, got)
		}
		e.unmount(third)
		must(t, e.tidy(soon))
	}
}

// TestDaemonlessReleased has the reconciler, and the hook, release what is idle.
func TestDaemonlessReleased(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	r := e.reconcile(0)
	target := e.mustMount(e.by(mountspec.DriverEROFS, s))
	e.answers(target, "one")
	e.unmount(target)
	must(t, r.idle(soon))
	must(t, r.stop())

	target = e.mustMount(e.by(mountspec.DriverEROFS, s))
	must(t, instance.Release(t.Context(), runDir, s.Instance, target))
	if e.record().Current != nil {
		t.Error("the hook's release leaves the generation")
	}
	e.answers(target, "one")
	e.unmount(target)
	must(t, e.tidy(soon))
	if m := mounted(t, runDir); len(m) != 1 {
		t.Errorf("mounted: %q", m)
	}

	// What was begun for a mount that fails is undone with it.
	if r := e.mount(e.by(mountspec.DriverEROFS, s), filepath.Join(e.target(), "missing")); r.code == 0 {
		t.Errorf("a mount on nothing: %+v", r)
	}
	if keys, err := instance.Keys(runDir); err != nil || len(keys) > 0 {
		t.Errorf("after a mount that failed: %q, %v", keys, err)
	}

	// It needs no place in a shared daemon.
	shared := e.by(mountspec.DriverAuto, s)
	shared.Daemon.Mode = mountspec.ModeShared
	target = e.mustMount(shared)
	e.answers(target, "one")
	e.served(mountspec.DriverEROFS)
	e.daemons(0)
	e.unmount(target)
}

// TestUnproven damages what was proven: auto starts a daemon, erofs fails with the reason.
func TestUnproven(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	data, err := filepath.Glob(filepath.Join(s.CacheDir, "*.blob.data"))
	must(t, err)
	if len(data) < 2 {
		t.Fatalf("data files %q", data)
	}
	for _, c := range []struct {
		name, reason string
		do           func(t *testing.T)
	}{
		{"no proof", "nobody has compared", func(t *testing.T) { must(t, os.Remove(proof.Path(s.CacheDir, s.BootstrapDigest))) }},
		{"touched", "written to", func(t *testing.T) { must(t, os.Chtimes(data[0], time.Now(), time.Now())) }},
		{"swapped", "inode", func(t *testing.T) {
			must(t, unix.Renameat2(unix.AT_FDCWD, data[0], unix.AT_FDCWD, data[1], unix.RENAME_EXCHANGE))
			t.Cleanup(func() { _ = unix.Renameat2(unix.AT_FDCWD, data[0], unix.AT_FDCWD, data[1], unix.RENAME_EXCHANGE) })
		}},
		{"another proof", "is for the bootstrap", func(t *testing.T) {
			path := proof.Path(s.CacheDir, s.BootstrapDigest)
			text, err := os.ReadFile(path)
			must(t, err)
			other := "sha256:" + strings.Repeat("0", 64)
			must(t, os.WriteFile(path, []byte(strings.ReplaceAll(string(text), s.BootstrapDigest, other)), 0o600))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := e.in(t)
			_ = os.Remove(proof.Path(s.CacheDir, s.BootstrapDigest))
			e.prove(s)
			c.do(t)
			target := e.target()
			if r := e.mount(e.by(mountspec.DriverEROFS, s), target); r.code == 0 || !strings.Contains(r.out, "not proven") || !strings.Contains(r.out, c.reason) {
				t.Errorf("erofs: %+v, want %q", r, c.reason)
			}
			if m := mounted(t, target); len(m) > 0 {
				t.Errorf("after a refusal there is %q", m)
			}
			if c.name == "swapped" {
				return // a daemon would read the wrong file as well
			}
			target = e.mustMount(e.by(mountspec.DriverAuto, s))
			e.holds(img, target)
			e.daemons(1)
			e.served(mountspec.DriverFUSE)
			log, err := os.ReadFile(filepath.Join(e.root, "instances", s.Instance, "nydusd.log"))
			if err != nil || !strings.Contains(string(log), c.reason) {
				t.Errorf("the log does not say %q (%v):\n%s", c.reason, err, log)
			}
			e.unmount(target)
			must(t, e.tidy(soon))
		})
	}
}

// TestHoledIsNeverRead makes a hole and has nobody but the prover notice.
func TestHoledIsNeverRead(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	data, err := filepath.Glob(filepath.Join(s.CacheDir, "*.blob.data"))
	must(t, err)
	for _, path := range data {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err)
		must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
		must(t, f.Close())
	}
	if r := e.mount(e.by(mountspec.DriverEROFS, s), e.target()); r.code == 0 || !strings.Contains(r.out, "not proven") {
		t.Errorf("a holed image: %+v", r)
	}
	p := prove.Prover{Now: func() time.Time { return time.Now().Add(time.Minute) }}
	if _, err := p.Prove(t.Context(), s.CacheDir, s.Bootstrap, s.BootstrapDigest); !errors.Is(err, prove.ErrWrong) {
		t.Errorf("a hole is proven: %v", err)
	}
	for _, blob := range data {
		must(t, os.Remove(blob)) // what was done here is not nydusd's to find
	}
	maps, _ := filepath.Glob(filepath.Join(s.CacheDir, "*chunk_map"))
	for _, path := range maps {
		must(t, os.Remove(path))
	}
	target := e.mustMount(e.by(mountspec.DriverAuto, s))
	e.holds(img, target)
	e.served(mountspec.DriverFUSE)
	e.unmount(target)
}

// TestKernelCannot has the cache and the bootstrap where the kernel mounts no files: that is
// found out once.
func TestKernelCannot(t *testing.T) {
	e := newEnv(t)
	dir, err := os.MkdirTemp(kit.RunRoot, "root")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	e.root = dir
	e.key, err = mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(e.root)
	must(t, err)
	verdict := filepath.Join(runDir, "no-erofs")
	t.Cleanup(func() { must(t, errors.Join(e.tidy(soon), os.Remove(verdict))) })
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	for _, c := range []struct{ said, not string }{
		{"block devices only", "could not before"},
		{"could not before", "nothing"},
	} {
		target := e.mustMount(e.by(mountspec.DriverAuto, s))
		e.holds(img, target)
		e.daemons(1)
		log, err := os.ReadFile(filepath.Join(e.root, "instances", s.Instance, "nydusd.log"))
		if err != nil || !strings.Contains(string(log), c.said) || strings.Contains(string(log), c.not) {
			t.Errorf("the log does not say %q, or does %q (%v):\n%s", c.said, c.not, err, log)
		}
		e.unmount(target)
		must(t, e.tidy(soon))
	}
	// Who asks for the kernel alone hears from the kernel.
	if r := e.mount(e.by(mountspec.DriverEROFS, s), e.target()); r.code == 0 || !strings.Contains(r.out, "block devices only") || strings.Contains(r.out, "could not before") {
		t.Errorf("erofs: %+v", r)
	}
}

// TestProofSurvivesDaemons has a daemon work on the complete blobs again: it must not
// rewrite them, or no image that shares blobs would ever stay proven.
func TestProofSurvivesDaemons(t *testing.T) {
	e := newEnv(t)
	img := odd(t)
	s := e.provable(img)
	e.complete(img, s)
	target := e.mustMount(e.by(mountspec.DriverFUSE, s))
	e.holds(img, target)
	e.daemons(1)
	e.unmount(target)
	must(t, e.tidy(soon))
	target = e.mustMount(e.by(mountspec.DriverEROFS, s))
	e.holds(img, target)
	e.daemons(0)
	e.unmount(target)
}

// TestDaemonlessInterrupted leaves what a helper leaves that was killed between the mount
// and the record of it.
func TestDaemonlessInterrupted(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	target := e.mustMount(e.by(mountspec.DriverEROFS, s))
	e.unmount(target)
	must(t, instance.Change(t.Context(), runDir, s.Instance, e.record().Current.Number, func(g *instance.Generation) { g.Ready, g.Dev = false, "" }))
	target = e.mustMount(e.by(mountspec.DriverEROFS, s))
	e.answers(target, "one")
	if g := e.record().Current; g.Number != 2 || len(e.record().Retired) > 0 {
		t.Errorf("the next mount made %+v", e.record())
	}
	e.unmount(target)

	must(t, instance.Change(t.Context(), runDir, s.Instance, 2, func(g *instance.Generation) { g.Ready, g.Dev = false, "" }))
	must(t, e.tidy(soon))

	// Somebody takes the mount off.
	target = e.mustMount(e.by(mountspec.DriverEROFS, s))
	must(t, rootfs.Detach(e.record().Current.Mountpoint))
	if got := e.served(mountspec.DriverEROFS); got.State != instance.StateServing {
		t.Errorf("detached, with a user: %+v", got)
	}
	other := e.mustMount(e.by(mountspec.DriverEROFS, s))
	e.answers(other, "one")
	e.answers(target, "one")
	e.unmount(target)
	e.unmount(other)
}

// TestWrittenDuringTheMount has somebody write to, or exchange, the cache after it was
// looked at and before it is mounted.
func TestWrittenDuringTheMount(t *testing.T) {
	k := newKiller(t, mountspec.ModeDedicated)
	s := k.provable(k.img)
	k.complete(k.img, s)
	data, err := filepath.Glob(filepath.Join(s.CacheDir, "*.blob.data"))
	must(t, err)
	if len(data) < 2 {
		t.Fatalf("data files %q", data)
	}
	touch := func() error {
		text, err := os.ReadFile(data[0])
		if err != nil {
			return err
		}
		f, err := os.OpenFile(data[0], os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(text[:1], 0)
		return errors.Join(err, f.Close())
	}
	exchange := func() error {
		return unix.Renameat2(unix.AT_FDCWD, data[0], unix.AT_FDCWD, data[1], unix.RENAME_EXCHANGE)
	}
	for _, c := range []struct {
		name   string
		before uint64
		strike func() error
		after  func() error
	}{
		{"written before it is opened by the kernel", unix.SYS_FSOPEN, touch, nil},
		{"written before it is attached", unix.SYS_MOVE_MOUNT, touch, nil},
		{"exchanged", unix.SYS_FSOPEN, exchange, exchange},
	} {
		for _, driver := range []mountspec.Driver{mountspec.DriverEROFS, mountspec.DriverAuto} {
			must(t, k.tidy(soon))
			_ = os.Remove(proof.Path(s.CacheDir, s.BootstrapDigest))
			k.prove(s)
			k.spec = k.by(driver, s)
			k.option = k.env.option(k.spec)
			if c.after != nil && driver == mountspec.DriverAuto {
				continue // a daemon would read the wrong file
			}
			said, err := os.Create(filepath.Join(t.TempDir(), "said"))
			must(t, err)
			helper := k.helper()
			helper.Stdout, helper.Stderr = said, said
			struck, status, err := trace{calls: []uint64{c.before}, n: 1, strike: c.strike}.run(helper)
			must(t, said.Close())
			if c.after != nil {
				must(t, c.after())
			}
			if err != nil || !struck {
				t.Fatalf("%s: struck %t, %v", c.name, struck, err)
			}
			if driver == mountspec.DriverEROFS {
				text, err := os.ReadFile(said.Name())
				if err != nil || status.ExitStatus() == 0 || !strings.Contains(string(text), "is no longer the file that was compared") {
					t.Errorf("%s: exit status %d: %s (%v)", c.name, status.ExitStatus(), text, err)
				}
				if m := mounted(t, k.target); len(m) > 0 {
					t.Errorf("%s: %q is left", c.name, m)
				}
				continue
			}
			if status.ExitStatus() != 0 {
				t.Fatalf("%s, auto: exit status %d", c.name, status.ExitStatus())
			}
			k.served(mountspec.DriverFUSE)
			k.holds(k.img, k.target)
			k.unmount(k.target)
		}
	}
}
