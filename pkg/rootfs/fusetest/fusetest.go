// Package fusetest serves real, empty FUSE filesystems that stop answering when a
// test says so. It is for tests alone.
package fusetest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// FS is a mounted filesystem.
type FS struct {
	// Dir is where it is mounted, Dev its device number.
	Dir, Dev string

	fd   int
	stop *os.File

	mu    sync.Mutex
	moved *sync.Cond
	mode  mode
	taken int
}

type mode int

const (
	answering mode = iota
	ignoring
	taking
)

// Mount mounts one until the end of the test.
func Mount(t testing.TB) *FS {
	t.Helper()
	f := &FS{Dir: t.TempDir()}
	f.moved = sync.NewCond(&f.mu)
	var err error
	if f.fd, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", f.fd)
	if err := unix.Mount("fusetest", f.Dir, "fuse.test", unix.MS_RDONLY, options); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	f.stop = w
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.serve(int(r.Fd()))
	}()
	t.Cleanup(func() {
		_ = unix.Unmount(f.Dir, unix.MNT_FORCE|unix.MNT_DETACH)
		f.Answer()
		w.Close()
		<-ended
		r.Close()
		unix.Close(f.fd)
	})
	var st unix.Stat_t
	if err := unix.Stat(f.Dir, &st); err != nil {
		t.Fatal(err)
	}
	f.Dev = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	return f
}

// Answer lets it answer again.
func (f *FS) Answer() { f.set(answering) }

// Ignore leaves requests unread, as a daemon that was stopped.
func (f *FS) Ignore() { f.set(ignoring) }

// Take reads requests and never answers them: whoever waits for one cannot be
// killed.
func (f *FS) Take() { f.set(taking) }

// AwaitTaken waits until a request has been taken.
func (f *FS) AwaitTaken() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.taken == 0 {
		f.moved.Wait()
	}
}

func (f *FS) set(m mode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mode = m
	f.moved.Broadcast()
}

func (f *FS) serve(stop int) {
	request := make([]byte, 1<<17)
	for {
		polls := []unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(polls, -1); err != nil && !errors.Is(err, unix.EINTR) || polls[1].Revents != 0 {
			return
		}
		f.mu.Lock()
		for f.mode == ignoring {
			f.moved.Wait()
		}
		take := f.mode == taking
		f.mu.Unlock()
		n, err := unix.Read(f.fd, request)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			continue
		case err != nil:
			return // unmounted or aborted
		}
		if take {
			f.mu.Lock()
			f.taken++
			f.moved.Broadcast()
			f.mu.Unlock()
			continue
		}
		f.reply(request[:n])
	}
}

// What is asked, see linux/fuse.h.
const (
	opForget, opGetattr, opStatfs, opInit, opInterrupt, opBatchForget = 2, 3, 17, 26, 36, 42
)

func (f *FS) reply(request []byte) {
	var body []byte
	var code int32
	switch binary.NativeEndian.Uint32(request[4:]) {
	case opForget, opInterrupt, opBatchForget:
		return
	case opInit:
		body = make([]byte, 64)
		binary.NativeEndian.PutUint32(body, 7)
		binary.NativeEndian.PutUint32(body[4:], 31)
		binary.NativeEndian.PutUint32(body[20:], 4096)
	case opGetattr:
		body = make([]byte, 104)
		binary.NativeEndian.PutUint64(body[16:], 1) // inode
		binary.NativeEndian.PutUint32(body[76:], unix.S_IFDIR|0o755)
		binary.NativeEndian.PutUint32(body[80:], 2) // links
	case opStatfs:
		body = make([]byte, 80)
		binary.NativeEndian.PutUint32(body[40:], 512)
	default:
		code = -int32(unix.ENOSYS)
	}
	answer := make([]byte, 16, 16+len(body))
	binary.NativeEndian.PutUint32(answer, uint32(16+len(body)))
	binary.NativeEndian.PutUint32(answer[4:], uint32(code))
	copy(answer[8:], request[8:16])
	_, _ = unix.Write(f.fd, append(answer, body...))
}

// Main runs tests in a mount namespace of their own: none of their mounts is left
// when they are killed. It returns the exit status.
func Main(m *testing.M) int {
	const stage = "FUSETEST_NAMESPACE"
	if os.Getenv(stage) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "make the mounts private:", err)
			return 1
		}
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), stage+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "enter a mount namespace (are you root?):", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}
