package rootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// TypeEROFS is the type of the kernel's EROFS in the mount table.
const TypeEROFS = "erofs"

// EROFS mounts a v6 bootstrap on target through the kernel's own filesystem, read-only,
// with files as its devices, in the order of its device slots. It takes Linux 6.12 and a
// bootstrap on a disk.
//
// The kernel believes whatever it finds in the devices: the caller has proven that it is
// right. The device files are taken by their descriptors, so that they are those that were
// looked at.
func EROFS(target, bootstrap string, devices []*os.File) error {
	fd, err := erofs(bootstrap, devices)
	if err != nil {
		return fmt.Errorf("mount the image through the kernel's EROFS: %w%s", err, erofsHint(err))
	}
	defer unix.Close(fd)
	if err := attach(fd, target); err != nil {
		return fmt.Errorf("mount the image through the kernel's EROFS: %w", err)
	}
	if err := Private(target); err != nil {
		return errors.Join(err, Detach(target))
	}
	return nil
}

// erofs returns a mount that is attached nowhere. mount(2) takes one page of options, which
// is too short for forty devices.
func erofs(source string, devices []*os.File) (int, error) {
	ctx, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen erofs: %w", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetString(ctx, "source", source); err != nil {
		return -1, explained(ctx, fmt.Errorf("set source %s: %w", source, err))
	}
	for _, f := range devices {
		if err := unix.FsconfigSetString(ctx, "device", fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil {
			return -1, explained(ctx, fmt.Errorf("add device %s: %w", f.Name(), err))
		}
	}
	if err := unix.FsconfigSetFlag(ctx, "ro"); err != nil {
		return -1, explained(ctx, fmt.Errorf("set ro: %w", err))
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, explained(ctx, fmt.Errorf("create the filesystem of %s: %w", source, err))
	}
	// As nydusd's mount has.
	const attrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOATIME
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, explained(ctx, fmt.Errorf("fsmount: %w", err))
	}
	return fd, nil
}

// explained adds what the kernel has to say about a filesystem context.
func explained(ctx int, err error) error {
	text := make([]byte, 1024)
	n, failed := unix.Read(ctx, text)
	if failed != nil || n <= 0 {
		return err
	}
	return fmt.Errorf("%w (%q)", err, text[:n])
}

// CannotEROFS tells whether an error of EROFS or ProbeEROFS lies in the kernel, or in where
// the bootstrap lies: the next try on this node ends the same.
func CannotEROFS(err error) bool { return erofsHint(err) != "" }

func erofsHint(err error) string {
	switch {
	case errors.Is(err, unix.ENODEV):
		return "; the kernel lacks EROFS (CONFIG_EROFS_FS): use driver \"fuse\""
	case errors.Is(err, unix.ENOSYS):
		return "; the kernel lacks the new mount calls: use driver \"fuse\""
	case errors.Is(err, unix.ENOTBLK):
		return "; the kernel mounts block devices only (file-backed mounts take Linux 6.12 and CONFIG_EROFS_FS_BACKED_BY_FILE), or the bootstrap lies where it cannot, such as on a tmpfs"
	}
	return ""
}

// ProbeEROFS tells whether this kernel mounts files in dir through EROFS: it tries it, with
// an image of an empty directory. What it mounts is attached nowhere.
func ProbeEROFS(dir string) error {
	f, err := os.CreateTemp(dir, ".erofs-probe-")
	if err != nil {
		return fmt.Errorf("probe EROFS: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(emptyEROFS())
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("probe EROFS: %w", err)
	}
	fd, err := erofs(filepath.Clean(f.Name()), nil)
	if err != nil {
		return fmt.Errorf("probe EROFS: %w%s", err, erofsHint(err))
	}
	return unix.Close(fd)
}

// emptyEROFS is one block: the superblock at 1024, and behind its 128 bytes the inode of the
// root directory, compact and without data. (Linux, fs/erofs/erofs_fs.h.)
func emptyEROFS() []byte {
	const super, inode = 1024, 1024 + 128
	b := make([]byte, 4096)
	le := binary.LittleEndian
	le.PutUint32(b[super:], 0xE0F5E1E2)
	b[super+12] = 12                     // the block size is 1 << 12
	le.PutUint16(b[super+14:], inode/32) // the root's number
	le.PutUint64(b[super+16:], 1)        // inodes
	le.PutUint32(b[super+36:], 1)        // blocks
	le.PutUint16(b[inode+4:], unix.S_IFDIR|0o755)
	le.PutUint16(b[inode+6:], 2) // links
	return b
}
