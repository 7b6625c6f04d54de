package blob

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// key is a blob's id in half the bytes.
type key [32]byte

func keyOf(id string) (k key) {
	if n, err := hex.Decode(k[:], []byte(id)); err != nil || n != len(k) {
		return key{}
	}
	return k
}

// source is a bootstrap.
type source struct {
	// image is for people; living is the key of the instance that it is read by, empty
	// for a snapshot's.
	image, living string
	// digest is that of the bootstrap, as its layer or its instance records it; empty when
	// that does not tell.
	digest string
	// dir is the cache directory that it counts in, empty for all.
	dir string
	// where is what people find it by.
	where string
	open  func() (*os.File, error)
}

// use is who needs a blob.
type use struct {
	sources []*source
	// chunks is how many the blob has, 0 when none of them knows.
	chunks uint32
}

func (u use) living() bool {
	return slices.ContainsFunc(u.sources, func(s *source) bool { return s.living != "" })
}

// names are the images' and the instances', each once.
func (u use) names() (images, instances []string) {
	for _, s := range u.sources {
		if s.living != "" {
			instances = append(instances, s.living)
		}
		images = append(images, s.image)
	}
	return sorted(images), sorted(instances)
}

func sorted(list []string) []string {
	slices.Sort(list)
	return slices.Compact(list)
}

// refs is who needs which blobs.
type refs struct {
	// in is by cache directory; "" is what counts in all of them.
	in map[string]map[key]use
	// broken is by cache directory what keeps from removing anything there; "" is
	// all of them.
	broken  map[string]error
	sources []*source
}

func newRefs() *refs {
	return &refs{in: map[string]map[key]use{}, broken: map[string]error{}}
}

// of tells who needs a blob in a directory.
func (r *refs) of(d *directory, id string) use {
	k := keyOf(id)
	u, all := r.in[d.cache][k], r.in[""][k]
	if len(all.sources) > 0 {
		u = use{append(slices.Clip(u.sources), all.sources...), max(u.chunks, all.chunks)}
	}
	if d.owner != "" && d.host+d.repository != "" {
		u.sources = slices.DeleteFunc(slices.Clone(u.sources), func(s *source) bool { return !s.usesPrivate(d) })
	}
	return u
}

// usesPrivate tells whether a private directory may be that of the image.
func (s *source) usesPrivate(d *directory) bool {
	switch {
	case s.dir == "":
		return true
	case s.living != "":
		return s.living == d.owner
	}
	return s.digest == "" || mountspec.InstanceKey(s.digest, d.host, d.repository, d.cache) == d.owner
}

// fault is what keeps from removing anything in a cache directory.
func (r *refs) fault(cache string) error { return errors.Join(r.broken[""], r.broken[cache]) }

func (r *refs) errors() error {
	var errs []error
	for _, dir := range slices.Sorted(maps.Keys(r.broken)) {
		where := dir
		if dir == "" {
			where = "any cache directory"
		}
		errs = append(errs, fmt.Errorf("nothing is removed from %s: %w", where, r.broken[dir]))
	}
	return errors.Join(errs...)
}

func (r *refs) fail(dir string, err error) { r.broken[dir] = errors.Join(r.broken[dir], err) }

// add takes in the blobs of a bootstrap.
func (r *refs) add(s *source, blobs []rafs.Blob) {
	r.sources = append(r.sources, s)
	in := r.in[s.dir]
	if in == nil {
		in = map[key]use{}
		r.in[s.dir] = in
	}
	for i := range blobs {
		b := &blobs[i]
		// The files of nydusd 2.2 have the name of the index.
		for _, id := range []string{b.ID, b.MetaID} {
			if id == "" {
				continue
			}
			k := keyOf(id)
			u := in[k]
			in[k] = use{append(u.sources, s), max(u.chunks, b.ChunkCount)}
		}
	}
}

// collect reads what all snapshots and all instances need.
func (c *Cache) collect(ctx context.Context) (*refs, error) {
	r := newRefs()
	c.addLiving(r)
	images, err := snapshot.Images(c.o.Root)
	if err != nil {
		r.fail("", err)
	}
	for _, im := range images {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s := &source{image: im.Ref, digest: im.Digest, where: im.Dir(), open: im.Open}
		// An image whose place is not known may have its blobs anywhere.
		if dir, err := c.o.Place(ctx, im.Ref, im.Backend); err == nil {
			s.dir = filepath.Clean(dir)
		}
		blobs, err := c.memo.blobs(s)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			r.fail(s.dir, err)
		default:
			r.add(s, blobs)
		}
	}
	c.memo.turn()
	return r, nil
}

// living reads what the instances need.
func (c *Cache) living() *refs {
	r := newRefs()
	c.addLiving(r)
	return r
}

func (c *Cache) addLiving(r *refs) {
	readers, err := instance.Readers(c.o.RunDir)
	if err != nil {
		r.fail("", err)
	}
	for _, reader := range readers {
		s := &source{image: reader.Image, living: reader.Key, digest: reader.Digest, where: reader.Bootstrap, open: func() (*os.File, error) { return os.Open(reader.Bootstrap) }}
		if reader.CacheDir != "" {
			s.dir = filepath.Clean(reader.CacheDir)
		}
		blobs, err := c.memo.blobs(s)
		if err != nil && !c.reads(reader) {
			continue // it has ended meanwhile
		}
		if err != nil {
			r.fail(s.dir, fmt.Errorf("instance %s of image %q: %w", reader.Key, reader.Image, err))
			continue
		}
		r.add(s, blobs)
	}
}

// reads tells whether an instance is still there.
func (c *Cache) reads(reader instance.Reader) bool {
	readers, err := instance.Readers(c.o.RunDir)
	return err != nil || slices.Contains(readers, reader)
}

// memo remembers what bootstraps name, by what a file is: no bootstrap is ever written
// again, as long as nobody puts the clock back. What two turns did not ask for is forgotten.
type memo struct {
	mu          sync.Mutex
	now, before map[proof.File][]rafs.Blob
}

func (m *memo) turn() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now, m.before = nil, m.now
}

func (m *memo) blobs(s *source) ([]rafs.Blob, error) {
	f, err := s.open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	id, err := proof.Stat(f)
	if err != nil {
		return nil, err
	}
	if blobs, ok := m.known(id); ok {
		return blobs, nil
	}
	boot, _, err := rafs.OpenFile(f)
	if err != nil {
		return nil, fmt.Errorf("bootstrap of image %q in %s: %w; remove the image and pull it again", s.image, s.where, err)
	}
	m.keep(id, boot.Blobs)
	return boot.Blobs, nil
}

func (m *memo) known(id proof.File) ([]rafs.Blob, bool) {
	m.mu.Lock()
	blobs, ok := m.now[id]
	if !ok {
		blobs, ok = m.before[id]
	}
	m.mu.Unlock()
	if ok {
		m.keep(id, blobs)
	}
	return blobs, ok
}

func (m *memo) keep(id proof.File, blobs []rafs.Blob) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now == nil {
		m.now = map[proof.File][]rafs.Blob{}
	}
	m.now[id] = blobs
}
