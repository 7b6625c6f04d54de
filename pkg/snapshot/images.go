package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Image is a nydus image as its bootstrap's layer records it.
type Image struct {
	// Ref is the reference by which it was pulled, Backend the one that its labels ask
	// for.
	Ref, Backend string
	// Digest is that of the bootstrap, sha256:….
	Digest string
	// Download is what the image's label asks for, see LabelDownload; "" for nothing.
	Download string

	dir, path string
}

// Path is where the image's bootstrap is. What lies there may be anything: see Open.
func (i Image) Path() string { return filepath.Join(i.dir, "fs", i.path) }

// Open opens the image's bootstrap, with the same care as when it was pulled. The error
// wraps fs.ErrNotExist when the whole layer is gone.
func (i Image) Open() (*os.File, error) {
	f, _, err := openBootstrap(filepath.Join(i.dir, "fs"))
	if err == nil {
		return f, nil
	}
	if _, gone := os.Lstat(filepath.Join(i.dir, recordName)); errors.Is(gone, fs.ErrNotExist) {
		return nil, fmt.Errorf("open bootstrap of image %q: its layer is gone: %w", i.Ref, fs.ErrNotExist)
	}
	// Not wrapped: an image whose layer is there needs its blobs, also when its bootstrap is not.
	return nil, fmt.Errorf("open bootstrap of image %q in %s: %s; remove the image and pull it again", i.Ref, i.dir, err.Error())
}

// Dir is the layer's directory, for people.
func (i Image) Dir() string { return i.dir }

// Images lists the nydus images whose bootstrap is in a layer below root, in no
// particular order. It reads the layers' records and not the database, so that it may
// be asked beside a running snapshotter. An error means that the list may lack some.
func Images(root string) ([]Image, error) {
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	var list []Image
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(root, "snapshots", e.Name())
		r, err := readRecord(dir)
		switch {
		case err != nil:
			errs = append(errs, err)
		case r != nil && r.Kind == kindBootstrap:
			list = append(list, Image{Ref: r.Image, Backend: r.Backend, Digest: r.Digest, Download: r.Download, dir: dir, path: r.Path})
		}
	}
	return list, errors.Join(errs...)
}
