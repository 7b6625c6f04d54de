package logs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Old is where Cut puts the older part of a log.
func Old(path string) string { return path + ".1" }

// fresh is where the older part is while it is being written.
func fresh(path string) string { return path + ".new" }

// Files lists everything that a log at path may consist of.
func Files(path string) []string { return []string{path, Old(path), fresh(path)} }

// Range is what Cut took out of a log: To bytes were taken off its front, of which
// those from From on are in Old now. To is 0 when nothing was cut.
type Range struct{ From, To int64 }

// Cut bounds the log at path: of one that has grown over limit the newest part, at
// most limit, becomes the older log, and the log begins anew. Together they take no
// more than twice the limit, and what is written until the next Cut.
//
// Whoever has the log open to append to it goes on writing to it, and loses nothing
// where the filesystem can take off the front of a file (ext4, XFS). Elsewhere the
// log is emptied, and what is written in the instant between the last look at it and
// that is lost, or more in a flood. A line that is written in one piece is torn
// between the two files at most.
//
// A Cut that is killed half way leaves the log complete, and at worst no older one.
// A machine that loses its power may lose the older one, too.
// When the older part cannot be kept, for want of space for instance, the log is
// bounded all the same, and the error says so. While another process cuts the same
// log Cut does nothing.
func Cut(path string, limit int64) (Range, error) {
	c := cutter{path: path, limit: limit, collapse: true}
	over, err := c.open()
	if c.log != nil {
		defer c.log.Close()
	}
	if err != nil {
		return Range{}, fmt.Errorf("bound log: %w", err)
	}
	if !over {
		return Range{}, nil
	}
	return c.cut()
}

// ahead is how much room Reserve makes.
const ahead = 256 << 10

// Drop makes room on a full disk: the older log goes, and what is in the log if that
// is more than keep.
func Drop(path string, keep int64) (Range, error) {
	c := cutter{path: path, limit: keep, collapse: true}
	over, err := c.open()
	if c.log == nil {
		return Range{}, err
	}
	defer c.log.Close()
	if err = errors.Join(err, c.forget()); err == nil && over {
		to := c.align(c.size)
		c.took = Range{From: to, To: to}
		err = c.shrink()
	}
	if err != nil {
		return c.took, fmt.Errorf("drop log: %w", err)
	}
	return c.took, nil
}

// Reserve makes room for what is written to a log next, which takes as much space on
// disk: nydusd 2.2.0 ends when it cannot write its log, as on a full disk.
func Reserve(log *os.File, size int64) error {
	err := unix.Fallocate(int(log.Fd()), unix.FALLOC_FL_KEEP_SIZE, size, ahead)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return &os.PathError{Op: "reserve space for log", Path: log.Name(), Err: err}
	}
	return nil
}

// cutter is one Cut.
type cutter struct {
	path  string
	limit int64
	log   *os.File
	old   *os.File
	size  int64 // of the log when it was opened
	block int64 // of its filesystem
	// collapse says that the front of a file may be taken off, where that works.
	collapse bool
	took     Range
	// published says that old is what others see.
	published bool
}

// open locks the log, removes what a killed Cut left, and tells whether there is
// something to cut.
func (c *cutter) open() (over bool, err error) {
	f, err := os.OpenFile(c.path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	c.log = f
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return false, &os.PathError{Op: "lock", Path: c.path, Err: err}
	}
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		return false, fmt.Errorf("%s is no regular file", c.path)
	}
	if err := remove(fresh(c.path)); err != nil {
		return false, err
	}
	// As when the limit was lowered.
	if old, err := os.Lstat(Old(c.path)); err == nil && old.Size() > c.limit {
		if err := remove(Old(c.path)); err != nil {
			return false, err
		}
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return false, &os.PathError{Op: "statfs", Path: c.path, Err: err}
	}
	c.size, c.block = info.Size(), fs.Bsize
	return c.size > c.limit, nil
}

func (c *cutter) cut() (Range, error) {
	var err error
	for _, step := range c.steps() {
		if err = step(); err != nil {
			break
		}
	}
	if c.old != nil {
		err = errors.Join(err, c.old.Close())
	}
	if err == nil {
		return c.took, nil
	}
	// A bounded log is worth more than its old lines.
	err = errors.Join(fmt.Errorf("keep the older part of log %s, of which lines are lost now: %w", c.path, err), remove(fresh(c.path)))
	if c.old = nil; !c.published {
		to := c.align(c.size - c.limit/2)
		c.took = Range{From: to, To: to}
	}
	err = errors.Join(err, c.shrink())
	return c.took, err
}

// steps are what cut does. It may end after each.
func (c *cutter) steps() []func() error {
	return []func() error{c.forget, c.copy, c.publish, c.trim, c.shrink}
}

// forget removes what is older: with the copy to come it would be too much.
func (c *cutter) forget() error { return remove(Old(c.path)) }

// share is the part of the limit that is left for what comes while we copy.
func (c *cutter) share() int64 { return c.limit / 8 }

// copy writes the newest part to a new file, from the beginning of a line.
func (c *cutter) copy() (err error) {
	from := lineAt(c.log, max(0, c.size-(c.limit-c.share())))
	if _, err := c.log.Seek(from, io.SeekStart); err != nil {
		return err
	}
	c.old, err = os.OpenFile(fresh(c.path), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.CopyN(c.old, c.log, c.size-from); err != nil {
		return err
	}
	c.took.From, c.took.To = from, c.align(c.size)
	// Not synced: on a busy disk that takes seconds, in which the log grows without
	// bound. A machine that loses its power may lose the older log.
	return nil
}

// align returns where the last block before offset begins: the front of a file can
// be taken off in whole blocks only, and never all of it.
func (c *cutter) align(offset int64) int64 { return (offset - 1) / c.block * c.block }

func (c *cutter) publish() error {
	err := os.Rename(fresh(c.path), Old(c.path))
	c.published = err == nil
	return err
}

// trim takes off the older part what stays in the log.
func (c *cutter) trim() error {
	kept := c.took.To - c.took.From
	if err := c.old.Truncate(kept); err != nil {
		return err
	}
	_, err := c.old.Seek(kept, io.SeekStart)
	return err
}

// shrink takes off the front of the log, or empties it.
func (c *cutter) shrink() error {
	if c.collapse {
		err := unix.Fallocate(int(c.log.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, c.took.To)
		if err == nil {
			return nil
		}
	}
	if _, err := c.log.Seek(c.took.To, io.SeekStart); err != nil {
		return err
	}
	if c.old != nil {
		n, err := io.Copy(c.old, io.LimitReader(c.log, c.share()))
		c.took.To += n
		return errors.Join(err, c.log.Truncate(0))
	}
	// All of it goes.
	end, err := c.log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	c.took = Range{From: end, To: end}
	return c.log.Truncate(0)
}

// lineAt returns the first beginning of a line from offset on, or offset when there
// is none nearby.
func lineAt(f io.ReaderAt, offset int64) int64 {
	if offset == 0 {
		return 0
	}
	buf := make([]byte, maxLine)
	n, _ := f.ReadAt(buf, offset-1)
	if end := bytes.IndexByte(buf[:n], '\n'); end >= 0 {
		return offset + int64(end)
	}
	return offset
}

// remove removes a file if it is there.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
