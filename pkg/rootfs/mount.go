package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mount"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

// Overlay describes one overlay mount. Paths are absolute.
type Overlay struct {
	// Lower lists the lower directories, uppermost first; at least one.
	Lower []string
	// Upper and Work are empty for a read-only overlay.
	Upper, Work string
	// Options are flags and overlay options as mount(8) takes them, such as
	// "nodev" or "index=off". Later ones win: "dev" clears "nodev".
	Options []string
	// IDMap, when set, shifts the owners of what the lower directories hold, none of
	// which may be FUSE's. The upper one is taken as it is. It takes Linux 5.19.
	IDMap *IDMap
	// Unmapped is how many of the lower directories, from the uppermost on, IDMap does
	// not concern: what lies there belongs to the right owners already.
	Unmapped int
}

// maxData is how much option text mount(2) takes: a page with its final NUL.
func maxData() int { return os.Getpagesize() - 1 }

// Mount mounts the overlay on target. Long lists of lower directories are
// written relative to their common parent, so that hundreds fit.
func (o Overlay) Mount(target string) error {
	lower := o.Lower
	if o.Upper == "" && len(lower) == 1 {
		// The kernel refuses a read-only overlay of a single layer.
		if o.IDMap != nil {
			return bindMapped(lower[0], target, Flags(o.Options), o.IDMap)
		}
		return Bind(lower[0], target, append([]string{"ro"}, Flags(o.Options)...))
	}
	if o.IDMap != nil {
		return o.mountMapped(target)
	}
	dir := ""
	if len(o.data(lower)) > maxData() {
		dir, lower = shorten(lower)
	}
	data := o.data(lower)
	if len(data) > maxData() {
		return tooLong(target, len(lower), len(data))
	}
	err := at(dir, func() error { return mount.Mount("overlay", target, "overlay", data) })
	if err != nil {
		return fmt.Errorf("mount overlay: %w%s", err, hint(err))
	}
	return nil
}

func tooLong(target string, layers, size int) error {
	return fmt.Errorf("mount overlay on %s: the options for %d layers take %d bytes, the kernel takes %d: use an image with fewer layers or a shorter root directory",
		target, layers, size, maxData())
}

func (o Overlay) data(lower []string) string {
	parts := []string{"lowerdir=" + strings.Join(lower, ":")}
	if o.Upper != "" {
		parts = append(parts, "upperdir="+o.Upper, "workdir="+o.Work)
	} else {
		parts = append(parts, "ro")
	}
	return strings.Join(append(parts, o.Options...), ",")
}

// Flags drops an overlay's own options and its labels, which a bind does not
// take.
func Flags(options []string) []string {
	var flags []string
	for _, o := range options {
		if !strings.Contains(o, "=") && o != "userxattr" && o != "volatile" {
			flags = append(flags, o)
		}
	}
	return flags
}

// shorten writes the paths that lie beneath the most useful common directory
// relative to it. The others, such as an image's mountpoint, stay absolute.
func shorten(paths []string) (dir string, short []string) {
	for _, p := range paths {
		// Snapshots lie at DIR/ID/fs.
		d := filepath.Dir(filepath.Dir(p))
		if saved(d, paths) > saved(dir, paths) {
			dir = d
		}
	}
	for _, p := range paths {
		if rel, ok := strings.CutPrefix(p, dir+"/"); ok && dir != "" {
			p = rel
		}
		short = append(short, p)
	}
	return dir, short
}

func saved(dir string, paths []string) int {
	n := 0
	for _, p := range paths {
		if dir != "" && strings.HasPrefix(p, dir+"/") {
			n += len(dir) + 1
		}
	}
	return n
}

// at runs fn with dir as its working directory, without changing that of the
// process: on a thread of its own, which is thrown away.
func at(dir string, fn func() error) error {
	if dir == "" {
		return fn()
	}
	var err error
	thread.Throwaway(func() {
		if err = unix.Unshare(unix.CLONE_FS); err != nil {
			err = fmt.Errorf("give the mounting thread a working directory of its own: %w", err)
			return
		}
		if err = unix.Chdir(dir); err != nil {
			err = fmt.Errorf("change to %s: %w", dir, err)
			return
		}
		err = fn()
	})
	return err
}

func hint(err error) string {
	switch {
	case errors.Is(err, unix.ENODEV):
		return "; the kernel lacks overlayfs (CONFIG_OVERLAY_FS)"
	case errors.Is(err, unix.EINVAL):
		return "; the kernel log (dmesg) names the option or directory it refused"
	}
	return ""
}

// Bind mounts source on target, privately: what is mounted on either later does
// not show on the other. Options are flags as mount(8) takes them; a bind whose
// options name none keeps the flags of its source.
func Bind(source, target string, options []string) error {
	if err := mount.Mount(source, target, "", "bind"); err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	return finish(target, options)
}

// finish makes the bind on target private and sets its flags, or takes it off.
func finish(target string, options []string) error {
	err := Private(target)
	if err == nil && len(options) > 0 {
		if err = mount.Mount("", target, "", "remount,bind,"+strings.Join(options, ",")); err != nil {
			err = fmt.Errorf("set the flags of the bind: %w", err)
		}
	}
	if err != nil {
		return errors.Join(err, Detach(target))
	}
	return nil
}

// Private takes the mount on path out of its peer group. A mount made beneath a
// shared one, as the run directory is, is in one with every bind of it.
func Private(path string) error {
	if err := mount.Mount("", path, "none", "private"); err != nil {
		return fmt.Errorf("make the mount private: %w", err)
	}
	return nil
}

// Tmpfs mounts a tmpfs of sizeMiB on dir, for root only, and makes it shared: a
// private copy of it in another mount namespace would keep every filesystem
// below it, and so every daemon, alive.
func Tmpfs(dir string, sizeMiB int) error {
	opts := fmt.Sprintf("nosuid,nodev,noexec,mode=0700,size=%dm", sizeMiB)
	if err := mount.Mount("nydus", dir, "tmpfs", opts); err != nil {
		return fmt.Errorf("mount run directory: %w", err)
	}
	if err := Share(dir); err != nil {
		return errors.Join(err, Detach(dir))
	}
	return nil
}

// Share makes the tmpfs on dir shared if it is not yet.
func Share(dir string) error {
	if err := mount.Mount("", dir, "none", "shared"); err != nil {
		return fmt.Errorf("share run directory: %w", err)
	}
	return nil
}

// Detach takes the uppermost mount off path, even a busy one; the filesystem
// ends when nothing uses it any more. A path without a mount is no error.
func Detach(path string) error {
	_, err := detach(path, 0)
	return err
}

// maxStack bounds how many mounts DetachAll takes off one path.
const maxStack = 64

// DetachAll takes every mount off path.
func DetachAll(path string) error { return detachAll(path, 0) }

// Abort takes every mount off path and fails all requests to the filesystems,
// for good, also those that wait for an answer now. It is for a filesystem that
// nobody uses.
func Abort(path string) error { return detachAll(path, unix.MNT_FORCE) }

func detachAll(path string, flags int) error {
	for range maxStack {
		if more, err := detach(path, flags); err != nil || !more {
			return err
		}
	}
	return fmt.Errorf("unmount %s: more than %d mounts lie on it", path, maxStack)
}

// detach tells whether there was a mount.
func detach(path string, flags int) (bool, error) {
	err := unix.Unmount(path, flags|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, fs.ErrNotExist):
		return false, nil
	}
	return false, fmt.Errorf("unmount: %w", &os.PathError{Op: "umount2", Path: path, Err: err})
}
