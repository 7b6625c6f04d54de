package instance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// linked tells where the descriptors in a directory of /proc lead to, but for the standard
// ones. One that was closed meanwhile is none.
func linked(t *testing.T, dir string) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	found := map[string]bool{}
	for _, e := range entries {
		if e.Name() == "0" || e.Name() == "1" || e.Name() == "2" {
			continue
		}
		if path, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			found[path] = true
		}
	}
	return found
}

// A thread that a daemon keeps waiting has no file, least of all a lock: that is the
// process's, and goes with it.
func TestWhoAsksHoldsNoLock(t *testing.T) {
	cache := t.TempDir()
	lock, err := LockCache(t.Context(), cache)
	must(t, err)
	defer lock.Close()
	i := mustOpen(t, dirOf(t.TempDir(), testKey), openCreate)
	defer i.Close()
	waits, answer, ended := make(chan int), make(chan struct{}), make(chan error)
	go func() {
		ended <- empty(func() error {
			waits <- unix.Gettid()
			<-answer
			return unix.EIO
		})
	}()
	thread := <-waits
	mine, its := linked(t, "/proc/self/fd"), linked(t, fmt.Sprintf("/proc/self/task/%d/fd", thread))
	close(answer)
	if err := <-ended; !errors.Is(err, unix.EIO) {
		t.Errorf("the answer is %v", err)
	}
	for what, path := range map[string]string{"the cache": lock.Name(), "the instance": i.lock.Name()} {
		if !mine[path] {
			t.Errorf("the process has lost the lock of %s, %s: it has %v", what, path, mine)
		}
	}
	for path := range its {
		if filepath.IsAbs(path) {
			t.Errorf("the thread that waits has %s", path)
		}
	}
}
