package kit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Eventually waits until what is ok, for which no event exists, and ends the test
// when that takes longer than within.
func Eventually(t TB, what string, within time.Duration, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(within)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
		<-tick.C
	}
}

// Stop stops a process and returns once none of its threads runs any more: each
// stops by itself, and one of a daemon's may answer until then.
func Stop(t TB, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatalf("stop process %d: %v", pid, err)
	}
	Eventually(t, fmt.Sprintf("all threads of process %d are stopped", pid), time.Minute, func() bool {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, file := range files {
			text, err := os.ReadFile(file)
			_, state, _ := bytes.Cut(text[bytes.LastIndexByte(text, ')')+1:], []byte(" "))
			if err == nil && !bytes.HasPrefix(state, []byte("T")) {
				return false
			}
		}
		return len(files) > 0
	})
}

// Contents reads the regular files below dir, by their paths, at most so many.
func Contents(dir string, most int) (map[string][]byte, error) {
	files := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || len(files) >= most {
			return err
		}
		text, err := os.ReadFile(path)
		files[path] = text
		return err
	})
	if err == nil && len(files) == 0 {
		err = fmt.Errorf("%s has no files", dir)
	}
	return files, err
}

// ReadPast reads a file past the page cache and compares it.
func ReadPast(path string, want []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	got := make([]byte, len(want)+1)
	n, err := f.ReadAt(got, 0)
	if n != len(want) || !bytes.Equal(got[:n], want) {
		return errors.Join(fmt.Errorf("%s: read %d bytes of %d, or others", path, n, len(want)), err)
	}
	return nil
}
