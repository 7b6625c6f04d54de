package mount_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// killer mounts one image again and again, with helpers that are killed.
type killer struct {
	*env
	img    *fixture
	spec   *mountspec.Spec
	option string
	target string
}

func newKiller(t *testing.T, mode mountspec.Mode) *killer {
	t.Helper()
	e := newEnv(t)
	e.mode = mode
	k := &killer{env: e, img: small(t, "one"), target: e.target()}
	k.spec = e.spec(k.img)
	k.option = e.option(k.spec)
	return k
}

func (k *killer) helper() *exec.Cmd {
	return k.command(k.t.Context(), "nydus-overlayfs", k.spec.SnapshotDir, k.target, "-o", k.option)
}

// works checks that the next mount works, after what containerd does first.
func (k *killer) works() {
	k.t.Helper()
	for slices.Contains(mounted(k.t, k.target), k.target) {
		k.unmount(k.target)
	}
	out, err := k.helper().CombinedOutput()
	if err != nil || len(out) > 0 {
		k.t.Fatalf("the mount after a kill: %v: %s", err, out)
	}
	k.answers(k.target, "one")
	table, err := rootfs.ReadTable()
	must(k.t, err)
	targets := map[string]int{}
	for _, m := range table {
		targets[m.Target]++
	}
	g := k.record().Current
	if targets[k.target] != 1 || targets[g.Mountpoint] != 1 {
		k.t.Errorf("%d mounts on the target, %d on %s, want 1 and 1", targets[k.target], targets[g.Mountpoint], g.Mountpoint)
	}
	k.unmount(k.target)
}

// cold lets the instance go entirely.
func (k *killer) cold() {
	k.t.Helper()
	if err := k.tidy(soon); err != nil {
		k.t.Fatal(err)
	}
	k.daemons(0)
	if left := k.entries(); len(left) > 0 {
		k.t.Fatalf("left behind: %v", left)
	}
}

func (k *killer) span(prepare func()) time.Duration {
	k.t.Helper()
	var spans []time.Duration
	for range 9 {
		prepare()
		started := time.Now()
		out, err := k.helper().CombinedOutput()
		spans = append(spans, time.Since(started))
		if err != nil {
			k.t.Fatalf("%v: %s", err, out)
		}
		k.unmount(k.target)
	}
	return slices.Min(spans)
}

