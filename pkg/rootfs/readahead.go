package rootfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readAheadKiB is how far the kernel reads ahead in a file of a file-backed EROFS, and how
// much it reads around a page fault. The kernel's own is 128. EROFS waits for each of these
// reads, which goes through the cache file's read-ahead in pieces of 64 KiB: few large ones
// take a third fewer requests to start a program from a cold page cache, for a fifth more
// bytes on a disk that reads 128 KiB ahead itself. More than this gains little, and whoever
// jumps about in a large file pays for all of it.
const readAheadKiB = 512

// backingDevices has a directory for each of the kernel's read-ahead settings
// (Documentation/ABI/testing/sysfs-class-bdi).
const backingDevices = "/sys/class/bdi"

// ReadAhead has the kernel read further ahead in the files of an EROFS that is mounted on
// target, once it knows the name of the filesystem's setting, which is no part of the
// kernel's contract. A filesystem that reads as far already is left as it is. An error costs
// speed alone.
func ReadAhead(target string) error {
	name, err := sysfsName(target)
	if err != nil {
		return fmt.Errorf("read-ahead of %s: %w", target, err)
	}
	// "erofs/erofs-12": since EROFS mounts files its name is that of the setting.
	device, ok := strings.CutPrefix(name, TypeEROFS+"/")
	if _, err := strconv.ParseUint(strings.TrimPrefix(device, TypeEROFS+"-"), 10, 64); !ok || err != nil {
		return fmt.Errorf("read-ahead of %s: the kernel calls it %q, which names no setting", target, name)
	}
	path := filepath.Join(backingDevices, device, "read_ahead_kb")
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read-ahead of %s: %w", target, err)
	}
	if is, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && is >= readAheadKiB {
		return nil
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(readAheadKiB)), 0); err != nil {
		return fmt.Errorf("read-ahead of %s: %w", target, err)
	}
	return nil
}

// getSysfsPath is FS_IOC_GETFSSYSFSPATH of include/uapi/linux/fs.h (Linux 6.9), as it is on
// all architectures that nydusd runs on.
const getSysfsPath = 0x80811501

// sysfsName is the name that a filesystem has beneath /sys/fs.
func sysfsName(target string) (string, error) {
	fd, err := unix.Open(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: target, Err: err}
	}
	defer unix.Close(fd)
	var path struct {
		len  uint8
		name [128]byte
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getSysfsPath, uintptr(unsafe.Pointer(&path)))
	if errno != 0 {
		return "", fmt.Errorf("ask for the filesystem's name in sysfs: %w", errno)
	}
	return string(path.name[:min(int(path.len), len(path.name))]), nil
}
