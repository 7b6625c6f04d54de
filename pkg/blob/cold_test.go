package blob

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

// coldFile makes a file whose pages are in memory, or not.
func coldFile(t *testing.T, b *bed, size int, resident bool) (*cached, []byte) {
	t.Helper()
	dir := b.dir("one")
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * 7)
	}
	path := filepath.Join(dir, proof.DataName(idOf(1)))
	b.write(path, data)
	f, err := os.Open(path)
	b.must(err)
	defer f.Close()
	b.must(f.Sync())
	if !resident {
		b.must(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	}
	return &cached{dir: &directory{path: dir, cache: dir}, id: idOf(1)}, data
}

// inMemory is how many pages of a blob's data are in the page cache.
func inMemory(t *testing.T, c *cached) uint64 {
	t.Helper()
	f, err := openData(c)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0); err != nil {
		t.Fatal(err)
	}
	return st.Cache
}

// Whatever it reads, the page cache is as before.
func TestColdReads(t *testing.T) {
	for _, direct := range []bool{true, false} {
		for _, resident := range []bool{true, false} {
			kept := false
			// Others may empty the page cache meanwhile, but not each time.
			for range 10 {
				if before, after := coldRead(t, direct, resident); before == after {
					kept = true
					break
				}
			}
			if !kept {
				t.Errorf("direct %v, in memory before %v: it is never as before", direct, resident)
			}
		}
	}
}

// coldRead reads parts of a file, and tells how many of its pages were in memory before and
// after that.
func coldRead(t *testing.T, direct, resident bool) (before, after uint64) {
	t.Helper()
	const size = 3<<20 + 5000
	b := newBed(t)
	c, data := coldFile(t, b, size, resident)
	before = inMemory(t, c)
	buffer, err := newColdBuffer()
	b.must(err)
	r, err := openCold(c, buffer)
	b.must(err)
	cold := r.(*coldReader)
	if !cold.direct {
		t.Fatalf("%s: the tests' directory cannot be read directly", b.root)
	}
	if !direct {
		cold.direct = false
		b.must(errors.Join(cold.setDirect(false), cold.beginBuffered()))
	}
	for _, at := range [][2]int{{0, 1}, {0, 4096}, {4096, 100}, {100, 4096}, {4096, 1 << 20}, {8192, 2<<20 + 1}, {size - 1, 1}, {size - 5000, 5000}, {0, size}} {
		p := make([]byte, at[1])
		if n, err := r.ReadAt(p, int64(at[0])); n != len(p) || err != nil || !bytes.Equal(p, data[at[0]:at[0]+at[1]]) {
			t.Errorf("direct %v: %d bytes at %d: %d, %v", direct, at[1], at[0], n, err)
		}
	}
	for _, off := range []int64{size - 1, size, size + 5000} {
		if n, err := r.ReadAt(make([]byte, 4096), off); !errors.Is(err, io.EOF) || int64(n) != max(size-off, 0) {
			t.Errorf("direct %v: past the end at %d: %d, %v", direct, off, n, err)
		}
	}
	if cold.direct != direct {
		t.Errorf("it is read directly: %v, want %v", cold.direct, direct)
	}
	after = inMemory(t, c)
	b.must(errors.Join(r.Close(), unix.Munmap(buffer)))
	return before, after
}

func TestBeIdle(t *testing.T) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never free: the thread ends
		if err := beIdle(); err != nil {
			t.Error(err)
		}
		const ioprioGet = unix.SYS_IOPRIO_GET
		got, _, errno := unix.Syscall(ioprioGet, ioprioWhoProcess, uintptr(unix.Gettid()), 0)
		nice, err := unix.Getpriority(unix.PRIO_PROCESS, unix.Gettid())
		if errno != 0 || got != ioprioIdle || err != nil || 20-nice != niceLeast {
			t.Errorf("ioprio %d (%v), nice %d (%v)", got, errno, 20-nice, err)
		}
	}()
	<-done
}
