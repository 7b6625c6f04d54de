// Package prove compares the blobs of an image in a cache directory with the digests in
// the image's bootstrap, and writes down what it found right (package proof).
//
// What it promises:
//
//   - A proof is written only after every chunk that the image's files consist of was read
//     back and had the digest that the bootstrap tells, by blake3 or sha256, and every
//     chunk of every blob is there by nydusd's own word, so that no daemon has a reason to
//     write to the files again.
//   - The data is on disk before it is compared, and the proof is written under another
//     name, synced and renamed: killed at any moment, it leaves a proof or none.
//   - A blob that somebody writes to meanwhile is not proven.
//   - It reads no faster than it was told, and nothing of a blob while one is incomplete.
//
// It is part of the snapshotter; the mount helper does not link it. It is not for blobs
// that nydusd keeps compressed, for private cache directories of daemons older than 2.3, or
// for chunks that the bootstrap has no digests for (zran, batches, encrypted ones).
package prove

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blobcheck"
	"github.com/nydusfs/nydus-snapshotter/pkg/draft"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

var (
	// ErrIncomplete says that the cache lacks something of the image, or that somebody
	// has just written to it: it may be proven later.
	ErrIncomplete = errors.New("not complete in the cache")
	// ErrWrong says that the cache has other data than the image.
	ErrWrong = errors.New("the cache has other data than the image")
	// ErrRecent says that somebody has written to a file within the last two seconds; it
	// wraps ErrIncomplete.
	ErrRecent = fmt.Errorf("%w: it was just written to", ErrIncomplete)
)

// Missing is what the cache lacks of an image, by nydusd's own word. It wraps ErrIncomplete.
type Missing struct {
	// Blobs are those that are not all there, in the order of the device slots.
	Blobs []Lack
}

// Lack is a blob that is not all there. Ready of its chunks are.
type Lack struct {
	Blob   string `json:"blob"`
	Ready  int    `json:"ready"`
	Chunks int    `json:"chunks"`
}

func (m *Missing) Error() string {
	const named = 3
	text := make([]string, 0, named+1)
	for i, b := range m.Blobs {
		if i == named {
			text = append(text, fmt.Sprintf("and %d more blobs are not all there", len(m.Blobs)-named))
			break
		}
		text = append(text, fmt.Sprintf("blob %s has %d of %d chunks", b.Blob, b.Ready, b.Chunks))
	}
	return fmt.Sprintf("%v: %s", ErrIncomplete, strings.Join(text, ", "))
}

// Unwrap makes it an ErrIncomplete.
func (m *Missing) Unwrap() error { return ErrIncomplete }

// Image is one that may be proven.
type Image struct {
	// Name is for people.
	Name string
	// CacheDir has its blobs, Bootstrap is the path of its bootstrap, Digest that file's.
	CacheDir, Bootstrap, Digest string
	// Open, when set, opens the bootstrap with more care than a path allows. An error that
	// wraps fs.ErrNotExist says that the image is gone.
	Open func() (*os.File, error)
}

func (im *Image) open() (*os.File, error) {
	if im.Open != nil {
		return im.Open()
	}
	return proof.OpenRegular(im.Bootstrap)
}

// Settled is how long nobody may have written to a file that is proven: a change within the
// same tick of the kernel's clock would not show in its times.
const Settled = 2 * time.Second

// BlobError says of which blob an error is.
type BlobError struct {
	// Blob is its id.
	Blob  string
	Cause error
}

// Error implements error.
func (e *BlobError) Error() string { return fmt.Sprintf("blob %s: %v", e.Blob, e.Cause) }

// Unwrap returns the cause.
func (e *BlobError) Unwrap() error { return e.Cause }

// maxChunks bounds how many chunks an image may have that is proven: each takes 56 bytes of
// memory.
const maxChunks = 4 << 20

// Prover proves images, one at a time. The zero value reads as fast as it can.
type Prover struct {
	// Rate bounds how many bytes a second are read; nil for no bound. Its burst is at
	// least rafs.MaxChunkSize.
	Rate *rate.Limiter
	// Turn, when set, is shared with other provers: only one of them works at a time, and
	// none compares what another one has just proven.
	Turn Turn
	// Progress, when set, is told how many bytes of how many were compared.
	Progress func(done, total int64)
	// Again compares also what is proven already. What is wrong loses its proofs.
	Again bool
	// Now is the clock; nil for the real one.
	Now func() time.Time
	// Step, when set, is called before each step that changes or compares something, for
	// tests that end there.
	Step func(name string)

	compared, total int64 // bytes, of one image
}

// NewRate is a bound of so many bytes a second for Prover.
func NewRate(bytesPerSecond int) *rate.Limiter {
	return rate.NewLimiter(rate.Limit(bytesPerSecond), max(bytesPerSecond, rafs.MaxChunkSize))
}

// Turn lets one prover of several work.
type Turn chan struct{}

