package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount is one line of the mount table.
type Mount struct {
	// Target is where it is mounted.
	Target string
	// Root is which directory of the filesystem is mounted there.
	Root string
	// Type is the filesystem's type, such as "overlay" or "fuse.rafs".
	Type string
	// Source is what was mounted, as whoever mounted it named it.
	Source string
	// Dev is the filesystem's device number, "major:minor".
	Dev string
	// Flags are the mount's own flags, such as "rw,nosuid".
	Flags string
	// Options are the filesystem's options.
	Options string
}

// Option returns the value of one of the filesystem's options.
func (m Mount) Option(name string) (string, bool) {
	for _, o := range strings.Split(m.Options, ",") {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			return v, true
		}
	}
	return "", false
}

// Table is a reading of the mount table of the caller's mount namespace, in the
// kernel's order: of several mounts on one target the last is visible.
type Table []Mount

// ReadTable reads the mount table.
func ReadTable() (Table, error) {
	return read(nil)
}

// read reads the lines that filter does not skip. It opens no os.File: Go's
// runtime would poll it, which takes longer than reading.
func read(filter mountinfo.FilterFunc) (Table, error) {
	fd, err := openTable()
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	defer unix.Close(fd)
	infos, err := mountinfo.GetMountsFromReader(reader(fd), filter)
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	return toTable(infos), nil
}

// openTable opens the mount table of the calling thread.
func openTable() (int, error) {
	const path = "/proc/thread-self/mountinfo"
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// reader reads a file descriptor.
type reader int

func (r reader) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(r), p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		return max(n, 0), err
	}
}

func toTable(infos []*mountinfo.Info) Table {
	t := make(Table, len(infos))
	for i, m := range infos {
		t[i] = Mount{
			Target: m.Mountpoint, Root: m.Root, Type: m.FSType, Dev: fmt.Sprintf("%d:%d", m.Major, m.Minor),
			Flags: m.Options, Source: unescape(m.Source), Options: unescape(m.VFSOptions),
		}
	}
	return t
}

// unescape undoes the octal escapes by which the kernel keeps a line one line.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace(s)
}

// At returns the visible mount on target.
func (t Table) At(target string) (Mount, bool) {
	for i := len(t) - 1; i >= 0; i-- {
		if t[i].Target == target {
			return t[i], true
		}
	}
	return Mount{}, false
}

// Under returns the mount that path lies on.
func (t Table) Under(path string) (Mount, bool) {
	best, found := Mount{}, false
	for _, m := range t {
		if (path == m.Target || strings.HasPrefix(path, strings.TrimSuffix(m.Target, "/")+"/")) && len(m.Target) >= len(best.Target) {
			best, found = m, true
		}
	}
	return best, found
}

// Watch tells when the mount table of the calling thread's mount namespace
// changes. The zero value is not usable; see NewWatch.
type Watch struct {
	// fd is no os.File: Go's runtime would poll it too, and the kernel tells
	// each change to one poll only.
	fd int
}

// NewWatch opens the mount table. What changes after it returns wakes Wait.
func NewWatch() (*Watch, error) {
	fd, err := openTable()
	if err != nil {
		return nil, fmt.Errorf("watch mount table: %w", err)
	}
	return &Watch{fd: fd}, nil
}

// Close releases the watch. It must not be called while Wait runs.
func (w *Watch) Close() error { return unix.Close(w.fd) }

// ErrDeadline says that the time given to Wait is over.
var ErrDeadline = errors.New("deadline exceeded")

// Wait returns when the mount table has changed (changed is true), when one of
// the file descriptors fds is readable (a pidfd: its process has ended), or
// with ErrDeadline. A zero deadline is none.
func (w *Watch) Wait(deadline time.Time, fds ...int) (changed bool, err error) {
	polls := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLPRI}}
	for _, fd := range fds {
		polls = append(polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for {
		timeout := -1
		if !deadline.IsZero() {
			// Round up, or the last millisecond would be spent spinning.
			timeout = int(max(0, (time.Until(deadline)+time.Millisecond-1)/time.Millisecond))
		}
		n, err := unix.Poll(polls, timeout)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return false, fmt.Errorf("poll mount table: %w", err)
		case n == 0:
			return false, ErrDeadline
		}
		return polls[0].Revents != 0, nil
	}
}

// Follow calls changed once when it has begun to watch and then after every
// change of the mount table, one call for changes that come while it runs, until
// ctx ends. It returns nil then.
func Follow(ctx context.Context, changed func()) error {
	w, err := NewWatch()
	if err != nil {
		return err
	}
	defer w.Close()
	r, stop, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("watch mount table: %w", err)
	}
	defer r.Close()
	// Closing the pipe's other end wakes the poll below. A second close is
	// harmless.
	defer stop.Close()
	defer context.AfterFunc(ctx, func() { stop.Close() })()
	changed() // what came before the watch
	for ctx.Err() == nil {
		moved, err := w.Wait(time.Time{}, int(r.Fd()))
		if err != nil {
			return err
		}
		if moved {
			changed()
		}
	}
	return nil
}

// Lookup returns the visible mount on target. It is cheaper than a whole Table.
func Lookup(target string) (Mount, bool, error) {
	t, err := read(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != target, false })
	m, ok := t.At(target)
	return m, ok, err
}
