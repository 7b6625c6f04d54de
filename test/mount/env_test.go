package mount_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == stuckName {
		stuck()
	}
	if os.Args[0] == recoveryName {
		recoverOne()
		return
	}
	if filepath.Base(os.Args[0]) == hogName {
		if err := hog(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	kit.Main(m)
}

const (
	// runDir is the one that programs use unless told otherwise: the sealing
	// keys are looked for there and nowhere else.
	runDir = "/run/nydus-snapshotter"
	// soon bounds everything that should happen at once.
	soon = 20 * time.Second
	// oomScore and startTimeout are what options ask for unless a test changes it.
	oomScore     = 123
	startTimeout = 20 * time.Second
	// slack is what a busy machine may add to a bound. atOnce bounds what must
	// not wait for a daemon: far below startTimeout.
	slack  = 8 * time.Second
	atOnce = 8 * time.Second
)

// env is a node without containerd and snapshotter: their directories, and what
// a snapshotter would have put there.
type env struct {
	t     *testing.T
	root  string
	key   mountspec.Key
	bin   string
	tools kit.Tools
	snaps *int
	mode  mountspec.Mode // what options ask for
}

// in is the same node for a subtest.
func (e *env) in(t *testing.T) *env {
	sub := *e
	sub.t = t
	return &sub
}

// newEnv makes a node. At the end of the test the reconciler must be able to
// clean up all that is left in the run directory and in the root.
func newEnv(t *testing.T) *env {
	t.Helper()
	kit.Baseline(t)
	e := &env{t: t, snaps: new(int), bin: kit.Binaries(t, "nydus-overlayfs", "mount.nydus", "nydus-shim-hook"), tools: kit.MustTools(t)}
	e.root = filepath.Join(t.TempDir(), "root")
	must(t, os.MkdirAll(e.root, 0o700))
	must(t, instance.SetupRunDir(runDir))
	t.Cleanup(func() { e.dispose() })
	t.Cleanup(func() {
		if t.Failed() {
			e.showLogs()
		}
	})
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(e.root)
	must(t, err)
	e.key = key
	return e
}

// showLogs shows what daemons said to whoever looks into a failure.
func (e *env) showLogs() {
	logs, _ := filepath.Glob(filepath.Join(e.root, "instances", "*", "nydusd.log"))
	for _, path := range logs {
		text, err := os.ReadFile(path)
		e.t.Logf("--- %s (%v)\n%s", path, err, text)
	}
}

func (e *env) dispose() {
	if err := e.tidy(soon); err != nil {
		e.t.Error(err)
	}
	e.reap()
	if left := e.entries(); len(left) > 0 {
		e.t.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	for _, dir := range cgroups(cgroupParent()) {
		if err := unix.Rmdir(dir); err != nil {
			e.t.Errorf("cgroup %s of an ended daemon is left: %v", dir, err)
		}
	}
	if err := unix.Unmount(runDir, 0); err != nil {
		e.t.Errorf("unmount run directory: %v", err)
		_ = unix.Unmount(runDir, unix.MNT_DETACH)
	}
	if err := os.Remove(runDir); err != nil {
		e.t.Errorf("remove run directory: %v", err)
	}
}

// reap takes note of successors that have ended: they are children of this process,
// which stands for a snapshotter that would have ended before them.
func (e *env) reap() {
	all, err := kit.Processes()
	must(e.t, err)
	for _, p := range all {
		if p.State == 'Z' && p.PPID == os.Getpid() {
			// Somebody else here may have been faster.
			if _, err := unix.Wait4(p.PID, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
				must(e.t, err)
			}
		}
	}
}

// entries lists what should not be in the run directory and the root of a node
// on which nothing is mounted. Failed starts leave their log, see logs.
func (e *env) entries() []string {
	var left []string
	walk := func(dir string, ok func(rel string, d os.DirEntry) bool) {
		_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if rel, _ := filepath.Rel(dir, path); err == nil && rel != "." && !ok(rel, d) {
				left = append(left, path)
			}
			return nil
		})
	}
	walk(runDir, func(rel string, d os.DirEntry) bool {
		return rel == "i" || rel == "keys" || strings.HasPrefix(rel, "keys/") || ((strings.HasPrefix(rel, "nydusd-") || strings.HasPrefix(rel, "cache-")) && !d.IsDir())
	})
	walk(e.root, func(rel string, d os.DirEntry) bool {
		top, rest, _ := strings.Cut(rel, "/")
		switch top {
		case "snapshots":
			return true
		case "cache":
			return !strings.HasPrefix(d.Name(), ".new-")
		case "instances":
			return rest == "" || d.IsDir() || d.Name() == "nydusd.log"
		}
		return false
	})
	return left
}

