package blob

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// unpacked reads one of the images of pkg/blobcheck.
func unpacked(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "blobcheck", "testdata", name))
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

// fetched puts all chunks that an image knows into the cache, as nydusd does.
func (b *bed) fetched(dir, name string) (boot []byte, tables []rafs.ChunkTable) {
	b.t.Helper()
	boot = unpacked(b.t, name+".boot.gz")
	tables, err := rafs.Chunks(bytes.NewReader(boot), int64(len(boot)), 1<<20)
	b.must(err)
	for i := range tables {
		t := &tables[i]
		blob := unpacked(b.t, filepath.Join("blobs", t.Blob.ID+".gz"))
		data := make([]byte, t.Blob.UncompressedSize)
		bits := make([]byte, 4096+(t.Blob.ChunkCount+7)/8)
		copy(bits, mapOf(0)[:16])
		for n := range t.Len() {
			c := t.At(n)
			copy(data[c.RawOffset:], b.inflated(t.Blob.Compressor, c, blob[c.Offset:c.End()]))
			bits[4096+c.Index/8] |= 0x80 >> (c.Index % 8)
		}
		b.write(filepath.Join(dir, t.Blob.ID+".blob.data"), data)
		b.write(filepath.Join(dir, t.Blob.ID+".chunk_map"), bits)
	}
	return boot, tables
}

func (b *bed) inflated(compressor rafs.Compressor, c rafs.Chunk, text []byte) []byte {
	if !c.Compressed {
		return text
	}
	if compressor == rafs.CompressorLZ4 {
		out := make([]byte, c.RawSize)
		_, err := lz4.UncompressBlock(text, out)
		b.must(err)
		return out
	}
	z, err := zstd.NewReader(nil)
	b.must(err)
	defer z.Close()
	out, err := z.DecodeAll(text, nil)
	b.must(err)
	return out
}

// flip changes a byte of a file.
func (b *bed) flip(path string, at int64) {
	b.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	b.must(err)
	defer f.Close()
	text := make([]byte, 1)
	_, err = f.ReadAt(text, at)
	b.must(err)
	text[0] ^= 0x10
	_, err = f.WriteAt(text, at)
	b.must(err)
}

func (b *bed) verify() []Verdict {
	b.t.Helper()
	last, total := int64(-1), int64(0)
	list, err := b.cache().Verify(b.t.Context(), func(done, all int64) {
		if done < last || done > all {
			b.t.Errorf("%d of %d after %d", done, all, last)
		}
		last, total = done, all
	})
	b.must(err)
	if len(list) > 0 && last != total {
		b.t.Errorf("ended at %d of %d", last, total)
	}
	return list
}

func TestVerifyRealImages(t *testing.T) {
	for _, name := range []string{
		"v6-none-4k", "v6-lz4_block-4k", "v6-zstd-4k", "v6-zstd-0x10000", "v6-lz4_block-0x1000000", "v6-merged", "v6-chunk-dict", "v6-inline", "v6-inlinetoc",
	} {
		b := newBed(t)
		dir := b.dir("one")
		boot, tables := b.fetched(dir, name)
		b.image("one", boot)
		list := b.verify()
		if len(list) != len(tables) {
			t.Fatalf("%s: %+v", name, list)
		}
		for i := range list {
			if v := &list[i]; v.Checked == 0 || v.Checked != v.Ready || v.Bad != 0 || v.Unchecked != 0 || v.Problem != "" || v.Evicted {
				t.Errorf("%s: %+v", name, v)
			}
		}
		for i := range tables {
			c, id := tables[i].At(tables[i].Len()-1), tables[i].Blob.ID
			b.flip(filepath.Join(dir, id+".blob.data"), int64(c.RawOffset+uint64(c.RawSize)-1))
			for _, v := range b.verify() {
				if wrong := v.ID == id; wrong != (v.Bad == 1) || wrong != (v.Problem != "") || v.Evicted != wrong {
					t.Errorf("%s, a flipped bit in %s: %+v", name, id, v)
				}
			}
			if has := b.has(dir, id); has != "" {
				t.Errorf("%s: wrong and not evicted: %s", name, has)
			}
		}
	}
}

// TestVerifyOneOfMany: chunks that are not there are not read, and each is compared once,
// however many images have it.
func TestVerifyOneOfMany(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-zstd-4k")
	b.image("one", boot)
	b.image("one", append(boot, make([]byte, 4096)...))
	c, id := tables[0].At(0), tables[0].Blob.ID
	bits, err := os.ReadFile(filepath.Join(dir, id+".chunk_map"))
	b.must(err)
	bits[4096+c.Index/8] &^= 0x80 >> (c.Index % 8)
	b.write(filepath.Join(dir, id+".chunk_map"), bits)
	b.flip(filepath.Join(dir, id+".blob.data"), int64(c.RawOffset))
	if v := b.verify(); len(v) != 1 || v[0].Checked != tables[0].Len()-1 || v[0].Problem != "" {
		t.Errorf("%+v", v)
	}
}

