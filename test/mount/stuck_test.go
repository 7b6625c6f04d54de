package mount_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stuckName is the name under which this test program stands in nydusd's place.
const stuckName = "nydusd-stuck"

// stuck mounts as nydusd does, takes a request of its own out of the device, and
// answers it never: a thread that waits for that cannot be killed.
func stuck() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if len(os.Args) == 2 {
		fmt.Println("Version: v2.2.0")
		os.Exit(0)
	}
	mountpoint := ""
	for n, a := range os.Args {
		if a == "--mountpoint" {
			mountpoint = os.Args[n+1]
		}
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	fail(err)
	fail(unix.Mount("rafs", mountpoint, "fuse", unix.MS_RDONLY, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)))
	request := make([]byte, 1<<17)
	_, err = unix.Read(fd, request)
	fail(err)
	// The answer to FUSE_INIT: a header with the request's number, then 64 bytes
	// that begin with the protocol's version, and have the largest write at 20.
	answer := make([]byte, 16+64)
	binary.NativeEndian.PutUint32(answer, uint32(len(answer)))
	copy(answer[8:16], request[8:16])
	binary.NativeEndian.PutUint32(answer[16:], 7)
	binary.NativeEndian.PutUint32(answer[20:], 31)
	binary.NativeEndian.PutUint32(answer[16+20:], 4096)
	_, err = unix.Write(fd, answer)
	fail(err)
	go func() {
		for {
			if _, err := unix.Read(fd, request); err != nil && !errors.Is(err, unix.EINTR) {
				fail(err)
			}
		}
	}()
	_, err = os.ReadDir(mountpoint)
	fail(err)
}

// A daemon that waits for itself is got rid of all the same: after a failed
// start, and as an orphan.
func TestDaemonThatWaitsForItself(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	self, err := os.Executable()
	must(t, err)
	path := filepath.Join(t.TempDir(), stuckName)
	must(t, os.Symlink(self, path))
	s := e.spec(img)
	s.Daemon.Path, s.Daemon.StartTimeout = path, 2*time.Second
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, within: 2*time.Second + slack, want: []string{"mounted but does not serve"}})

	s.Daemon.StartTimeout = time.Minute
	cmd := e.command(t.Context(), "nydus-overlayfs", s.SnapshotDir, e.target(), "-o", e.option(s))
	must(t, cmd.Start())
	must(t, waitFor(func() bool { return len(mounted(t, runDir+"/")) > 0 }))
	must(t, cmd.Process.Kill())
	// It is not gone as long as it waits for the daemon, but it has let the lock go.
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	target := e.mustMount(e.spec(img))
	e.holds(img, target)
	e.unmount(target)
	select {
	case <-gone:
	case <-time.After(soon):
		t.Errorf("the killed helper is still there after %s", soon)
	}
	if left := processesOf(t, path); len(left) > 0 {
		t.Errorf("left running: %v", left)
	}
}