// tidy runs a reconciler that does not linger until no instance is left.
func (e *env) tidy(within time.Duration) error {
	r := e.reconcile(0)
	defer r.stop()
	return r.idle(within)
}

// reconciler is the snapshotter's, within the test.
type reconciler struct {
	cancel func()
	done   chan error
	log    *logBook
}

func (e *env) reconcile(linger time.Duration) *reconciler {
	ctx, cancel := context.WithCancel(context.Background())
	r := &reconciler{cancel: cancel, done: make(chan error, 1), log: &logBook{said: make(chan struct{}, 1)}}
	rec := instance.NewReconciler(instance.ReconcilerConfig{
		RunDir: runDir, Root: e.root, Linger: linger, Log: slog.New(slog.NewTextHandler(r.log, nil)),
	})
	go func() { r.done <- rec.Run(ctx) }()
	return r
}

func (r *reconciler) stop() error {
	r.cancel()
	return <-r.done
}

// idle waits until no instance is left.
func (r *reconciler) idle(within time.Duration) error {
	timer := time.NewTimer(within)
	defer timer.Stop()
	tick := time.NewTicker(20 * time.Millisecond) // not everything is said
	defer tick.Stop()
	for {
		keys, err := instance.Keys(runDir)
		if err != nil || len(keys) == 0 {
			return err
		}
		select {
		case <-r.log.said:
		case <-tick.C:
		case <-timer.C:
			return fmt.Errorf("instances %v are still there after %v; the reconciler said:\n%s", keys, within, r.log)
		}
	}
}

// logBook keeps what is logged and tells that something was.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
	said chan struct{}
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case b.said <- struct{}{}:
	default:
	}
	return b.text.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// fixture is a converted image: its bootstrap and a directory of its blobs.
type fixture struct {
	*kit.Image
	boot    []byte
	blobs   string
	tree    kit.Tree
	version string // RAFS version; v6 if empty
	number  uint64 // of the recipe, see TestImages
}

// lasting gives the kit directories that live as long as the whole run.
type lasting struct {
	*testing.T
	dir string
	n   *int
}

func (l lasting) TempDir() string {
	*l.n++
	dir := filepath.Join(l.dir, strconv.Itoa(*l.n))
	must(l.T, os.MkdirAll(dir, 0o755))
	return dir
}

// fixtures are made once, by the first test that wants them.
var fixtures sync.Map

func makeFixture(t *testing.T, name string, opts kit.NydusOptions, build func(kit.TB) *kit.Image) *fixture {
	t.Helper()
	if f, ok := fixtures.Load(name); ok {
		return f.(*fixture)
	}
	tb := lasting{t, filepath.Join(kit.Scratch(), "images", name), new(int)}
	f := &fixture{Image: build(tb).MustNydus(tb, opts), blobs: tb.TempDir()}
	var err error
	f.boot, err = f.BootstrapBytes()
	must(t, err)
	f.tree, err = f.Tree()
	must(t, err)
	for n, l := range f.Layers {
		if n != f.Bootstrap() {
			must(t, os.Link(l.Path, filepath.Join(f.blobs, l.Desc.Digest.Encoded())))
		}
	}
	if opts.Version != "" {
		f.version = "v" + opts.Version
	}
	fixtures.Store(name, f)
	return f
}

// small is an image of busybox and a few files.
func small(t *testing.T, name string) *fixture {
	t.Helper()
	return makeFixture(t, name, kit.NydusOptions{}, func(tb kit.TB) *kit.Image { return kit.SmallImage(tb, name) })
}

// odd is an image of everything that a file system can get wrong.
func odd(t *testing.T) *fixture {
	t.Helper()
	return makeFixture(t, "odd", kit.NydusOptions{}, oddImage)
}

// oddV5 is the same in RAFS version 5.
func oddV5(t *testing.T) *fixture {
	t.Helper()
	return makeFixture(t, "odd-v5", kit.NydusOptions{Version: "5"}, oddImage)
}

func oddImage(tb kit.TB) *kit.Image {
	return kit.MustBuildImage(tb, kit.Pause, kit.BusyboxLayer(kit.MustTools(tb)), kit.OddLower(), kit.OddUpper())
}

// snapshot makes a directory as containerd's snapshots have them.
func (e *env) snapshot() string {
	e.t.Helper()
	*e.snaps++
	dir := filepath.Join(e.root, "snapshots", strconv.Itoa(*e.snaps))
	must(e.t, os.MkdirAll(filepath.Join(dir, "fs"), 0o755))
	must(e.t, os.MkdirAll(filepath.Join(dir, "work"), 0o711))
	return dir
}

