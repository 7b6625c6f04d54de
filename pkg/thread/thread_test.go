package thread

import (
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestThrowaway: what f makes of its thread is nobody else's, and the main thread, which
// /proc/self stands for, is never taken.
func TestThrowaway(t *testing.T) {
	before, err := os.Readlink("/proc/self/cwd")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			Throwaway(func() {
				if unix.Gettid() == unix.Getpid() {
					t.Error("it is the main thread")
				}
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					t.Errorf("unshare: %v", err)
				}
				if err := unix.Chdir("/"); err != nil {
					t.Errorf("chdir: %v", err)
				}
			})
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if dir, err := os.Readlink("/proc/thread-self/cwd"); err != nil || dir != before {
				t.Errorf("a thread that lives on is in %q, %v; want %q", dir, err, before)
			}
		})
	}
	all.Wait()
	if dir, err := os.Readlink("/proc/self/cwd"); err != nil || dir != before {
		t.Errorf("the main thread is in %q, %v; want %q", dir, err, before)
	}
}
