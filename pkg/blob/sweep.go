package blob

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
)

// Report is what a sweep did, or would do.
type Report struct {
	// Blobs and Usage are what there was before, in bytes on the disk.
	Blobs int   `json:"blobs"`
	Usage int64 `json:"usage"`
	// Removed are the blobs that nothing needed, Evicted those that had to go for room.
	Removed []Blob `json:"removed"`
	Evicted []Blob `json:"evicted"`
	// Freed is what both of them occupied, in bytes.
	Freed int64 `json:"freed"`
	// Short is how much more should have gone to get below the low watermark, in bytes:
	// what is left is read by an instance, open, or too young.
	Short int64 `json:"short"`
	// Busy is how many were to go and are still open somewhere.
	Busy int `json:"busy"`
	// Orphans is how many proofs went of images that are not there any more; others may share
	// their blobs.
	Orphans int `json:"orphans"`
	// Young is how many nothing needs, but are not old enough yet; the first of them
	// is at Next.
	Young int       `json:"young"`
	Next  time.Time `json:"next,omitzero"`
	// Unknown are files that are none of a blob's. They are left alone.
	Unknown []string `json:"unknown"`
}

// Sweep removes what nothing needs, and then evicts what there is no room for. It may run
// beside others and beside everything that mounts. With dry it only tells.
// The error says what could not be looked at or removed; the rest was done all the same.
func (c *Cache) Sweep(ctx context.Context, dry bool) (Report, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := Report{Removed: []Blob{}, Evicted: []Blob{}, Unknown: []string{}}
	s, err := c.look(ctx)
	if s == nil {
		return out, err
	}
	w := &sweep{Cache: c, state: s, dry: dry, report: &out}
	w.fail(err)
	w.fail(s.refs.errors())
	for _, d := range s.dirs {
		out.Blobs += len(d.blobs)
		out.Unknown = append(out.Unknown, d.unknown...)
		for _, b := range d.blobs {
			out.Usage += b.usage()
		}
	}
	w.unneeded(ctx)
	w.evict(ctx)
	w.disown()
	if err := errors.Join(w.errs...); err != nil {
		return out, fmt.Errorf("sweep cache: %w", err)
	}
	return out, nil
}

// sweep is one run of Sweep.
type sweep struct {
	*Cache
	*state
	dry    bool
	report *Report
	errs   []error
}

func (w *sweep) fail(err error) {
	if err != nil {
		w.errs = append(w.errs, err)
	}
}

// unneeded removes what no bootstrap names, and what is left of blobs that were half
// removed.
func (w *sweep) unneeded(ctx context.Context) {
	jobs := make([]*job, 0, len(w.dirs))
	for _, d := range w.dirs {
		if w.refs.fault(d.cache) != nil {
			continue
		}
		j := &job{dir: d, list: w.old(d)}
		jobs = append(jobs, j)
	}
	// The time goes into waiting for the disk, which takes many directories at once.
	var all errgroup.Group
	all.SetLimit(beside)
	for _, j := range jobs {
		if len(j.list) > 0 || j.dir.lock != "" && len(j.dir.blobs) == 0 {
			all.Go(func() error { w.do(ctx, j); return nil })
		}
	}
	w.fail(all.Wait())
	for _, j := range jobs {
		w.report.Removed = append(w.report.Removed, w.settle(j)...)
	}
}

// beside is how many directories are worked on at a time.
const beside = 8

// old lists what nothing needs and is old enough.
func (w *sweep) old(d *directory) (list []*cached) {
	for _, b := range d.blobs {
		if !w.idle(b) {
			continue
		}
		at := b.written().Add(w.o.Grace)
		if !at.After(w.o.Now()) {
			list = append(list, b)
			continue
		}
		w.report.Young++
		w.later(at)
	}
	return list
}

// job is what is to be removed from a directory, and what became of that.
type job struct {
	dir  *directory
	list []*cached
	// young says that what was just written goes too.
	young bool

	gone []*cached
	busy int
	err  error
}

// do removes what no instance reads by now.
func (w *sweep) do(ctx context.Context, j *job) {
	if w.dry {
		j.gone = j.list
		return
	}
	for part := range slices.Chunk(j.list, batch) {
		if j.err = w.locked(ctx, j, part); j.err != nil {
			return
		}
	}
	if d := j.dir; d.lock != "" && len(j.gone) == len(d.blobs) {
		j.err = w.dissolve(ctx, d)
	}
}

// settle takes a job's outcome into the report and returns what is gone.
func (w *sweep) settle(j *job) []Blob {
	w.fail(j.err)
	w.report.Busy += j.busy
	out := make([]Blob, 0, len(j.gone))
	ids := make(map[string]bool, len(j.gone))
	for _, b := range j.gone {
		ids[b.id] = true
		w.report.Freed += b.usage()
		out = append(out, w.describe(b, w.refs.of(j.dir, b.id)))
	}
	j.dir.blobs = slices.DeleteFunc(j.dir.blobs, func(b *cached) bool { return ids[b.id] })
	return out
}

