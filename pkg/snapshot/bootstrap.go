package snapshot

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// bootstrapPaths are where a bootstrap layer holds its bootstrap, best first.
func bootstrapPaths() []string { return []string{"image/image.boot", "image.boot"} }

// inspect reads the bootstrap in a layer's directory and returns what is to be
// recorded. Nothing in the directory can be trusted.
func inspect(layer string) (record, error) {
	f, path, err := openBootstrap(layer)
	if err != nil {
		return record{}, err
	}
	defer f.Close()
	r, err := read(f, path)
	if err != nil {
		return record{}, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func openBootstrap(layer string) (*os.File, string, error) {
	dir, err := os.OpenFile(layer, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, "", err
	}
	defer dir.Close()
	for _, path := range bootstrapPaths() {
		f, err := openBeneath(dir, path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", path, err)
		}
		return f, path, nil
	}
	return nil, "", fmt.Errorf("the layer has no file %s", bootstrapPaths()[0])
}

// openBeneath opens a regular file below dir for reading and refuses anything
// else before it is opened: opening a device or a FIFO has effects.
func openBeneath(dir *os.File, path string) (*os.File, error) {
	fd, err := openat2(int(dir.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, errors.New("a symbolic link is on the way to it, which an image must not have there")
	case errors.Is(err, unix.ENOTDIR):
		return nil, fs.ErrNotExist
	case err != nil:
		return nil, fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("is %s, want a regular file", typeName(st.Mode))
	}
	// Through the descriptor this is the same file, whatever its name is now.
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	return f, nil
}

func openat2(dir int, path string, how *unix.OpenHow) (int, error) {
	const tries = 32 // EAGAIN: something was renamed meanwhile
	for i := 0; ; i++ {
		fd, err := unix.Openat2(dir, path, how)
		if err == nil || i == tries || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFBLK, unix.S_IFCHR:
		return "a device"
	default:
		return "something unknown"
	}
}

func read(f *os.File, path string) (record, error) {
	boot, size, err := rafs.OpenFile(f)
	if err != nil {
		return record{}, err
	}
	sum := sha256.New()
	if n, err := io.Copy(sum, io.NewSectionReader(f, 0, size)); err != nil || n != size {
		return record{}, fmt.Errorf("read %d of %d bytes: %w", n, size, errors.Join(err, io.ErrUnexpectedEOF))
	}
	// The record will vouch for this content, also after a power cut.
	if err := f.Sync(); err != nil {
		return record{}, fmt.Errorf("write to disk: %w", err)
	}
	r := record{
		Kind: kindBootstrap, Path: path, Size: size, FSVersion: boot.Version,
		Digest: "sha256:" + hex.EncodeToString(sum.Sum(nil)),
	}
	for _, b := range boot.Blobs {
		r.Blobs = append(r.Blobs, b.ID)
	}
	return r, nil
}
