package nydusd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Command describes one daemon that serves one image over FUSE.
type Command struct {
	// Path is the executable.
	Path string
	// Config is the configuration file, Bootstrap the image's metadata file.
	Config, Bootstrap string
	// Mountpoint is an existing, empty directory.
	Mountpoint string
	// Socket is where the daemon's API will listen; it must not exist.
	Socket string
	// Supervisor is the socket to which the daemon connects when it is told to
	// hand its filesystem over; see package custody. Empty for none.
	Supervisor string
	// ID is the daemon's name. With Supervisor it must have one, and a successor
	// the same.
	ID string
	// Successor starts a daemon that mounts nothing and has neither Config nor
	// Bootstrap: it waits to be told to fetch both from Supervisor.
	Successor bool
	// Args, when set, is the whole command line behind Path instead: for a
	// program of ours that is to live like a daemon.
	Args []string
	// Log receives standard output and error, panics included.
	Log *os.File
	// LogLevel is nydusd's; empty means info.
	LogLevel string
	// Threads is the number of FUSE threads; 0 means nydusd's default.
	Threads int
	// OOMScoreAdj is the process's; see proc_pid_oom_score_adj(5).
	OOMScoreAdj int
	// Cgroup places the process; the zero value leaves it where it is started.
	Cgroup Cgroup
	// CacheLock is inherited, so that what it locks stays locked exactly as
	// long as the process is there. May be nil.
	CacheLock *os.File
}

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

// Start starts the daemon and does not wait for it. It outlives its starter.
func Start(c Command) (*Process, error) {
	var p *Process
	var err error
	// A child inherits signal mask and cgroup from the thread that forks.
	onThrowawayThread(func() { p, err = start(c) })
	if err != nil {
		return nil, fmt.Errorf("start nydusd %s: %w", c.Path, err)
	}
	return p, nil
}

// onThrowawayThread runs f on a thread that ends afterwards, whatever f made of
// it. The main thread never ends before the process does, so it is not taken.
func onThrowawayThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f() // and stays locked
			return
		}
		// As long as this goroutine holds the main thread, no other gets it.
		onThrowawayThread(f)
		runtime.UnlockOSThread()
	}()
	<-done
}

func start(c Command) (*Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	if err := blockSignals(); err != nil {
		return nil, err
	}
	// Whatever the caller of our program left open must not reach the daemon.
	if err := closeOnExec(); err != nil {
		return nil, fmt.Errorf("close inherited descriptors: %w", err)
	}
	p := &Process{FD: -1}
	attr := &syscall.SysProcAttr{Setsid: true, PidFD: &p.FD}
	place := c.Cgroup.enter(attr)
	defer place.close()

	files := []*os.File{null, c.Log, c.Log}
	if c.CacheLock != nil {
		files = append(files, c.CacheLock)
	}
	attrs := &os.ProcAttr{Dir: "/", Env: environment(os.Environ()), Files: files, Sys: attr}
	proc, err := os.StartProcess(c.Path, c.args(), attrs)
	if err != nil && attr.UseCgroupFD {
		place.refused(err)
		proc, err = os.StartProcess(c.Path, c.args(), attrs)
	}
	if err != nil {
		return nil, explain(err)
	}
	p.PID, p.Warnings, p.Unmet = proc.Pid, place.warnings, place.unmet
	p.limits(c.OOMScoreAdj)
	// Nobody has reaped it, so it is there even if it has ended already.
	if p.StartTime, err = startTime(p.PID); err == nil && p.FD < 0 {
		err = errors.New("the kernel has no pidfds: Linux 5.4 is needed")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("follow process %d: %w", p.PID, err), proc.Kill())
	}
	// It has a descriptor of its own of the process, which would stay open until
	// the garbage is collected.
	_ = proc.Release()
	return p, nil
}

func (c Command) args() []string {
	if c.Args != nil {
		return append([]string{c.Path}, c.Args...)
	}
	args := []string{c.Path, "fuse"}
	if c.Successor {
		args = append(args, "--upgrade")
	} else {
		args = append(args, "--config", c.Config, "--bootstrap", c.Bootstrap)
	}
	args = append(args, "--mountpoint", c.Mountpoint, "--apisock", c.Socket,
		// The limit is set from outside: nydusd ends when it may not raise it.
		"--rlimit-nofile", "0")
	if c.Supervisor != "" {
		args = append(args, "--supervisor", c.Supervisor, "--id", c.ID)
	}
	if c.LogLevel != "" {
		args = append(args, "--log-level", c.LogLevel)
	}
	if c.Threads > 0 {
		args = append(args, "--fuse-threads", strconv.Itoa(c.Threads))
	}
	return args
}

