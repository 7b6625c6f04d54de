package blob

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

// disown removes proofs of images that are neither pulled nor mounted any more. Those that
// name a blob that goes have gone with it; these would stay with blobs that others share.
// Nobody would be harmed by one of them, nor is anybody by losing one: the image is compared
// once more. So there is no lock.
func (w *sweep) disown() {
	for _, d := range w.dirs {
		if d.lock != "" || len(d.proven) == 0 || w.refs.fault(d.cache) != nil {
			continue
		}
		wanted, known := w.refs.digests(d.cache)
		if !known {
			continue
		}
		for _, name := range d.proven {
			if path := filepath.Join(d.path, name); !wanted[path] {
				w.fail(w.orphan(path))
			}
		}
	}
}

// digests are the paths of the proofs that images may have in a cache directory. They are not
// known when one's digest is not.
func (r *refs) digests(cache string) (paths map[string]bool, known bool) {
	paths = map[string]bool{}
	for _, s := range r.sources {
		switch {
		case s.dir != "" && s.dir != cache:
		case s.digest != "":
			paths[proof.Path(cache, s.digest)] = true
		case s.living == "":
			return nil, false
		}
	}
	return paths, true
}

// orphan removes a proof that is old enough.
func (w *sweep) orphan(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has gone with a blob
	}
	if err != nil {
		return fmt.Errorf("look at proof: %w", err)
	}
	if at := info.ModTime().Add(w.o.Grace); at.After(w.o.Now()) {
		w.later(at)
		return nil
	}
	w.report.Orphans++
	if w.dry {
		return nil
	}
	if err := w.o.step("remove", path); err != nil {
		return errors.Join(errStopped, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the proof of an image that is gone: %w", err)
	}
	return nil
}

// later notes when something becomes old enough.
func (w *sweep) later(at time.Time) {
	if w.report.Next.IsZero() || at.Before(w.report.Next) {
		w.report.Next = at
	}
}
