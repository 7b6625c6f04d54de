package rafs

import (
	"bytes"
	"fmt"
)

const (
	v5Magic     = 0x52414653
	v5Version   = 0x500
	v5SuperSize = 8192
	v5ExtSize   = 64
	// v5EntryHead is what to read ahead of a blob; the id follows it.
	v5EntryHead = 8
	// v5MaxTable is the size of a table with MaxBlobs entries, each with its
	// NUL, and the padding.
	v5MaxTable = MaxBlobs*(v5EntryHead+idSize+1) + 8
)

func openV5(im *image) (*Bootstrap, error) {
	// nydusd wants the whole superblock to be there; we need its head.
	if im.size < v5SuperSize {
		return nil, fmt.Errorf("%w: a v5 superblock has %d bytes, the file %d", ErrTruncated, v5SuperSize, im.size)
	}
	sb, err := im.read("v5 superblock", 0, 80)
	if err != nil {
		return nil, err
	}
	if version := le.Uint32(sb[4:]); version != v5Version {
		return nil, fmt.Errorf("%w: version %#x, want %#x", ErrNotRAFS, version, v5Version)
	}
	if size := le.Uint32(sb[8:]); size != v5SuperSize {
		return nil, fmt.Errorf("%w: v5 superblock says that it has %d bytes, want %d", ErrInvalid, size, v5SuperSize)
	}
	b := &Bootstrap{Version: V5, ChunkSize: le.Uint32(sb[12:])}
	if err := checkChunkSize(b.ChunkSize); err != nil {
		return nil, err
	}
	if b.Blobs, err = v5Blobs(im, le.Uint64(sb[48:]), le.Uint32(sb[64:])); err != nil {
		return nil, err
	}
	if err := v5Extend(im, b.Blobs, le.Uint64(sb[72:]), le.Uint32(sb[68:])); err != nil {
		return nil, err
	}
	compressor, digester := v5Flags(le.Uint64(sb[16:]))
	for i := range b.Blobs {
		b.Blobs[i].ChunkSize, b.Blobs[i].Compressor, b.Blobs[i].Digester = b.ChunkSize, compressor, digester
	}
	if err := check(b.Blobs); err != nil {
		return nil, err
	}
	return b, nil
}

// v5Blobs takes the table apart as nydusd does: entries as long as more than a
// head is left.
func v5Blobs(im *image, offset uint64, size uint32) ([]Blob, error) {
	if size > v5MaxTable {
		return nil, fmt.Errorf("%w: v5 blob table of %d bytes: want at most %d blobs", ErrInvalid, size, MaxBlobs)
	}
	if size == 0 {
		return nil, nil
	}
	if offset < v5SuperSize {
		return nil, fmt.Errorf("%w: v5 blob table at %d, within the superblock", ErrInvalid, offset)
	}
	table, err := im.read("v5 blob table", offset, uint64(size))
	if err != nil {
		return nil, err
	}
	var blobs []Blob
	for len(table) > v5EntryHead {
		id, rest, _ := bytes.Cut(table[v5EntryHead:], []byte{0})
		table = rest
		// Checked here already: an id that is short makes many entries.
		if err := checkID(len(blobs), string(id)); err != nil {
			return nil, err
		}
		blobs = append(blobs, Blob{ID: string(id), Index: uint32(len(blobs))})
	}
	return blobs, nil
}

// v5Extend adds what the extended blob table tells, when there is one.
func v5Extend(im *image, blobs []Blob, offset uint64, entries uint32) error {
	if entries == 0 || len(blobs) == 0 {
		return nil
	}
	if offset < v5SuperSize || int64(entries) < int64(len(blobs)) || entries > MaxBlobs {
		return fmt.Errorf("%w: v5 extended blob table of %d entries at %d for %d blobs", ErrInvalid, entries, offset, len(blobs))
	}
	table, err := im.read("v5 extended blob table", offset, uint64(entries)*v5ExtSize)
	if err != nil {
		return err
	}
	for i := range blobs {
		e := table[i*v5ExtSize:]
		blobs[i].ChunkCount = le.Uint32(e)
		blobs[i].Features = Features(le.Uint32(e[4:]))
		blobs[i].UncompressedSize = le.Uint64(e[8:])
		blobs[i].CompressedSize = le.Uint64(e[16:])
	}
	return nil
}

// v5Flags tells the compressor and the digester that hold for all blobs. nydusd
// takes the first that is set, and these when none is.
func v5Flags(flags uint64) (Compressor, Digester) {
	compressor, digester := CompressorLZ4, DigesterBlake3
	switch {
	case flags&0x1 != 0:
		compressor = CompressorNone
	case flags&0x2 != 0:
	case flags&0x40 != 0:
		compressor = CompressorGzip
	case flags&0x80 != 0:
		compressor = CompressorZstd
	}
	if flags&0x4 == 0 && flags&0x8 != 0 {
		digester = DigesterSHA256
	}
	return compressor, digester
}
