package blobcheck

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// unpacked reads a file of testdata.
func unpacked(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// image is a real one.
type image struct {
	name   string
	tables []rafs.ChunkTable
	blobs  [][]byte // one for each table
}

func images(t testing.TB) []image {
	t.Helper()
	files, err := filepath.Glob("testdata/*.boot.gz")
	if err != nil || len(files) < 20 {
		t.Fatalf("%d images in testdata: %v", len(files), err)
	}
	list := make([]image, 0, len(files))
	for _, file := range files {
		boot := unpacked(t, filepath.Base(file))
		im := image{name: strings.TrimSuffix(filepath.Base(file), ".boot.gz")}
		if im.tables, err = rafs.Chunks(bytes.NewReader(boot), int64(len(boot)), 1<<20); err != nil {
			t.Fatalf("%s: %v", im.name, err)
		}
		for i := range im.tables {
			im.blobs = append(im.blobs, unpacked(t, filepath.Join("blobs", im.tables[i].Blob.ID+".gz")))
		}
		list = append(list, im)
	}
	return list
}

// named returns one image.
func named(t testing.TB, name string) image {
	t.Helper()
	for _, im := range images(t) {
		if im.name == name {
			return im
		}
	}
	t.Fatalf("no image %s", name)
	return image{}
}

func checker(t testing.TB, table *rafs.ChunkTable) *Checker {
	t.Helper()
	c, err := New(table, NewPool(2), nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// read passes a part on and returns what has come, how much of it is unchecked, and how
// it ends.
func read(t testing.TB, c *Checker, data []byte, offset, length, size int) ([]byte, int64, error) {
	t.Helper()
	r, err := c.Reader(t.Context(), bytes.NewReader(data[offset:min(offset+length, len(data))]), int64(offset), int64(length), int64(size))
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	return got, r.Unchecked(), err
}

// TestGood: what is right comes whole, however it is asked for and arrives.
func TestGood(t *testing.T) {
	for _, im := range images(t) {
		t.Run(im.name, func(t *testing.T) {
			for i := range im.tables {
				table, blob := &im.tables[i], im.blobs[i]
				c := checker(t, table)
				whole, unchecked, err := read(t, c, blob, 0, len(blob), len(blob))
				if err != nil || !bytes.Equal(whole, blob) {
					t.Fatalf("blob %d: %d of %d bytes: %v", i, len(whole), len(blob), err)
				}
				t.Logf("blob %d: %d bytes, %d chunks, %d opaque, %d bytes unchecked", i, len(blob), table.Len(), table.Opaque, unchecked)
				if strings.HasPrefix(im.name, "v5-none") && unchecked != 0 {
					t.Errorf("%d bytes unchecked", unchecked)
				}
				for k := range table.Len() {
					chunk := table.At(k)
					got, unchecked, err := read(t, c, blob, int(chunk.Offset), int(chunk.Size), len(blob))
					if err != nil || unchecked != 0 || !bytes.Equal(got, blob[chunk.Offset:chunk.End()]) {
						t.Fatalf("blob %d, chunk %d: %d bytes, %d unchecked: %v", i, k, len(got), unchecked, err)
					}
				}
				for what, slow := range map[string]io.Reader{
					"bytes":        iotest.OneByteReader(bytes.NewReader(blob)),
					"halves":       iotest.HalfReader(bytes.NewReader(blob)),
					"end with EOF": iotest.DataErrReader(bytes.NewReader(blob)),
				} {
					r, err := c.Reader(t.Context(), slow, 0, int64(len(blob)), int64(len(blob)))
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(r)
					if err != nil || !bytes.Equal(got, blob) {
						t.Errorf("blob %d in %s: %d bytes: %v", i, what, len(got), err)
					}
					r.Close()
				}
			}
		})
	}
}

// covered tells for each byte of a blob whether a check has to notice a change of it.
func covered(c *Checker, size int) []bool {
	all := make([]bool, size)
	s := c.parts(0, int64(size), int64(size))
	for {
		p, ok := s.next()
		if !ok {
			return all
		}
		n := p.size
		if p.kind == theList {
			n = int64(c.table.Meta.Size)
			for _, at := range [][2]int64{{0, 4}, {8, 40}, {4092, 4096}} {
				for k := at[0]; k < at[1]; k++ {
					all[p.offset+n+k] = true
				}
			}
		}
		for k := range n {
			all[p.offset+k] = true
		}
	}
}

// TestFlipped flips single bits: each is found, or lies where nothing was promised.
func TestFlipped(t *testing.T) {
	for _, im := range images(t) {
		t.Run(im.name, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			for i := range im.tables {
				blob, c := bytes.Clone(im.blobs[i]), checker(t, &im.tables[i])
				must := covered(c, len(blob))
				unchecked := 0
				for _, m := range must {
					if !m {
						unchecked++
					}
				}
				_, said, err := read(t, c, blob, 0, len(blob), len(blob))
				if err != nil || said != int64(unchecked) {
					t.Fatalf("blob %d: %d bytes unchecked, want %d: %v", i, said, unchecked, err)
				}
				most := 80
				if im.tables[i].Blob.ChunkSize > 64<<10 {
					most = 30 // each decompresses more than a megabyte
				}
				positions := random.Perm(len(blob))[:most]
				for at := range min(int(im.tables[i].Meta.Size)+64, most) { // and all of the metadata
					positions = append(positions, min(int(im.tables[i].Meta.Offset)+at, len(blob)-1))
				}
				found, equal := 0, 0
				for _, at := range positions {
					bit := byte(1) << random.IntN(8)
					blob[at] ^= bit
					start, end := around(c, at, len(blob))
					got, _, err := read(t, c, blob, start, end-start, len(blob))
					switch {
					case errors.Is(err, ErrContent):
						found++
						if len(got) >= end-start || !must[at] {
							t.Errorf("blob %d, byte %d: %d bytes came, covered %v: %v", i, at, len(got), must[at], err)
						}
						var where *ContentError
						if !errors.As(err, &where) || int64(at) < where.Offset || int64(at) >= where.Offset+where.Size {
							t.Errorf("blob %d, byte %d: %v", i, at, err)
						}
					case err != nil:
						t.Errorf("blob %d, byte %d: %v", i, at, err)
					case must[at]:
						equal++
						if !harmless(c, im.blobs[i], blob, at) {
							t.Errorf("blob %d, byte %d is wrong and came", i, at)
						}
					}
					blob[at] ^= bit
				}
				t.Logf("blob %d: %d of %d found, %d mean the same", i, found, len(positions), equal)
				if unchecked < len(blob)/2 && found < len(positions)/2 {
					t.Errorf("blob %d: only %d of %d were found", i, found, len(positions))
				}
			}
		})
	}
}

// around returns a range of whole parts with the one at a position, and some more.
func around(c *Checker, at, size int) (start, end int) {
	s := c.parts(0, int64(size), int64(size))
	for {
		p, ok := s.next()
		switch {
		case !ok:
			return start, size
		case p.offset+16<<10 < int64(at):
			start = int(p.offset)
		case p.offset > int64(at)+16<<10:
			return start, int(p.offset)
		}
	}
}

// harmless tells whether the part at a position decodes to the same in both.
func harmless(c *Checker, right, wrong []byte, at int) bool {
	s := c.parts(0, int64(len(right)), int64(len(right)))
	for {
		p, ok := s.next()
		if !ok {
			return false
		}
		if int64(at) < p.offset || int64(at) >= p.offset+p.size {
			continue
		}
		raw, compressor, n := int(p.chunk.RawSize), c.table.Blob.Compressor, p.size
		if p.kind == theList {
			raw, compressor, n = int(c.table.Meta.RawSize), c.table.Meta.Compressor, int64(c.table.Meta.Size)
		} else if p.streamed() || p.kind == theTOC {
			return false
		}
		if int64(at) >= p.offset+n {
			return false // the header
		}
		a, err1 := new(worker).decoded(right[p.offset:][:n], raw, compressor)
		b, err2 := new(worker).decoded(wrong[p.offset:][:n], raw, compressor)
		return err1 == nil && err2 == nil && compressor != rafs.CompressorNone && bytes.Equal(a, b)
	}
}

// TestHeldBack: of a part that is wrong the last byte never comes, whatever is wrong.
func TestHeldBack(t *testing.T) {
	all := images(t)
	for _, im := range all {
		if strings.HasSuffix(im.name, "zran") {
			continue // TestZran
		}
		table, blob := &im.tables[0], im.blobs[0]
		c := checker(t, table)
		first, last := table.At(0), table.At(table.Len()-1)
		start, length := int(first.Offset), int(last.End()-first.Offset)
		other := another(all, blob[start:start+length], start)
		for what, wrong := range map[string][]byte{
			"zeros":      make([]byte, len(blob)),
			"swapped":    append(bytes.Clone(other), make([]byte, len(blob))...)[:len(blob)],
			"shifted":    append([]byte{0}, blob...)[:len(blob)],
			"error page": slices.Concat(blob[:start], []byte("<html>"), blob[start+6:]),
			"noise":      noise(len(blob)),
		} {
			got, _, err := read(t, c, wrong, start, length, len(blob))
			if !errors.Is(err, ErrContent) || len(got) >= length {
				t.Errorf("%s, %s: %d of %d bytes: %v", im.name, what, len(got), length, err)
			}
		}
		got, _, err := read(t, c, blob[:start+length-1], start, length, 0)
		if !errors.Is(err, io.ErrUnexpectedEOF) || len(got) >= length {
			t.Errorf("%s, truncated: %d of %d bytes: %v", im.name, len(got), length, err)
		}
		// What another chunk of the same blob has does not do.
		if table.Len() > 1 && first.Size == last.Size {
			if _, err := onlyChunk(t, c, first, blob[last.Offset:last.End()]); !errors.Is(err, ErrContent) {
				t.Errorf("%s: the last chunk instead of the first: %v", im.name, err)
			}
		}
	}
}

// another returns a blob that has something else than data at start.
func another(all []image, data []byte, start int) []byte {
	for _, im := range all {
		for _, b := range im.blobs {
			if len(b) > start && !bytes.HasPrefix(b[start:], data) {
				return b
			}
		}
	}
	return nil
}

func onlyChunk(t *testing.T, c *Checker, chunk rafs.Chunk, data []byte) ([]byte, error) {
	t.Helper()
	r, err := c.Reader(t.Context(), bytes.NewReader(data), int64(chunk.Offset), int64(chunk.Size), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	return io.ReadAll(r)
}

func noise(n int) []byte {
	b, random := make([]byte, n), rand.NewChaCha8([32]byte{7})
	_, _ = random.Read(b)
	return b
}

// TestUnaligned: what cuts a chunk is refused, except behind the data.
func TestUnaligned(t *testing.T) {
	im := named(t, "v6-inlinetoc")
	table, blob := &im.tables[0], im.blobs[0]
	c := checker(t, table)
	a, b := table.At(1), table.At(2)
	m := table.Meta
	for what, part := range map[string][3]uint64{
		"begins within":         {a.Offset + 1, b.End(), uint64(len(blob))},
		"ends within":           {a.Offset, b.End() - 1, uint64(len(blob))},
		"within":                {a.Offset + 1, a.End() - 1, uint64(len(blob))},
		"one byte":              {a.Offset, a.Offset + 1, uint64(len(blob))},
		"the list":              {m.Offset, m.Offset + m.Size, uint64(len(blob))},
		"the header":            {m.Offset + m.Size, m.Offset + m.Size + 4096, uint64(len(blob))},
		"ends within, said end": {a.Offset, b.End() - 1, b.End() - 1},
	} {
		_, _, err := read(t, c, blob, int(part[0]), int(part[1]-part[0]), int(part[2]))
		if !errors.Is(err, ErrUnaligned) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, n := range []int{1, 512, 4096, len(blob) - int(a.Offset) - 1} {
		got, unchecked, err := read(t, c, blob, len(blob)-n, n, len(blob))
		if err != nil || len(got) != n || unchecked <= 0 && n < 512 {
			t.Errorf("the last %d bytes: %d came, %d unchecked: %v", n, len(got), unchecked, err)
		}
	}
	for _, bad := range [][3]int64{{-1, 5, 100}, {5, -1, 100}, {90, 11, 100}, {1 << 62, 1 << 62, 0}} {
		if _, err := c.Reader(t.Context(), nil, bad[0], bad[1], bad[2]); err == nil {
			t.Errorf("%v: accepted", bad)
		}
	}
	if got, _, err := read(t, c, blob, 10, 0, len(blob)); err != nil || len(got) != 0 {
		t.Errorf("an empty part: %v", err)
	}
}

// TestTOC: a table of contents is checked when the bootstrap has its digest.
func TestTOC(t *testing.T) {
	for name, want := range map[string]error{"v6-inlinetoc": ErrContent, "v6-inline": nil} {
		im := named(t, name)
		blob := bytes.Clone(im.blobs[0])
		blob[len(blob)-600] ^= 1
		_, _, err := read(t, checker(t, &im.tables[0]), blob, len(blob)-4096, 4096, len(blob))
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

// TestZran: nothing of it can be checked, and that is said.
func TestZran(t *testing.T) {
	im := named(t, "v6-zran")
	blob := im.blobs[0]
	got, unchecked, err := read(t, checker(t, &im.tables[0]), blob, 5, len(blob)-10, len(blob))
	if err != nil || len(got) != len(blob)-10 || unchecked != int64(len(got)) || im.tables[0].Opaque == 0 {
		t.Errorf("%d bytes, %d unchecked, %d opaque: %v", len(got), unchecked, im.tables[0].Opaque, err)
	}
}

// TestListOfUnknownChunks: what the bootstrap does not know must not reach into what it
// knows.
func TestListOfUnknownChunks(t *testing.T) {
	im := named(t, "v6-merged")
	table, blob := &im.tables[0], im.blobs[0]
	if table.Len() == int(table.Blob.ChunkCount) {
		t.Fatal("the bootstrap knows all chunks: the image does not serve")
	}
	c := checker(t, table)
	m := table.Meta
	raw, err := new(worker).decoded(blob[m.Offset:][:m.Size], int(m.RawSize), m.Compressor)
	if err != nil {
		t.Fatal(err)
	}
	// The same list, uncompressed.
	stored := *c.table
	stored.Meta.Compressor, stored.Meta.Size = rafs.CompressorNone, m.RawSize
	c.table = &stored
	header := bytes.Clone(blob[m.Offset+m.Size:][:4096])
	header[8] = 0
	header = append(header[:24], append(le64(m.RawSize), header[32:]...)...)
	ok := func(list []byte) error { return c.checkList(new(worker), append(bytes.Clone(list), header...)) }
	if err := ok(raw); err != nil {
		t.Fatal(err)
	}
	known := map[uint32]bool{}
	for i := range table.Len() {
		known[table.At(i).Index] = true
	}
	for i := range table.Blob.ChunkCount {
		for _, at := range []int{5, 8, 9, 10, 13} { // offsets and sizes
			bad := bytes.Clone(raw)
			bad[int(i)*16+at] ^= 0x80
			err := ok(bad)
			if err == nil && known[i] {
				t.Errorf("chunk %d: a change of byte %d is not found", i, at)
			}
		}
		for what, offset := range map[string]byte{"before": 0, "behind": 0xff} {
			bad := bytes.Clone(raw)
			for at := range 5 {
				bad[int(i)*16+8+at] = offset
			}
			if err := ok(bad); err == nil && i > 0 {
				t.Errorf("chunk %d: that it lies %s its neighbours is not found", i, what)
			}
		}
	}
}

func le64(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

// TestListV2: no image of testdata has entries of 24 bytes: nydus-image writes them for
// CRCs, which came with 2.3.
func TestListV2(t *testing.T) {
	chunks := []rafs.Chunk{
		{Offset: 0, Size: 100, RawSize: 4096, Compressed: true},
		{Offset: 100, Size: 1<<24 - 1, RawOffset: 4096, RawSize: 1 << 24, Index: 1, Compressed: true},
		{Offset: 1 << 33, Size: 5, RawOffset: 1 << 34, RawSize: 5, Index: 2},
	}
	meta := rafs.Meta{Offset: 1 << 34, Size: 72, RawSize: 72}
	table, err := rafs.NewChunkTable(rafs.Blob{Features: rafs.FeatureChunkInfoV2, ChunkCount: 3}, meta, chunks)
	if err != nil {
		t.Fatal(err)
	}
	c := checker(t, table)
	var list []byte
	for i, chunk := range chunks {
		flags, crc := uint64(0x10), uint64(0xabcdef)
		if chunk.Compressed {
			flags |= 1
		}
		if i == 0 {
			flags, crc = 1, 0
		}
		list = append(list, le64(chunk.RawOffset>>12|uint64(chunk.RawSize-1)<<32|flags<<56)...)
		list = append(list, le64(chunk.Offset|uint64(chunk.Size)<<40)...)
		list = append(list, le64(crc)...)
	}
	header := make([]byte, 4096)
	copy(header, slices.Concat(le64(headerMagic), le64(3<<32), le64(meta.Offset), le64(72), le64(72)))
	copy(header[4092:], le64(headerMagic)[:4])
	whole := append(list, header...)
	part := func(data []byte) error {
		r, err := c.Reader(t.Context(), bytes.NewReader(data), int64(meta.Offset), int64(len(data)), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		_, err = io.Copy(io.Discard, r)
		return err
	}
	if err := part(whole); err != nil {
		t.Fatal(err)
	}
	for at := range 72 {
		bit := 0
		if at%24 == 7 {
			bit = 1 // another flag than that of a CRC
		}
		whole[at] ^= 1 << bit
		if err := part(whole); !errors.Is(err, ErrContent) && at%24 < 16 {
			t.Errorf("byte %d of the list: %v", at, err)
		}
		whole[at] ^= 1 << bit
	}
}

// broken fails in the middle.
type broken struct {
	io.Reader
	err error
}

func (b broken) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = b.err
	}
	return n, err
}

func TestSourceFails(t *testing.T) {
	im := named(t, "v6-zstd-4k")
	table, blob := &im.tables[0], im.blobs[0]
	for _, end := range []int{0, 1, 100, len(blob) - 1} {
		r, err := checker(t, table).Reader(t.Context(), broken{bytes.NewReader(blob[:end]), fs.ErrPermission}, 0, int64(len(blob)), int64(len(blob)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if !errors.Is(err, fs.ErrPermission) || len(got) != end {
			t.Errorf("after %d bytes: %d: %v", end, len(got), err)
		}
		if _, again := r.Read(make([]byte, 1)); !errors.Is(again, fs.ErrPermission) {
			t.Errorf("after %d bytes, again: %v", end, again)
		}
		r.Close()
		r.Close()
	}
}

// TestClosedEarly: checks that run do not outlive the reader, and workers come back.
func TestClosedEarly(t *testing.T) {
	im := named(t, "v6-zstd-0x10000")
	table, blob := &im.tables[0], im.blobs[0]
	c := checker(t, table)
	for n := range 200 {
		r, err := c.Reader(t.Context(), bytes.NewReader(blob), 0, int64(len(blob)), int64(len(blob)))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.CopyN(io.Discard, r, int64(n*len(blob)/200))
		r.Close()
		if _, err := r.Read(make([]byte, 10)); err == nil {
			t.Fatal("a closed part can be read")
		}
	}
	if n := len(c.pool.workers); n != 2 {
		t.Errorf("%d workers are left, want 2", n)
	}
}

func TestUnsupported(t *testing.T) {
	for what, blob := range map[string]rafs.Blob{
		"digester":   {Digester: 7},
		"compressor": {Compressor: rafs.CompressorGzip},
	} {
		table, err := rafs.NewChunkTable(blob, rafs.Meta{}, []rafs.Chunk{{Size: 1, RawSize: 1}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(table, NewPool(0), nil); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
