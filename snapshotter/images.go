package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"github.com/nydusfs/nydus-snapshotter/pkg/blobcheck"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// source lets the gateway fetch from registries, and checks what comes.
type source struct {
	fetcher *registry.Fetcher
	images  *mounted
}

// Open implements gateway.Source. Whole chunks are fetched, since a piece of one cannot be
// checked. nydusd asks for nothing else.
func (s source) Open(ctx context.Context, b gateway.Blob, offset, length int64) (gateway.Content, error) {
	checker, err := s.images.checker(b.Instance, b.Digest)
	if err != nil {
		return nil, err
	}
	if checker == nil {
		return s.part(ctx, nil, b, offset, length)
	}
	// Where the table of contents lies is known with the size only.
	for size := int64(0); ; {
		v, err := s.verified(ctx, checker, b, offset, length, size)
		if err == nil || size > 0 || !errors.Is(err, blobcheck.ErrUnaligned) {
			return v, err
		}
		if size, err = s.Size(ctx, b); err != nil {
			return nil, err
		}
	}
}

func (s source) verified(ctx context.Context, c *blobcheck.Checker, b gateway.Blob, offset, length, size int64) (gateway.Content, error) {
	first, all := c.Around(offset, max(length, 1), size)
	if length < 0 {
		all = length // to its end
	}
	part, err := s.part(ctx, c, b, first, all)
	if err != nil {
		return nil, err
	}
	reader, err := c.Reader(ctx, part, first, part.Left(), part.Size())
	if err != nil {
		if size > 0 {
			part.Distrust(first, 1) // it has another size than the blob
		}
		return nil, errors.Join(err, part.Close())
	}
	if length < 0 {
		length = part.Left() - (offset - first)
	}
	return &verified{part: part, reader: reader, skip: offset - first, left: length}, nil
}

// Size implements gateway.Source.
func (s source) Size(ctx context.Context, b gateway.Blob) (int64, error) {
	checker, err := s.images.checker(b.Instance, b.Digest)
	if err != nil {
		return 0, err
	}
	part, err := s.part(ctx, checker, b, 0, 1)
	if err != nil {
		return 0, err
	}
	return part.Size(), part.Close()
}

// part opens one of a host that has all of the blob, as far as c, which may be nil, knows.
func (s source) part(ctx context.Context, c *blobcheck.Checker, b gateway.Blob, offset, length int64) (*registry.Part, error) {
	blob := registry.Blob{Registry: b.Registry, Repository: b.Repository, Digest: b.Digest}
	if c != nil {
		blob.AtLeast = c.End()
	}
	part, err := s.fetcher.Open(ctx, blob, offset, length)
	switch {
	case errors.Is(err, registry.ErrRange):
		return nil, fmt.Errorf("%w: %w", gateway.ErrRange, err)
	case errors.Is(err, registry.ErrNoBlob):
		return nil, fmt.Errorf("%w: %w", gateway.ErrNoBlob, err)
	}
	return part, err
}

// verified is a part of a blob that does not end well when it is not the image's.
type verified struct {
	part   *registry.Part
	reader *blobcheck.Reader
	// skip is how much comes before what was asked for, left how much of that is still
	// to be read.
	skip, left int64
}

// Size implements gateway.Content.
func (v *verified) Size() int64 { return v.part.Size() }

// Left implements gateway.Content.
func (v *verified) Left() int64 { return v.left }

// Read implements io.Reader. The last bytes come when everything around them is right.
func (v *verified) Read(p []byte) (int, error) {
	if v.left == 0 {
		return 0, io.EOF
	}
	if v.skip > 0 {
		n, err := io.CopyN(io.Discard, v.reader, v.skip)
		v.skip -= n
		if err != nil {
			return 0, v.blame(err)
		}
	}
	n, err := v.reader.Read(p[:min(int64(len(p)), v.left)])
	if int64(n) == v.left && err == nil {
		_, err = io.Copy(io.Discard, v.reader)
	}
	if err != nil {
		return 0, v.blame(err)
	}
	v.left -= int64(n)
	return n, nil
}

// blame has whoever asks again, as nydusd does, get it from another host.
func (v *verified) blame(err error) error {
	var bad *blobcheck.ContentError
	if errors.As(err, &bad) {
		v.part.Distrust(bad.Offset, bad.Size)
		err = fmt.Errorf("%s gives out something else than the image's bootstrap says: %w", v.part.Host(), err)
	}
	return err
}

// Close implements io.Closer.
func (v *verified) Close() error { return errors.Join(v.reader.Close(), v.part.Close()) }

// mounted knows of which blobs the images consist that are mounted, and what those
// contain.
type mounted struct {
	runDir string
	verify bool
	log    *slog.Logger
	pool   *blobcheck.Pool

	reading singleflight.Group

	mu     sync.Mutex
	images map[string]*blobs
	// budgets are those of registries.
	budgets map[string]*blobcheck.Budget
}

