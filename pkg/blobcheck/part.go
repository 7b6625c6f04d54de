package blobcheck

import (
	"crypto/sha256"
	"fmt"
	"hash"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// kind is what a part of a blob is.
type kind int

const (
	aChunk kind = iota
	theList
	theTOC
)

// part is a stretch of a blob that can be checked as a whole.
type part struct {
	kind         kind
	offset, size int64
	chunk        rafs.Chunk
}

// streamed tells whether it is hashed as it arrives.
func (p *part) streamed() bool { return p.kind == aChunk && !p.chunk.Compressed }

func (p *part) what() string {
	return [...]string{"a chunk", "the list of chunks", "the table of contents"}[p.kind]
}

// wrong makes an error of what it is instead.
func (p *part) wrong(cause error) error {
	return &ContentError{Offset: p.offset, Size: p.size, What: p.what(), Cause: cause}
}

// checked is how many of its bytes are.
func (p *part) checked() int64 {
	if p.kind == theList {
		return p.size - rafs.MetaHeaderSize + headerChecked
	}
	return p.size
}

// check returns what is wrong with data.
func (p *part) check(w *worker, c *Checker, data []byte) error {
	switch p.kind {
	case theList:
		return c.checkList(w, data)
	case theTOC:
		if got := sha256.Sum256(data); got != c.table.Meta.TOCDigest {
			return fmt.Errorf("its digest is %x, want %x", got, c.table.Meta.TOCDigest)
		}
		return nil
	}
	raw, err := w.decoded(data, int(p.chunk.RawSize), c.table.Blob.Compressor)
	if err != nil {
		return err
	}
	h := w.sum.hash(c.table.Blob.Digester)
	h.Write(raw)
	return w.sum.is(h, &p.chunk.Digest)
}

// parts lists those of a range, in order.
type parts struct {
	c *Checker
	// chunk is the next one, last the one behind the last.
	chunk, last int
	// rest are those behind the chunks.
	rest []part
	// cut is one that lies only partly in the range, if its size is not 0.
	cut part
}

func (s *parts) peek() (part, bool) {
	if s.chunk < s.last {
		return chunkPart(s.c.table.At(s.chunk)), true
	}
	if len(s.rest) > 0 {
		return s.rest[0], true
	}
	return part{}, false
}

func (s *parts) next() (part, bool) {
	p, ok := s.peek()
	switch {
	case s.chunk < s.last:
		s.chunk++
	case ok:
		s.rest = s.rest[1:]
	}
	return p, ok
}

func chunkPart(c rafs.Chunk) part {
	return part{kind: aChunk, offset: int64(c.Offset), size: int64(c.Size), chunk: c}
}

// parts finds those between offset and end of a blob of size bytes.
func (c *Checker) parts(offset, end, size int64) parts {
	s := parts{c: c, chunk: c.table.Search(uint64(offset))}
	if s.chunk < c.table.Len() {
		if first := chunkPart(c.table.At(s.chunk)); first.offset < offset && end > offset {
			s.cut = first
			s.chunk++
		}
	}
	s.last = max(c.table.Search(uint64(end)), s.chunk)
	if s.last < c.table.Len() {
		if behind := chunkPart(c.table.At(s.last)); behind.offset < end && behind.offset >= offset {
			s.cut = behind
		}
	}
	for _, p := range c.metadata(size) {
		switch {
		case p.offset >= offset && p.offset+p.size <= end:
			s.rest = append(s.rest, p)
		case p.offset < end && p.offset+p.size > offset:
			s.cut = p
		}
	}
	return s
}

// End is where the last chunk ends that the bootstrap knows: no blob is shorter.
func (c *Checker) End() int64 {
	if n := c.table.Len(); n > 0 {
		return int64(c.table.At(n - 1).End())
	}
	return 0
}

// Around returns the least stretch of the blob around length bytes at offset that cuts no
// chunk and no piece of metadata; size is as for Reader, and so is the returned length.
func (c *Checker) Around(offset, length, size int64) (first, all int64) {
	first, end := offset, offset+length
	widen := func(p part) {
		if p.offset < end && p.offset+p.size > first {
			first, end = min(first, p.offset), max(end, p.offset+p.size)
		}
	}
	for _, at := range []int64{offset, end - 1} {
		if i := c.table.Search(uint64(at)); i < c.table.Len() {
			widen(chunkPart(c.table.At(i)))
		}
	}
	for _, p := range c.metadata(size) {
		widen(p)
	}
	return first, end - first
}

// metadata lists the parts behind the chunks of a blob of size bytes.
func (c *Checker) metadata(size int64) []part {
	var all []part
	m := &c.table.Meta
	behind := c.End()
	if c.meta {
		list := part{kind: theList, offset: int64(m.Offset), size: int64(m.Size) + rafs.MetaHeaderSize}
		all, behind = append(all, list), list.offset+list.size
	}
	// Whoever tells the size may be wrong. nydusd believes it, and the digest shows it.
	if at := size - int64(m.TOCSize); m.TOCDigest != [32]byte{} && m.TOCSize > 0 && at >= behind {
		all = append(all, part{kind: theTOC, offset: at, size: int64(m.TOCSize)})
	}
	return all
}

// hasher hashes a chunk as it arrives, in whole pieces.
type hasher struct {
	digester digester
	sum      hash.Hash
	piece    buffer
}

func (h *hasher) start(r *Reader) {
	h.piece.pool = r.c.pool
	h.sum = h.digester.hash(r.c.table.Blob.Digester)
}

func (h *hasher) write(p []byte) {
	for len(p) > 0 {
		if h.piece.size == 0 && len(p) >= len(piece{}) {
			h.sum.Write(p)
			return
		}
		n := min(len(p), len(piece{})-h.piece.size)
		h.piece.write(p[:n])
		if p = p[n:]; h.piece.size == len(piece{}) {
			h.flush()
		}
	}
}

// flush hashes the piece, which is kept.
func (h *hasher) flush() {
	if h.piece.size > 0 {
		h.sum.Write(h.piece.pieces[0][:h.piece.size])
		h.piece.empty()
	}
}

func (h *hasher) finish(p part) error {
	h.flush()
	if err := h.digester.is(h.sum, &p.chunk.Digest); err != nil {
		return p.wrong(err)
	}
	return nil
}
