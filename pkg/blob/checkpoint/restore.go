package checkpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

// Restore makes a cache directory say no more than what its checkpoints vouch for, and
// brings that to the disk. It reads no data. An error means that the directory may still
// say more: nydusd must not use it.
func Restore(dir string) (Report, error) {
	var out Report
	list, err := blobs(dir)
	if err != nil {
		return out, fmt.Errorf("look at cache: %w", err)
	}
	for _, b := range list {
		lost, err := b.restore()
		if err != nil {
			return out, fmt.Errorf("look at blob %s in %s, which may not be whole since this machine stopped: %w", b.id, dir, err)
		}
		if lost.Blobs > 0 {
			out.Blobs, out.Chunks = out.Blobs+1, out.Chunks+lost.Chunks
		}
	}
	if out.Blobs == 0 {
		return out, nil
	}
	if err := syncDir(dir); err != nil {
		return out, fmt.Errorf("look at cache: %w", err)
	}
	return out, nil
}

// restore is Restore for one blob. Maps go before metadata.
func (b *blob) restore() (Report, error) {
	var out Report
	var vouched []file
	proven := b.proven()
	for _, name := range chunkmap.Names(b.id) {
		r := b.load(name)
		if r != nil && !b.holds(r) {
			r = nil
		}
		if r != nil {
			vouched = append(vouched, r.Metadata...)
		}
		if !b.names[name] && b.names[name+Suffix] {
			// Somebody has removed the map: what comes next begins anew.
			if err := remove(b.path(name + Suffix)); err != nil {
				return out, err
			}
		}
		if !b.names[name] {
			continue
		}
		changed, err := b.limit(name, r, proven, &out)
		if err != nil {
			return out, err
		}
		if changed {
			out.Blobs = 1
		}
	}
	for _, suffix := range metadata() {
		name := b.id + suffix
		if !b.names[name] || b.right(name, vouched) {
			continue
		}
		out.Blobs = 1
		if err := remove(b.path(name)); err != nil {
			return out, err
		}
	}
	return out, nil
}

// holds tells whether the data is still that of the checkpoint.
func (b *blob) holds(r *record) bool {
	now, err := b.stat(proof.DataName(b.id))
	return err == nil && r.Data.same(now)
}

// limit takes from a map what the checkpoint does not have; all without one. What is proven
// is vouched for by that.
func (b *blob) limit(name string, r *record, proven bool, out *Report) (changed bool, err error) {
	path := b.path(name)
	now, err := readMap(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil && !errors.Is(err, chunkmap.ErrInvalid):
		return false, err
	case err != nil:
		r = nil // there is no telling what it has lost
	case now.bits == nil, proven:
		return false, nil // nobody has used it yet, or it has all
	}
	if r == nil || len(r.Bits) != len(now.bits) {
		out.Chunks += missing(now.bits, nil)
		return true, errors.Join(remove(path), remove(path+Suffix))
	}
	sure := make([]byte, len(now.bits))
	for i := range sure {
		sure[i] = now.bits[i] & r.Bits[i]
	}
	if slices.Equal(sure, now.bits) && (!now.full || r.Full && slices.Equal(sure, r.Bits)) {
		return false, nil
	}
	out.Chunks += missing(now.bits, sure)
	if b.write(name, append(chunkmap.Header(), sure...)) != nil {
		// It is to go in any case; that takes no room.
		return true, errors.Join(remove(path), remove(path+Suffix))
	}
	return true, nil
}

// right tells whether metadata is what it was when it was synced.
func (b *blob) right(name string, vouched []file) bool {
	f, err := proof.OpenQuiet(b.path(name))
	if err != nil {
		return false
	}
	defer f.Close()
	now, err := identify(f)
	if err != nil {
		return false
	}
	sum, err := digest(f)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(vouched, func(v file) bool { return v.Name == name && v.same(now) && v.SHA256 == sum })
}
