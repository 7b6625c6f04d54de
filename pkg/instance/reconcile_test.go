package instance

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// clock is a Reconciler's that a test moves.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func newTestReconciler(t *testing.T, linger time.Duration) (*Reconciler, *clock) {
	t.Helper()
	c := &clock{now: time.Now()}
	return NewReconciler(ReconcilerConfig{
		RunDir: t.TempDir(), Root: t.TempDir(), Linger: linger, Now: c.Now,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}), c
}

// served makes an instance whose daemon has ended without anybody's noticing.
func served(t *testing.T, r *Reconciler, ready bool) dir {
	t.Helper()
	d := dirOf(r.cfg.RunDir, testKey)
	i := mustOpen(t, d, openCreate)
	defer i.Close()
	g := d.gen(1)
	i.rec.Root, i.rec.Last = r.cfg.Root, 1
	i.rec.Current = &Generation{Number: 1, Ready: ready, Mountpoint: g.mountpoint(), Socket: g.socket(), PID: 1 << 30, Dev: "0:0"}
	must(t, i.write())
	must(t, os.MkdirAll(string(diskDirOf(r.cfg.Root, testKey)), 0o700))
	for _, path := range []string{diskDirOf(r.cfg.Root, testKey).bootstrap(), diskDirOf(r.cfg.Root, testKey).log()} {
		must(t, os.WriteFile(path, nil, 0o600))
	}
	return d
}

func gone(t *testing.T, r *Reconciler) bool {
	t.Helper()
	keys, err := Keys(r.cfg.RunDir)
	must(t, err)
	return len(keys) == 0
}

func TestIdleInstancesLinger(t *testing.T) {
	r, c := newTestReconciler(t, time.Minute)
	served(t, r, true)
	if next := r.pass(t.Context()); next != time.Minute || gone(t, r) {
		t.Fatalf("first seen idle: look again in %v, gone: %v; want a minute and false", next, gone(t, r))
	}
	c.now = c.now.Add(59 * time.Second)
	if next := r.pass(t.Context()); next != time.Second || gone(t, r) {
		t.Fatalf("idle for 59 s: look again in %v, gone: %v; want 1 s and false", next, gone(t, r))
	}
	c.now = c.now.Add(time.Second)
	r.pass(t.Context())
	if !gone(t, r) {
		t.Fatal("idle for a minute, and still there")
	}
	if _, err := os.Stat(string(diskDirOf(r.cfg.Root, testKey))); !os.IsNotExist(err) {
		t.Errorf("the directory on disk: %v", err)
	}
}

func TestUsedInstancesStay(t *testing.T) {
	r, c := newTestReconciler(t, time.Minute)
	d := served(t, r, true)
	// A mount of its device somewhere: any real one will do.
	i := mustOpen(t, d, openExisting)
	i.rec.Current.Dev = anyDevice(t)
	must(t, i.write())
	must(t, i.Close())
	for range 3 {
		c.now = c.now.Add(time.Hour)
		if next := r.pass(t.Context()); next != time.Hour || gone(t, r) {
			t.Fatalf("look again in %v, gone: %v; want an hour and false", next, gone(t, r))
		}
	}
}

// An interrupted start is nobody's: it does not linger.
func TestInterruptedStartIsCleanedUp(t *testing.T) {
	r, _ := newTestReconciler(t, time.Hour)
	d := served(t, r, false)
	must(t, os.MkdirAll(d.gen(1).mountpoint(), 0o700))
	for _, path := range []string{d.gen(1).config(), d.gen(1).socket(), filepath.Join(string(d.gen(1)), ".new-1"), filepath.Join(d.users(), ".new-2")} {
		must(t, os.WriteFile(path, nil, 0o600))
	}
	r.pass(t.Context())
	if !gone(t, r) {
		t.Error("still there")
	}
}

