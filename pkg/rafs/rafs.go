package rafs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The versions of RAFS, as Bootstrap.Version tells them.
const (
	V5 = "v5"
	V6 = "v6"
)

// MaxBlobs bounds the number of blobs of one image. It is far more than an image
// has layers, and keeps what a hostile bootstrap makes us hold at 2 MB.
const MaxBlobs = 4096

// MaxChunks bounds the number of chunks of one blob, as nydusd does.
const MaxChunks = 1 << 24

// The ways in which a bootstrap can be wrong, for errors.Is.
var (
	// ErrNotRAFS says that the file is no bootstrap of a known version.
	ErrNotRAFS = errors.New("not a RAFS bootstrap")
	// ErrTruncated says that the file ends before what it announces.
	ErrTruncated = errors.New("bootstrap is truncated")
	// ErrBlobID says that a blob has an id that is no digest.
	ErrBlobID = errors.New("blob id is not 64 lowercase hex digits")
	// ErrInvalid says that the bootstrap contradicts itself or exceeds a limit.
	ErrInvalid = errors.New("bootstrap is invalid")
)

// Bootstrap is what the head of a bootstrap tells.
type Bootstrap struct {
	// Version is V5 or V6.
	Version string
	// ChunkSize is the image's, in bytes.
	ChunkSize uint32
	// Blobs lists the blobs by index. For v6 this is the order of the EROFS
	// device slots too.
	Blobs []Blob
}

// Blob is one data blob of an image.
type Blob struct {
	// ID is the blob's sha256 as 64 lowercase hex digits.
	ID string
	// Index is the position in the blob table.
	Index uint32
	// ChunkSize is the size of the largest chunk in bytes.
	ChunkSize uint32
	// ChunkCount is the number of chunks. It is 0 for v5 images without an
	// extended blob table, as are both sizes.
	ChunkCount uint32
	// CompressedSize is the blob's size in the registry in bytes, as far as
	// it is known to the bootstrap. It may leave out what lies behind the data.
	CompressedSize uint64
	// UncompressedSize is the size in bytes of all chunks, which is that of
	// nydusd's cache file.
	UncompressedSize uint64
	// Blocks is the size of the EROFS device in blocks of 4 KiB; 0 for v5.
	Blocks uint32
	// Compressor is how chunks are compressed.
	Compressor Compressor
	// Digester is how chunk digests are made.
	Digester Digester
	// Features are the blob's.
	Features Features
	// MetaID is the id of the blob that holds this blob's metadata, as 64
	// lowercase hex digits, when that is another one (FeatureSeparate, as for
	// zran), otherwise empty. nydusd 2.2 names its cache files by it.
	MetaID string
	// MetaSize is that blob's size in bytes.
	MetaSize uint64
	// ListSize is the size in bytes of the blob's own list of chunks, as nydusd keeps it
	// in its cache; 0 for v5. It is what the image says, and not checked.
	ListSize uint64
}

// Features is the set of a blob's feature bits.
type Features uint32

// The features that change how a blob is fetched or cached.
const (
	// FeatureInlinedMeta: the filesystem's metadata lies within the blob, as
	// in the bootstrap of a single layer. Open refuses it.
	FeatureInlinedMeta Features = 1 << 1
	// FeatureChunkInfoV2: the blob's own list of chunks has entries of 24 bytes
	// instead of 16.
	FeatureChunkInfoV2 Features = 1 << 2
	// FeatureZran: the blob is an OCI layer, read at random through an index.
	FeatureZran Features = 1 << 3
	// FeatureSeparate: the blob's metadata lies in a blob of its own.
	FeatureSeparate Features = 1 << 4
	// FeatureInlinedDigests: the digests of the chunks lie within the blob, so
	// that nydusd can verify what it caches.
	FeatureInlinedDigests Features = 1 << 5
	// featureTarfs: the blob is an OCI layer's tar file.
	featureTarfs Features = 1 << 6
	// featureBatch: several chunks may be compressed as one.
	featureBatch Features = 1 << 7
	// featureEncrypted: chunks and metadata are encrypted.
	featureEncrypted Features = 1 << 8
	// FeatureTarTOC: the blob was made by nydus-image 2.2 or newer.
	FeatureTarTOC Features = 1 << 30
)

// Has tells whether all of want are set.
func (f Features) Has(want Features) bool { return f&want == want }

// Compressor is how chunks are compressed.
type Compressor uint32

// The compressors that RAFS knows.
const (
	CompressorNone Compressor = iota
	CompressorLZ4
	CompressorGzip
	CompressorZstd
)

// String is the name that nydus-image uses.
func (c Compressor) String() string { return name(uint32(c), "none", "lz4_block", "gzip", "zstd") }

// Digester is how the digests of chunks are made.
type Digester uint32

// The digesters that RAFS knows.
const (
	DigesterBlake3 Digester = iota
	DigesterSHA256
)

// String is the name that nydus-image uses.
func (d Digester) String() string { return name(uint32(d), "blake3", "sha256") }

func name(n uint32, names ...string) string {
	if int64(n) < int64(len(names)) {
		return names[n]
	}
	return fmt.Sprintf("unknown (%d)", n)
}

