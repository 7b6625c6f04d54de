package blobcheck

import (
	"encoding/binary"
	"fmt"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// The header behind a blob's list of chunks, little endian: magic u32 at 0, features u32
// at 4, compressor u32 at 8, number of chunks u32 at 12, offset of the list u64 at 16, its
// size u64 at 24 and uncompressed u64 at 32, zeros from 60, magic u32 at 4092.
const (
	headerMagic = 0xb10bb10b
	// headerChecked is how many bytes of it are compared. nydusd looks at no others
	// for a blob whose chunks can be read each on its own.
	headerChecked = 40
)

// entrySize is that of an entry of the list in bytes.
func entrySize(t *rafs.ChunkTable) uint64 {
	if t.Blob.Features.Has(rafs.FeatureChunkInfoV2) {
		return 24
	}
	return 16
}

// checkList compares the blob's list of chunks with the bootstrap's.
func (c *Checker) checkList(w *worker, data []byte) error {
	m := &c.table.Meta
	if err := c.checkHeader(data[m.Size:]); err != nil {
		return err
	}
	raw, err := w.decoded(data[:m.Size], int(m.RawSize), m.Compressor)
	if err != nil {
		return err
	}
	size := int(entrySize(c.table))
	known, end, rawEnd := 0, uint64(0), uint64(0)
	for i := range c.table.Blob.ChunkCount {
		got := entry(raw[int(i)*size:][:size])
		if known < c.table.Len() {
			if want := c.table.At(known); want.Index == i {
				if known++; got.differs(want, size) {
					return fmt.Errorf("chunk %d is said to have %d bytes at %d, %d at %d uncompressed; want %d at %d, %d at %d",
						i, got.Size, got.Offset, got.RawSize, got.RawOffset, want.Size, want.Offset, want.RawSize, want.RawOffset)
				}
			}
		}
		// One that the bootstrap does not know has to fit between its neighbours, so
		// that it changes none that it knows.
		if got.Offset < end || got.RawOffset < rawEnd {
			return fmt.Errorf("chunk %d at %d, %d uncompressed, overlaps the one before, which ends at %d, %d",
				i, got.Offset, got.RawOffset, end, rawEnd)
		}
		end, rawEnd = got.End(), got.RawOffset+uint64(got.RawSize)
	}
	if end > m.Offset || (c.table.Blob.UncompressedSize > 0 && rawEnd > c.table.Blob.UncompressedSize) {
		return fmt.Errorf("its chunks end at %d, %d uncompressed; want at most %d, %d", end, rawEnd, m.Offset, c.table.Blob.UncompressedSize)
	}
	return nil
}

func (c *Checker) checkHeader(h []byte) error {
	le, m := binary.LittleEndian, &c.table.Meta
	if le.Uint32(h) != headerMagic || le.Uint32(h[4092:]) != headerMagic {
		return fmt.Errorf("its header begins with %#x and ends with %#x, want %#x", le.Uint32(h), le.Uint32(h[4092:]), uint32(headerMagic))
	}
	if got := rafs.Compressor(le.Uint32(h[8:])); got != m.Compressor {
		return fmt.Errorf("its header says compressor %s, want %s", got, m.Compressor)
	}
	if got := le.Uint32(h[12:]); got != c.table.Blob.ChunkCount {
		return fmt.Errorf("its header says %d chunks, want %d", got, c.table.Blob.ChunkCount)
	}
	if offset, size, raw := le.Uint64(h[16:]), le.Uint64(h[24:]), le.Uint64(h[32:]); offset != m.Offset || size != m.Size || raw != m.RawSize {
		return fmt.Errorf("its header says %d bytes (%d uncompressed) at %d, want %d (%d) at %d", size, raw, offset, m.Size, m.RawSize, m.Offset)
	}
	return nil
}

// listed is a chunk as the blob's own list has it.
type listed struct {
	rafs.Chunk
	flags byte
	// odd says that bits are set that have no meaning.
	odd bool
}

// entry reads one of 16 bytes (nydus calls them v1) or of 24 (v2).
//
// v1: u64 with bits 12–43 the uncompressed offset in blocks of 4096, 44–63 and above them
// 8–11 the uncompressed size minus 1; u64 with bits 0–39 the offset, 44–63 and above them
// 40–43 the size minus 1.
//
// v2: u64 with bits 0–31 the uncompressed offset in blocks of 4096, 32–55 the uncompressed
// size minus 1, 56–63 flags; u64 with bits 0–39 the offset, 40–63 the size; u64 with what
// belongs to the flags.
func entry(e []byte) listed {
	const low40 = 1<<40 - 1
	raw, comp := binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint64(e[8:])
	var c listed
	c.Offset = comp & low40
	if len(e) == 16 {
		c.odd = raw&0xff != 0
		c.RawOffset = raw & 0xffffffff000
		c.RawSize = uint32(raw>>44|raw&0xf00<<12) + 1
		c.Size = uint32(comp>>44|comp>>20&0xf00000) + 1
		return c
	}
	c.RawOffset = raw & 0xffffffff << 12
	c.RawSize = uint32(raw>>32&0xffffff) + 1
	c.Size = uint32(comp >> 40)
	c.flags = byte(raw >> 56)
	return c
}

// differs tells whether nydusd would do something else with it than with want.
func (l listed) differs(want rafs.Chunk, size int) bool {
	const compressed, crc = 1, 0x10
	if size == 24 && (l.flags&^(compressed|crc) != 0 || (l.flags&compressed != 0) != want.Compressed) {
		return true
	}
	return l.odd || l.Offset != want.Offset || l.Size != want.Size || l.RawOffset != want.RawOffset || l.RawSize != want.RawSize
}
