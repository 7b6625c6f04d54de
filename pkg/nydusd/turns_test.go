package nydusd

import (
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process that is stopped does not run; one that reads from a pipe does whenever
// there is something.
func TestTurns(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() {
		in.Close()
		_ = cmd.Wait()
	}()
	start, err := StartTime(cmd.Process.Pid)
	must(t, err)
	p, err := Find(cmd.Process.Pid, start)
	must(t, err)
	defer p.Close()
	echo := func() {
		t.Helper()
		_, err := in.Write([]byte("x"))
		must(t, err)
		_, err = out.Read(make([]byte, 1))
		must(t, err)
	}
	turns := func() uint64 {
		t.Helper()
		n, err := p.Turns()
		must(t, err)
		return n
	}
	// rests waits until the process is back in read(2).
	rests := func() uint64 {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; {
			fields, err := stat(p.PID)
			must(t, err)
			if n := turns(); fields[0] == "S" && n == turns() || time.Now().After(deadline) {
				return n
			}
		}
	}
	echo()
	before := rests()
	if now := rests(); now != before {
		t.Errorf("%d turns, then %d, though it had nothing to do", before, now)
	}
	echo()
	if now := rests(); now <= before {
		t.Errorf("%d turns, %d before it had something to do", now, before)
	}
	must(t, unix.Kill(p.PID, unix.SIGSTOP))
	for !p.Stopped() {
	}
	before = turns()
	_, err = in.Write([]byte("x"))
	must(t, err)
	if now := turns(); now != before {
		t.Errorf("a stopped process had %d turns more", now-before)
	}
	must(t, unix.Kill(p.PID, unix.SIGCONT))
}
