package mount_test

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// changing are the system calls that leave something behind.
var changing = []uint64{
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_OPENAT, unix.SYS_MKDIRAT, unix.SYS_LINKAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT,
	unix.SYS_WRITE, unix.SYS_FSYNC, unix.SYS_FLOCK, unix.SYS_CLOSE, unix.SYS_CLONE, unix.SYS_CLONE3, unix.SYS_WAIT4,
	unix.SYS_PRLIMIT64, unix.SYS_EXIT_GROUP, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_MOVE_MOUNT,
	unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR, unix.SYS_UNSHARE,
}

// trace is a run of a program under ptrace, in which something happens when it is
// about to make its n-th system call out of calls. Its children are not traced.
type trace struct {
	calls []uint64
	// from is the call with which counting begins; 0 is the first one.
	from uint64
	n    int
	// strike is what happens. The program may be killed by it.
	strike func() error
}

// run tells whether it came to the n-th call, and how the program has ended.
func (tr trace) run(cmd *exec.Cmd) (struck bool, status unix.WaitStatus, err error) {
	// All requests must come from the thread that traces.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return false, 0, err
	}
	pid := cmd.Process.Pid
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return false, 0, fmt.Errorf("wait for the traced program: %w", err)
	}
	const options = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return false, 0, fmt.Errorf("trace: %w", err)
	}
	seen := 0
	for tid := pid; ; {
		if tid == pid && (status.Exited() || status.Signaled()) {
			return struck, status, cmd.Process.Release()
		}
		if !struck && status.Stopped() && status.StopSignal() == unix.SIGTRAP|0x80 {
			call, err := entered(tid)
			if err != nil {
				return false, status, err
			}
			if seen > 0 && slices.Contains(tr.calls, call) || seen == 0 && (tr.from != 0 && call == tr.from || tr.from == 0 && slices.Contains(tr.calls, call)) {
				seen++
			}
			if struck = seen == tr.n; struck {
				if err := tr.strike(); err != nil {
					return true, status, fmt.Errorf("strike: %w", err)
				}
			}
		}
		if status.Stopped() {
			if err := unix.PtraceSyscall(tid, passedOn(status)); err != nil && !errors.Is(err, unix.ESRCH) {
				return struck, status, fmt.Errorf("resume thread %d: %w", tid, err)
			}
		}
		for {
			// Of this thread: others have children of their own.
			tid, err = unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EINTR) {
				return struck, status, fmt.Errorf("wait for the traced program: %w", err)
			}
		}
	}
}

// passedOn is the signal that a stopped thread is to get: not those that ptrace makes.
func passedOn(status unix.WaitStatus) int {
	sig := status.StopSignal()
	if status.TrapCause() > 0 || sig == unix.SIGTRAP || sig == unix.SIGTRAP|0x80 || sig == unix.SIGSTOP {
		return 0
	}
	return int(sig)
}

// entered returns the system call that a stopped thread is about to make, and none
// that there is when it has just made one.
func entered(tid int) (uint64, error) {
	const none = 1 << 32
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
			return none, nil // it has just been ended
		}
		return none, fmt.Errorf("read the system call of thread %d: %w", tid, errno)
	}
	if info.op != entry {
		return none, nil
	}
	return info.nr, nil
}
