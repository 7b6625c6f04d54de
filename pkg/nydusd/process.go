package nydusd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Process is a started daemon.
type Process struct {
	// PID and StartTime (in clock ticks since boot) name the process for good;
	// a PID alone is used again.
	PID       int
	StartTime uint64
	// FD is a pidfd: readable once the process has ended.
	FD int
	// Warnings say what could not be arranged although the daemon runs, Unmet
	// those of them that tell of a limit that is not in force.
	Warnings, Unmet []string
}

// Kill ends a daemon that nobody uses, and waits until it is gone. A daemon
// whose mounts are in use must not be killed. Its filesystem on mountpoint is
// aborted: when nydusd starts it asks that itself, and a thread that waits for an
// answer from the threads that were killed beside it would never end, nor let go
// of the device whose closing would wake it.
func (p *Process) Kill(mountpoint string) error {
	if err := p.killGroup(); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill nydusd %d: %w", p.PID, err)
	}
	// After the signal, so that no mount comes behind it that is asked.
	if err := rootfs.Abort(mountpoint); err != nil {
		return fmt.Errorf("kill nydusd %d: %w", p.PID, err)
	}
	if !p.Wait(time.Now().Add(killWait)) {
		return fmt.Errorf("kill nydusd %d: it has not ended after %s; a disk or another file system that it uses may hang", p.PID, killWait)
	}
	return nil
}

// killWait is how long a process may take to end that was killed. It takes
// milliseconds, or as long as the disk hangs that it waits for.
const killWait = 5 * time.Second

// killGroup kills the process with what it started itself, when it is a script
// for example. Before Linux 6.9 a pidfd names no group (EINVAL), and a process
// that leads none yet has none (ESRCH).
func (p *Process) killGroup() error {
	const group = 1 << 2 // PIDFD_SIGNAL_PROCESS_GROUP
	err := unix.PidfdSendSignal(p.FD, unix.SIGKILL, nil, group)
	if err != nil {
		err = unix.PidfdSendSignal(p.FD, unix.SIGKILL, nil, 0)
	}
	return err
}

// Abandon makes a daemon end whose filesystem is gone, or that hangs, and does not
// wait for it.
func (p *Process) Abandon() error {
	if err := unix.PidfdSendSignal(p.FD, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill nydusd %d, which serves nobody: %w", p.PID, err)
	}
	return nil
}

// End ends a daemon that has mounted nothing, and waits until it is gone. The
// Process stays the caller's.
func (p *Process) End() error {
	if err := p.Abandon(); err != nil {
		return err
	}
	defer p.Exit() // we may be its parent
	if !p.Wait(time.Now().Add(killWait)) {
		return fmt.Errorf("end nydusd %d: it is killed, and still there after %s", p.PID, killWait)
	}
	return nil
}

// Wait waits for the process to end, until deadline (zero: for ever), and tells
// whether it has.
func (p *Process) Wait(deadline time.Time) bool { return p.wait(deadline, -1) }

// WaitFile waits until there is a file, which the process is expected to make, or
// the process has ended, or deadline has come, which is no error.
func (p *Process) WaitFile(path string, deadline time.Time) error {
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		defer unix.Close(watch)
		_, err = unix.InotifyAddWatch(watch, filepath.Dir(path), unix.IN_CREATE|unix.IN_MOVED_TO)
	}
	if err != nil {
		return fmt.Errorf("watch %s: %w", filepath.Dir(path), err)
	}
	buf := make([]byte, 4096)
	polls := []unix.PollFd{{Fd: int32(p.FD), Events: unix.POLLIN}, {Fd: int32(watch), Events: unix.POLLIN}}
	for polls[0].Revents == 0 {
		var st unix.Stat_t
		left := time.Until(deadline)
		if err := unix.Lstat(path, &st); err == nil || left <= 0 {
			return nil
		}
		if _, err := unix.Poll(polls, int(left/time.Millisecond)+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for %s: %w", path, err)
		}
		_, _ = unix.Read(watch, buf) // what it says does not matter
	}
	return nil
}

// WaitContext waits for the process to end or ctx, and tells whether it has
// ended. Where it cannot wait it returns at once.
func (p *Process) WaitContext(ctx context.Context) bool {
	r, w, err := os.Pipe()
	if err != nil {
		return p.wait(time.Now(), -1) // out of descriptors: the caller asks again
	}
	defer r.Close()
	// A second close is harmless.
	defer w.Close()
	defer context.AfterFunc(ctx, func() { w.Close() })()
	return p.wait(time.Time{}, int(r.Fd()))
}

func (p *Process) wait(deadline time.Time, stop int) bool {
	polls := []unix.PollFd{{Fd: int32(p.FD), Events: unix.POLLIN}, {Fd: int32(stop)}}
	for {
		timeout := -1
		if !deadline.IsZero() {
			timeout = int(max(0, (time.Until(deadline)+time.Millisecond-1)/time.Millisecond))
		}
		_, err := unix.Poll(polls, timeout)
		if !errors.Is(err, unix.EINTR) {
			return polls[0].Revents != 0
		}
	}
}

