package mount_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

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
	killAtEveryStep(t, newKiller(t, mountspec.ModeDedicated), 60)
}

func TestHelperKilledAtEveryStepToASharedDaemon(t *testing.T) {
	killAtEveryStep(t, newKiller(t, mountspec.ModeShared), 60)
}

func TestHelperKilledAtEveryStepWithoutADaemon(t *testing.T) {
	k := newKiller(t, mountspec.ModeDedicated)
	k.spec = k.provable(k.img)
	k.complete(k.img, k.spec)
	k.spec = k.by(mountspec.DriverEROFS, k.spec)
	k.option = k.env.option(k.spec)
	killAtEveryStep(t, k, 30)
	k.daemons(0)
}

// killAtEveryStep expects at least so many steps of a cold mount.
func killAtEveryStep(t *testing.T, k *killer, least int) {
	for _, state := range []string{"cold", "warm"} {
		steps := 0
		for step := 1; ; step++ {
			if state == "cold" {
				k.cold()
			}
			cmd := k.helper()
			kill := func() error { return cmd.Process.Kill() }
			killed, status, err := trace{calls: changing, n: step, strike: kill}.run(cmd)
			if err != nil || !killed && status.ExitStatus() != 0 {
				t.Fatalf("%s, step %d: exit status %d, %v", state, step, status.ExitStatus(), err)
			}
			k.works()
			if !killed {
				break
			}
			steps++
		}
		t.Logf("%s: %d steps", state, steps)
		if want := map[string]int{"cold": least, "warm": 15}[state]; steps < want {
			t.Errorf("%s: only %d steps were seen, want at least %d", state, steps, want)
		}
	}
}
