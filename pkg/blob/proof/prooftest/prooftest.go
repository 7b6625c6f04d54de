// Package prooftest fills cache directories as nydusd does, from the images of real tools
// that package blobcheck keeps, for tests of what works with complete blobs.
//
// It is linked by tests alone.
package prooftest

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Image is an image with its cache directory.
type Image struct {
	// Bootstrap is the path of its bootstrap, Digest that file's.
	Bootstrap, Digest string
	// CacheDir has its blobs.
	CacheDir string
	Head     *rafs.Bootstrap
	Tables   []rafs.ChunkTable
}

// Data is the path of a blob's data.
func (im *Image) Data(blob int) string {
	return filepath.Join(im.CacheDir, proof.DataName(im.Head.Blobs[blob].ID))
}

// Map is the path of a blob's chunk map.
func (im *Image) Map(blob int) string {
	return filepath.Join(im.CacheDir, im.Head.Blobs[blob].ID+".chunk_map")
}

// Proof is the path of the image's proof.
func (im *Image) Proof() string { return proof.Path(im.CacheDir, im.Digest) }

// New makes the image of a name in package blobcheck's testdata complete in a new cache
// directory beneath dir. Its blobs were last written to an hour ago.
func New(t testing.TB, testdata, name, dir string) *Image {
	t.Helper()
	boot := unpacked(t, filepath.Join(testdata, name+".boot.gz"))
	sum := sha256.Sum256(boot)
	im := &Image{Bootstrap: filepath.Join(dir, "image.boot"), Digest: "sha256:" + hex.EncodeToString(sum[:]), CacheDir: filepath.Join(dir, "cache")}
	must(t, os.MkdirAll(im.CacheDir, 0o700))
	must(t, os.WriteFile(im.Bootstrap, boot, 0o600))
	var err error
	im.Head, err = rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	must(t, err)
	im.Tables, err = rafs.Chunks(bytes.NewReader(boot), int64(len(boot)), 1<<20)
	must(t, err)
	for i := range im.Tables {
		im.fill(t, testdata, i)
	}
	return im
}

func (im *Image) fill(t testing.TB, testdata string, i int) {
	t.Helper()
	table := &im.Tables[i]
	blob := unpacked(t, filepath.Join(testdata, "blobs", table.Blob.ID+".gz"))
	data := make([]byte, table.Blob.UncompressedSize)
	for n := range table.Len() {
		c := table.At(n)
		copy(data[c.RawOffset:], decompressed(t, table.Blob.Compressor, c, blob[c.Offset:c.End()]))
	}
	must(t, os.WriteFile(im.Data(i), data, 0o600))
	must(t, os.WriteFile(im.Map(i), ChunkMap(table.Blob.ChunkCount), 0o600))
	Age(t, im.Data(i))
}

// Age makes a file look as if it had been written to an hour ago. When it was changed
// remains; see Later.
func Age(t testing.TB, path string) {
	t.Helper()
	then := time.Now().Add(-time.Hour)
	must(t, os.Chtimes(path, then, then))
}

// Later is a clock by which what happens now has settled.
func Later() time.Time { return time.Now().Add(time.Minute) }

// ChunkMap is the map of a blob with so many chunks that are all there.
func ChunkMap(chunks uint32) []byte {
	m := make([]byte, 4096, 4096+(chunks+7)/8)
	for n, word := range []uint32{0x424D4150, 1, 0x434D4150, 0} {
		binary.LittleEndian.PutUint32(m[4*n:], word)
	}
	for n := uint32(0); n < chunks; n += 8 {
		m = append(m, 0xff<<(8-min(8, chunks-n)))
	}
	return m
}

func decompressed(t testing.TB, by rafs.Compressor, c rafs.Chunk, data []byte) []byte {
	t.Helper()
	out := make([]byte, c.RawSize)
	var err error
	switch {
	case !c.Compressed:
		return data
	case by == rafs.CompressorLZ4:
		_, err = lz4.UncompressBlock(data, out)
	case by == rafs.CompressorZstd:
		var d *zstd.Decoder
		d, err = zstd.NewReader(nil)
		must(t, err)
		defer d.Close()
		out, err = d.DecodeAll(data, nil)
	default:
		t.Fatalf("no decompressor for %s", by)
	}
	must(t, err)
	return out
}

func unpacked(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Clean(path))
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	data, err := io.ReadAll(z)
	must(t, err)
	return data
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
