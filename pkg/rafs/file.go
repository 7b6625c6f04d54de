package rafs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// MaxSize bounds a bootstrap in bytes. The largest seen have a few hundred MiB, for some
// millions of files.
const MaxSize = 1 << 30

// OpenFile is Open for a file, which has to be a regular one of at most MaxSize bytes. It
// also returns its size.
func OpenFile(f *os.File) (b *Bootstrap, size int64, err error) {
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("not a regular file (%s)", info.Mode().Type())
	case info.Size() > MaxSize:
		err = fmt.Errorf("%w: it has %d bytes, more than the limit of %d", ErrInvalid, info.Size(), MaxSize)
	default:
		b, err = open(&image{r: f, size: info.Size()})
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read bootstrap: %w", err)
	}
	return b, info.Size(), nil
}

// ReadFile is OpenFile for a path. It follows no symbolic link there, and does not block on
// what is no file. Its errors name the path.
func ReadFile(path string) (*Bootstrap, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open bootstrap: %w", err)
	}
	b, _, err := OpenFile(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}
