package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Connections is the kernel's own list of FUSE filesystems (fusectl). It answers
// whatever hangs, and knows filesystems that are mounted nowhere any more. A
// number is used again once its filesystem is gone: whoever acts on one has to
// know that it is still the one that he means.
type Connections struct{ fd int }

// OpenConnections opens the list. It needs no fusectl that is mounted, and leaves
// none behind.
func OpenConnections() (*Connections, error) {
	fd, err := fusectl()
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("open the kernel's list of FUSE filesystems: %w; load the module (modprobe fuse)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open the kernel's list of FUSE filesystems: %w", err)
	}
	return &Connections{fd}, nil
}

// fusectl makes a mount that is attached nowhere: it goes with its descriptor.
func fusectl() (int, error) {
	ctx, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	return fd, os.NewSyscallError("fsmount", err)
}

// Close closes the list.
func (c *Connections) Close() error { return unix.Close(c.fd) }

// Waiting tells how many requests to the filesystem with that device number
// ("major:minor") have no answer yet. The error wraps fs.ErrNotExist when there is
// no such filesystem.
func (c *Connections) Waiting(dev string) (int, error) {
	fd, err := c.open(dev, "waiting", unix.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var buf [32]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return 0, fmt.Errorf("read how many wait for FUSE filesystem %s: %w", dev, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(buf[:n])))
}

// Abort fails all requests to the filesystem with that device number, those that
// wait now and those to come, for good: its users get errors. One that is gone is no
// error.
func (c *Connections) Abort(dev string) error {
	fd, err := c.open(dev, "abort", unix.O_WRONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("1")); err != nil {
		return fmt.Errorf("abort FUSE filesystem %s: %w", dev, err)
	}
	return nil
}

func (c *Connections) open(dev, file string, flags int) (int, error) {
	number, err := connection(dev)
	if err != nil {
		return -1, err
	}
	path := number + "/" + file
	fd, err := unix.Openat(c.fd, path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, fmt.Errorf("FUSE filesystem %s: %w", dev, &os.PathError{Op: "open", Path: "fusectl:" + path, Err: err})
	}
	return fd, nil
}

// connection is the kernel's name for a FUSE filesystem: its device number, as
// the kernel has it, in decimal.
func connection(dev string) (string, error) {
	const minorBits = 20
	left, right, _ := strings.Cut(dev, ":")
	major, err1 := strconv.ParseUint(left, 10, 32-minorBits)
	minor, err2 := strconv.ParseUint(right, 10, minorBits)
	if err1 != nil || err2 != nil {
		return "", fmt.Errorf("device number %q: want major:minor", dev)
	}
	return strconv.FormatUint(major<<minorBits|minor, 10), nil
}

// Connected tells whether there is a FUSE filesystem with that device number,
// mounted in whatever mount namespace, or nowhere any more.
func Connected(dev string) (bool, error) {
	c, err := OpenConnections()
	if err != nil {
		return false, err
	}
	defer unix.Close(c.fd)
	_, err = c.Waiting(dev)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// AbortConnection is Connections.Abort for one filesystem.
func AbortConnection(dev string) error {
	c, err := OpenConnections()
	if err != nil {
		return err
	}
	return errors.Join(c.Abort(dev), c.Close())
}
