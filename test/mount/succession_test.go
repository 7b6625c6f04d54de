package mount_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// replacing are the system calls by which a daemon is replaced. A request to its API
// is a write.
var replacing = []uint64{
	unix.SYS_FLOCK, unix.SYS_FTRUNCATE, unix.SYS_CLONE, unix.SYS_CLONE3, unix.SYS_CONNECT, unix.SYS_WRITE, unix.SYS_SENDMSG,
	unix.SYS_RECVMSG, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_FSYNC, unix.SYS_MKDIRAT, unix.SYS_PIDFD_SEND_SIGNAL,
	unix.SYS_WAITID, unix.SYS_EXIT_GROUP,
}

// recoveryName is the name under which this test program is a snapshotter's recovery,
// until a daemon has been succeeded.
const recoveryName = "recovery-of-one"

func recoverOne() {
	book := &logBook{said: make(chan struct{}, 1)}
	cfg := recovery.Config{RunDir: runDir, Policy: recovery.PolicyFailover, StartTimeout: startTimeout, Log: slog.New(slog.NewTextHandler(book, nil)),
		Spare: func(context.Context, bool) (recovery.Spare, error) {
			return custody.Connect(filepath.Join(runDir, "holder.sock"))
		}}
	go func() {
		fmt.Fprintln(os.Stderr, recovery.New(cfg).Run(context.Background()))
		os.Exit(2)
	}()
	for range book.said {
		if strings.Contains(book.String(), "nydusd was succeeded") {
			os.Exit(0)
		}
	}
}

// strikes are who is killed at a step of a succession: who carries it out, the
// successor, or both.
var strikes = []string{"starter", "successor", "both"}

// succession kills at every step of what replaces a daemon.
type succession struct {
	*env
	img    *fixture
	target string
	before int // the daemon that is replaced
	killed int // successors
	step   int
	who    string
}

// strike returns what is killed at a step.
func (s *succession) strike(cmd *exec.Cmd) func() error {
	return func() error {
		if s.who != "successor" {
			if err := cmd.Process.Kill(); err != nil {
				return err
			}
		}
		if s.who == "starter" {
			return nil
		}
		list, err := kit.DaemonProcesses()
		for _, p := range list {
			if p.PID != s.before {
				s.killed++
				err = errors.Join(err, unix.Kill(p.PID, unix.SIGKILL))
			}
		}
		return err
	}
}

// trace runs what replaces the daemon, and returns its exit status, -1 when it was
// killed.
func (s *succession) trace(cmd *exec.Cmd) (struck bool, code int) {
	s.t.Helper()
	struck, status, err := trace{calls: replacing, from: unix.SYS_FLOCK, n: s.step, strike: s.strike(cmd)}.run(cmd)
	if killed := struck && s.who != "successor"; err != nil || killed != status.Signaled() {
		s.t.Fatalf("step %d, kill of %s: status %x, %v", s.step, s.who, uint32(status), err)
	}
	return struck, status.ExitStatus()
}

// settles waits until one daemon serves and is written down, and reads all it has.
func (s *succession) settles() {
	s.t.Helper()
	within(s.t, fmt.Sprintf("after step %d, kill of %s, one daemon serves, and is written down", s.step, s.who), s.served)
	s.holds(s.img, s.target)
}

func (s *succession) served() bool {
	g := s.current()
	p, err := nydusd.Find(g.PID, g.StartTime)
	if err != nil || p == nil {
		return false
	}
	defer p.Close()
	connected, err := p.Connected()
	list, lerr := kit.DaemonProcesses()
	return err == nil && lerr == nil && connected && len(list) == 1
}

// atEveryStep plays a succession again and again, each time with a kill one step
// later.
func (s *succession) atEveryStep(least int, play func() (struck bool)) {
	s.t.Helper()
	struck, turn := 0, seed(s.t).IntN(len(strikes))
	for s.step = 1; ; s.step++ {
		s.who = strikes[(s.step+turn)%len(strikes)]
		s.target = s.mustMount(s.spec(s.img))
		hit := play()
		s.unmount(s.target)
		must(s.t, s.tidy(soon))
		s.reap()
		if !hit {
			break
		}
		struck++
	}
	s.t.Logf("%d steps, %d successors killed", struck, s.killed)
	if struck < least || s.killed < least/4 {
		s.t.Errorf("%d steps and %d killed successors were seen, want at least %d and %d", struck, s.killed, least, least/4)
	}
}

// The snapshotter recovers what it found dead, from the holder, and is killed at
// every step, or the successor, or both: the next one brings it back.
func TestSuccessionKilledAtEveryStep(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestFailover
	}
	program, err := os.Executable()
	must(t, err)
	s := &succession{env: e, img: small(t, "one")}
	s.atEveryStep(30, func() bool {
		r := e.recover(recovery.PolicyFailover, true)
		within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
		s.before = e.current().PID
		r.stop()
		e.kill(s.before)
		cmd := e.command(t.Context(), program)
		cmd.Args[0] = recoveryName
		struck, code := s.trace(cmd)
		if code > 0 {
			t.Fatalf("step %d, kill of %s: exit status %d", s.step, s.who, code)
		}
		r = e.recover(recovery.PolicyFailover, true)
		s.settles()
		r.stop()
		return struck
	})
	e.holderEnds()
}

// An upgrade is killed at every step, or the successor, or both, while the
// snapshotter runs.
func TestUpgradeKilledAtEveryStep(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestUpgrade
	}
	program := filepath.Join(kit.Binaries(t, "nydus-snapshotter"), "nydus-snapshotter")
	s := &succession{env: e, img: small(t, "one")}
	s.atEveryStep(30, func() bool {
		r := e.recover(recovery.PolicyFailover, true)
		within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
		s.before = e.current().PID
		cmd := e.command(t.Context(), program, "daemon", "upgrade", "--run-dir", runDir, "--all", "--nydusd", e.tools.Nydusd)
		struck, _ := s.trace(cmd)
		s.settles()
		if text := r.log.String(); strings.Contains(text, "given up") {
			t.Errorf("step %d, kill of %s: it was given up:\n%s", s.step, s.who, text)
		}
		r.stop()
		return struck
	})
	e.holderEnds()
}
