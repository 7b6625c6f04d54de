package mount_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/hang"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/probe"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// hangTimeout is what the tests configure.
const hangTimeout = 2 * time.Second

// watchHangs runs what looks for daemons that hang, as in the snapshotter, until
// the end of the test.
func (e *env) watchHangs(cfg hang.Config) *logBook {
	e.t.Helper()
	log := &logBook{said: make(chan struct{}, 1)}
	cfg.RunDir, cfg.Timeout, cfg.Log = runDir, hangTimeout, slog.New(slog.NewTextHandler(log, nil))
	cfg.Asker = &probe.Prober{Program: filepath.Join(e.bin, "nydus-shim-hook")}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- hang.New(cfg).Run(ctx) }()
	e.t.Cleanup(func() {
		cancel()
		must(e.t, <-done)
		if e.t.Failed() {
			e.t.Logf("--- hang\n%s", log)
		}
	})
	return log
}

// held is a reader whose request a daemon has taken and not answered: the registry
// keeps it waiting.
type held struct {
	*exec.Cmd
	target  string
	release func()
	ended   chan error
}

// hold mounts an image from a registry and begins to read from it.
func (e *env) hold(reg *kit.Registry) *held {
	e.t.Helper()
	img := makeFixture(e.t, "large", kit.NydusOptions{}, largeImage)
	reg.MustPush(e.t, img.Image, "hang/image:1")
	s := e.registrySpec(img, reg, "hang/image")
	s.Daemon.HangTimeout = hangTimeout
	h := &held{target: e.mustMount(s), ended: make(chan error, 1)}
	// The metadata of its blob is fetched, and what stands near.
	must(e.t, exec.CommandContext(e.t.Context(), "cat", filepath.Join(h.target, "name")).Run())
	gate, asked := make(chan struct{}), make(chan struct{}, 64)
	reg.SetHook(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		asked <- struct{}{}
		<-gate
		next.ServeHTTP(w, r)
	})
	h.release = func() {
		reg.SetHook(nil)
		close(gate)
	}
	// Past the page cache: who waits for a page can be killed. In a process of its own:
	// each child of this one would have to close the file.
	h.Cmd = exec.CommandContext(e.t.Context(), "dd", "if="+filepath.Join(h.target, "data"), "of=/dev/null", "iflag=direct", "bs=64K", "skip=200", "status=none")
	must(e.t, h.Start())
	<-asked
	go func() { h.ended <- h.Wait() }()
	return h
}

// largeImage is more than a daemon fetches when it is asked for a little.
func largeImage(tb kit.TB) *kit.Image {
	data := make([]byte, 16<<20)
	_, _ = rand.Read(data)
	return kit.MustBuildImage(tb, kit.Pause, kit.FileLayer(kit.File{Name: "./"}, kit.File{Name: "name", Data: "large"}, kit.File{Name: "data", Data: string(data)}))
}

// A process that waits for a stopped daemon, which has taken its request, cannot
// be killed. When the bound is over it ends, and its root filesystem can go; the
// next mount of the image gets another daemon.
func TestStoppedDaemonIsAborted(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	img := small(t, "one")
	h := e.hold(reg)
	before := e.current()
	stop(t, before.PID)
	h.release()
	must(t, h.Process.Kill())
	select {
	case <-h.ended:
		t.Fatal("the reader ended: the test does not test anything")
	case <-time.After(hangTimeout / 2):
	}
	log := e.watchHangs(hang.Config{})
	started := time.Now()
	select {
	case <-h.ended:
	case <-time.After(hangTimeout + slack):
		t.Fatalf("the reader cannot be ended; said was:\n%s", log)
	}
	took := time.Since(started)
	t.Logf("the reader ended %v after the watch began; the bound is %v", took, hangTimeout)
	if took < hangTimeout {
		t.Errorf("the daemon was aborted after %v, before its time", took)
	}
	within(t, "it is said", func() bool { return strings.Contains(log.String(), "was aborted") })
	for _, want := range []string{"instance=", "image=registry.test/" + t.Name(), "pid=" + itoa(before.PID), "it was stopped, for", "waiting="} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, log)
		}
	}
	e.daemons(0)
	if r := e.record(); r.Current != nil || mountedAt(t, before.Mountpoint) {
		t.Errorf("the aborted generation is still in use: %+v", r.Current)
	}
	e.unmount(h.target)
	again := e.mustMount(e.spec(img))
	e.holds(img, again)
	e.unmount(again)
}

