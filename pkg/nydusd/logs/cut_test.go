package logs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

// writer appends numbered lines as a daemon does: in one piece each.
type writer struct {
	t    *testing.T
	file *os.File
	next int
}

func newWriter(t *testing.T, path string) *writer {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return &writer{t: t, file: f}
}

// lineNumber is a line of 64 bytes.
func lineNumber(n int) string { return fmt.Sprintf("%-63d\n", n) }

func (w *writer) write(lines int) {
	w.t.Helper()
	for range lines {
		_, err := w.file.WriteString(lineNumber(w.next))
		must(w.t, err)
		w.next++
	}
}

// taken returns how much a log takes on disk, all its files together.
func taken(t *testing.T, path string) (total int64) {
	t.Helper()
	for _, file := range Files(path) {
		if info, err := os.Stat(file); err == nil {
			total += info.Size()
		}
	}
	return total
}

// newest checks that the log, and what is before it in the older one, is the newest
// lines without a gap, and returns how many.
func (w *writer) newest(path string) int {
	w.t.Helper()
	text := readFile(w.t, Old(path)) + readFile(w.t, path)
	n := w.next
	for ; strings.HasSuffix(text, lineNumber(n-1)); n-- {
		text = strings.TrimSuffix(text, lineNumber(n-1))
	}
	if text != "" {
		w.t.Errorf("%d bytes before the %d newest lines are others: %.100q", len(text), w.next-n, text[max(0, len(text)-100):])
	}
	return w.next - n
}

const limit = 64 << 10

// everywhere runs a test where the front of a file can be taken off (if the
// temporary directory's filesystem can do it), and where not.
func everywhere(t *testing.T, test func(t *testing.T, path string)) {
	t.Run("temporary", func(t *testing.T) { test(t, filepath.Join(t.TempDir(), "log")) })
	t.Run("tmpfs", func(t *testing.T) {
		dir, err := os.MkdirTemp("/dev/shm", "logs-test")
		must(t, err)
		defer os.RemoveAll(dir)
		test(t, filepath.Join(dir, "log"))
	})
}

func TestCut(t *testing.T) { everywhere(t, testCut) }

func testCut(t *testing.T, path string) {
	if took, err := Cut(path, limit); took != (Range{}) || err != nil {
		t.Errorf("no log: %v, %v", took, err)
	}
	w := newWriter(t, path)
	w.write(limit / 64)
	if took, err := Cut(path, limit); took != (Range{}) || err != nil || len(readFile(t, path)) != limit {
		t.Errorf("one of the limit's size: %v, %v", took, err)
	}
	for range 5 {
		w.write(limit/64 + 100)
		held, err := os.Open(path)
		must(t, err)
		must(t, unix.Flock(int(held.Fd()), unix.LOCK_EX))
		if took, err := Cut(path, limit); took != (Range{}) || err != nil {
			t.Errorf("while another process cuts: %v, %v", took, err)
		}
		held.Close()
		size := int64(len(readFile(t, path)))
		took, err := Cut(path, limit)
		must(t, err)
		w.write(3)
		if left := int64(len(readFile(t, path))); took.To-took.From > limit || took.To-took.From < limit/2 || left != size-took.To+3*64 || left > 8192 {
			t.Errorf("cut %v of %d, %d left", took, size, left)
		}
		if n := w.newest(path); n < limit/64/2 {
			t.Errorf("%d lines are kept", n)
		}
		if taken(t, path) > 2*limit {
			t.Errorf("takes %d", taken(t, path))
		}
	}
	// The limit was lowered.
	if _, err := Cut(path, limit/8); err != nil || taken(t, path) > limit/4 {
		t.Errorf("takes %d, %v", taken(t, path), err)
	}
}

// A Cut that is killed after any step leaves the newest lines, and no more than the
// bound; the next one finishes.
func TestCutKilled(t *testing.T) { everywhere(t, testCutKilled) }

func testCutKilled(t *testing.T, path string) {
	for steps := range len((&cutter{}).steps()) + 1 {
		for _, file := range Files(path) {
			must(t, remove(file))
		}
		w := newWriter(t, path)
		w.write(2 * limit / 64)
		must(t, cut(path))
		w.write(limit/64 + 1)
		c := cutter{path: path, limit: limit, collapse: true}
		if over, err := c.open(); !over || err != nil {
			t.Fatalf("%v, %v", over, err)
		}
		for _, step := range c.steps()[:steps] {
			must(t, step())
		}
		c.log.Close() // and so its lock goes
		if c.old != nil {
			c.old.Close()
		}
		if taken(t, path) > 2*limit+8192 {
			t.Errorf("after %d steps it takes %d", steps, taken(t, path))
		}
		if steps < len(c.steps()) {
			// Not emptied yet: the log itself is complete.
			if text := readFile(t, path); !strings.Contains(text, lineNumber(w.next-limit/64-1)) || !strings.HasSuffix(text, lineNumber(w.next-1)) {
				t.Errorf("after %d steps the log has other lines", steps)
			}
		} else if n := w.newest(path); n < limit/64/2 {
			t.Errorf("after all steps %d lines are kept", n)
		}
		w.write(1)
		must(t, cut(path))
		w.write(1)
		if n := w.newest(path); n < limit/64/2 {
			t.Errorf("killed after %d steps, and cut again: %d lines are kept", steps, n)
		}
		if left := readFile(t, fresh(path)); left != "" || taken(t, path) > 2*limit {
			t.Errorf("killed after %d steps, and cut again: it takes %d, %d of them unfinished", steps, taken(t, path), len(left))
		}
	}
}

func cut(path string) error {
	_, err := Cut(path, limit)
	return err
}

// Without space for the older part the log is bounded all the same, and the daemon
// goes on.
func TestCutOnAFullDisk(t *testing.T) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread, and its mount namespace, end with this goroutine.
		runtime.LockOSThread()
		dir := t.TempDir()
		if err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", 2*limit))); err != nil {
			t.Error(err)
			return
		}
		path := filepath.Join(dir, "log")
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		for err == nil {
			_, err = f.WriteString(lineNumber(0))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Error(err)
		}
		took, err := Cut(path, limit)
		if !errors.Is(err, unix.ENOSPC) || took.From != took.To || took.To < limit || !strings.Contains(err.Error(), "lines are lost") {
			t.Errorf("cut %v, %v", took, err)
		}
		if _, err := f.WriteString("on\n"); err != nil {
			t.Errorf("the daemon cannot write: %v", err)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != "on\n" {
			t.Errorf("the log is %q, %v", text, err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 1 {
			t.Errorf("left behind: %v", left)
		}
	}()
	<-done
}

func TestCutRefuses(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	for _, name := range []string{"link", "fifo", "."} {
		if took, err := Cut(filepath.Join(dir, name), 1); err == nil || took != (Range{}) {
			t.Errorf("%s: %v, %v", name, took, err)
		}
	}
}
