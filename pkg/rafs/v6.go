package rafs

import (
	"encoding/hex"
	"fmt"
)

const (
	v6Magic = 0xE0F5E1E2
	// v6Super is where the superblock lies; the extension follows it.
	v6Super     = 1024
	v6SuperSize = 128 + 256
	v6BlockBits = 12
	v6Block     = 1 << v6BlockBits
	v6BlobSize  = 256
	v6SlotSize  = 128
)

func openV6(im *image) (*Bootstrap, error) {
	sb, err := im.read("v6 superblock", v6Super, v6SuperSize)
	if err != nil {
		return nil, err
	}
	if sb[12] != v6BlockBits {
		return nil, fmt.Errorf("%w: v6 block size 2^%d, want 2^%d", ErrInvalid, sb[12], v6BlockBits)
	}
	if im.size%v6Block != 0 {
		return nil, fmt.Errorf("%w: %d bytes, a v6 bootstrap has a multiple of %d", ErrTruncated, im.size, v6Block)
	}
	devices, slots := le.Uint16(sb[86:]), le.Uint16(sb[88:])
	ext := sb[128:]
	b := &Bootstrap{Version: V6, ChunkSize: le.Uint32(ext[20:])}
	if err := checkChunkSize(b.ChunkSize); err != nil {
		return nil, err
	}
	// The chunk table lies at the end: it shows a file that was cut.
	if err := im.within("v6 chunk table", le.Uint64(ext[24:]), le.Uint64(ext[32:])); err != nil {
		return nil, err
	}
	if b.Blobs, err = v6Blobs(im, le.Uint64(ext[8:]), le.Uint32(ext[16:])); err != nil {
		return nil, err
	}
	if err := check(b.Blobs); err != nil {
		return nil, err
	}
	if err := v6Slots(im, b.Blobs, devices, uint64(slots)*v6SlotSize); err != nil {
		return nil, err
	}
	return b, nil
}

func v6Blobs(im *image, offset uint64, size uint32) ([]Blob, error) {
	if size%v6BlobSize != 0 || size/v6BlobSize > MaxBlobs {
		return nil, fmt.Errorf("%w: v6 blob table of %d bytes: want a multiple of %d and at most %d blobs", ErrInvalid, size, v6BlobSize, MaxBlobs)
	}
	if size == 0 {
		return nil, nil
	}
	if offset < v6Block || offset%v6Block != 0 {
		return nil, fmt.Errorf("%w: v6 blob table at %d: want a multiple of %d behind the superblock", ErrInvalid, offset, v6Block)
	}
	table, err := im.read("v6 blob table", offset, uint64(size))
	if err != nil {
		return nil, err
	}
	blobs := make([]Blob, len(table)/v6BlobSize)
	for i := range blobs {
		blobs[i] = v6Blob(table[i*v6BlobSize:][:v6BlobSize])
		if blobs[i].Index != uint32(i) {
			return nil, fmt.Errorf("%w: v6 blob table: entry %d says that it is %d", ErrInvalid, i, blobs[i].Index)
		}
	}
	return blobs, nil
}

func v6Blob(e []byte) Blob {
	b := Blob{
		ID:               string(e[:idSize]),
		Index:            le.Uint32(e[64:]),
		ChunkSize:        le.Uint32(e[68:]),
		ChunkCount:       le.Uint32(e[72:]),
		Compressor:       Compressor(le.Uint32(e[76:])),
		Digester:         Digester(le.Uint32(e[80:])),
		Features:         Features(le.Uint32(e[84:])),
		CompressedSize:   le.Uint64(e[88:]),
		UncompressedSize: le.Uint64(e[96:]),
		ListSize:         le.Uint64(e[128:]),
	}
	if b.Features.Has(FeatureSeparate) {
		b.MetaID = hex.EncodeToString(e[168:200])
		b.MetaSize = le.Uint64(e[200:])
	}
	return b
}

// v6Slots checks that the kernel, which knows only the device slots, would see
// the same blobs in the same order.
func v6Slots(im *image, blobs []Blob, devices uint16, offset uint64) error {
	if int(devices) != len(blobs) {
		return fmt.Errorf("%w: v6 superblock has %d device slots, the blob table %d blobs", ErrInvalid, devices, len(blobs))
	}
	if devices == 0 {
		return nil
	}
	if offset < v6Super+128 {
		return fmt.Errorf("%w: v6 device slots at %d, within the superblock", ErrInvalid, offset)
	}
	slots, err := im.read("v6 device slots", offset, uint64(devices)*v6SlotSize)
	if err != nil {
		return err
	}
	for i := range blobs {
		slot := slots[i*v6SlotSize:][:v6SlotSize]
		if tag := slot[:idSize]; string(tag) != blobs[i].ID {
			return fmt.Errorf("%w: v6 device slot %d is tagged %q, the blob there is %s", ErrInvalid, i, tag, blobs[i].ID)
		}
		blobs[i].Blocks = le.Uint32(slot[idSize:])
	}
	return nil
}
