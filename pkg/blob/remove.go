package blob

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

// errStopped marks what a test's step returned.
var errStopped = errors.New("stopped")

// removal removes the files of blobs in one directory, in an order in which it may be
// killed at any time; see the package comment.
type removal struct {
	dir  *os.File
	step func(what, path string) error
	// proofs says that some may name these blobs.
	proofs bool

	list []*held
	busy int
	done []*cached
}

// held is a blob whose files nobody else has open.
type held struct {
	*cached
	leases []*os.File
	maps   []*os.File // some of these
}

// add takes a blob in, unless one of its files is open somewhere.
func (r *removal) add(b *cached) error {
	h := &held{cached: b}
	for i := range b.files {
		f, err := r.lease(b.files[i].name)
		if f != nil {
			h.leases = append(h.leases, f)
			if b.files[i].kind == kindMap {
				h.maps = append(h.maps, f)
			}
		}
		if err == nil {
			continue
		}
		h.close()
		if errors.Is(err, unix.EAGAIN) {
			r.busy++
			return nil
		}
		return err
	}
	r.list = append(r.list, h)
	return nil
}

// lease opens a file that nobody else has open. A file that is gone is nil. Where there
// are no leases it cannot be told, see the package comment.
func (r *removal) lease(name string) (*os.File, error) {
	fd, err := unix.Openat(int(r.dir.Fd()), name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(r.dir.Name(), name), Err: err}
	}
	f := os.NewFile(uintptr(fd), filepath.Join(r.dir.Name(), name))
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	if errors.Is(err, unix.EAGAIN) {
		f.Close()
		return nil, fmt.Errorf("%s is open: %w", f.Name(), err)
	}
	return f, nil
}

// run removes what was added: proofs and all maps, then, once that is on the disk, the rest.
func (r *removal) run() error {
	if len(r.list) == 0 {
		return nil
	}
	if err := r.disprove(); err != nil {
		return err
	}
	for _, h := range r.list {
		for _, f := range h.maps {
			// Whoever is just opening it gets it empty.
			if err := r.do("cut", f.Name(), func() error { return f.Truncate(0) }); err != nil {
				return err
			}
		}
		for _, k := range []kind{kindSynced, kindMap} {
			if err := r.unlink(h, k); err != nil {
				return err
			}
		}
	}
	if err := r.do("sync", r.dir.Name(), r.dir.Sync); err != nil {
		return err
	}
	for _, h := range r.list {
		for _, k := range []kind{kindMeta, kindData} {
			if err := r.unlink(h, k); err != nil {
				return err
			}
		}
		r.done = append(r.done, h.cached)
	}
	return nil
}

// disprove removes the proofs of images that have one of the blobs. Nobody would believe
// them, since they name inodes; but nothing else would remove them.
func (r *removal) disprove() error {
	if !r.proofs {
		return nil
	}
	ids := make([]string, len(r.list))
	for i, h := range r.list {
		ids[i] = h.id
	}
	return r.do("disprove", r.dir.Name(), func() error { return proof.Remove(r.dir.Name(), ids...) })
}

func (r *removal) unlink(h *held, k kind) error {
	for i := range h.files {
		f := &h.files[i]
		if f.kind != k {
			continue
		}
		err := r.do("remove", filepath.Join(r.dir.Name(), f.name), func() error {
			return unix.Unlinkat(int(r.dir.Fd()), f.name, 0)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *removal) do(what, path string, change func() error) error {
	if err := r.step(what, path); err != nil {
		return errors.Join(errStopped, err)
	}
	if err := change(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s %s: %w", what, path, err)
	}
	return nil
}

func (h *held) close() {
	for _, f := range h.leases {
		f.Close()
	}
}

// close lets the files go; their space is free from then on.
func (r *removal) close() {
	for _, h := range r.list {
		h.close()
	}
}