// dissolve removes an empty private directory. nydusd makes its own again when it comes
// just now.
func (w *sweep) dissolve(ctx context.Context, d *directory) error {
	lock, err := instance.LockCache(ctx, d.cache)
	if err != nil {
		return err
	}
	defer lock.Close()
	own, free, err := d.own()
	if err != nil || !free {
		return err
	}
	defer own.Close()
	if err := w.o.step("remove", d.path); err != nil {
		return errors.Join(errStopped, err)
	}
	if err := unix.Rmdir(d.path); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove private cache directory: %w", &os.PathError{Op: "rmdir", Path: d.path, Err: err})
	}
	return nil
}

// idle tells whether nothing needs a blob's files. Without a map nobody believes the
// data, and without data nobody should believe the map.
func (w *sweep) idle(b *cached) bool {
	u := w.refs.of(b.dir, b.id)
	if len(u.sources) == 0 {
		return true
	}
	return !u.living() && b.has(kindMap) != b.has(kindData)
}

// evict removes what no instance reads, least recently used first, until there is room.
func (w *sweep) evict(ctx context.Context) {
	excess, err := w.excess()
	if err != nil || excess <= 0 {
		w.fail(err)
		return
	}
	var list []*cached
	for _, d := range w.dirs {
		if w.refs.fault(d.cache) != nil {
			continue
		}
		for _, b := range d.blobs {
			u := w.refs.of(d, b.id)
			if len(u.sources) > 0 && !u.living() && !b.written().Add(w.o.Grace).After(w.o.Now()) {
				list = append(list, b)
			}
		}
	}
	slices.SortStableFunc(list, func(a, b *cached) int {
		return cmp.Or(w.lastUse(a).Compare(w.lastUse(b)), cmp.Compare(a.id, b.id))
	})
	for excess > 0 && len(list) > 0 {
		// As many as are needed, of one directory, in this order.
		d, n, bytes := list[0].dir, 0, int64(0)
		for n < len(list) && n < batch && list[n].dir == d && bytes < excess {
			bytes += list[n].usage()
			n++
		}
		j := &job{dir: d, list: list[:n]}
		w.do(ctx, j)
		evicted := w.settle(j)
		list = list[n:]
		for i := range evicted {
			excess -= evicted[i].Usage
		}
		w.report.Evicted = append(w.report.Evicted, evicted...)
		if ctx.Err() != nil || errors.Is(j.err, errStopped) {
			return
		}
	}
	w.report.Short = max(excess, 0)
}

// excess is how many bytes are to go.
func (w *sweep) excess() (int64, error) {
	if w.o.High.IsZero() {
		return 0, nil
	}
	usage := w.report.Usage - w.report.Freed
	low := w.o.Low
	if low.IsZero() {
		low = w.o.High
	}
	if w.o.High.Part == 0 && low.Part == 0 {
		if usage <= w.o.High.Bytes {
			return 0, nil
		}
		return usage - low.Bytes, nil
	}
	if len(w.dirs) == 0 {
		return 0, nil // there is nothing that could go
	}
	disk, err := w.disk()
	if err != nil {
		return 0, err
	}
	over := func(m Mark) int64 {
		if m.Part == 0 {
			return usage - m.Bytes
		}
		return disk.used - int64(math.Floor(m.Part*float64(disk.size)))
	}
	if over(w.o.High) <= 0 {
		return 0, nil
	}
	return over(low), nil
}

// batch is how many blobs are removed under one lock: a mount may wait for that.
const batch = 64

// locked removes a few blobs while nothing can begin to read them.
func (w *sweep) locked(ctx context.Context, j *job, list []*cached) error {
	d := j.dir
	lock, err := instance.LockCache(ctx, d.cache)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	own, free, err := d.own()
	if err != nil || !free {
		j.busy += len(list)
		return err
	}
	defer own.Close()
	// Whoever comes after this waits for the lock.
	now := w.living()
	if err := now.fault(d.cache); err != nil {
		return fmt.Errorf("nothing is removed from %s: %w", d.path, err)
	}
	dir, err := os.Open(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	r := &removal{dir: dir, step: w.o.step, proofs: d.proofs}
	defer r.close()
	for _, b := range list {
		if now.of(d, b.id).living() {
			continue
		}
		if b, err = b.again(dir); err != nil {
			return err
		}
		if !j.young && b.written().Add(w.o.Grace).After(w.o.Now()) {
			continue // it is another one by now
		}
		if err := r.add(b); err != nil {
			return err
		}
	}
	err = r.run()
	j.gone, j.busy = append(j.gone, r.done...), j.busy+r.busy
	return err
}

// own takes the lock of a private directory; it is free when no daemon uses it. A shared
// one needs none.
func (d *directory) own() (lock *os.File, free bool, err error) {
	if d.lock == "" {
		return nil, true, nil
	}
	f, err := os.OpenFile(d.lock, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, true, nil // who had it is gone, and who comes waits for the cache directory's
	}
	if err != nil {
		return nil, false, fmt.Errorf("lock private cache directory: %w", err)
	}
	if err := flock(f); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, false, nil
		}
		return nil, false, fmt.Errorf("lock private cache directory %s: %w", d.path, err)
	}
	return f, true, nil
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