// The same for a daemon that new mounts have replaced before: what lies on it is
// reached by no path any more.
func TestReplacedDaemonIsAborted(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	h := e.hold(reg)
	before := e.current()
	stop(t, before.PID)
	h.release()
	must(t, h.Process.Kill())
	// As the helper would.
	must(t, rootfs.Detach(before.Mountpoint))
	must(t, rootfs.Detach(h.target))
	e.watchHangs(hang.Config{})
	select {
	case <-h.ended:
	case <-time.After(hangTimeout + slack):
		t.Fatal("the reader cannot be ended")
	}
	must(t, e.tidy(soon))
	e.daemons(0)
}

// As long as somebody else keeps the daemon's descriptor, to kill it helps nobody.
func TestKeptFilesystemIsAborted(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	if !e.succeeds() {
		return // it hands nothing over
	}
	h := e.hold(reg)
	before := e.current()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	kept, err := custody.Receive(ctx, before.Supervisor, client.New(before.Socket).SendFD)
	must(t, err)
	defer kept.Close()
	stop(t, before.PID)
	h.release()
	must(t, h.Process.Kill())
	e.watchHangs(hang.Config{})
	select {
	case <-h.ended:
	case <-time.After(hangTimeout + slack):
		t.Fatal("the reader cannot be ended")
	}
	if kept.Alive() {
		t.Error("the filesystem lives")
	}
	e.unmount(h.target)
	must(t, e.tidy(soon))
	e.daemons(0)
}

// stop stops a process and waits until all its threads are.
func stop(t *testing.T, pid int) {
	t.Helper()
	kit.Stop(t, pid)
	within(t, "it is stopped", func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return err == nil && !slices.ContainsFunc(threads, func(file string) bool {
			text, err := os.ReadFile(file)
			return err == nil && !strings.Contains(string(text), ") T ")
		})
	})
}

func mountedAt(t *testing.T, path string) bool {
	t.Helper()
	_, ok, err := rootfs.Lookup(path)
	must(t, err)
	return ok
}

// Nobody waits for a stopped daemon: it may go on later.
func TestStoppedDaemonIsLeftAloneWhileNobodyWaits(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	target := e.mustMount(e.spec(img))
	before := e.current()
	log := e.watchHangs(hang.Config{AskEvery: 100 * time.Millisecond})
	kit.Stop(t, before.PID)
	within(t, "it is said that it does not answer", func() bool { return strings.Contains(log.String(), "nydusd does not answer") })
	must(t, unix.Kill(before.PID, unix.SIGCONT))
	within(t, "it is said that it answers", func() bool { return strings.Contains(log.String(), "nydusd answers again") })
	if now := e.current(); now.PID != before.PID || now.Failed {
		t.Errorf("it was replaced by %+v; said was\n%s", now, log)
	}
	e.holds(img, target)
	e.unmount(target)
}

// Our questions, one for each image and one for the pool, are no users of it.
func TestStoppedSharedDaemonIsLeftAloneWhileNobodyWaits(t *testing.T) {
	e := newSharedEnv(t)
	one, two := tiny(t, "one"), tiny(t, "two")
	targets := map[string]*fixture{e.mustMount(e.spec(one)): one, e.mustMount(e.spec(two)): two}
	before := e.pool().Current
	log := e.watchHangs(hang.Config{AskEvery: 100 * time.Millisecond})
	kit.Stop(t, before.PID)
	within(t, "it is said that it does not answer", func() bool { return strings.Contains(log.String(), "nydusd does not answer") })
	must(t, unix.Kill(before.PID, unix.SIGCONT))
	within(t, "it is said that it answers", func() bool { return strings.Contains(log.String(), "nydusd answers again") })
	if now := e.pool().Current; now.PID != before.PID || now.Failed {
		t.Errorf("it was replaced by %+v; said was\n%s", now, log)
	}
	for target, img := range targets {
		e.holds(img, target)
		e.unmount(target)
	}
}