// Connected tells whether the daemon's filesystem still exists: as long as it
// does, its device number is nobody else's. A daemon whose filesystem is gone
// serves nobody, even if it has not ended yet.
func (p *Process) Connected() (bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", p.PID)
	entries, err := os.ReadDir(dir)
	if isGone(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at process %d: %w", p.PID, err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// The name only tells what not to touch: a file of the cache may lie on a
		// disk that hangs, and the device's node may have been made anew.
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && !strings.HasPrefix(link, "/dev/") {
			continue
		}
		var st unix.Stat_t
		if err == nil {
			err = unix.Stat(filepath.Join(dir, e.Name()), &st)
		}
		if isGone(err) || err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != fuseDevice) {
			continue
		}
		serves := false
		if err == nil {
			serves, err = p.serving(fd)
		}
		if err != nil {
			return false, fmt.Errorf("look at descriptor %d of process %d: %w", fd, p.PID, err)
		}
		if serves {
			return true, nil
		}
	}
	return false, nil
}

// isGone tells whether an error about a process or one of its descriptors means
// that it is there no more. Any other one says nothing about it.
func isGone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrProcessDone)
}

// fuseDevice is the number of /dev/fuse (10, 229), which nydusd opens to serve a
// filesystem.
const fuseDevice = 10<<8 | 229

// serving looks at one of the daemon's open FUSE devices. The kernel reports an
// error on it once the filesystem is gone.
func (p *Process) serving(fd int) (bool, error) {
	own, err := unix.PidfdGetfd(p.FD, fd, 0)
	if isGone(err) || errors.Is(err, unix.EBADF) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("pidfd_getfd: %w", err)
	}
	defer unix.Close(own)
	polls := []unix.PollFd{{Fd: int32(own)}}
	for {
		_, err = unix.Poll(polls, 0)
		if !errors.Is(err, unix.EINTR) {
			return polls[0].Revents&unix.POLLERR == 0, err
		}
	}
}

// RSS is the process's memory in bytes, 0 when it has ended.
func (p *Process) RSS() int64 {
	fields, err := stat(p.PID)
	if err != nil || len(fields) <= rssField {
		return 0
	}
	pages, err := strconv.ParseInt(fields[rssField], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// rssField is the index of field 24 in what stat returns.
const rssField = 24 - 3

// Stopped tells whether the process was stopped, by SIGSTOP or a debugger: it
// answers nobody until it is continued.
func (p *Process) Stopped() bool {
	fields, err := stat(p.PID)
	return err == nil && (fields[0] == "T" || fields[0] == "t")
}

// Turns counts how often the process's threads have given up the processor or
// had it taken away: while it stays the same, none of them runs.
func (p *Process) Turns() (uint64, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.PID))
	if err != nil {
		return 0, err
	}
	var sum uint64
	for _, file := range files {
		text, err := os.ReadFile(file)
		if isGone(err) {
			continue // that thread has ended
		}
		if err != nil {
			return 0, fmt.Errorf("look at the threads of process %d: %w", p.PID, err)
		}
		for _, line := range strings.Split(string(text), "\n") {
			if name, value, _ := strings.Cut(line, ":"); strings.HasSuffix(name, "voluntary_ctxt_switches") {
				n, _ := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				sum += n
			}
		}
	}
	return sum, nil
}

// Exit describes how the process has ended, reaping it when it is a child of ours;
// empty when that cannot be known: of others the kernel tells it since 6.15.
func (p *Process) Exit() string {
	var status unix.WaitStatus
	if pid, err := unix.Wait4(p.PID, &status, unix.WNOHANG, nil); err != nil || pid != p.PID {
		var ok bool
		if status, ok = p.exitStatus(); !ok {
			return ""
		}
	}
	return describe(status)
}

func describe(status unix.WaitStatus) string {
	if status.Signaled() {
		return "killed by " + unix.SignalName(status.Signal())
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
}

// Reap is Exit for a process that Find does not find any more, if its parent, which we
// may be, has not taken note of its end.
func Reap(pid int, start uint64) string {
	if now, err := startTime(pid); err != nil || now != start {
		return ""
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	p := Process{PID: pid, StartTime: start, FD: fd}
	p.Wait(time.Now().Add(reapWait)) // threads of it may still be ending
	return p.Exit()
}

// pidfdInfo is the kernel's struct pidfd_info (linux/pidfd.h), its first version.
type pidfdInfo struct {
	mask, cgroup uint64
	ids          [11]uint32
	exit         int32
}

const (
	// pidfdGetInfo is PIDFD_GET_INFO, _IOWR(0xff, 11, struct pidfd_info).
	pidfdGetInfo = 3<<30 | 64<<16 | 0xff<<8 | 11
	// pidfdInfoExit is PIDFD_INFO_EXIT.
	pidfdInfoExit = 1 << 3
	// reapWait is how long the parent of a process that has ended may take to
	// reap it, before which its status is not told.
	reapWait = 100 * time.Millisecond
)

// exitStatus asks the kernel how a process has ended that is no child of ours.
func (p *Process) exitStatus() (unix.WaitStatus, bool) {
	polls := []unix.PollFd{{Fd: int32(p.FD)}} // POLLHUP comes once it is reaped
	if n, err := unix.Poll(polls, int(reapWait/time.Millisecond)); err != nil || n == 0 {
		return 0, false
	}
	info := pidfdInfo{mask: pidfdInfoExit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(p.FD), pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.mask&pidfdInfoExit == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.exit), true
}

// Close releases the pidfd.
func (p *Process) Close() error { return unix.Close(p.FD) }
