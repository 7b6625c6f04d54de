package blobcheck

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// The ways in which it can end, for errors.Is.
var (
	// ErrContent says that the source delivers something else than the image needs:
	// see ContentError.
	ErrContent = errors.New("wrong content")
	// ErrUnaligned says that a part begins or ends within a chunk, so that it could
	// not be checked. nydusd asks for no such parts.
	ErrUnaligned = errors.New("the part cuts a chunk")
)

// ContentError is an [ErrContent] and says where. The source of these bytes, and of no
// others of the part, is wrong.
type ContentError struct {
	// Offset and Size are those of the chunk, or of the piece of metadata, in the blob.
	Offset, Size int64
	// What it should have been.
	What string
	// Cause is what it is instead.
	Cause error
}

// Error implements error.
func (e *ContentError) Error() string {
	return fmt.Sprintf("%s: %s of %d bytes at %d: %v", ErrContent, e.What, e.Size, e.Offset, e.Cause)
}

// Unwrap implements what errors.Is and errors.As need.
func (e *ContentError) Unwrap() []error { return []error{ErrContent, e.Cause} }

// Checker knows what a blob must contain. Any number of goroutines may use it.
type Checker struct {
	table  *rafs.ChunkTable
	pool   *Pool
	budget *Budget
	// meta says whether the blob's list of chunks can be compared.
	meta bool
}

// maxRaw bounds what is decompressed at once, in bytes: a chunk, and the list of a
// million chunks.
const maxRaw = 24 << 20

// New makes a checker of the blob that table describes. Its readers hold no more of
// chunks that have not arrived as a whole than budget allows, if that is not nil.
func New(table *rafs.ChunkTable, pool *Pool, budget *Budget) (*Checker, error) {
	if d := table.Blob.Digester; d != rafs.DigesterBlake3 && d != rafs.DigesterSHA256 {
		return nil, fmt.Errorf("check blob %s: digester %s: %w", table.Blob.ID, d, errors.ErrUnsupported)
	}
	if !decodes(table.Blob.Compressor) && table.Len() > 0 {
		return nil, fmt.Errorf("check blob %s: compressor %s: %w", table.Blob.ID, table.Blob.Compressor, errors.ErrUnsupported)
	}
	m := table.Meta
	comparable := m.Size > 0 && m.RawSize <= maxRaw && decodes(m.Compressor) && table.Opaque == 0 &&
		m.RawSize == uint64(table.Blob.ChunkCount)*entrySize(table) && (m.Compressor != rafs.CompressorNone || m.Size == m.RawSize)
	return &Checker{table: table, pool: pool, budget: budget, meta: comparable}, nil
}

// decodes tells whether a worker can.
func decodes(c rafs.Compressor) bool {
	return c == rafs.CompressorNone || c == rafs.CompressorLZ4 || c == rafs.CompressorZstd
}

// Reader passes a part of a blob on and checks it. It is not for several goroutines.
type Reader struct {
	c   *Checker
	ctx context.Context
	src io.Reader
	// offset is where the next byte lies, end where the part ends.
	offset, end int64
	parts       parts
	unchecked   int64
	err         error

	now     part // what arrives; none when its size is 0
	arrived buffer
	held    int64 // of the budget
	// task is what has arrived as a whole, to be checked together with more.
	task task
	// results are those of the checks that are running, so many of them.
	results chan error
	running int
	// Chunks that are not compressed are hashed as they arrive, so that they need not
	// be held.
	hash   hasher
	closed bool
}

// Reader passes on length bytes at offset of the blob that is size bytes long, which
// src gives out; size may be 0 when nobody knows it. It refuses with [ErrUnaligned] a
// part that cuts a chunk, unless it reaches to the blob's end: there nydusd looks for
// the table of contents, and does not take the rest of what it gets for data.
//
// It waits for its share of the budget until ctx ends. Close it when done, which does not
// close src.
func (c *Checker) Reader(ctx context.Context, src io.Reader, offset, length, size int64) (*Reader, error) {
	end := offset + length
	if offset < 0 || length < 0 || end < offset || (size > 0 && end > size) {
		return nil, fmt.Errorf("check blob %s: no %d bytes at %d of %d", c.table.Blob.ID, length, offset, size)
	}
	r := &Reader{c: c, ctx: ctx, src: src, offset: offset, end: end, arrived: buffer{pool: c.pool}, results: make(chan error, atOnce)}
	r.parts = c.parts(offset, end, size)
	cut := r.parts.cut
	if cut.size > 0 && (end != size || cut.offset >= offset) {
		return nil, fmt.Errorf("check blob %s: %d bytes at %d: %w: %s of %d bytes at %d",
			c.table.Blob.ID, length, offset, ErrUnaligned, cut.what(), cut.size, cut.offset)
	}
	r.unchecked = length
	for all := r.parts; ; {
		p, ok := all.next()
		if !ok {
			break
		}
		r.unchecked -= p.checked()
	}
	return r, nil
}

// Unchecked is how many bytes of the part are passed on without a check. The package's
// description says which.
func (r *Reader) Unchecked() int64 { return r.unchecked }

