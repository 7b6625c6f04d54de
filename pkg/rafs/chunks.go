package rafs

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"sort"
)

// MaxChunkSize bounds a chunk in bytes, compressed and not, as nydusd does.
const MaxChunkSize = 16 << 20

// ChunkTable tells what a blob must contain, as far as an image's bootstrap knows it.
//
// The bootstrap knows the chunks that the image's files consist of. A blob may hold
// others: those of files that a layer above hides or removes, and of other images
// when the blob belongs to a chunk dictionary.
//
// It is never changed, so many goroutines may use it. It takes 56 bytes a chunk.
type ChunkTable struct {
	// Blob is the one whose chunks they are.
	Blob Blob
	// Meta tells where the blob's own metadata lies, for v6.
	Meta Meta
	// Opaque is how many chunks are not listed, because they cannot be read each on
	// its own: those of zran and batch blobs, encrypted ones, and chunks that are
	// compressed with gzip.
	Opaque int

	chunks []record
}

// Meta tells where nydusd finds a v6 blob's own list of chunks, which it reads before
// anything else ("blob.meta": the compressed list, followed by a header of 4096 bytes),
// and the table of contents at the blob's end.
type Meta struct {
	// Compressor is how the list is compressed.
	Compressor Compressor
	// Offset and Size say where the compressed list lies, RawSize is what it has
	// uncompressed, all in bytes. Size is 0 when the blob has none: for v5, and when
	// it lies in a blob of its own (Blob.MetaID).
	Offset, Size, RawSize uint64
	// TOCSize is that of the table of contents in bytes, TOCDigest its sha256. All
	// zero when the bootstrap does not know them.
	TOCSize   uint32
	TOCDigest [32]byte
}

// MetaHeaderSize is that of the header behind a blob's list of chunks, in bytes.
const MetaHeaderSize = 4096

// Chunk is one piece of file data in a blob.
type Chunk struct {
	// Offset and Size say where it lies in the blob, in bytes.
	Offset uint64
	Size   uint32
	// RawOffset and RawSize say the same of the uncompressed blob, as nydusd caches
	// it. RawOffset is 0 for v5.
	RawOffset uint64
	RawSize   uint32
	// Index is its place in the blob's own list of chunks; 0 for v5.
	Index uint32
	// Compressed says whether it is compressed, with the blob's compressor.
	Compressed bool
	// Digest is that of the uncompressed data, made with the blob's digester.
	Digest [32]byte
}

// End is where in the blob the chunk ends.
func (c Chunk) End() uint64 { return c.Offset + uint64(c.Size) }

// record is a Chunk in 56 bytes.
type record struct {
	offset, size     uint32 // the lower parts
	rawBlock, rawLen uint32
	high             uint32 // of offset, in units of 4 GiB
	index            uint32 // the uppermost bit says that it is compressed
	digest           [32]byte
}

const compressedBit = 1 << 31

func (r *record) start() uint64 { return uint64(r.high)<<32 | uint64(r.offset) }

// Len is the number of chunks that are listed.
func (t *ChunkTable) Len() int { return len(t.chunks) }

// At returns the chunk i, of Len. They are in the order of their offsets and do not
// overlap.
func (t *ChunkTable) At(i int) Chunk {
	r := &t.chunks[i]
	return Chunk{
		Offset: r.start(), Size: r.size, RawOffset: uint64(r.rawBlock) << v6BlockBits, RawSize: r.rawLen,
		Index: r.index &^ compressedBit, Compressed: r.index&compressedBit != 0, Digest: r.digest,
	}
}

// Search returns the first chunk that ends behind offset, or Len.
func (t *ChunkTable) Search(offset uint64) int {
	return sort.Search(len(t.chunks), func(i int) bool {
		return t.chunks[i].start()+uint64(t.chunks[i].size) > offset
	})
}

// Chunks reads the chunk tables of the bootstrap of size bytes in r, one for each blob
// by its index. An image with more than most chunks is refused with ErrInvalid, so that
// a hostile one takes no more than 56 bytes for each of those.
func Chunks(r io.ReaderAt, size int64, most int) ([]ChunkTable, error) {
	im := &image{r: r, size: size}
	b, err := open(im)
	if err != nil {
		return nil, fmt.Errorf("read bootstrap: %w", err)
	}
	tables, err := chunks(im, b, most)
	if err != nil {
		return nil, fmt.Errorf("read the bootstrap's chunks: %w", err)
	}
	return tables, nil
}