func TestVerifyProblems(t *testing.T) {
	for what, c := range map[string]struct {
		damage func(b *bed, dir, id string)
		want   string
	}{
		"map":   {func(b *bed, dir, id string) { b.write(filepath.Join(dir, id+".chunk_map"), []byte("x")) }, "chunk map is invalid"},
		"short": {func(b *bed, dir, id string) { b.must(os.Truncate(filepath.Join(dir, id+".blob.data"), 4096)) }, "4096 bytes"},
		"empty": {func(b *bed, dir, id string) { b.must(os.Truncate(filepath.Join(dir, id+".blob.data"), 0)) }, "0 bytes"},
		"holes": {func(b *bed, dir, id string) {
			info, err := os.Stat(filepath.Join(dir, id+".blob.data"))
			b.must(err)
			b.must(os.Truncate(filepath.Join(dir, id+".blob.data"), 0))
			b.must(os.Truncate(filepath.Join(dir, id+".blob.data"), info.Size()))
		}, "chunks differ"},
	} {
		for _, living := range []bool{false, true} {
			b := newBed(t)
			dir := b.dir("one")
			boot, tables := b.fetched(dir, "v6-zstd-4k")
			b.image("one", boot)
			if living {
				b.instance("one", boot)
			}
			proven := b.prove(dir, 1, tables[0].Blob.ID)
			c.damage(b, dir, tables[0].Blob.ID)
			list := b.verify()
			if exists(proven) {
				t.Errorf("%s, in use %v: the proof is left", what, living)
			}
			if len(list) != 1 || !strings.Contains(list[0].Problem, c.want) || list[0].Evicted == living {
				t.Errorf("%s, in use %v: %+v", what, living, list)
			}
			if gone := b.has(dir, tables[0].Blob.ID) == ""; gone == living {
				t.Errorf("%s, in use %v: gone %v", what, living, gone)
			}
		}
	}
}

// TestVerifyUnchecked: nothing tells what an OCI layer's chunks or those of v5 must be.
func TestVerifyUnchecked(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot := unpacked(t, "v6-zran.boot.gz")
	tables, err := rafs.Chunks(bytes.NewReader(boot), int64(len(boot)), 1<<20)
	b.must(err)
	blob := tables[0].Blob
	bits := make([]byte, 4096+(blob.ChunkCount+7)/8)
	copy(bits, mapOf(0)[:16])
	bits[4096] = 0x80
	for _, id := range []string{blob.ID, blob.MetaID} {
		b.write(filepath.Join(dir, id+".blob.data"), make([]byte, blob.UncompressedSize))
		b.write(filepath.Join(dir, id+".chunk_map"), bits)
	}
	b.image("one", boot)
	list := b.verify()
	if len(list) != 2 {
		t.Fatalf("%+v", list)
	}
	for i := range list {
		if v := &list[i]; v.Unchecked != 1 || v.Checked != 0 || v.Problem != "" {
			t.Errorf("%+v", v)
		}
	}
	if r := b.sweep(b.options()); len(r.Removed) != 0 {
		t.Errorf("removed: %+v", r.Removed)
	}

	b = newBed(t)
	dir = b.dir("one")
	boot = unpacked(t, "v5-zstd-4k.boot.gz")
	head, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	b.must(err)
	blob = head.Blobs[0]
	bits = make([]byte, 4096+(blob.ChunkCount+7)/8)
	copy(bits, mapOf(0)[:16])
	bits[4096] = 0xc0
	b.write(filepath.Join(dir, blob.ID+".blob.data"), make([]byte, blob.UncompressedSize))
	b.write(filepath.Join(dir, blob.ID+".chunk_map"), bits)
	b.image("one", boot)
	if list := b.verify(); len(list) != 1 || list[0].Unchecked != 2 || list[0].Checked != 0 || list[0].Problem != "" {
		t.Errorf("v5: %+v", list)
	}
}

// A daemon that just writes a chunk is no damage.
func TestVerifyLooksTwice(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-zstd-4k")
	b.image("one", boot)
	c := b.cache()
	st, err := c.look(t.Context())
	b.must(err)
	blob := st.dirs[0].blobs[0]
	for _, heals := range []bool{true, false} {
		v := &verifying{state: st, found: map[place]*verdict{}, settle: time.Millisecond, open: func(b *cached) (reader, error) {
			f, err := openData(b)
			return &torn{reader: f, heals: heals, left: 3}, err
		}}
		b.must(v.blob(t.Context(), blob, &tables[0], rafs.V6))
		if o := v.verdict(blob); (o.Bad == 0) != heals || o.Checked != tables[0].Len() {
			t.Errorf("heals %v: %+v", heals, o.Verdict)
		}
	}
}

// torn is wrong a few times.
type torn struct {
	reader
	heals bool
	left  int
}

func (r *torn) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.reader.ReadAt(p, off)
	if r.left > 0 || !r.heals {
		r.left--
		p[0] ^= 1
	}
	return n, err
}
