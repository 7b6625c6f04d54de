package instance

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/draft"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

const (
	// runDirMiB bounds the run directory. An instance takes some 10 KiB.
	runDirMiB = 64
	// MaxRunDir is how long the path of a run directory may be: with an
	// instance's directory and socket it must fit a socket address, 107 bytes.
	MaxRunDir = 107 - len("/i/0123456789abcdef0123456789abcdef/g999999/api.sock")
)

// SetupRunDir makes sure that path is a run directory that can be trusted: a
// tmpfs of our own, owned by the calling user, mode 0700, reached through no
// symbolic link. Whoever comes first mounts it.
func SetupRunDir(path string) error {
	if len(path) > MaxRunDir {
		return fmt.Errorf("run directory %s: %d characters are too long for the sockets in it, at most %d: set a shorter run_dir", path, len(path), MaxRunDir)
	}
	if strings.ContainsAny(path, ",:\\\n") {
		return fmt.Errorf("run directory %q has a character that an overlay option cannot carry (one of , : \\ or a line break): set another run_dir", path)
	}
	mounted, err := checkRunDir(path)
	if err == nil && mounted {
		// Whoever mounted it may have been killed before it did this.
		return rootfs.Share(path)
	}
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return fmt.Errorf("create run directory: %w", err)
		}
		_, err = checkRunDir(path)
	}
	if err != nil {
		return err
	}
	return mountRunDir(path)
}

// mountRunDir mounts the tmpfs once, however many processes try.
func mountRunDir(path string) error {
	// All who find it missing open the same directory beneath it.
	lock, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("lock run directory: %w", err)
	}
	defer lock.Close()
	if err := flock(lock, unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock run directory %s: %w", path, err)
	}
	if mounted, err := checkRunDir(path); err != nil || mounted {
		return err
	}
	return rootfs.Tmpfs(path, runDirMiB)
}

// checkRunDir tells whether path is trusted, and whether our tmpfs is on it.
func checkRunDir(path string) (mounted bool, err error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if errors.Is(err, unix.ELOOP) {
		return false, fmt.Errorf("run directory %s: a part of it is a symbolic link; configure the path it leads to", path)
	}
	if err != nil {
		return false, fmt.Errorf("open run directory: %w", &os.PathError{Op: "openat2", Path: path, Err: err})
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_UID|unix.STATX_MODE, &st); err != nil {
		return false, fmt.Errorf("check run directory: %w", &os.PathError{Op: "statx", Path: path, Err: err})
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return false, fmt.Errorf("run directory %s is not trusted: owner %d, mode %04o, want owner %d and mode 0700; correct or remove it", path, st.Uid, st.Mode&0o7777, os.Geteuid())
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return false, fmt.Errorf("check run directory: %w", &os.PathError{Op: "statfs", Path: path, Err: err})
	}
	return fs.Type == unix.TMPFS_MAGIC && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// openFile opens a file as os.OpenFile does, mode 0600, but without Go's poller,
// which would be set up for the first file of all: in a mount on a running
// instance nothing else needs it.
func openFile(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// readFile is os.ReadFile by openFile.
func readFile(path string) ([]byte, error) {
	f, err := openFile(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// unfinished begins the names of files that are being written, before that of the file they
// will be: who removes what is left of one leaves those of others alone.
func unfinished(path string) string { return ".new-" + filepath.Base(path) + "-" }

// writeFile replaces a file so that it is always either the old or the new one.
func writeFile(path string, data []byte) error { return draft.Write(path, unfinished(path), data) }

// readOrWrite returns the content of a file that is written once: text, if it
// does not exist yet. Of several writers, of other texts too, one wins. It locks
// the directory meanwhile, and removes what killed writers of this file left there.
func readOrWrite(path string, text []byte) ([]byte, error) {
	have, err := os.ReadFile(filepath.Clean(path))
	if !errors.Is(err, os.ErrNotExist) {
		return have, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := flock(dir, unix.LOCK_EX); err != nil {
		return nil, &os.PathError{Op: "flock", Path: dir.Name(), Err: err}
	}
	if have, err := os.ReadFile(filepath.Clean(path)); !errors.Is(err, os.ErrNotExist) {
		return have, err
	}
	left, _ := filepath.Glob(filepath.Join(dir.Name(), unfinished(path)+"*"))
	for _, file := range left {
		os.Remove(file)
	}
	return text, writeFile(path, text)
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