// The seed of the random moments; NYDUS_KILL_SEED repeats a run.
func seed(t *testing.T) *rand.Rand {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if text := os.Getenv("NYDUS_KILL_SEED"); text != "" {
		var err error
		n, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	t.Logf("NYDUS_KILL_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0))
}

func TestHelperKilledAtRandomMoments(t *testing.T) {
	random := seed(t)
	for _, state := range []struct {
		name    string
		linger  time.Duration
		running bool // a reconciler runs meanwhile
		times   int
		mode    mountspec.Mode
	}{
		{"no reconciler", 0, false, 70, mountspec.ModeDedicated},
		{"eager reconciler", 0, true, 65, mountspec.ModeDedicated},
		{"idle instances linger", 30 * time.Millisecond, true, 65, mountspec.ModeDedicated},
		{"shared without reconciler", 0, false, 50, mountspec.ModeShared},
		{"shared with an eager reconciler", 0, true, 50, mountspec.ModeShared},
	} {
		t.Run(state.name, func(t *testing.T) {
			k := newKiller(t, state.mode)
			cold, warm := k.span(k.cold), k.span(func() {})
			if state.running {
				r := k.reconcile(state.linger)
				defer func() { must(t, r.stop()) }()
			}
			// A helper that was done before its moment came does not count.
			kills, n := 0, 0
			for ; kills < state.times; n++ {
				if n == 20*state.times {
					t.Fatalf("only %d of %d helpers were still there to be killed, want %d; a mount takes %v, on a running instance %v",
						kills, n, state.times, cold, warm)
				}
				if !state.running && n%2 == 0 {
					k.cold()
				}
				span := cold
				if n%2 == 1 {
					span = warm
				}
				if !k.killAfter(time.Duration(random.Int64N(int64(span) * 12 / 10))) {
					kills++
				}
				k.works()
			}
			t.Logf("a mount takes %v, on a running instance %v; %d helpers were killed in %d attempts", cold, warm, kills, n)
		})
	}
}

// A daemon whose starter was killed, and that neither mounts nor ends.
func TestOrphanIsEnded(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	started, silent := filepath.Join(t.TempDir(), "started"), filepath.Join(t.TempDir(), "silent")
	must(t, unix.Mkfifo(started, 0o600))
	must(t, unix.Mkfifo(silent, 0o600))
	// One process only: the shell itself hangs, in a read that nobody answers.
	hanging := e.wrapper("exec 9<>'" + silent + "'; echo > '" + started + "'; read -r -u 9 _")
	for _, next := range []string{"mount", "reconciler"} {
		s := e.spec(img)
		s.Daemon.Path, s.Daemon.StartTimeout = hanging, time.Minute
		cmd := e.command(t.Context(), "nydus-overlayfs", s.SnapshotDir, e.target(), "-o", e.option(s))
		must(t, cmd.Start())
		_, err := os.ReadFile(started) // ends when the daemon has run
		must(t, err)
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		if n := len(processesOf(t, hanging)); n != 1 {
			t.Fatalf("%d orphans, want 1", n)
		}
		if next == "mount" {
			e.unmount(e.mustMount(e.spec(img)))
		}
		must(t, e.tidy(soon))
		if left := processesOf(t, hanging); len(left) > 0 {
			t.Errorf("after the next %s: %v", next, left)
		}
	}
}

// killAfter starts a helper and kills it after d. It tells whether that was too
// late.
func (k *killer) killAfter(d time.Duration) (finished bool) {
	k.t.Helper()
	cmd := k.helper()
	must(k.t, cmd.Start())
	timer := time.AfterFunc(d, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	timer.Stop()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL) {
		k.t.Fatalf("a helper that was to be killed after %v: %v", d, err)
	}
	return err == nil
}

// The helper is killed before each of its system calls that could matter.
func TestHelperKilledAtEveryStep(t *testing.T) {
	killAtEveryStep(t, mountspec.ModeDedicated)
}

func TestHelperKilledAtEveryStepToASharedDaemon(t *testing.T) {
	killAtEveryStep(t, mountspec.ModeShared)
}

func killAtEveryStep(t *testing.T, mode mountspec.Mode) {
	k := newKiller(t, mode)
	for _, state := range []string{"cold", "warm"} {
		steps := 0
		for step := 1; ; step++ {
			if state == "cold" {
				k.cold()
			}
			killed, err := traceAndKill(k.helper(), step)
			if err != nil {
				t.Fatalf("%s, step %d: %v", state, step, err)
			}
			k.works()
			if !killed {
				break
			}
			steps++
		}
		t.Logf("%s: %d steps", state, steps)
		if want := map[string]int{"cold": 60, "warm": 15}[state]; steps < want {
			t.Errorf("%s: only %d steps were seen, want at least %d", state, steps, want)
		}
	}
}

// traceAndKill runs a program under ptrace and kills it when it is about to
// make its n-th system call that changes something. It tells whether it came to
// that. Children of the program are not traced.
func traceAndKill(cmd *exec.Cmd, n int) (killed bool, err error) {
	// All requests must come from the thread that traces.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	pid := cmd.Process.Pid
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return false, fmt.Errorf("wait for the traced program: %w", err)
	}
	const options = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return false, fmt.Errorf("trace: %w", err)
	}
	seen := 0
	for tid := pid; ; {
		sig := 0
		switch {
		case status.Stopped() && status.StopSignal() == unix.SIGTRAP|0x80:
			if changes, err := entersChange(tid); err != nil {
				return false, err
			} else if changes {
				seen++
			}
			if seen == n {
				return true, kill(cmd)
			}
		case status.Stopped() && status.TrapCause() <= 0 && status.StopSignal() != unix.SIGTRAP && status.StopSignal() != unix.SIGSTOP:
			sig = int(status.StopSignal())
		}
		if status.Stopped() {
			if err := unix.PtraceSyscall(tid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
				return false, fmt.Errorf("resume thread %d: %w", tid, err)
			}
		}
		tid, err = unix.Wait4(-1, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false, fmt.Errorf("wait for the traced program: %w", err)
		case tid == pid && status.Exited():
			if status.ExitStatus() != 0 {
				err = fmt.Errorf("exit status %d", status.ExitStatus())
			}
			return false, errors.Join(err, cmd.Process.Release())
		}
	}
}

func kill(cmd *exec.Cmd) error {
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || (tid == cmd.Process.Pid && (status.Exited() || status.Signaled())) {
			return errors.Join(err, cmd.Process.Release())
		}
	}
}

// changing are the system calls that leave something behind.
var changing = []uint64{
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_OPENAT, unix.SYS_MKDIRAT, unix.SYS_LINKAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT,
	unix.SYS_WRITE, unix.SYS_FSYNC, unix.SYS_FLOCK, unix.SYS_CLOSE, unix.SYS_CLONE, unix.SYS_CLONE3, unix.SYS_WAIT4,
	unix.SYS_PRLIMIT64, unix.SYS_EXIT_GROUP,
}

// entersChange tells whether a stopped thread is about to make a system call
// that leaves something behind.
func entersChange(tid int) (bool, error) {
	var info struct {
		op   uint8
		_    [3]uint8
		arch uint32
		_    [2]uint64
		nr   uint64
		_    [8]uint64
	}
	const get, entry = 0x420e, 1 // PTRACE_GET_SYSCALL_INFO, PTRACE_SYSCALL_INFO_ENTRY
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, get, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0); errno != 0 {
		if errno == unix.ESRCH {
			return false, nil // it has just been ended
		}
		return false, fmt.Errorf("read the system call of thread %d: %w", tid, errno)
	}
	return info.op == entry && slices.Contains(changing, info.nr), nil
}