// What was killed before it had written anything, and what is being worked on.
func TestEmptyAndLockedInstances(t *testing.T) {
	r, _ := newTestReconciler(t, 0)
	must(t, os.MkdirAll(dirOf(r.cfg.RunDir, testKey).users(), 0o700))
	must(t, os.MkdirAll(filepath.Join(instancesDir(r.cfg.RunDir), ".gone-x.1.2", "u"), 0o700))
	disk := diskDirOf(r.cfg.Root, testKey)
	must(t, os.MkdirAll(string(disk), 0o700))
	must(t, os.WriteFile(disk.bootstrap()+".new", nil, 0o600))
	i := mustOpen(t, dirOf(r.cfg.RunDir, testKey), openExisting)
	if next := r.pass(t.Context()); next != recheck || gone(t, r) {
		t.Errorf("locked by another: look again in %v, gone: %v; want %v and false", next, gone(t, r), recheck)
	}
	must(t, i.Close())
	r.pass(t.Context())
	left, err := os.ReadDir(instancesDir(r.cfg.RunDir))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if _, err := os.Stat(string(disk)); !os.IsNotExist(err) {
		t.Errorf("the directory on disk: %v", err)
	}
}

func TestOldLogsArePruned(t *testing.T) {
	r, c := newTestReconciler(t, time.Hour)
	d := served(t, r, true) // lives
	old := diskDirOf(r.cfg.Root, "00000000000000000000000000000000")
	must(t, os.MkdirAll(string(old), 0o700))
	must(t, os.WriteFile(old.log(), nil, 0o600))
	r.pruneDisk(t.Context())
	if _, err := os.Stat(old.log()); err != nil {
		t.Errorf("a fresh log: %v", err)
	}
	c.now = c.now.Add(logRetention + time.Minute)
	r.pruneDisk(t.Context())
	if _, err := os.Stat(string(old)); !os.IsNotExist(err) {
		t.Errorf("a log of the day before yesterday: %v", err)
	}
	if _, err := os.Stat(diskDirOf(r.cfg.Root, testKey).log()); err != nil {
		t.Errorf("the log of an instance that lives: %v", err)
	}
	if keys, err := Keys(r.cfg.RunDir); err != nil || len(keys) != 1 || dirOf(r.cfg.RunDir, keys[0]) != d {
		t.Errorf("instances %v, %v", keys, err)
	}
}

func anyDevice(t *testing.T) string {
	t.Helper()
	table, err := rootfs.ReadTable()
	must(t, err)
	m, ok := table.At("/proc")
	if !ok {
		t.Fatal("/proc is not mounted")
	}
	return m.Dev
}

// TestSlowPassIsTold has a clock that goes on by a step each time it is asked.
func TestSlowPassIsTold(t *testing.T) {
	for _, tc := range []struct {
		step time.Duration
		told bool
	}{{slowPass / 10, false}, {2 * slowPass, true}} {
		r, c := newTestReconciler(t, time.Minute)
		served(t, r, true)
		var log bytes.Buffer
		r.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		r.cfg.Now = func() time.Time { c.now = c.now.Add(tc.step); return c.now }
		r.timed(t.Context())
		if told := strings.Contains(log.String(), "released late"); told != tc.told {
			t.Errorf("a clock that goes on by %v: told %v, want %v: %s", tc.step, told, tc.told, &log)
		}
	}
}

// TestLongLockIsTold has an instance that somebody keeps, as is told, and one that a Hold keeps
// for as long as it fetches.
func TestLongLockIsTold(t *testing.T) {
	for _, held := range []bool{false, true} {
		r, c := newTestReconciler(t, 0)
		var log bytes.Buffer
		r.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		i := mustOpen(t, served(t, r, true), openExisting)
		i.rec.Current.Held = held
		must(t, i.write())
		for _, told := range []int{0, 1, 1} {
			if r.pass(t.Context()); held {
				told = 0
			}
			if got := strings.Count(log.String(), "locked for long"); got != told {
				t.Errorf("held: %v: told %d times, want %d: %s", held, got, told, &log)
			}
			c.now = c.now.Add(lockedLong)
		}
		if want := fmt.Sprintf("pids=[%d]", os.Getpid()); !held && !strings.Contains(log.String(), want) {
			t.Errorf("want %s: %s", want, &log)
		}
		i.Close()
		if r.pass(t.Context()); !gone(t, r) {
			t.Errorf("held: %v: the instance is still there, although nobody has it locked", held)
		}
	}
}
