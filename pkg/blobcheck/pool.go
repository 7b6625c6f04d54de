package blobcheck

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/zeebo/blake3"
	"golang.org/x/sync/semaphore"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Pool bounds how many checks run at once and owns what they need. All readers of a
// process share one.
type Pool struct {
	workers chan *worker
	// pieces are what arrives.
	pieces sync.Pool
}

// NewPool makes a pool for n checks at once, at least one. More than the process has
// processors only take memory: each has room for two chunks, and what zstd needs.
func NewPool(n int) *Pool {
	n = max(n, 1)
	p := &Pool{workers: make(chan *worker, n), pieces: sync.Pool{New: func() any { return new(piece) }}}
	for range n {
		p.workers <- new(worker)
	}
	return p
}

// piece is what buffers consist of. Whole ones are filled before the next, since
// hashing small ones is several times as slow.
type piece [128 << 10]byte

// Budget bounds what readers hold of chunks that have not arrived as a whole, as long as
// they come along. Readers of one source should share one, and those of others have
// another. Who has waited for long goes on without: those who have it may themselves wait
// for something that he holds.
type Budget struct {
	all  int64
	left *semaphore.Weighted
}

// NewBudget makes one of so many bytes. A chunk that is larger gets all of it.
func NewBudget(all int64) *Budget { return &Budget{all, semaphore.NewWeighted(all)} }

// take gets n bytes if nobody waits for them.
func (b *Budget) take(n int64) bool { return b == nil || b.left.TryAcquire(min(n, b.all)) }

// budgetPatience is how long a reader waits.
const budgetPatience = 2 * time.Second

// wait gets n bytes, or tells that it has not after a while.
func (b *Budget) wait(ctx context.Context, n int64) (bool, error) {
	if b == nil {
		return true, nil
	}
	patience, cancel := context.WithTimeout(ctx, budgetPatience)
	defer cancel()
	err := b.left.Acquire(patience, min(n, b.all))
	if err != nil && ctx.Err() == nil {
		return false, nil
	}
	return err == nil, err
}

// give gives back what was got at once.
func (b *Budget) give(n int64) {
	if b != nil && n > 0 {
		b.left.Release(min(n, b.all))
	}
}

// buffer holds what has arrived.
type buffer struct {
	pool   *Pool
	pieces []*piece
	size   int
}

func (b *buffer) write(p []byte) {
	for len(p) > 0 {
		used := b.size % len(piece{})
		if used == 0 {
			b.pieces = append(b.pieces, b.pool.pieces.Get().(*piece))
		}
		n := copy(b.pieces[len(b.pieces)-1][used:], p)
		b.size, p = b.size+n, p[n:]
	}
}

// takes is how much memory it has with n bytes more.
func (b *buffer) takes(n int64) int64 {
	const whole = int64(len(piece{}))
	return (int64(b.size) + n + whole - 1) / whole * whole
}

// empty gives the memory back.
func (b *buffer) empty() {
	for _, p := range b.pieces {
		b.pool.pieces.Put(p)
	}
	clear(b.pieces)
	b.pieces, b.size = b.pieces[:0], 0
}

// worker makes one check at a time.
type worker struct {
	zstd    *zstd.Decoder
	in, out []byte
	sum     digester
}

// keepMost bounds what a worker keeps from one check to the next, in bytes: few images
// have larger chunks.
const keepMost = 2 << 20

// room returns n bytes in *b.
func room(b *[]byte, n int) []byte {
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	return (*b)[:n]
}

// release forgets what was unusually large.
func (w *worker) release() {
	for _, b := range []*[]byte{&w.in, &w.out} {
		if cap(*b) > keepMost {
			*b = nil
		}
	}
}

// contiguous returns what is in b, and empties it.
func (w *worker) contiguous(b *buffer) []byte {
	in, n := room(&w.in, b.size), 0
	for _, p := range b.pieces {
		n += copy(in[n:], p[:])
	}
	b.empty()
	return in
}

// decoded returns the size bytes that data is the compressed form of.
func (w *worker) decoded(data []byte, size int, compressor rafs.Compressor) ([]byte, error) {
	out := room(&w.out, size)
	var (
		n   int
		err error
	)
	switch compressor {
	case rafs.CompressorNone:
		return data, nil
	case rafs.CompressorLZ4:
		n, err = lz4.UncompressBlock(data, out)
	case rafs.CompressorZstd:
		if w.zstd == nil {
			// No window is larger than the largest chunk, but zstd rounds up. The chunk's
			// digest says more than zstd's checksum.
			w.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
				zstd.IgnoreChecksum(true), zstd.WithDecoderMaxMemory(2*maxRaw), zstd.WithDecodeAllCapLimit(true))
			if err != nil {
				return nil, fmt.Errorf("prepare to decompress: %w", err)
			}
		}
		out, err = w.zstd.DecodeAll(data, out[:0:size])
		n = len(out)
	default:
		return nil, fmt.Errorf("%w: %s", errors.ErrUnsupported, compressor)
	}
	if err != nil {
		return nil, fmt.Errorf("does not decompress: %w", err)
	}
	if n != size {
		return nil, fmt.Errorf("decompresses to %d bytes, want %d", n, size)
	}
	return out, nil
}

// Matches tells whether data is what a chunk's digest says, uncompressed. The error wraps
// errors.ErrUnsupported when nobody knows how its digests are made.
func Matches(by rafs.Digester, want [32]byte, data []byte) (bool, error) {
	switch by {
	case rafs.DigesterBlake3:
		return blake3.Sum256(data) == want, nil
	case rafs.DigesterSHA256:
		return sha256.Sum256(data) == want, nil
	}
	return false, fmt.Errorf("digests by %s: %w", by, errors.ErrUnsupported)
}

// digester makes digests of chunks. Its zero value is ready.
type digester struct {
	blake3, sha256 hash.Hash
	sum            [32]byte
}

// hash returns a fresh one.
func (d *digester) hash(kind rafs.Digester) hash.Hash {
	if kind == rafs.DigesterSHA256 {
		if d.sha256 == nil {
			d.sha256 = sha256.New()
		}
		d.sha256.Reset()
		return d.sha256
	}
	if d.blake3 == nil {
		d.blake3 = blake3.New()
	}
	d.blake3.Reset()
	return d.blake3
}

// is tells whether h has come to want.
func (d *digester) is(h hash.Hash, want *[32]byte) error {
	if got := h.Sum(d.sum[:0]); !bytes.Equal(got, want[:]) {
		return fmt.Errorf("its digest is %x, want %x", got, want[:])
	}
	return nil
}