// Open reads the bootstrap of size bytes in r. An error wraps one of this
// package's error values or comes from r.
func Open(r io.ReaderAt, size int64) (*Bootstrap, error) {
	b, err := open(&image{r: r, size: size})
	if err != nil {
		return nil, fmt.Errorf("read bootstrap: %w", err)
	}
	return b, nil
}

func open(im *image) (*Bootstrap, error) {
	v5, magic5, err := im.magic(0, v5Magic)
	if err != nil {
		return nil, err
	}
	v6, magic6, err := im.magic(v6Super, v6Magic)
	if err != nil {
		return nil, err
	}
	switch {
	case v5 && v6:
		// nydusd would take one, the kernel the other.
		return nil, fmt.Errorf("%w: it has superblocks of both v5 and v6", ErrInvalid)
	case v6:
		return openV6(im)
	case v5:
		return openV5(im)
	case im.size == 0:
		return nil, fmt.Errorf("%w: it is empty", ErrNotRAFS)
	default:
		return nil, fmt.Errorf("%w: %d bytes, with %#08x at 0 (v5 has %#08x) and %#08x at %d (v6 has %#08x)",
			ErrNotRAFS, im.size, magic5, v5Magic, magic6, v6Super, v6Magic)
	}
}

// image bounds what is read.
type image struct {
	r    io.ReaderAt
	size int64
}

// magic tells whether the u32 at offset is want, and what it is. A file that
// ends before has none.
func (im *image) magic(offset int64, want uint32) (bool, uint32, error) {
	if im.size < offset+4 {
		return false, 0, nil
	}
	b, err := im.read("magic", uint64(offset), 4)
	if err != nil {
		return false, 0, err
	}
	got := le.Uint32(b)
	return got == want, got, nil
}

// within checks that n bytes at offset lie within the file.
func (im *image) within(what string, offset, n uint64) error {
	if size := uint64(max(im.size, 0)); n > size || offset > size-n {
		return fmt.Errorf("%w: its %s is %d bytes at %d, the file has %d bytes", ErrTruncated, what, n, offset, im.size)
	}
	return nil
}

// read returns n bytes at offset, which must lie within the file. Callers bound
// n by constants.
func (im *image) read(what string, offset, n uint64) ([]byte, error) {
	if err := im.within(what, offset, n); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if got, err := im.r.ReadAt(b, int64(offset)); got < len(b) {
		// The file shrank, or size was not its size.
		if err == nil || errors.Is(err, io.EOF) {
			err = ErrTruncated
		}
		return nil, fmt.Errorf("%s of %d bytes at %d: %w", what, n, offset, err)
	}
	return b, nil
}

// check refuses what no consumer of a blob list can live with.
func check(blobs []Blob) error {
	seen := make(map[string]int, len(blobs))
	for i := range blobs {
		b := &blobs[i]
		if err := checkID(i, b.ID); err != nil {
			return err
		}
		if other, ok := seen[b.ID]; ok {
			return fmt.Errorf("%w: blobs %d and %d are both %s", ErrInvalid, other, i, b.ID)
		}
		seen[b.ID] = i
		if b.Features.Has(FeatureInlinedMeta) {
			return fmt.Errorf("%w: blob %s is said to hold this bootstrap, so that nydusd would take the file's name for its id; the image's layers were not merged", ErrInvalid, b.ID)
		}
		if b.ChunkCount > MaxChunks {
			return fmt.Errorf("%w: blob %s has %d chunks, more than %d", ErrInvalid, b.ID, b.ChunkCount, MaxChunks)
		}
		if err := checkSizes(b); err != nil {
			return err
		}
	}
	return nil
}

const maxCompressed, maxUncompressed = 1 << 40, 1 << 44

// checkSizes keeps sums and file sizes far from overflow, at nydusd's limits.
func checkSizes(b *Blob) error {
	if b.CompressedSize > maxCompressed || b.UncompressedSize > maxUncompressed {
		return fmt.Errorf("%w: blob %s has %d bytes, %d uncompressed; the limits are %d and %d",
			ErrInvalid, b.ID, b.CompressedSize, b.UncompressedSize, uint64(maxCompressed), uint64(maxUncompressed))
	}
	return checkChunkSize(b.ChunkSize)
}

func checkChunkSize(n uint32) error {
	if n < 4<<10 || n > 16<<20 || n&(n-1) != 0 {
		return fmt.Errorf("%w: chunk size %d: want a power of two from 4 KiB to 16 MiB", ErrInvalid, n)
	}
	return nil
}

// checkID names a bad id so that a person can recognise it, however long and
// whatever is in it.
func checkID(index int, id string) error {
	if IsID(id) {
		return nil
	}
	shown := strings.TrimRight(id, "\x00")
	if len(shown) > idSize {
		return fmt.Errorf("%w: blob %d is %.64q… (%d bytes)", ErrBlobID, index, shown[:idSize], len(shown))
	}
	return fmt.Errorf("%w: blob %d is %q", ErrBlobID, index, shown)
}

// IsID tells whether s is 64 lowercase hex digits, as a blob's id is, and a digest without
// its algorithm.
func IsID(s string) bool {
	return len(s) == idSize && strings.Trim(s, "0123456789abcdef") == ""
}

// idSize is the length of a sha256 in hex digits.
const idSize = 64

var le = binary.LittleEndian
