package proof

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Draft is a file that is being written beside the one that it is to replace. Its errors name
// the latter: the same failure has the same text each time, and is told once by who does so.
type Draft struct {
	*os.File
	path, tmp string
}

// NewDraft makes one, mode 0600, of which prefix begins the name until it is put in its place.
func NewDraft(path, prefix string) (*Draft, error) {
	tmp := filepath.Join(filepath.Dir(path), prefix+strconv.FormatUint(rand.Uint64(), 10))
	fd, err := unix.Open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: path, Err: err}
	}
	return &Draft{os.NewFile(uintptr(fd), path), path, tmp}, nil
}

// Place gives it its name. It was synced and closed before.
func (d *Draft) Place() error {
	if err := os.Rename(d.tmp, d.path); err != nil {
		return &os.PathError{Op: "rename to", Path: d.path, Err: errors.Unwrap(err)}
	}
	return nil
}

// Discard removes it.
func (d *Draft) Discard() error {
	if err := os.Remove(d.tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return &os.PathError{Op: "remove what was to become", Path: d.path, Err: errors.Unwrap(err)}
	}
	return nil
}
