package blob

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// block is what direct reads have to be aligned to at most: no disk has larger sectors.
const block = 4096

// coldBuffer is how much is read directly at once, in bytes.
const coldBuffer = 1 << 20

// coldReader reads a blob's data from the disk, so that what has gone wrong there shows
// although the page cache still has it right, and leaves the page cache as it was.
type coldReader struct {
	*os.File
	// buffer is aligned to a page. It may be shared by readers that are not used at the
	// same time.
	buffer []byte
	// direct is whether the filesystem reads past the page cache.
	direct bool
}

// newColdBuffer returns memory for coldReader, which is to be given back to unix.Munmap.
func newColdBuffer() ([]byte, error) {
	memory, err := unix.Mmap(-1, 0, coldBuffer, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("get memory for direct reads: %w", err)
	}
	return memory, nil
}

func openCold(b *cached, buffer []byte) (reader, error) {
	f, err := openData(b)
	if err != nil {
		return nil, err
	}
	r := &coldReader{File: f, buffer: buffer}
	r.direct = r.setDirect(true) == nil
	if r.direct {
		return r, nil
	}
	return r, r.beginBuffered()
}

func (r *coldReader) setDirect(on bool) error {
	flags, err := unix.FcntlInt(r.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if flags &^= unix.O_DIRECT; on {
		flags |= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(r.Fd(), unix.F_SETFL, flags)
	return err
}

// beginBuffered is for filesystems that cannot read past the page cache.
func (r *coldReader) beginBuffered() error {
	// No more than what is asked for is to be read ahead.
	if err := unix.Fadvise(int(r.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return &os.PathError{Op: "fadvise", Path: r.Name(), Err: err}
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (r *coldReader) ReadAt(p []byte, off int64) (n int, err error) {
	if r.direct {
		n, err = r.readDirect(p, off)
		if !errors.Is(err, unix.EINVAL) {
			return n, err
		}
		// Some say so only now.
		r.direct = false
		if err := errors.Join(r.setDirect(false), r.beginBuffered()); err != nil {
			return 0, err
		}
	}
	return r.readBuffered(p, off)
}

func (r *coldReader) readDirect(p []byte, off int64) (done int, err error) {
	for done < len(p) {
		at := off + int64(done)
		skip := at % block
		want := min(int64(len(r.buffer)), (skip+int64(len(p)-done)+block-1)/block*block)
		n, err := unix.Pread(int(r.Fd()), r.buffer[:want], at-skip)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return done, &os.PathError{Op: "read", Path: r.Name(), Err: err}
		case int64(n) <= skip:
			return done, io.EOF
		}
		done += copy(p[done:], r.buffer[skip:n])
	}
	return done, nil
}

// readBuffered drops what it has read, unless somebody else had it in memory before.
func (r *coldReader) readBuffered(p []byte, off int64) (int, error) {
	first := off / block * block
	length := (off + int64(len(p)) - first + block - 1) / block * block
	var before unix.Cachestat_t
	// Before Linux 6.5 nothing tells; then it is dropped.
	err := unix.Cachestat(uint(r.Fd()), &unix.CachestatRange{Off: uint64(first), Len: uint64(length)}, &before, 0)
	resident := err == nil && before.Cache > 0
	n, err := r.File.ReadAt(p, off)
	if !resident {
		// It is a hint; what stays is no harm.
		_ = unix.Fadvise(int(r.Fd()), first, length, unix.FADV_DONTNEED)
	}
	return n, err
}

const (
	ioprioWhoProcess = 1
	ioprioIdle       = 3 << 13
	niceLeast        = 19
)

// beIdle has the calling thread use disk and processor only when nobody else does, as far
// as the kernel's schedulers know that (ioprio_set(2), setpriority(2)). It cannot be
// undone without privileges, so the thread is to end afterwards.
func beIdle() error {
	tid := unix.Gettid()
	var errs []error
	if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, uintptr(tid), ioprioIdle); errno != 0 {
		errs = append(errs, os.NewSyscallError("ioprio_set", errno))
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, tid, niceLeast); err != nil {
		errs = append(errs, os.NewSyscallError("setpriority", err))
	}
	return errors.Join(errs...)
}
