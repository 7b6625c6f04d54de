package instance

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// child starts a process that ends when it is killed.
func child(t *testing.T) (pid int, start uint64, kill func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sleep", "1000")
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_, _ = cmd.Process.Wait()
	})
	start, err := nydusd.StartTime(cmd.Process.Pid)
	must(t, err)
	return cmd.Process.Pid, start, func() {
		t.Helper()
		must(t, cmd.Process.Kill())
		// Waits for the end, and leaves the zombie.
		for {
			err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				must(t, err)
				return
			}
		}
	}
}

func reaped(pid int) bool {
	return errors.Is(unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil), unix.ECHILD)
}

// TestHoldAdoptsNoZombie: a daemon that ended before it was looked for is over, and leaves
// no zombie to a process that goes on for long.
func TestHoldAdoptsNoZombie(t *testing.T) {
	pid, start, kill := child(t)
	h := &Hold{}
	must(t, h.adopt(&Generation{PID: pid, StartTime: start}))
	if h.proc == nil || h.Ended() {
		t.Fatalf("one that lives: %+v", h.proc)
	}
	must(t, h.proc.Close())
	kill()
	if reaped(pid) {
		t.Fatal("it is no zombie before")
	}
	must(t, h.adopt(&Generation{PID: pid, StartTime: start}))
	if h.proc != nil || !h.Ended() || !reaped(pid) {
		t.Errorf("process %+v, ended: %v, reaped: %v", h.proc, h.Ended(), reaped(pid))
	}
}

// TestHoldIsNotHeldUpByZombies: what a zombie was holding is removed, whoever's child it is.
func TestHoldIsNotHeldUpByZombies(t *testing.T) {
	run := t.TempDir()
	i := mustOpen(t, dirOf(run, testKey), openCreate)
	defer i.Close()
	pid, start, kill := child(t)
	i.rec.Retired = []Generation{{Number: 1, PID: pid, StartTime: start, Ready: true, Mountpoint: filepath.Join(string(dirOf(run, testKey)), "g1", "mnt")}}
	must(t, i.write())
	kill()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h := &Hold{inst: i}
	if err := h.drain(ctx); err != nil || len(i.rec.Retired) > 0 {
		t.Errorf("%+v, %v", i.rec.Retired, err)
	}
	if reaped(pid) {
		t.Error("it was no zombie meanwhile")
	}
}
