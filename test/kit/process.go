package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is a server that the kit started: containerd, the snapshotter, the registry.
type Daemon struct {
	Name string
	PID  int
	Log  string // path of its output

	done chan struct{}
	err  error
}

// startDaemon starts argv in a session of its own, output appended to log.
func startDaemon(name, log string, env, argv []string) (*Daemon, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return start(name, log, cmd)
}

// start starts a command that is a server.
func start(name, log string, cmd *exec.Cmd) (*Daemon, error) {
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	d := &Daemon{Name: name, PID: cmd.Process.Pid, Log: log, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

// Running reports whether the process has not ended yet.
func (d *Daemon) Running() bool {
	if d == nil {
		return false
	}
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// Err waits for the process to end and says how it did; an exit code of 0 is an
// error too, since a server is not meant to end by itself.
func (d *Daemon) Err() error {
	<-d.done
	if d.err == nil {
		return errors.New("exit status 0")
	}
	return d.err
}

// Signal sends s and does not wait.
func (d *Daemon) Signal(s syscall.Signal) error {
	if !d.Running() {
		return nil
	}
	return unix.Kill(d.PID, s)
}

// end sends s and waits; one that takes longer than the deadline is killed and reported.
func (d *Daemon) end(s syscall.Signal, within time.Duration) error {
	if !d.Running() {
		return nil
	}
	_ = unix.Kill(d.PID, s)
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-d.done:
		return nil
	case <-timer.C:
		_ = unix.Kill(d.PID, unix.SIGKILL)
		<-d.done
		return fmt.Errorf("stop %s (pid %d): still running %v after %v, killed", d.Name, d.PID, within, s)
	}
}

// ready waits until the daemon accepts connections on its socket. A connection is
// refused between bind and listen, for which no event exists: hence the ticker.
func (d *Daemon) ready(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := net.Dial("unix", socket)
		if err == nil {
			return c.Close()
		}
		select {
		case <-d.done:
			return fmt.Errorf("%s ended before it was ready: %w\n%s", d.Name, d.Err(), tail(d.Log, 20))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready on %s: %w\n%s", d.Name, socket, errors.Join(ctx.Err(), err), d.dissect())
		case <-tick.C:
		}
	}
}

// dissect tells what a daemon waits for, as far as that can be seen: the kernel's
// stacks of its threads, and those of its goroutines, which end it.
func (d *Daemon) dissect() string {
	var text strings.Builder
	text.WriteString(tail(d.Log, 5) + "\n")
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", d.PID))
	for _, thread := range threads {
		stack, _ := os.ReadFile(thread)
		if !bytes.Contains(stack, []byte("futex_wait")) && !bytes.Contains(stack, []byte("ep_poll")) {
			fmt.Fprintf(&text, "%s:\n%s", thread, stack)
		}
	}
	before, _ := os.ReadFile(d.Log)
	_ = d.end(unix.SIGQUIT, 10*time.Second)
	after, _ := os.ReadFile(d.Log)
	for _, routine := range strings.Split(string(after[min(len(before), len(after)):]), "\n\n") {
		// Those that only serve are many.
		if strings.HasPrefix(routine, "goroutine") && (strings.Contains(routine, "plugin") || strings.Contains(routine, "main.")) {
			text.WriteString(routine + "\n\n")
		}
	}
	return text.String()
}

// tail is the end of a log, for error texts.
func tail(path string, lines int) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimRight(text, "\n"), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// dumpOnFailure adds the end of the logs to the test's own output.
func dumpOnFailure(t TB, logs ...string) {
	if !t.Failed() {
		return
	}
	for _, log := range logs {
		if _, err := os.Stat(log); err == nil {
			t.Logf("--- %s of %s\n%s", filepath.Base(log), t.Name(), tail(log, 150))
		}
	}
}
