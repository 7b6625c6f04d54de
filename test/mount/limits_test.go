package mount_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// limitFile finds the file that holds a cgroup's limit, whichever version has the
// controller.
func limitFile(t *testing.T, cgroup, v1, v2 string) string {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/*" + cgroup + "/" + v1, "/sys/fs/cgroup" + cgroup + "/" + v2, "/sys/fs/cgroup/*" + cgroup + "/" + v2} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0]
		}
	}
	t.Fatalf("no cgroup %s has %s or %s", cgroup, v1, v2)
	return ""
}

// What the option says is in force for the daemon, and for its successor.
func TestLimitsOfADaemon(t *testing.T) {
	e := newEnv(t)
	r := e.recover(recovery.PolicyFailover, false)
	img := small(t, "one")
	s := e.spec(img)
	s.Daemon.MemoryLimit, s.Daemon.CPULimit = 128<<20, 750
	target := e.mustMount(s)
	check := func() {
		t.Helper()
		g := e.current()
		cgroup := fmt.Sprintf("%s/%s.g%d", s.Daemon.CgroupParent, s.Instance, g.Number)
		memory, cpu := limitFile(t, cgroup, "memory.limit_in_bytes", "memory.max"), limitFile(t, cgroup, "cpu.cfs_quota_us", "cpu.max")
		for file, want := range map[string]string{memory: "134217728", cpu: "75000"} {
			text, err := os.ReadFile(file)
			if err != nil || !strings.HasPrefix(string(text), want) {
				t.Errorf("%s is %q, %v; want %s", file, text, err, want)
			}
			procs, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cgroup.procs"))
			if err != nil || !slices.Contains(strings.Fields(string(procs)), itoa(g.PID)) {
				t.Errorf("nydusd %d is not in %s: %q, %v", g.PID, filepath.Dir(file), procs, err)
			}
		}
		if len(g.Unmet) > 0 {
			t.Errorf("not in force: %q", g.Unmet)
		}
	}
	check()
	before := e.current()
	if e.succeeds() {
		within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	}
	must(t, unix.Kill(before.PID, unix.SIGKILL))
	within(t, "a successor", func() bool { g := e.current(); return g.Ready && g.PID != before.PID })
	check()
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
}

// A limit that the kernel refuses keeps no image from being mounted, and is told
// where people look.
func TestUnmetLimit(t *testing.T) {
	e := newEnv(t)
	r := e.recover(recovery.PolicyRestart, false)
	img := small(t, "one")
	s := e.spec(img)
	s.Daemon.MemoryLimit, s.Daemon.CPULimit = 128<<20, 1
	target := e.mustMount(s)
	e.holds(img, target)
	const want = "the cpu limit of 1 thousandths of a core is not in force: "
	if g := e.current(); len(g.Unmet) != 1 || !strings.HasPrefix(g.Unmet[0], want) {
		t.Errorf("the record says %q, want %q", g.Unmet, want)
	}
	log, err := os.ReadFile(filepath.Join(e.root, "instances", s.Instance, "nydusd.log"))
	if err != nil || !strings.Contains(string(log), "warning: "+want) {
		t.Errorf("the daemon's log does not say %q: %v\n%s", want, err, log)
	}
	within(t, "the snapshotter's log says it", func() bool {
		return strings.Contains(r.log.String(), `msg="a limit of nydusd is not in force"`) && strings.Contains(r.log.String(), want)
	})
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
}

// With less memory than it needs to start nydusd is killed, and the mount says why.
func TestTooLittleMemoryToStart(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	s.Daemon.MemoryLimit = 1 << 20
	r := e.mount(s, e.target())
	if want := "the kernel killed it for memory, of which it may use 1048576 bytes: raise [cgroup] memory"; r.code == 0 || !strings.Contains(r.out, want) {
		t.Errorf("exit status %d, want an error that says %q: %s", r.code, want, r.out)
	}
	e.daemons(0)
}

// hogName makes this program use up a cgroup's memory.
const hogName = "hog"

// hog joins a cgroup and uses memory until somebody was killed there for it.
func hog(events string) error {
	if err := os.WriteFile(filepath.Join(filepath.Dir(events), "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	// Less attractive than nydusd with its 1000, whatever the tests themselves run with.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0); err != nil {
		return err
	}
	// What is in a file in memory counts for the cgroup, and for no process.
	fd, err := unix.MemfdCreate("hog", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for step := make([]byte, 256<<10); ; {
		text, err := os.ReadFile(events)
		if err != nil || !strings.Contains(string(text), "oom_kill 0") {
			return err
		}
		if _, err := unix.Write(fd, step); err != nil {
			return err
		}
	}
}

// starve makes the kernel kill whom it likes best in a cgroup for its memory limit,
// as if nydusd had grown for a moment. What it used is free again when it returns.
func (e *env) starve(key string, g instance.Generation) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", limitFile(e.t, fmt.Sprintf("%s/%s.g%d", g.Cgroup, key, g.Number), "memory.oom_control", "memory.events"))
	cmd.Args[0] = hogName
	out, err := cmd.CombinedOutput()
	// With nydusd gone the kernel may take it too, before it has seen that.
	if kills, _ := instance.OOMKills(key, g); ctx.Err() != nil || err != nil && kills < 2 {
		e.t.Fatalf("use up the memory of %s: %v: %s", cmd.Args[1], err, out)
	}
}

// served is the generation in use of one of several images, or a zero one.
func served(t *testing.T, key string) instance.Generation {
	t.Helper()
	rec, err := instance.ReadRecord(runDir, key)
	must(t, err)
	if rec.Current == nil {
		return instance.Generation{}
	}
	return *rec.Current
}

// A daemon that is killed for memory is succeeded like any other; nobody else
// notices.
func TestDaemonKilledForMemory(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // it dies as in TestRestart
	}
	r := e.recover(recovery.PolicyFailover, true)
	s, o := e.spec(small(t, "one")), e.spec(small(t, "two"))
	// The kernel takes nydusd, however much another in its cgroup has.
	s.Daemon.MemoryLimit, s.Daemon.OOMScoreAdj = 96<<20, 1000
	target, other := e.mustMount(s), e.mustMount(o)
	before, beside := served(t, s.Instance), served(t, o.Instance)
	bystanders := e.read(other, 1)
	within(t, "the daemon's descriptor is kept", func() bool { return served(t, s.Instance).Kept })
	readers := e.read(target, 3)
	e.starve(s.Instance, before)
	within(t, "a successor", func() bool { return served(t, s.Instance).Restarts > 0 })
	readers.end(t)
	e.answers(target, "one")
	if text := r.log.String(); !strings.Contains(text, `cause="killed at its memory limit"`) || strings.Contains(text, "cause=unknown") {
		t.Errorf("the log does not say that it was killed at its memory limit:\n%s", text)
	}
	bystanders.end(t)
	if now := served(t, o.Instance); now.PID != beside.PID {
		t.Errorf("the other image is served by nydusd %d, want %d as before", now.PID, beside.PID)
	}
	if n, err := instance.OOMKills(o.Instance, beside); err != nil || n != 0 {
		t.Errorf("%d of the other image's daemons were killed for memory, %v", n, err)
	}
	e.unmount(target)
	e.unmount(other)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// greedy is an image whose reading takes more memory than its daemon needs to
// start: a chunk is read and kept as a whole.
func greedy(t *testing.T) *fixture {
	t.Helper()
	return makeFixture(t, "greedy", kit.NydusOptions{ChunkSize: "0x1000000", Compressor: "none"}, func(tb kit.TB) *kit.Image {
		random := rand.NewChaCha8([32]byte{7})
		files := []kit.File{{Name: "./"}, {Name: "name", Data: "greedy"}}
		for n := range greedyFiles {
			data := make([]byte, 16<<20)
			_, _ = random.Read(data)
			files = append(files, kit.File{Name: fmt.Sprintf("data%d", n), Data: string(data)})
		}
		return kit.MustBuildImage(tb, kit.Pause, kit.FileLayer(files...))
	})
}

const (
	greedyFiles = 3
	// tightMemory is enough to start.
	tightMemory = 16 << 20
)

// An image whose daemons cannot live with their limit is given up; its readers
// fail rather than hang, and no other image notices.
func TestMemoryLimitTooSmall(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // it dies as in TestRestart
	}
	r := e.recover(recovery.PolicyFailover, false)
	s, o := e.spec(greedy(t)), e.spec(small(t, "two"))
	s.Daemon.MemoryLimit = tightMemory
	target, other := e.mustMount(s), e.mustMount(o)
	bystanders := e.read(other, 1)
	within(t, "the daemon's descriptor is kept", func() bool { return served(t, s.Instance).Kept })
	first, beside := served(t, s.Instance), served(t, o.Instance)
	// In processes of their own: whatever this one has open there would be closed by
	// a successor that it starts, which waits for that successor.
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute) // five deaths, which take seconds on a busy machine
	defer cancel()
	ends := make(chan error, greedyFiles)
	for n := range greedyFiles {
		cat := exec.CommandContext(ctx, "cat", filepath.Join(target, fmt.Sprintf("data%d", n)))
		var said strings.Builder
		cat.Stderr = &said
		go func() {
			err := cat.Run()
			if ctx.Err() != nil {
				err = errors.New("it hangs")
			} else if text := strings.ToLower(said.String()); strings.Contains(text, unix.ENOTCONN.Error()) || strings.Contains(text, unix.ECONNABORTED.Error()) {
				err = unix.ENOTCONN
			}
			ends <- err
		}()
	}
	for range greedyFiles {
		if err := <-ends; !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("reading what needs more memory than there is: %v; want it to fail", err)
		}
	}
	within(t, "it is given up", func() bool { return strings.Contains(r.log.String(), "keeps dying and is given up") })
	if n, err := instance.OOMKills(s.Instance, first); err != nil || n < 5 {
		t.Errorf("%d daemons were killed for memory, %v; want all of them", n, err)
	}
	bystanders.end(t)
	if now := served(t, o.Instance); now.PID != beside.PID {
		t.Errorf("the other image is served by nydusd %d, want %d as before", now.PID, beside.PID)
	}
	e.unmount(target)
	e.unmount(other)
	must(t, e.tidy(soon))
	r.stop()
}