// A daemon that does not run although it was not stopped, and one that waits for
// its registry.
func TestStuckDaemonIsAborted(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	h := e.hold(reg)
	before := e.current()
	thaw := freeze(t, before.PID)
	must(t, h.Process.Kill())
	log := e.watchHangs(hang.Config{StuckAfter: hangTimeout})
	select {
	case <-h.ended:
	case <-time.After(hangTimeout + slack):
		t.Fatalf("the reader cannot be ended; said was:\n%s", log)
	}
	within(t, "it is said", func() bool { return strings.Contains(log.String(), "it is stuck: none of its threads has run for") })
	thaw()
	h.release()
	e.unmount(h.target)
	must(t, e.tidy(soon))
	e.daemons(0)
}

// freeze keeps a process from running, by a cgroup: that is not seen in its state.
func freeze(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	table, err := rootfs.ReadTable()
	must(t, err)
	dir := ""
	for _, m := range table {
		if m.Type == "cgroup2" {
			dir = filepath.Join(m.Target, "nydus-test-frozen")
		}
	}
	if dir == "" {
		t.Fatal("no cgroup v2 is mounted, which could freeze a process")
	}
	must(t, os.Mkdir(dir, 0o755))
	file := func(name, text string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0) }
	must(t, file("cgroup.procs", itoa(pid)))
	must(t, file("cgroup.freeze", "1"))
	within(t, "it is frozen", func() bool {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		return strings.Contains(string(text), "frozen 1")
	})
	thaw = func() {
		_ = file("cgroup.freeze", "0")
		within(t, "its cgroup can be removed", func() bool { return os.Remove(dir) == nil || !exists(dir) })
	}
	t.Cleanup(func() {
		if exists(dir) {
			_ = file("cgroup.kill", "1")
			thaw()
		}
	})
	return thaw
}

// One that waits for its registry is busy. It is left alone, whatever it takes.
func TestBusyDaemonIsNotAborted(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	h := e.hold(reg)
	before := e.current()
	log := e.watchHangs(hang.Config{AskEvery: 100 * time.Millisecond})
	select {
	case err := <-h.ended:
		t.Fatalf("the reader has ended: %v", err)
	case <-time.After(3 * hangTimeout):
	}
	h.release()
	if err := <-h.ended; err != nil {
		t.Errorf("the reader ended with %v", err)
	}
	if now := e.current(); now.PID != before.PID || now.Failed || strings.Contains(log.String(), "hangs") {
		t.Errorf("it was taken for hung: %+v; said was\n%s", now, log)
	}
	e.unmount(h.target)
}

// With failover a reader notices a pause only.
func TestStoppedDaemonIsSucceeded(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	if !e.succeeds() {
		return // TestStoppedDaemonIsAborted
	}
	r := e.recover(recovery.PolicyFailover, true)
	h := e.hold(reg)
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	before := e.current()
	stop(t, before.PID)
	h.release()
	log := e.watchHangs(hang.Config{})
	if err := <-h.ended; err != nil {
		t.Errorf("the reader: %v", err)
	}
	if now := e.current(); now.Number != before.Number || now.Restarts != 1 {
		t.Errorf("after the hang: %+v; want a successor of the same generation", now)
	}
	if want := "nydusd hangs and is killed; its successor goes on"; !strings.Contains(log.String(), want) {
		t.Errorf("the log does not say %q:\n%s", want, log)
	}
	e.unmount(h.target)
	must(t, e.tidy(soon))
	e.daemons(0)
	r.stop()
	e.holderEnds()
}