// blobs are those of one bootstrap.
type blobs struct {
	bootstrap string // its digest
	known     map[digest.Digest]bool
	checkers  map[digest.Digest]*blobcheck.Checker
	chunks    int
	used      time.Time
}

const (
	// maxImages and maxChunks bound what is remembered, the latter at 56 bytes each.
	// The image that is read is remembered in any case, unless it alone has more
	// chunks: then it is not verified.
	maxImages = 1000
	maxChunks = 1 << 20
	// hostBudget is what the chunks of one registry may take that are arriving: enough
	// for some dozen of the usual size, more than the processors check at a time.
	hostBudget = 6 << 20
)

func newMounted(runDir string, verify bool, log *slog.Logger) *mounted {
	return &mounted{
		runDir: runDir, verify: verify, log: log, pool: blobcheck.NewPool(runtime.GOMAXPROCS(0)),
		images: map[string]*blobs{}, budgets: map[string]*blobcheck.Budget{},
	}
}

// Has implements gateway.Images.
func (m *mounted) Has(key string, blob digest.Digest) (bool, error) {
	b, err := m.of(key)
	if err != nil {
		return false, err
	}
	return b.known[blob], nil
}

// checker returns the one of a blob, nil when there is nothing to check it by.
func (m *mounted) checker(key string, blob digest.Digest) (*blobcheck.Checker, error) {
	b, err := m.of(key)
	if err != nil {
		return nil, err
	}
	return b.checkers[blob], nil
}

// of returns the blobs of a living instance.
func (m *mounted) of(key string) (*blobs, error) {
	rec, err := instance.ReadRecord(m.runDir, key)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", gateway.ErrNotMounted, err)
	}
	if err != nil {
		return nil, err
	}
	if b := m.remembered(key, rec.BootstrapDigest); b != nil {
		return b, nil
	}
	// For all who want the same at once, and without keeping others waiting.
	b, err, _ := m.reading.Do(key+rec.BootstrapDigest, func() (any, error) {
		b, err := m.read(rec)
		if err == nil {
			m.remember(key, b)
		}
		return b, err
	})
	if err != nil {
		return nil, err
	}
	return b.(*blobs), nil
}

func (m *mounted) remembered(key, bootstrap string) *blobs {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.images[key]
	if b == nil || b.bootstrap != bootstrap {
		return nil
	}
	b.used = time.Now()
	return b
}

func (m *mounted) remember(key string, b *blobs) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.images, key)
	m.makeRoom(b.chunks)
	b.used = time.Now()
	m.images[key] = b
}

// makeRoom forgets those that have not been used for longest.
func (m *mounted) makeRoom(more int) {
	for {
		oldest, chunks := "", more
		for key, b := range m.images {
			chunks += b.chunks
			if oldest == "" || b.used.Before(m.images[oldest].used) {
				oldest = key
			}
		}
		if oldest == "" || len(m.images) < maxImages && chunks <= maxChunks {
			return
		}
		delete(m.images, oldest)
	}
}

// read reads what an image consists of.
func (m *mounted) read(rec *instance.Record) (*blobs, error) {
	path := instance.BootstrapPath(rec)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read which blobs the image has: %w", err)
	}
	defer f.Close()
	boot, size, err := rafs.OpenFile(f)
	if err != nil {
		return nil, fmt.Errorf("read which blobs the image has: %s: %w", path, err)
	}
	b := &blobs{bootstrap: rec.BootstrapDigest, known: map[digest.Digest]bool{}, checkers: map[digest.Digest]*blobcheck.Checker{}}
	for _, blob := range boot.Blobs {
		b.known[digest.NewDigestFromEncoded(digest.SHA256, blob.ID)] = true
		if blob.MetaID != "" {
			b.known[digest.NewDigestFromEncoded(digest.SHA256, blob.MetaID)] = true
		}
	}
	if !m.verify {
		return b, nil
	}
	tables, err := rafs.Chunks(f, size, maxChunks)
	if err != nil {
		m.log.Warn("what is read of an image cannot be verified", "event", "unchecked", "image", rec.Image, "instance", rec.Key, "error", err)
		return b, nil
	}
	for i := range tables {
		c, err := blobcheck.New(&tables[i], m.pool, m.budget(rec.Host))
		if err != nil {
			m.log.Warn("what is read of a blob cannot be verified", "event", "unchecked", "image", rec.Image, "instance", rec.Key, "blob", tables[i].Blob.ID, "error", err)
			continue
		}
		b.checkers[digest.NewDigestFromEncoded(digest.SHA256, tables[i].Blob.ID)] = c
		b.chunks += tables[i].Len()
	}
	return b, nil
}

// budget returns that of a registry.
func (m *mounted) budget(host string) *blobcheck.Budget {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.budgets[host]
	if b == nil {
		b = blobcheck.NewBudget(hostBudget)
		m.budgets[host] = b
	}
	return b
}