// NewTurn returns one that nobody has.
func NewTurn() Turn { return make(Turn, 1) }

// take waits for it. A nil one anybody has.
func (t Turn) take(ctx context.Context) (release func(), err error) {
	if t == nil {
		return func() {}, nil
	}
	select {
	case t <- struct{}{}:
		return func() { <-t }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *Prover) step(name string) {
	if p.Step != nil {
		p.Step(name)
	}
}

// Prove proves the image of a bootstrap, of the digest given, in its cache directory, unless
// it is proven already: done is false then. The error wraps ErrIncomplete when it may be possible later, ErrWrong
// when what the cache has is wrong, and proof.ErrNotProven when it can never be.
func (p *Prover) Prove(ctx context.Context, cacheDir, bootstrap, digest string) (done bool, err error) {
	return p.Image(ctx, Image{CacheDir: cacheDir, Bootstrap: bootstrap, Digest: digest})
}

// Image is Prove for an image.
func (p *Prover) Image(ctx context.Context, im Image) (done bool, err error) {
	if done, err = p.prove(ctx, im, nil); err != nil {
		return false, fmt.Errorf("prove that the image is in the cache directory %s: %w", im.CacheDir, err)
	}
	return done, nil
}

// prove tells known, if set, what the bootstrap says as soon as it is read.
func (p *Prover) prove(ctx context.Context, im Image, known func(*rafs.Bootstrap)) (done bool, err error) {
	cacheDir, digest := im.CacheDir, im.Digest
	if proof.Path(cacheDir, digest) == "" {
		return false, fmt.Errorf("%w: bootstrap digest %.80q is not sha256: and 64 lowercase hex digits", proof.ErrNotProven, digest)
	}
	f, err := im.open()
	if err != nil {
		return false, fmt.Errorf("open bootstrap: %w", err)
	}
	defer f.Close()
	b, size, err := rafs.OpenFile(f)
	if err != nil {
		return false, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if known != nil {
		known(b)
	}
	release, err := p.Turn.take(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	if !p.Again && valid(cacheDir, digest, b) {
		return false, nil
	}
	return p.all(ctx, &im, b, io.NewSectionReader(f, 0, size))
}

// all compares all blobs of an image, with the bootstrap b that f is, and writes the proof.
func (p *Prover) all(ctx context.Context, im *Image, b *rafs.Bootstrap, f *io.SectionReader) (done bool, err error) {
	cacheDir, digest := im.CacheDir, im.Digest
	if err := proof.Suitable(b); err != nil {
		return false, err
	}
	if err := present(cacheDir, b); err != nil {
		return false, err
	}
	if err := checkDigest(f, digest); err != nil {
		return false, err
	}
	tables, err := rafs.Chunks(f, f.Size(), maxChunks)
	if err != nil {
		return false, err
	}
	p.begin(tables)
	rec := proof.New(digest, []proof.Blob{})
	for i := range tables {
		file, err := p.blob(ctx, cacheDir, &tables[i])
		if err != nil {
			err = &BlobError{tables[i].Blob.ID, err}
			if p.Again && errors.Is(err, ErrWrong) {
				err = errors.Join(err, proof.Remove(cacheDir, tables[i].Blob.ID))
			}
			return false, err
		}
		rec.Blobs = append(rec.Blobs, proof.Blob{ID: tables[i].Blob.ID, File: file})
	}
	if err := p.write(cacheDir, rec); err != nil {
		return false, err
	}
	return true, nil
}

// valid tells whether there is a proof that holds.
func valid(cacheDir, digest string, b *rafs.Bootstrap) bool {
	proven, err := proof.Open(cacheDir, digest, b)
	if err != nil {
		return false
	}
	return proven.Close() == nil
}

// present tells whether nydusd has everything, by its own word. It reads no data.
func present(cacheDir string, b *rafs.Bootstrap) error {
	missing := &Missing{}
	for i := range b.Blobs {
		blob := &b.Blobs[i]
		m, err := chunkmap.Open(cacheDir, blob.ID, blob.ChunkCount)
		switch {
		case errors.Is(err, os.ErrNotExist):
			missing.Blobs = append(missing.Blobs, Lack{Blob: blob.ID, Chunks: int(blob.ChunkCount)})
		case err != nil:
			return err
		case !m.Complete():
			missing.Blobs = append(missing.Blobs, Lack{Blob: blob.ID, Ready: m.Ready(), Chunks: m.Len()})
		}
	}
	if len(missing.Blobs) > 0 {
		return missing
	}
	return nil
}

// begin learns how much there is to compare.
func (p *Prover) begin(tables []rafs.ChunkTable) {
	p.compared, p.total = 0, 0
	for i := range tables {
		for n := range tables[i].Len() {
			p.total += int64(tables[i].At(n).RawSize)
		}
	}
}

// advance tells that so much more was compared.
func (p *Prover) advance(bytes uint32) {
	p.compared += int64(bytes)
	if p.Progress != nil {
		p.Progress(p.compared, p.total)
	}
}

func checkDigest(r io.Reader, want string) error {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return fmt.Errorf("read bootstrap: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%w: the bootstrap has digest %s, expected %s", ErrWrong, got, want)
	}
	return nil
}

// blob compares one blob's data.
func (p *Prover) blob(ctx context.Context, cacheDir string, t *rafs.ChunkTable) (proof.File, error) {
	var none proof.File
	if t.Opaque > 0 {
		return none, fmt.Errorf("%w: the bootstrap has no digests for %d of its chunks", proof.ErrNotProven, t.Opaque)
	}
	f, err := proof.OpenQuiet(filepath.Join(cacheDir, proof.DataName(t.Blob.ID)))
	if err != nil {
		return none, fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	defer f.Close()
	before, err := proof.Stat(f)
	if err != nil {
		return none, err
	}
	if want := proof.Size(&t.Blob); before.Size != want {
		return none, fmt.Errorf("%w: %s has %d bytes, want %d", ErrWrong, f.Name(), before.Size, want)
	}
	if err := p.settle(before); err != nil {
		return none, err
	}
	p.step("sync data")
	if err := f.Sync(); err != nil {
		return none, errors.Join(fmt.Errorf("sync: %w", err), distrust(ctx, cacheDir, t.Blob.ID))
	}
	// What is in memory only because it was just written is to be read from the disk.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return none, fmt.Errorf("drop from memory: %w", err)
	}
	p.step("compare")
	if err := p.compare(ctx, f, t); err != nil {
		return none, err
	}
	after, err := proof.Stat(f)
	if err == nil && after != before {
		err = fmt.Errorf("%w: somebody writes to %s", ErrIncomplete, f.Name())
	}
	return after, err
}

// distrust has a blob's chunks fetched again that may not be on the disk: the kernel tells
// that once, and it was this process that it told.
func distrust(ctx context.Context, cacheDir, id string) error {
	hold, err := instance.HoldCache(ctx, cacheDir)
	if err != nil {
		return err
	}
	defer hold.Close()
	return checkpoint.Distrust(cacheDir, id)
}

func (p *Prover) now() time.Time {
	if p.Now == nil {
		return time.Now()
	}
	return p.Now()
}

func (p *Prover) settle(f proof.File) error {
	latest := max(f.Mtime, f.Change)
	if ago := p.now().Sub(time.Unix(0, latest)); ago < Settled {
		return fmt.Errorf("%w: %s ago", ErrRecent, ago)
	}
	return nil
}

// compare reads all chunks that the bootstrap knows.
func (p *Prover) compare(ctx context.Context, f *os.File, t *rafs.ChunkTable) error {
	buf := make([]byte, 0, t.Blob.ChunkSize)
	for i := range t.Len() {
		c := t.At(i)
		if p.Rate != nil {
			if err := p.Rate.WaitN(ctx, int(c.RawSize)); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if cap(buf) < int(c.RawSize) {
			buf = make([]byte, c.RawSize)
		}
		buf = buf[:c.RawSize]
		if _, err := f.ReadAt(buf, int64(c.RawOffset)); err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("%w: it ends before", ErrWrong)
			}
			return fmt.Errorf("read %d bytes at %d: %w", c.RawSize, c.RawOffset, err)
		}
		ok, err := blobcheck.Matches(t.Blob.Digester, c.Digest, buf)
		if err != nil {
			return fmt.Errorf("%w: %w", proof.ErrNotProven, err)
		}
		if !ok {
			return fmt.Errorf("%w: chunk %d, %d bytes at %d, has another digest", ErrWrong, c.Index, c.RawSize, c.RawOffset)
		}
		p.advance(c.RawSize)
	}
	return nil
}

// write makes the proof, and what makes it last.
func (p *Prover) write(cacheDir string, rec proof.Record) (err error) {
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	p.step("create proof")
	f, err := draft.New(proof.Path(cacheDir, rec.Bootstrap), proof.Temporary)
	if err != nil {
		return fmt.Errorf("write proof: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write proof: %w", err), f.Discard())
		}
	}()
	p.step("write proof")
	_, err = io.Copy(f, bytes.NewReader(text))
	p.step("sync proof")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	p.step("rename proof")
	if err = f.Place(); err != nil {
		return err
	}
	p.step("sync directory")
	return syncDir(cacheDir)
}

func syncDir(path string) error {
	d, err := os.Open(filepath.Clean(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// tidy removes what provers left that were killed. No other may run on the directory.
func tidy(cacheDir string) error {
	entries, err := os.ReadDir(cacheDir)
	if err != nil {
		return fmt.Errorf("tidy the cache directory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), proof.Temporary) {
			errs = append(errs, os.Remove(filepath.Join(cacheDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