// environment keeps what nydusd's HTTP client and its panics understand, and
// nothing of the container whose mount happens to start it.
func environment(all []string) []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, e := range all {
		name, _, _ := strings.Cut(e, "=")
		switch strings.ToUpper(name) {
		case "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "RUST_BACKTRACE":
			env = append(env, e)
		}
	}
	return env
}

// closeOnExec keeps every descriptor but the standard three from what is
// executed next.
func closeOnExec() error {
	err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	// Before Linux 5.11.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// blockSignals blocks SIGINT and SIGTERM for the calling thread and what it
// starts.
func blockSignals() error {
	var set unix.Sigset_t
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
		set.Val[(sig-1)/64] |= 1 << ((sig - 1) % 64)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	return nil
}

// limits gives the process the file limit that it can have and its OOM score.
func (p *Process) limits(oomScoreAdj int) {
	var now unix.Rlimit
	if err := unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, nil, &now); err == nil {
		want := unix.Rlimit{Cur: 1 << 20, Max: max(1<<20, now.Max)}
		if unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, &want, nil) != nil {
			want = unix.Rlimit{Cur: now.Max, Max: now.Max}
			if err := unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, &want, nil); err != nil {
				p.Warnings = append(p.Warnings, fmt.Sprintf("raise the file limit to %d: %v", now.Max, err))
			}
		}
	}
	file := fmt.Sprintf("/proc/%d/oom_score_adj", p.PID)
	if err := os.WriteFile(file, []byte(strconv.Itoa(oomScoreAdj)), 0); err != nil {
		p.Warnings = append(p.Warnings, fmt.Sprintf("set oom_score_adj to %d: %v", oomScoreAdj, err))
	}
}

// explain makes the usual mistakes readable.
func explain(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w; install nydusd or set [daemon] nydusd_path", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w; is the file executable?", err)
	}
	return err
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
	if status.Signaled() {
		return "killed by " + unix.SignalName(status.Signal())
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
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
	return unix.WaitStatus(info.exit), true //nolint:gosec // the same bits
}

// Close releases the pidfd.
func (p *Process) Close() error { return unix.Close(p.FD) }

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

// A process whose memory is on a filesystem that hangs, as that of a container whose
// nydusd does, keeps whoever looks at it waiting; a daemon does not. scanWait is how
// long all may take together to be looked at, leastWait what each may take when that
// is over.
const (
	scanWait  = 2 * time.Second
	leastWait = 20 * time.Millisecond
)

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

// SharesCache tells whether several daemons of this executable may use one
// cache directory: from 2.3 on. A build that does not tell its version may not.
func SharesCache(ctx context.Context, path string) (bool, error) {
	cmd := exec.CommandContext(ctx, path, "--version")
	// What it started itself ends with it, and otherwise may keep the pipe open.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if ctx.Err() != nil {
		err = fmt.Errorf("no answer in time: %w", ctx.Err())
	}
	if err != nil {
		return false, fmt.Errorf("ask %s for its version: %w", path, explain(err))
	}
	major, minor := versionOf(string(out))
	return major > 2 || major == 2 && minor >= 3, nil
}

// versionOf finds "Version: v2.3.1" in what `nydusd --version` prints; zeros
// without. No regular expressions here: they would be compiled, and Unicode's
// tables built, in each mount.
func versionOf(text string) (major, minor int) {
	_, after, _ := strings.Cut(text, "Version:")
	if n, _ := fmt.Sscanf(strings.TrimPrefix(strings.TrimSpace(after), "v"), "%d.%d", &major, &minor); n < 2 {
		return 0, 0
	}
	return major, minor
}

// plain drops the colours that nydusd writes around errors for a terminal.
func plain(s string) string {
	var b strings.Builder
	for s != "" {
		before, after, _ := strings.Cut(s, "\x1b[")
		b.WriteString(before)
		s = strings.TrimPrefix(strings.TrimLeft(after, "0123456789;"), "m")
	}
	return b.String()
}

// Tail returns the last lines of a log file, at most n, joined by " | ",
// without colours. It looks at what stands behind offset only.
func Tail(path string, offset int64, n int) string {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return ""
	}
	defer f.Close()
	buf := make([]byte, 8<<10)
	size, err := f.Seek(0, 2)
	if err != nil {
		return ""
	}
	got, _ := f.ReadAt(buf, max(offset, size-int64(len(buf))))
	lines := strings.Split(strings.TrimSpace(plain(string(buf[:got]))), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], " | ")
}
