package blob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Place is Options.Place.
func (c *Cache) Place(ctx context.Context, image, backend string) (string, error) {
	return c.o.Place(ctx, image, backend)
}

// Usage returns what a blob's files occupy in a cache directory, and in the private ones
// in it, in bytes on the disk. It looks for them by name and at nothing else. The id is 64
// hex digits.
func (c *Cache) Usage(dir, id string) (n int64, err error) {
	if !rafs.IsID(id) {
		return 0, fmt.Errorf("usage of blob %.80q: its id is not 64 lowercase hex digits", id)
	}
	dirs, err := instance.CacheDirs(dir)
	if err != nil {
		return 0, fmt.Errorf("usage of blob %s: %w", id, err)
	}
	for _, dir := range dirs {
		b, err := lookup(dir, id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("usage of blob %s: %w", id, err)
		}
		n += b.usage()
	}
	return n, nil
}

func lookup(dir, id string) (*cached, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return (&cached{id: id}).again(f)
}