// unpack puts the bootstrap where containerd unpacks it to.
func (e *env) unpack(boot []byte) string {
	e.t.Helper()
	path := filepath.Join(e.snapshot(), "fs", "image", "image.boot")
	must(e.t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(e.t, os.WriteFile(path, boot, 0o644))
	return path
}

// spec is what the snapshotter would say about a new container of the image.
func (e *env) spec(f *fixture) *mountspec.Spec {
	e.t.Helper()
	s := &mountspec.Spec{
		Bootstrap: e.unpack(f.boot), BootstrapDigest: digest.FromBytes(f.boot).String(), FSVersion: "v6",
		SnapshotDir: e.snapshot(), Kind: mountspec.KindRootfs, Image: "registry.test/" + e.t.Name() + ":latest",
		Repository: f.blobs, Root: e.root, RunDir: runDir, CacheDir: mountspec.CacheDir(e.root, "", f.blobs),
		Driver: mountspec.DriverAuto,
		Daemon: mountspec.Daemon{
			Path: e.tools.Nydusd, LogLevel: "info", Threads: 2, StartTimeout: startTimeout,
			OOMScoreAdj: oomScore, CgroupParent: cgroupParent(), Mode: e.mode,
		},
	}
	config, err := nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: f.blobs}, CacheDir: s.CacheDir}.FuseDev()
	must(e.t, err)
	s.Config = config
	if f.version != "" {
		s.FSVersion = f.version
	}
	s.Instance = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
	return s
}

// cgroupParent is where the daemons' cgroups lie.
func cgroupParent() string { return kit.CgroupRoot() + "/nydus" }

// another is the same image for another container.
func (e *env) another(s *mountspec.Spec) *mountspec.Spec {
	e.t.Helper()
	c := *s
	c.SnapshotDir = e.snapshot()
	return &c
}

// option seals a spec.
func (e *env) option(s *mountspec.Spec) string {
	e.t.Helper()
	o, err := mountspec.Encode(s, e.key)
	must(e.t, err)
	return o
}

// target makes a mountpoint.
func (e *env) target() string {
	e.t.Helper()
	dir, err := os.MkdirTemp(e.t.TempDir(), "rootfs")
	must(e.t, err)
	return dir
}

// result is how a program ended.
type result struct {
	out  string // standard output and error
	code int
	took time.Duration
}

// run runs a program until all who hold its output have closed it, as
// containerd does. The environment is that of containerd.
func (e *env) run(name string, args ...string) result {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), 30*time.Second)
	defer cancel()
	cmd := e.command(ctx, name, args...)
	started := time.Now()
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		e.t.Fatalf("%s did not end, or somebody keeps its output open: %v\n%s", name, ctx.Err(), out)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		e.t.Fatalf("%s: %v", name, err)
	}
	return result{string(out), cmd.ProcessState.ExitCode(), time.Since(started)}
}

func (e *env) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if path := filepath.Join(e.bin, name); !filepath.IsAbs(name) && exists(path) {
		name = path
	}
	cmd := exec.CommandContext(ctx, name, args...)
	// A child that holds the output open is an error, not a reason to wait.
	cmd.WaitDelay = 2 * time.Second
	cmd.Env = []string{"PATH=" + e.bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "SECRET_OF_THE_POD=1"}
	return cmd
}

// mount mounts as containerd does.
func (e *env) mount(s *mountspec.Spec, target string, options ...string) result {
	e.t.Helper()
	args := []string{s.SnapshotDir, target}
	for _, o := range append([]string{e.option(s)}, options...) {
		args = append(args, "-o", o)
	}
	return e.run(e.tools.MountFuse, append(args, "-t", "nydus-overlayfs")...)
}

// mustMount mounts and unmounts at the end of the test.
func (e *env) mustMount(s *mountspec.Spec, options ...string) (target string) {
	e.t.Helper()
	target = e.target()
	e.ok(e.mount(s, target, options...))
	e.t.Cleanup(func() { _ = rootfs.Detach(target) })
	return target
}

func (e *env) ok(r result) {
	e.t.Helper()
	if r.code != 0 || r.out != "" {
		e.t.Fatalf("mount: exit status %d: %s", r.code, r.out)
	}
}

func (e *env) unmount(target string) {
	e.t.Helper()
	if err := unix.Unmount(target, 0); err != nil {
		e.t.Fatalf("unmount %s: %v", target, err)
	}
}

// holds checks that the tree at target is the image's.
func (e *env) holds(f *fixture, target string) {
	e.t.Helper()
	kit.EqualTrees(e.t, target, f.tree, kit.MustWalk(e.t, target))
}

// answers reads one file of a small image through target.
func (e *env) answers(target, name string) {
	e.t.Helper()
	text, err := os.ReadFile(filepath.Join(target, "name"))
	if err != nil || string(text) != name {
		e.t.Fatalf("read through %s: %q, %v; want %q", target, text, err, name)
	}
}

