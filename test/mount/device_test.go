package mount_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// block is the unit in which a device loses what was written to it, in bytes.
const block = 4096

// device is a disk with a volatile write cache: a file on a FUSE filesystem of ours, with a
// loop device and ext4 above it. It keeps what was written and when that was flushed, so
// that what a power cut may leave of it can be made at any later time, and it fails as
// it is told.
type device struct {
	fs.Inode
	t    *testing.T
	file *os.File // what is on it now
	size int64
	path string // of the FUSE file
	base string // what was on it at first

	mu     sync.Mutex
	log    []entry
	record bool
	fault  syscall.Errno // of writes and flushes
	broken syscall.Errno // of reads too
}

// entry is a write; without data it is a flush.
type entry struct {
	at   int64
	data []byte
}

var (
	_ fs.NodeOnAdder   = (*deviceRoot)(nil)
	_ fs.NodeOpener    = (*device)(nil)
	_ fs.NodeGetattrer = (*device)(nil)
	_ fs.NodeReader    = (*device)(nil)
	_ fs.NodeWriter    = (*device)(nil)
	_ fs.NodeFsyncer   = (*device)(nil)
	_ fs.NodeAllocater = (*device)(nil)
)

type deviceRoot struct {
	fs.Inode
	d *device
}

// OnAdd implements fs.NodeOnAdder.
func (r *deviceRoot) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, r.d, fs.StableAttr{Mode: unix.S_IFREG}), true)
}

// newDevice makes a disk with an empty ext4 on it.
func newDevice(t *testing.T, size int64) *device {
	t.Helper()
	dir := t.TempDir()
	d := &device{t: t, size: size, base: filepath.Join(dir, "base")}
	format(t, d.base, size)
	now := filepath.Join(dir, "now")
	copySparse(t, d.base, now)
	var err error
	d.file, err = os.OpenFile(now, os.O_RDWR, 0)
	must(t, err)
	mountpoint := filepath.Join(dir, "fuse")
	must(t, os.Mkdir(mountpoint, 0o700))
	server, err := fs.Mount(mountpoint, &deviceRoot{d: d}, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMount: true, FsName: "device", Name: "device", MaxWrite: 512 << 10, DisableXAttrs: true},
	})
	must(t, err)
	t.Cleanup(func() {
		must(t, server.Unmount())
		d.file.Close()
	})
	d.path = filepath.Join(mountpoint, "disk")
	return d
}

// format makes a file with an empty ext4.
func format(t *testing.T, path string, size int64) {
	t.Helper()
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	// Nothing is initialised later: that would be writes of which no test is.
	out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", path).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
}

// copySparse copies a file with its holes.
func copySparse(t *testing.T, from, to string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", from, to).CombinedOutput()
	if err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

// Getattr implements fs.NodeGetattrer.
func (d *device) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = unix.S_IFREG|0o600, uint64(d.size)
	return 0
}

// Open implements fs.NodeOpener: nothing is kept in front of the device.
func (d *device) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

// Read implements fs.NodeReader.
func (d *device) Read(_ context.Context, _ fs.FileHandle, dest []byte, at int64) (fuse.ReadResult, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken != 0 {
		return nil, d.broken
	}
	n, err := d.file.ReadAt(dest, at)
	if n == 0 && err != nil {
		return nil, fs.ToErrno(err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Write implements fs.NodeWriter.
func (d *device) Write(_ context.Context, _ fs.FileHandle, data []byte, at int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fault != 0 {
		return 0, d.fault
	}
	n, err := d.file.WriteAt(data, at)
	if err != nil {
		return 0, fs.ToErrno(err)
	}
	if d.record {
		d.log = append(d.log, entry{at, append([]byte{}, data...)})
	}
	return uint32(n), 0
}

// Fsync implements fs.NodeFsyncer: what was written before it lasts.
func (d *device) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fault != 0 {
		return d.fault
	}
	if d.record {
		d.log = append(d.log, entry{})
	}
	return 0
}

// Allocate implements fs.NodeAllocater: the device knows no holes.
func (d *device) Allocate(context.Context, fs.FileHandle, uint64, uint64, uint32) syscall.Errno {
	return syscall.EOPNOTSUPP
}

// fail makes writes and flushes fail, and reads too when all is set; 0 mends it.
func (d *device) fail(err syscall.Errno, all bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault, d.broken = err, 0
	if all {
		d.broken = err
	}
}

// recording makes the device keep what is written to it, or stop that.
func (d *device) recording(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.record = on
}

// length is how much was recorded.
func (d *device) length() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.log)
}

// attach mounts a disk image, a file, at dir, until the returned function is called.
func attach(t *testing.T, image, dir, options string) (detach func()) {
	t.Helper()
	loop := loopDevice(t, image)
	defer loop.Close()
	if err := unix.Mount(loop.Name(), dir, "ext4", 0, options); err != nil {
		t.Fatalf("mount %s: %v", image, err)
	}
	return sync.OnceFunc(func() {
		err := unix.Unmount(dir, 0)
		if err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

// loopDevice is one that goes with its last user.
func loopDevice(t *testing.T, image string) *os.File {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(t, err)
	defer control.Close()
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	must(t, err)
	defer file.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		must(t, err)
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		must(t, err)
		config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if err == nil {
			return loop
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			t.Fatalf("set up %s for %s: %v", loop.Name(), image, err)
		}
	}
}

// cut makes an image of what a power cut after n entries may leave: all that was flushed,
// and of what was written since then a part. It returns how many blocks are missing.
func (d *device) cut(random *rand.Rand, n int, image string) (lost int) {
	d.t.Helper()
	copySparse(d.t, d.base, image)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	must(d.t, err)
	defer f.Close()
	log := d.log[:n]
	flushed := 0
	for i, e := range log {
		if e.data == nil {
			flushed = i
		}
	}
	// How much gets through differs from cut to cut.
	share := random.Float64()
	for i, e := range log {
		for off := 0; off < len(e.data); off += block {
			if i > flushed && random.Float64() >= share {
				lost++
				continue
			}
			_, err := f.WriteAt(e.data[off:min(off+block, len(e.data))], e.at+int64(off))
			must(d.t, err)
		}
	}
	return lost
}