// Read implements io.Reader. With the part's last bytes it waits until all has been
// checked. Once it has failed it has failed for good.
func (r *Reader) Read(p []byte) (int, error) {
	switch {
	case r.err != nil:
		return 0, r.err
	case r.offset == r.end:
		r.err = r.finish() // of an empty part; otherwise nothing is left to do
		if r.err == nil {
			r.err = io.EOF
		}
		return 0, r.err
	case len(p) == 0:
		return 0, nil
	}
	n, err := r.src.Read(p[:min(int64(len(p)), r.end-r.offset)])
	if bad := r.take(p[:n]); bad != nil {
		r.err = bad
		return 0, bad
	}
	switch {
	case r.offset == r.end:
		if bad := r.finish(); bad != nil {
			r.err = bad
			return 0, bad
		}
		return n, nil
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	r.err = err
	return n, err
}

// Close gives memory back. It waits for the checks that are running.
func (r *Reader) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	for ; r.running > 0; r.running-- {
		if err := <-r.results; r.err == nil {
			r.err = err
		}
	}
	r.arrived.empty()
	r.c.budget.give(r.held)
	r.held = 0
	r.hash.piece.empty()
	if r.err == nil {
		r.err = errors.New("read of a part that is closed")
	}
	return nil
}

// take sorts what has arrived.
func (r *Reader) take(p []byte) error {
	for len(p) > 0 {
		if r.now.size == 0 {
			next, ok := r.parts.peek()
			if !ok || next.offset >= r.offset+int64(len(p)) {
				r.offset += int64(len(p)) // nothing of it can be checked
				return nil
			}
			skip := next.offset - r.offset
			r.offset, p = next.offset, p[skip:]
			r.now, _ = r.parts.next()
			if err := r.begin(); err != nil {
				return err
			}
		}
		n := min(int64(len(p)), r.now.offset+r.now.size-r.offset)
		if r.now.streamed() {
			r.hash.write(p[:n])
		} else {
			r.arrived.write(p[:n])
		}
		r.offset, p = r.offset+n, p[n:]
		if r.offset == r.now.offset+r.now.size {
			if err := r.complete(); err != nil {
				return err
			}
		}
	}
	return nil
}

// begin is called with the first byte of what arrives.
func (r *Reader) begin() error {
	if r.now.streamed() {
		r.hash.start(r)
		return nil
	}
	more := r.arrived.takes(r.now.size) - r.held
	if more <= 0 || r.c.budget.take(more) {
		r.held += max(more, 0)
		return nil
	}
	// Who waits holds nothing of the budget.
	if len(r.task.parts) > 0 {
		if err := r.check(); err != nil {
			return err
		}
	}
	more = r.arrived.takes(r.now.size)
	got, err := r.c.budget.wait(r.ctx, more)
	if err != nil {
		return fmt.Errorf("check blob %s: wait for memory: %w", r.c.table.Blob.ID, err)
	}
	if got {
		r.held = more
	}
	return nil
}

// atLeast is how much is checked at once, in bytes, as far as there are chunks: for a
// small one alone a goroutine is too much.
const atLeast = 128 << 10

// atOnce is how many checks a reader has running: more than one, since nydusd waits for
// the last byte while the processors have nothing to do.
const atOnce = 2

// complete is called with the last byte of what arrives.
func (r *Reader) complete() error {
	p := r.now
	r.now = part{}
	if p.streamed() {
		return r.hash.finish(p)
	}
	r.task.parts = append(r.task.parts, p)
	if r.arrived.size >= atLeast {
		return r.check()
	}
	return nil
}

// check has what has arrived checked, once there is a place for it.
func (r *Reader) check() error {
	if err := r.wait(atOnce - 1); err != nil {
		return err
	}
	t := task{c: r.c, data: r.arrived, parts: r.task.parts, held: r.held}
	r.arrived, r.task.parts, r.held = buffer{pool: r.c.pool}, nil, 0
	r.running++
	// Taken before more arrives: no reader holds a chunk that waits for its check and
	// another one.
	w := <-r.c.pool.workers
	go func() { r.results <- t.run(w) }()
	return nil
}

// wait waits until no more than so many checks are running. The error is that of one that
// has ended; the part is over then, and Close waits for the others.
func (r *Reader) wait(most int) error {
	for r.running > most {
		r.running--
		if err := <-r.results; err != nil {
			return err
		}
	}
	return nil
}

// finish has everything checked and waits for it.
func (r *Reader) finish() error {
	if len(r.task.parts) > 0 {
		if err := r.check(); err != nil {
			return err
		}
	}
	return r.wait(0)
}

// task is a check of parts that have arrived.
type task struct {
	c     *Checker
	data  buffer
	parts []part
	held  int64
}

// run makes it with w, and gives that back to the pool.
func (t *task) run(w *worker) (err error) {
	defer func() {
		// Decoders are other people's, their input is anybody's: a fault of theirs
		// must not end everybody's reading.
		if fault := recover(); fault != nil {
			err = t.parts[0].wrong(fmt.Errorf("the check fails: %v", fault))
			w = new(worker)
		}
		t.c.budget.give(t.held)
		w.release()
		t.c.pool.workers <- w
	}()
	data := w.contiguous(&t.data)
	t.c.budget.give(t.held)
	t.held = 0
	for _, p := range t.parts {
		if err := p.check(w, t.c, data[:p.size]); err != nil {
			return p.wrong(err)
		}
		data = data[p.size:]
	}
	return nil
}
