package nydusd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Find opens a process by PID and start time. It returns nil without an error
// when it is gone.
func Find(pid int, startTime uint64) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	// Read after the pidfd was opened: if it still matches, the pidfd is ours.
	now, err := StartTime(pid)
	if err != nil && !isGone(err) {
		return nil, errors.Join(fmt.Errorf("look at process %d: %w", pid, err), unix.Close(fd))
	}
	if err != nil || now != startTime {
		return nil, unix.Close(fd)
	}
	return &Process{PID: pid, StartTime: startTime, FD: fd}, nil
}

// StartTime reads when a process that still runs was started, in clock ticks
// since boot. A zombie does not run.
func StartTime(pid int) (uint64, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	if state := fields[0]; state == "Z" || state == "X" {
		return 0, fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	return strconv.ParseUint(fields[startTimeField], 10, 64)
}

// startTime is StartTime for a process that may have ended.
func startTime(pid int) (uint64, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(fields[startTimeField], 10, 64)
}

// startTimeField is the index of field 22 in what stat returns.
const startTimeField = 22 - 3

// stat returns the fields of proc_pid_stat(5) from the third on, the state.
func stat(pid int) ([]string, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	// Not pollable, and not polled: a mount on a running instance is over
	// before Go's poller would be set up.
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	// The second field, the command, may hold spaces and parentheses.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields)+2)
	}
	return fields, nil
}

// Orphans lists the daemons whose mountpoint lies beneath dir, from their
// argument lists. It finds a daemon whose starter was killed before it could
// write down the PID.
func Orphans(dir string) ([]*Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []*Process
	deadline := time.Now().Add(scanWait)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !own(e) {
			continue
		}
		p, err := lookAt(pid, dir, max(leastWait, time.Until(deadline)))
		if err != nil {
			return found, err
		}
		if p != nil {
			found = append(found, p)
		}
	}
	return found, nil
}

// lookAt returns the process if it is a daemon whose mountpoint lies beneath dir, and
// nil for one that keeps us waiting, which it does with one thread of ours.
func lookAt(pid int, dir string, wait time.Duration) (*Process, error) {
	type result struct {
		p   *Process
		err error
	}
	seen := make(chan result, 1)
	go func() {
		p, err := daemonOf(pid, dir)
		seen <- result{p, err}
	}()
	late := time.NewTimer(wait)
	defer late.Stop()
	select {
	case r := <-seen:
		return r.p, r.err
	case <-late.C:
	}
	go func() {
		if r := <-seen; r.p != nil {
			_ = r.p.Close()
		}
	}()
	return nil, nil
}

// daemonOf is lookAt for as long as it takes.
func daemonOf(pid int, dir string) (*Process, error) {
	start, err := StartTime(pid)
	if err != nil || !leads(pid) {
		return nil, nil // it has just ended, or is none of those that Start starts
	}
	p, err := Find(pid, start)
	if err != nil || p == nil {
		return nil, err
	}
	// Asked last: now it is this process and no other of the same number.
	if serves(pid, dir) && !p.Wait(time.Now()) {
		return p, nil
	}
	return nil, p.Close()
}

// own tells whether a process is of this user. Anybody can have any arguments,
// and keep whoever reads them waiting.
func own(proc os.DirEntry) bool {
	info, err := proc.Info()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// leads tells whether a process leads a session, as every daemon does.
func leads(pid int) bool {
	fields, err := stat(pid)
	return err == nil && fields[sessionField] == strconv.Itoa(pid)
}

// sessionField is the index of field 6 in what stat returns.
const sessionField = 6 - 3

func serves(pid int, dir string) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(text, []byte(dir)) {
		return false
	}
	args := strings.Split(string(text), "\x00")
	for i, a := range args[:len(args)-1] {
		if a == "--mountpoint" && strings.HasPrefix(args[i+1], dir+"/") {
			return true
		}
	}
	return false
}

// A process whose memory is on a filesystem that hangs, as that of a container whose
// nydusd does, keeps whoever looks at it waiting; a daemon does not. scanWait is how
// long all may take together to be looked at, leastWait what each may take when that
// is over.
const (
	scanWait  = 2 * time.Second
	leastWait = 20 * time.Millisecond
)