func chunks(im *image, b *Bootstrap, most int) ([]ChunkTable, error) {
	walk := v6Chunks
	if b.Version == V5 {
		walk = v5Chunks
	}
	// Counted first: a slice that grows would take twice as much.
	counts, total := make([]int, len(b.Blobs)), 0
	err := walk(im, most, func(entry []byte) error {
		index := le.Uint32(entry[32:])
		if int64(index) >= int64(len(counts)) {
			return fmt.Errorf("%w: a chunk of blob %d, the image has %d blobs", ErrInvalid, index, len(counts))
		}
		counts[index]++
		if total++; total > most {
			return tooMany(most)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	tables := make([]ChunkTable, len(b.Blobs))
	for i := range tables {
		tables[i] = ChunkTable{Blob: b.Blobs[i], chunks: make([]record, 0, counts[i])}
	}
	if err := walk(im, most, func(entry []byte) error {
		index := le.Uint32(entry[32:])
		if int64(index) >= int64(len(tables)) || len(tables[index].chunks)+tables[index].Opaque >= counts[index] {
			return fmt.Errorf("%w: it changes while it is read", ErrInvalid)
		}
		return tables[index].add(b.Version, entry)
	}); err != nil {
		return nil, err
	}
	if b.Version == V6 {
		if err := v6Metas(im, tables); err != nil {
			return nil, err
		}
	}
	for i := range tables {
		if err := tables[i].order(); err != nil {
			return nil, err
		}
	}
	return tables, nil
}

func tooMany(most int) error {
	return fmt.Errorf("%w: it has more than %d chunks", ErrInvalid, most)
}

// A chunk has the same 80 bytes in v5 and v6.
const chunkEntry = 80

// The flags of a chunk.
const (
	chunkCompressed = 1 << iota
	chunkHole
	chunkEncrypted
	chunkBatch
	chunkCRC
	chunkFlags = 1<<iota - 1
)

// opaqueFeatures are those of blobs whose chunks cannot be read each on its own.
const opaqueFeatures = FeatureZran | featureTarfs | featureBatch | featureEncrypted

// add takes one entry.
func (t *ChunkTable) add(version string, e []byte) error {
	flags := le.Uint32(e[36:])
	c := Chunk{
		Digest: [32]byte(e[:32]), Compressed: flags&chunkCompressed != 0,
		Size: le.Uint32(e[40:]), RawSize: le.Uint32(e[44:]), Offset: le.Uint64(e[48:]), RawOffset: le.Uint64(e[56:]), Index: le.Uint32(e[72:]),
	}
	if flags&^chunkFlags != 0 {
		return fmt.Errorf("%w: blob %s has a chunk at %d with unknown flags %#x", ErrInvalid, t.Blob.ID, c.Offset, flags)
	}
	if flags&(chunkHole|chunkEncrypted|chunkBatch) != 0 || t.Blob.Features&opaqueFeatures != 0 ||
		(c.Compressed && t.Blob.Compressor == CompressorGzip) {
		t.Opaque++
		return nil
	}
	if version == V5 {
		// The same chunk may have other numbers in another file.
		c.Index, c.RawOffset = 0, 0
	}
	return t.list(c)
}

// list takes one chunk that can be read on its own.
func (t *ChunkTable) list(c Chunk) error {
	bad := func(why string) error {
		return fmt.Errorf("%w: blob %s has a chunk of %d bytes at %d, %d at %d uncompressed, index %d: %s",
			ErrInvalid, t.Blob.ID, c.Size, c.Offset, c.RawSize, c.RawOffset, c.Index, why)
	}
	switch {
	case c.Size == 0 || c.Size > MaxChunkSize || c.RawSize == 0 || c.RawSize > MaxChunkSize:
		return bad("want sizes from 1 byte to 16 MiB")
	case c.Offset > maxCompressed-MaxChunkSize:
		return bad("it lies too far behind")
	case !c.Compressed && c.Size != c.RawSize:
		return bad("it is not compressed, so both sizes must be equal")
	case c.RawOffset%v6Block != 0 || c.RawOffset > maxUncompressed-MaxChunkSize:
		return bad("want an uncompressed offset that is a multiple of 4096, within the blob")
	case c.Index >= MaxChunks:
		return bad("the index is too large")
	}
	r := record{
		offset: uint32(c.Offset), high: uint32(c.Offset >> 32), size: c.Size,
		rawBlock: uint32(c.RawOffset >> v6BlockBits), rawLen: c.RawSize, index: c.Index, digest: c.Digest,
	}
	if c.Compressed {
		r.index |= compressedBit
	}
	t.chunks = append(t.chunks, r)
	return nil
}

// NewChunkTable makes the table of a blob whose chunks are known from elsewhere than a
// bootstrap, with the same checks as [Chunks].
func NewChunkTable(blob Blob, meta Meta, list []Chunk) (*ChunkTable, error) {
	t := &ChunkTable{Blob: blob, Meta: meta, chunks: make([]record, 0, len(list))}
	for _, c := range list {
		if err := t.list(c); err != nil {
			return nil, err
		}
	}
	if err := t.order(); err != nil {
		return nil, err
	}
	return t, nil
}

// order sorts the chunks and refuses what contradicts itself.
func (t *ChunkTable) order() error {
	slices.SortFunc(t.chunks, func(a, b record) int { return cmp.Compare(a.start(), b.start()) })
	t.chunks = slices.Compact(t.chunks)
	for i := 1; i < len(t.chunks); i++ {
		a, b := t.At(i-1), t.At(i)
		if b.Offset < a.End() {
			return fmt.Errorf("%w: blob %s: chunks at %d and %d overlap", ErrInvalid, t.Blob.ID, a.Offset, b.Offset)
		}
		// nydusd relies on it.
		if t.Meta.RawSize > 0 && (b.Index <= a.Index || b.RawOffset < a.RawOffset+uint64(a.RawSize)) {
			return fmt.Errorf("%w: blob %s: chunks %d and %d lie in another order than their indices or uncompressed offsets say",
				ErrInvalid, t.Blob.ID, a.Index, b.Index)
		}
	}
	m := &t.Meta
	if m.Size == 0 || len(t.chunks) == 0 {
		return nil
	}
	last := t.At(len(t.chunks) - 1)
	if last.End() > m.Offset {
		return fmt.Errorf("%w: blob %s: its list of chunks lies at %d, among the chunks", ErrInvalid, t.Blob.ID, m.Offset)
	}
	if last.Index >= t.Blob.ChunkCount {
		return fmt.Errorf("%w: blob %s has %d chunks, but one with index %d", ErrInvalid, t.Blob.ID, t.Blob.ChunkCount, last.Index)
	}
	return nil
}

// v6Chunks reads the chunk table, which is one array.
func v6Chunks(im *image, most int, entry func([]byte) error) error {
	ext, err := im.read("v6 extension", v6Super+128, 48)
	if err != nil {
		return err
	}
	offset, size := le.Uint64(ext[24:]), le.Uint64(ext[32:])
	if size%chunkEntry != 0 {
		return fmt.Errorf("%w: v6 chunk table of %d bytes: want a multiple of %d", ErrInvalid, size, chunkEntry)
	}
	if size/chunkEntry > uint64(max(most, 0)) {
		return tooMany(most)
	}
	if err := im.within("v6 chunk table", offset, size); err != nil {
		return err
	}
	const once = 800 * chunkEntry
	for size > 0 {
		part, err := im.read("v6 chunk table", offset, min(size, once))
		if err != nil {
			return err
		}
		for e := range slices.Chunk(part, chunkEntry) {
			if err := entry(e); err != nil {
				return err
			}
		}
		offset, size = offset+uint64(len(part)), size-uint64(len(part))
	}
	return nil
}

// v6Metas adds where each blob's metadata is.
func v6Metas(im *image, tables []ChunkTable) error {
	if len(tables) == 0 {
		return nil
	}
	ext, err := im.read("v6 extension", v6Super+128, 48)
	if err != nil {
		return err
	}
	table, err := im.read("v6 blob table", le.Uint64(ext[8:]), uint64(len(tables))*v6BlobSize)
	if err != nil {
		return err
	}
	for i := range tables {
		if err := tables[i].readMeta(table[i*v6BlobSize:][:v6BlobSize]); err != nil {
			return err
		}
	}
	return nil
}

func (t *ChunkTable) readMeta(e []byte) error {
	if string(e[:idSize]) != t.Blob.ID {
		return fmt.Errorf("%w: it changes while it is read", ErrInvalid)
	}
	if t.Blob.Features.Has(FeatureSeparate) {
		return nil
	}
	m := Meta{
		TOCSize: le.Uint32(e[104:]), Compressor: Compressor(le.Uint32(e[108:])),
		Offset: le.Uint64(e[112:]), Size: le.Uint64(e[120:]), RawSize: le.Uint64(e[128:]), TOCDigest: [32]byte(e[136:168]),
	}
	// The same limits as nydusd's, which give 24 bytes to a chunk; contexts of batches
	// come on top, but those are opaque.
	const perChunk, tocMost = 24, 64 << 10
	if m.Offset > maxCompressed || m.Size > m.RawSize || m.TOCSize > tocMost ||
		(t.Blob.Features&opaqueFeatures == 0 && m.RawSize > perChunk*uint64(t.Blob.ChunkCount)) {
		return fmt.Errorf("%w: blob %s with %d chunks: its list of %d bytes (%d uncompressed) lies at %d, its table of contents has %d bytes",
			ErrInvalid, t.Blob.ID, t.Blob.ChunkCount, m.Size, m.RawSize, m.Offset, m.TOCSize)
	}
	t.Meta = m
	return nil
}

const (
	v5InodeSize = 128
	v5Xattr     = 1 << 2 // the flag of an inode with extended attributes
	v5FileType  = 0o170000
	v5Regular   = 0o100000
)

// v5Chunks reads the chunks of each inode: they follow its names and attributes.
func v5Chunks(im *image, most int, entry func([]byte) error) error {
	sb, err := im.read("v5 superblock", 0, 80)
	if err != nil {
		return err
	}
	offset, entries := le.Uint64(sb[32:]), uint64(le.Uint32(sb[56:]))
	if err := im.within("v5 inode table", offset, entries*4); err != nil {
		return err
	}
	// Each costs two reads, be there chunks or not.
	if entries > 8*MaxChunks {
		return fmt.Errorf("%w: v5 inode table of %d entries", ErrInvalid, entries)
	}
	const once = 16 << 10
	for entries > 0 {
		part, err := im.read("v5 inode table", offset, min(entries, once)*4)
		if err != nil {
			return err
		}
		for e := range slices.Chunk(part, 4) {
			// The last one may be padding.
			if at := uint64(le.Uint32(e)) << 3; at != 0 {
				if err := v5Inode(im, at, most, entry); err != nil {
					return err
				}
			}
		}
		offset, entries = offset+uint64(len(part)), entries-uint64(len(part)/4)
	}
	return nil
}

func v5Inode(im *image, at uint64, most int, entry func([]byte) error) error {
	if at < v5SuperSize {
		return fmt.Errorf("%w: v5 inode at %d, within the superblock", ErrInvalid, at)
	}
	inode, err := im.read("v5 inode", at, v5InodeSize)
	if err != nil {
		return err
	}
	count := uint64(le.Uint32(inode[96:]))
	if le.Uint32(inode[60:])&v5FileType != v5Regular || count == 0 {
		return nil
	}
	if count > uint64(max(most, 0)) {
		return tooMany(most)
	}
	at += v5InodeSize + align8(uint64(le.Uint16(inode[100:]))) + align8(uint64(le.Uint16(inode[102:])))
	if le.Uint64(inode[80:])&v5Xattr != 0 {
		head, err := im.read("v5 extended attributes", at, 8)
		if err != nil {
			return err
		}
		size := le.Uint64(head)
		if err := im.within("v5 extended attributes", at+8, size); err != nil {
			return err
		}
		at += 8 + align8(size)
	}
	const once = 800
	for count > 0 {
		part, err := im.read("v5 chunks of an inode", at, min(count, once)*chunkEntry)
		if err != nil {
			return err
		}
		for e := range slices.Chunk(part, chunkEntry) {
			if err := entry(e); err != nil {
				return err
			}
		}
		at, count = at+uint64(len(part)), count-uint64(len(part)/chunkEntry)
	}
	return nil
}

func align8(n uint64) uint64 { return (n + 7) &^ 7 }