// daemons waits until exactly want daemons run and returns them.
func (e *env) daemons(want int) []kit.Process {
	e.t.Helper()
	deadline := time.Now().Add(soon)
	for {
		list, err := kit.DaemonProcesses()
		must(e.t, err)
		if len(list) == want {
			return list
		}
		if len(list) < want || time.Now().After(deadline) {
			e.t.Fatalf("%d nydusd run, want %d: %v", len(list), want, list)
		}
		// Too many: wait for the end of any.
		var fds []unix.PollFd
		for _, p := range list {
			if fd, err := unix.PidfdOpen(p.PID, 0); err == nil {
				fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
			}
		}
		if len(fds) == len(list) {
			_, _ = unix.Poll(fds, int(time.Until(deadline).Milliseconds())+1)
		}
		for _, fd := range fds {
			unix.Close(int(fd.Fd))
		}
	}
}

// kill kills a daemon and waits until all its threads are gone.
func (e *env) kill(pid int) {
	e.t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	must(e.t, err)
	defer unix.Close(fd)
	must(e.t, unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0))
	if p := (nydusd.Process{PID: pid, FD: fd}); !p.Wait(time.Now().Add(soon)) {
		e.t.Fatalf("nydusd %d does not end", pid)
	}
}

// record reads the only image's record.
func (e *env) record() *instance.Record {
	e.t.Helper()
	images, _ := e.records()
	if len(images) != 1 {
		e.t.Fatalf("%d instances, want one", len(images))
	}
	return images[0]
}

// records reads all records: those of images, and of the daemons they share.
func (e *env) records() (images, pools []*instance.Record) {
	e.t.Helper()
	keys, err := instance.Keys(runDir)
	must(e.t, err)
	for _, key := range keys {
		r, err := instance.ReadRecord(runDir, key)
		must(e.t, err)
		if all := r.Generations(); len(all) > 0 && all[0].Shared {
			pools = append(pools, r)
		} else {
			images = append(images, r)
		}
	}
	return images, pools
}

// pool reads the record of the only shared daemon.
func (e *env) pool() *instance.Record {
	e.t.Helper()
	_, pools := e.records()
	if len(pools) != 1 {
		e.t.Fatalf("%d pools, want one", len(pools))
	}
	return pools[0]
}

// wrapper is an executable in nydusd's place: a script with $REAL for the real
// one, which answers --version. It is bash that runs it: unlike dash it leaves
// the signal mask as it is.
func (e *env) wrapper(body string) string {
	e.t.Helper()
	return e.script(`exec "$REAL" --version`, body)
}

// versioned is the real nydusd under another version.
func (e *env) versioned(version string) string {
	e.t.Helper()
	return e.script("exec echo 'Version: v"+version+"'", `exec "$REAL" "$@"`)
}

func (e *env) script(version, body string) string {
	e.t.Helper()
	path := filepath.Join(e.t.TempDir(), "nydusd")
	text := fmt.Sprintf("#!/bin/bash\nREAL='%s'\n[ \"$1\" = --version ] && %s\n%s\n", e.tools.Nydusd, version, body)
	must(e.t, os.WriteFile(path, []byte(text), 0o755))
	return path
}

// mounted lists the targets beneath dir and beneath the run directory.
func mounted(t *testing.T, dir string) []string {
	t.Helper()
	table, err := rootfs.ReadTable()
	must(t, err)
	var list []string
	for _, m := range table {
		if strings.HasPrefix(m.Target, dir) || strings.HasPrefix(m.Target, runDir+"/") {
			list = append(list, m.Target)
		}
	}
	slices.Sort(list)
	return list
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

// waitsFor waits until a program waits for a process: it holds a pidfd of that
// process, and one of its threads is in poll(2).
func waitsFor(program, process int) error {
	deadline := time.Now().Add(soon)
	tick := time.NewTicker(time.Millisecond) // it makes no event
	defer tick.Stop()
	for ; time.Now().Before(deadline); <-tick.C {
		if hasPidfd(program, process) && polls(program) {
			return nil
		}
	}
	return fmt.Errorf("process %d does not wait for %d", program, process)
}

func hasPidfd(program, process int) bool {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", program))
	return slices.ContainsFunc(files, func(file string) bool {
		text, _ := os.ReadFile(file)
		return strings.Contains(string(text), fmt.Sprintf("\nPid:\t%d\n", process))
	})
}

func polls(program int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", program))
	return slices.ContainsFunc(threads, func(file string) bool {
		text, _ := os.ReadFile(file)
		number, _, _ := strings.Cut(string(text), " ")
		return number == itoa(unix.SYS_POLL) || number == itoa(unix.SYS_PPOLL)
	})
}
