// Package draft replaces files so that whoever is killed in between leaves the old one or the
// new one.
//
// What it promises:
//
//   - A draft is a file of its own, mode 0600, beside the one that it is to replace, and gets
//     its name by rename(2). It is synced before.
//   - Errors name the file that was to be replaced, and never the draft, whose name is another
//     one each time: the same failure has the same text, and is told once by who does so.
//   - Go's poller is not set up, which in a mount on a running instance nothing else needs.
//
// Drafts that a killed process left stay. Whoever uses this gives them a prefix of their own,
// and removes what begins with it when nobody writes. The directory is not synced either:
// after a power cut the old file may be there again.
//
// Do not use it for files that others change in place, or that are too large to be there twice.
package draft

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// File is a draft.
type File struct {
	*os.File
	path, tmp string
}

// New makes one that is to replace path. Its name begins with prefix until then.
func New(path, prefix string) (*File, error) {
	tmp := filepath.Join(filepath.Dir(path), prefix+strconv.FormatUint(rand.Uint64(), 10))
	fd, err := unix.Open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &File{os.NewFile(uintptr(fd), path), path, tmp}, nil
}

// Place gives it its name. It was synced and closed before.
func (f *File) Place() error {
	if err := os.Rename(f.tmp, f.path); err != nil {
		return &os.PathError{Op: "rename to", Path: f.path, Err: errors.Unwrap(err)}
	}
	return nil
}

// Discard removes it, unless it has got its name.
func (f *File) Discard() error {
	if err := os.Remove(f.tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return &os.PathError{Op: "remove what was to become", Path: f.path, Err: errors.Unwrap(err)}
	}
	return nil
}

// Write replaces path by a file that has data, or leaves nothing behind.
func Write(path, prefix string, data []byte) error {
	f, err := New(path, prefix)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = f.Place()
	}
	if err != nil {
		return errors.Join(err, f.Discard())
	}
	return nil
}
