package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

// ErrNotSynced says that data of a blob could not be brought to the disk and may be lost:
// a daemon that has fetched it goes on to believe that it is there.
var ErrNotSynced = errors.New("data was not written to the disk")

// Take brings the blobs of a cache directory to the disk and writes down which chunks they
// have, for those of which that has changed. Hold is called for each of them, and keeps it
// from being removed until what it returns is called. What writers left that were killed
// is removed, when it is old at the time given. The error says what could not be done; the
// rest was done all the same.
func Take(ctx context.Context, dir string, now time.Time, hold func() (release func(), err error)) (Report, error) {
	var out Report
	list, err := blobs(dir)
	if err != nil {
		return out, fmt.Errorf("sync cache: %w", err)
	}
	errs := []error{tidy(dir, now)}
	for _, b := range list {
		if err := ctx.Err(); err != nil {
			return out, errors.Join(append(errs, err)...)
		}
		n, err := b.held(hold)
		if err != nil {
			errs = append(errs, fmt.Errorf("sync blob %s in %s: %w", b.id, b.dir, err))
		}
		if n > 0 {
			out.Blobs, out.Chunks = out.Blobs+1, out.Chunks+n
		}
	}
	return out, errors.Join(errs...)
}

// abandoned is how old a file is that nobody writes any more: that takes milliseconds, or as
// long as a disk hangs.
const abandoned = time.Hour

// tidy removes what killed writers left.
func tidy(dir string, now time.Time) error {
	left, err := filepath.Glob(filepath.Join(dir, temporary+"*"))
	errs := []error{err}
	for _, path := range left {
		if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() && now.Sub(info.ModTime()) > abandoned {
			errs = append(errs, remove(path))
		}
	}
	return errors.Join(errs...)
}

func (b *blob) held(hold func() (func(), error)) (int, error) {
	release, err := hold()
	if err != nil {
		return 0, err
	}
	defer release()
	return b.take()
}

// take returns how many chunks there are that the former checkpoint did not have.
func (b *blob) take() (int, error) {
	synced := 0
	for _, name := range chunkmap.Names(b.id) {
		if !b.names[name] {
			continue
		}
		n, err := b.checkpoint(name)
		if err != nil {
			return synced, err
		}
		synced += n
	}
	return synced, nil
}

// checkpoint takes the one of a map.
func (b *blob) checkpoint(name string) (int, error) {
	data, err := proof.OpenRegular(b.path(proof.DataName(b.id)))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer data.Close()
	now := record{Version: version}
	if now.Data, err = identify(data); err != nil {
		return 0, err
	}
	now.Data.Changed = 0
	// What is set by now was written by now.
	m, err := readMap(b.path(name))
	if errors.Is(err, fs.ErrNotExist) || err == nil && m.bits == nil {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	now.Bits, now.Full = m.bits, m.full
	was := b.load(name)
	if was != nil && !was.Data.same(now.Data) {
		was = nil
	}
	if was != nil && slices.Equal(was.Bits, now.Bits) && was.Full == now.Full && b.unchanged(was) {
		return 0, nil
	}
	if err := data.Sync(); err != nil {
		return 0, b.lost(fmt.Errorf("%w: %w", ErrNotSynced, err))
	}
	if now.Metadata, err = b.describe(was); err != nil {
		return 0, err
	}
	text, err := json.Marshal(now)
	if err != nil {
		return 0, err
	}
	if err := b.write(name+Suffix, text); err != nil {
		return 0, err
	}
	if was == nil {
		was = &record{}
	}
	return missing(now.Bits, was.Bits), nil
}

// missing counts the bits that b has not.
func missing(a, b []byte) int {
	n := 0
	for i, x := range a {
		if i < len(b) {
			x &^= b[i]
		}
		n += bits.OnesCount8(x)
	}
	return n
}

// unchanged tells whether the blob's metadata looks as it did.
func (b *blob) unchanged(was *record) bool {
	n := 0
	for _, suffix := range metadata() {
		if !b.names[b.id+suffix] {
			continue
		}
		now, err := b.stat(b.id + suffix)
		if err != nil || n >= len(was.Metadata) {
			return false
		}
		if of := was.Metadata[n]; of.Name != now.Name || !of.same(now) || of.Changed != now.Changed {
			return false
		}
		n++
	}
	return n == len(was.Metadata)
}

func (b *blob) stat(name string) (file, error) {
	f, err := proof.OpenQuiet(b.path(name))
	if err != nil {
		return file{}, err
	}
	defer f.Close()
	return identify(f)
}

// describe brings the metadata to the disk and tells what it is.
func (b *blob) describe(was *record) ([]file, error) {
	var list []file
	for _, suffix := range metadata() {
		if !b.names[b.id+suffix] {
			continue
		}
		f, err := b.synced(b.id+suffix, was)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, f)
	}
	return list, nil
}

func (b *blob) synced(name string, was *record) (file, error) {
	f, err := proof.OpenQuiet(b.path(name))
	if err != nil {
		return file{}, err
	}
	defer f.Close()
	now, err := identify(f)
	if err != nil {
		return file{}, err
	}
	if was != nil {
		for _, of := range was.Metadata {
			if of.Name == name && of.same(now) && of.Changed == now.Changed {
				return of, nil
			}
		}
	}
	if err := f.Sync(); err != nil {
		return file{}, b.lost(fmt.Errorf("%w: %w", ErrNotSynced, err))
	}
	now.SHA256, err = digest(f)
	return now, err
}

// lost makes the next daemon believe no more than the last checkpoint.
func (b *blob) lost(err error) error {
	_, undone := b.restore()
	return errors.Join(err, undone, syncDir(b.dir))
}

// Distrust is for whoever could not sync a blob's data: what was fetched since its last
// checkpoint is believed no more by the daemons that start from now on.
func Distrust(dir, id string) error {
	list, err := blobs(dir)
	if err != nil {
		return err
	}
	for _, b := range list {
		if b.id == id {
			if _, err := b.restore(); err != nil {
				return fmt.Errorf("blob %s in %s: %w", id, dir, err)
			}
			return syncDir(dir)
		}
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
