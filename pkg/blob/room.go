package blob

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// reserve is the part of the disk that what nobody asked for leaves free.
const reserve = 0.05

// Room tells how many bytes may be added to the cache that nobody waits for: up to the low
// watermark, since what is above the high one is removed down to that and would only be
// fetched again, and with a part of the disk left free. It is negative when there are too
// many already.
func (c *Cache) Room() (int64, error) {
	disk, err := c.disk()
	if err != nil {
		return 0, err
	}
	room := disk.free - int64(reserve*float64(disk.size))
	low := c.o.Low
	if low.IsZero() {
		low = c.o.High
	}
	switch {
	case low.Part > 0:
		room = min(room, int64(math.Floor(low.Part*float64(disk.size)))-disk.used)
	case low.Bytes > 0:
		usage, err := c.usage()
		if err != nil {
			return 0, err
		}
		room = min(room, low.Bytes-usage)
	}
	return room, nil
}

// Free tells how many bytes the cache's disk has left.
func (c *Cache) Free() (int64, error) {
	disk, err := c.disk()
	return disk.free, err
}

// disk is as df has it: what root alone may use is not there.
type disk struct{ size, used, free int64 }

func (c *Cache) disk() (disk, error) {
	var st unix.Statfs_t
	err := unix.Statfs(filepath.Join(c.o.Root, "cache"), &st)
	if errors.Is(err, fs.ErrNotExist) {
		err = unix.Statfs(c.o.Root, &st) // nothing was cached yet
	}
	if err != nil {
		return disk{}, fmt.Errorf("learn how full the disk of the cache in %s is: %w", c.o.Root, err)
	}
	d := disk{used: int64(st.Blocks-st.Bfree) * st.Bsize, free: int64(st.Bavail) * st.Bsize}
	d.size = d.used + d.free
	return d, nil
}

// usage is what the cache occupies by now.
func (c *Cache) usage() (n int64, err error) {
	dirs, err := scan(c.o.Root)
	for _, d := range dirs {
		for _, b := range d.blobs {
			n += b.usage()
		}
	}
	return n, err
}
