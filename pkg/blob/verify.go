package blob

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blobcheck"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Verdict is what Verify found out about a blob.
type Verdict struct {
	Blob
	// Checked is how many chunks were compared with their digests, Bad how many of
	// them differ. Unchecked are there too, but no bootstrap has a digest for them: see
	// rafs.ChunkTable, and all chunks of a v5 image.
	Checked   int `json:"checked"`
	Bad       int `json:"bad"`
	Unchecked int `json:"unchecked"`
	// Problem is what is wrong; empty when nothing is.
	Problem string `json:"problem,omitempty"`
	// Evicted says that the blob was removed for it, so that it is fetched again.
	// One that is in use stays.
	Evicted bool `json:"evicted"`
}

// maxChunks bounds what a bootstrap makes Verify hold: 56 bytes for each.
const maxChunks = 4 << 20

// Verify compares what is in the cache, and there as nydusd says, with the digests in the
// bootstraps of all images, and returns what it knows about each blob that one of them
// names, in the order of List. What is wrong and not in use is removed. Progress, when
// set, is told how many bytes of how many were looked at. The error says what could not
// be read; a blob that is wrong is none.
func (c *Cache) Verify(ctx context.Context, progress func(done, total int64)) ([]Verdict, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.look(ctx)
	if s == nil {
		return nil, err
	}
	v := &verifying{state: s, found: map[place]*verdict{}, progress: progress, open: func(b *cached) (reader, error) { return openData(b) }}
	errs := []error{err, s.refs.errors()}
	v.plan()
	for _, src := range v.sources() {
		if err := v.source(ctx, src); err != nil {
			errs = append(errs, fmt.Errorf("verify cache: image %q: %w", src.image, err))
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	return c.judge(ctx, v), errors.Join(errs...)
}

// verdict is a Verdict that is being found.
type verdict struct {
	Verdict
	b       *cached
	checked []byte // a bit for each chunk
	counted bool   // its bytes are in the progress
}

type verifying struct {
	*state
	found       map[place]*verdict
	order       []*verdict
	progress    func(done, total int64)
	done, total int64
	buffer      []byte

	// open opens a blob's data. Pace, when set, is called before so many bytes of it are
	// read. Settle is how long to wait before what is wrong is read once more, since a
	// daemon may just be writing it; 0 for not at all.
	open   func(*cached) (reader, error)
	pace   func(ctx context.Context, bytes int) error
	settle time.Duration
}

// reader is a blob's data.
type reader interface {
	io.ReaderAt
	io.Closer
	Stat() (fs.FileInfo, error)
}

// plan lists what there is.
func (v *verifying) plan() {
	for _, d := range v.dirs {
		for _, b := range d.blobs {
			if len(v.refs.of(d, b.id).sources) > 0 {
				v.total += b.usage()
			}
		}
	}
}

// sources are the bootstraps, each once.
func (v *verifying) sources() []*source { return distinct(v.refs.sources) }

// sourcesOf are those that name a blob.
func (v *verifying) sourcesOf(b *cached) []*source { return distinct(v.refs.of(b.dir, b.id).sources) }

// distinct leaves those out that are the same file: an instance's is a snapshot's.
func distinct(all []*source) []*source {
	type name struct {
		proof.File
		dir string
	}
	seen, list := map[name]bool{}, []*source(nil)
	for _, s := range all {
		f, err := s.open()
		if err != nil {
			list = append(list, s) // and tell then
			continue
		}
		id, err := proof.Stat(f)
		f.Close()
		if n := (name{id, s.dir}); err != nil || !seen[n] {
			seen[n] = true
			list = append(list, s)
		}
	}
	return list
}

// source verifies the blobs of a bootstrap.
func (v *verifying) source(ctx context.Context, s *source) error {
	tables, version, err := s.tables()
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range v.dirs {
		if s.dir != "" && s.dir != d.cache {
			continue
		}
		for i := range tables {
			for _, name := range []string{tables[i].Blob.ID, tables[i].Blob.MetaID} {
				if b := d.find(name); b != nil {
					errs = append(errs, v.blob(ctx, b, &tables[i], version))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// tables reads what a bootstrap knows of its blobs' chunks; nothing when it was removed
// meanwhile.
func (s *source) tables() (tables []rafs.ChunkTable, version string, err error) {
	f, err := s.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	boot, size, err := rafs.OpenFile(f)
	if err != nil {
		return nil, "", err
	}
	tables, err = rafs.Chunks(f, size, maxChunks)
	return tables, boot.Version, err
}

func (d *directory) find(id string) *cached {
	n, ok := slices.BinarySearchFunc(d.blobs, id, func(b *cached, id string) int { return cmp.Compare(b.id, id) })
	if ok {
		return d.blobs[n]
	}
	return nil
}

// blob compares what one bootstrap knows of a blob.
func (v *verifying) blob(ctx context.Context, b *cached, t *rafs.ChunkTable, version string) error {
	o := v.verdict(b)
	if o.checked == nil {
		o.checked = make([]byte, (t.Blob.ChunkCount+7)/8)
	}
	defer v.advance(o)
	if !b.has(kindMap) || t.Blob.ChunkCount == 0 || o.Problem != "" {
		return nil
	}
	// The data first: when the blob is removed and fetched anew meanwhile, an old map
	// must not be taken for that of new data.
	data, err := v.open(b)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nobody's, see Sweep
	}
	if err != nil {
		return err
	}
	defer data.Close()
	m, err := chunkmap.Open(b.dir.path, b.id, t.Blob.ChunkCount)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, chunkmap.ErrInvalid):
		o.Problem = err.Error()
		return nil
	case err != nil:
		return err
	}
	o.Chunks, o.Ready = m.Len(), m.Ready()
	if version == rafs.V5 {
		return nil // which does not tell where in the cache its chunks are
	}
	info, err := data.Stat()
	if err != nil {
		return err
	}
	if want := int64(t.Blob.UncompressedSize); want > 0 && info.Size() != want && m.Ready() > 0 {
		o.Problem = fmt.Sprintf("the data has %d bytes, want %d", info.Size(), want)
		return nil
	}
	return v.chunks(ctx, o, t, m, data)
}

func openData(b *cached) (*os.File, error) {
	return proof.OpenQuiet(filepath.Join(b.dir.path, proof.DataName(b.id)))
}

// chunks compares those that are there and were not compared for another image.
func (v *verifying) chunks(ctx context.Context, o *verdict, t *rafs.ChunkTable, m *chunkmap.Map, data reader) error {
	var bad []rafs.Chunk
	for i := range t.Len() {
		c := t.At(i)
		bit := byte(0x80 >> (c.Index % 8))
		if !m.Has(c.Index) || int(c.Index/8) >= len(o.checked) || o.checked[c.Index/8]&bit != 0 {
			continue
		}
		right, err := v.chunk(ctx, t.Blob.Digester, c, data)
		if err != nil {
			return fmt.Errorf("blob %s: %w", o.ID, err)
		}
		o.checked[c.Index/8] |= bit
		if o.Checked++; !right {
			bad = append(bad, c)
		}
	}
	if len(bad) == 0 || v.settle == 0 {
		o.Bad += len(bad)
		return nil
	}
	if err := wait(ctx, v.settle); err != nil {
		return err
	}
	for _, c := range bad {
		right, err := v.chunk(ctx, t.Blob.Digester, c, data)
		if err != nil {
			return fmt.Errorf("blob %s: %w", o.ID, err)
		}
		if !right {
			o.Bad++
		}
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// chunk tells whether a chunk is right. What cannot be read is not.
func (v *verifying) chunk(ctx context.Context, digester rafs.Digester, c rafs.Chunk, data reader) (bool, error) {
	if v.pace != nil {
		if err := v.pace(ctx, int(c.RawSize)); err != nil {
			return false, err
		}
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if cap(v.buffer) < int(c.RawSize) {
		v.buffer = make([]byte, c.RawSize)
	}
	text := v.buffer[:c.RawSize]
	if n, err := data.ReadAt(text, int64(c.RawOffset)); n < len(text) {
		if errors.Is(err, io.EOF) || errors.Is(err, unix.EIO) {
			return false, nil
		}
		return false, err
	}
	return blobcheck.Matches(digester, c.Digest, text)
}

func (v *verifying) verdict(b *cached) *verdict {
	p := place{b.dir.path, b.id}
	o := v.found[p]
	if o == nil {
		o = &verdict{b: b}
		o.ID = b.id
		v.found[p], v.order = o, append(v.order, o)
	}
	return o
}

// advance tells how far it is.
func (v *verifying) advance(o *verdict) {
	if !o.counted {
		o.counted = true
		v.done += o.b.usage()
	}
	if v.progress != nil {
		v.progress(v.done, v.total)
	}
}

// disprove takes the proofs of images away that have a blob which is wrong and stays: a disk
// that returns other bytes than before leaves the times alone which a proof tells. They go with
// one that is removed.
func disprove(o *verdict) error {
	if o.Evicted || o.b.dir.lock != "" {
		return nil // none is in a private directory
	}
	return proof.Remove(o.b.dir.path, o.ID)
}

// judge removes what is wrong and completes the verdicts.
func (c *Cache) judge(ctx context.Context, v *verifying) []Verdict {
	out := make([]Verdict, 0, len(v.order))
	w := &sweep{Cache: c, state: v.state, report: &Report{}}
	for _, o := range v.order {
		u := v.refs.of(o.b.dir, o.ID)
		found := c.describe(o.b, u)
		found.Ready = o.Ready
		o.Blob, o.Unchecked = found, max(o.Ready-o.Checked, 0)
		if o.Bad > 0 {
			o.Problem = fmt.Sprintf("%d of %d chunks differ from their digests", o.Bad, o.Checked)
		}
		if o.Problem != "" {
			j := &job{dir: o.b.dir, list: []*cached{o.b}, young: true}
			w.do(ctx, j)
			o.Evicted = len(j.gone) > 0
			if j.err != nil {
				o.Problem += "; it cannot be removed: " + j.err.Error()
			}
			if err := disprove(o); err != nil {
				o.Problem += "; " + err.Error()
			}
		}
		out = append(out, o.Verdict)
	}
	slices.SortFunc(out, func(a, b Verdict) int { return compare(&a.Blob, &b.Blob) })
	return out
}
