package mount_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// TestOldKernel has kernels that cannot: one without the calls, and one that mounts no files.
func TestOldKernel(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	for _, driver := range []mountspec.Driver{mountspec.DriverEROFS, mountspec.DriverAuto} {
		for _, c := range []struct {
			call   uint64
			errno  unix.Errno
			reason string
		}{
			{unix.SYS_FSOPEN, unix.ENOSYS, "lacks the new mount calls"},
			{unix.SYS_FSOPEN, unix.ENODEV, "lacks EROFS"},
			{unix.SYS_FSCONFIG, unix.ENOTBLK, "mounts block devices only"},
		} {
			must(t, forgetVerdict()) // the one of the case before
			spec, target := e.by(driver, s), e.target()
			said, err := os.Create(filepath.Join(t.TempDir(), "said"))
			must(t, err)
			helper := e.command(t.Context(), "nydus-overlayfs", spec.SnapshotDir, target, "-o", e.option(spec))
			helper.Stdout, helper.Stderr = said, said
			code, err := without(helper, c.call, c.errno)
			must(t, errors.Join(err, said.Close()))
			text, err := os.ReadFile(said.Name())
			must(t, err)
			if driver == mountspec.DriverEROFS {
				if code == 0 || !strings.Contains(string(text), c.reason) {
					t.Errorf("%v: exit status %d: %s", c.errno, code, text)
				}
				if m := mounted(t, target); len(m) > 0 {
					t.Errorf("%v: after a refusal there is %q", c.errno, m)
				}
				continue
			}
			if code != 0 || len(text) > 0 {
				t.Fatalf("%v, auto: exit status %d: %s", c.errno, code, text)
			}
			e.holds(img, target)
			e.served(mountspec.DriverFUSE)
			log, err := os.ReadFile(filepath.Join(e.root, "instances", s.Instance, "nydusd.log"))
			if err != nil || !strings.Contains(string(log), c.reason) {
				t.Errorf("the log does not say %q (%v):\n%s", c.reason, err, log)
			}
			e.unmount(target)
			must(t, e.tidy(soon))
		}
	}
	must(t, forgetVerdict())
	e.kernel(img, s)
}

// forgetVerdict makes helpers ask the kernel again.
func forgetVerdict() error {
	err := os.Remove(filepath.Join(runDir, "no-erofs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// without runs a program for which a system call always fails. Its children are not traced.
func without(cmd *exec.Cmd, call uint64, errno unix.Errno) (code int, err error) {
	runtime.LockOSThread() // all requests must come from the thread that traces
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid := cmd.Process.Pid
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return 0, err
	}
	const options = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return 0, err
	}
	failing := map[int]bool{} // threads within the call
	for tid := pid; ; {
		if tid == pid && (status.Exited() || status.Signaled()) {
			return status.ExitStatus(), cmd.Process.Release()
		}
		if status.Stopped() && status.StopSignal() == unix.SIGTRAP|0x80 {
			if err := fail(tid, call, errno, failing); err != nil {
				return 0, err
			}
		}
		if status.Stopped() {
			if err := unix.PtraceSyscall(tid, passedOn(status)); err != nil && !errors.Is(err, unix.ESRCH) {
				return 0, err
			}
		}
		for {
			tid, err = unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EINTR) {
				return 0, err
			}
		}
	}
}

// fail turns a call that begins into none, and gives its end the error.
func fail(tid int, call uint64, errno unix.Errno, failing map[int]bool) error {
	var regs unix.PtraceRegs
	now, err := entered(tid)
	if err != nil || now != call && !failing[tid] {
		return err
	}
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return err
	}
	if failing[tid] {
		delete(failing, tid)
		regs.Rax = uint64(-int64(errno))
	} else {
		failing[tid] = true
		regs.Orig_rax = ^uint64(0)
	}
	return unix.PtraceSetRegs(tid, &regs)
}
