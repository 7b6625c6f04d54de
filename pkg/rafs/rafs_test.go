package rafs

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

// load returns a bootstrap of testdata.
func load(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".boot.gz"))
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

// names lists the bootstraps of testdata.
func names(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.boot.gz")
	if err != nil || len(files) == 0 {
		t.Fatalf("no bootstraps in testdata: %v", err)
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".boot.gz")
	}
	return files
}

func openBytes(data []byte) (*Bootstrap, error) {
	return Open(bytes.NewReader(data), int64(len(data)))
}

// checked is one blob as `nydus-image check` prints it.
type checked struct {
	id                       string
	compressed, uncompressed uint64
	chunks                   uint32
	features                 string
}

var checkLine = regexp.MustCompile(`^\s+(\d+): (\S+), compressed data size \S+, compressed file size (\S+), uncompressed file size (\S+), chunks: (\S+), features: (.*)$`)

// oracle reads what nydus-image says of a bootstrap.
func oracle(t *testing.T, name string) []checked {
	t.Helper()
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".check"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	number := func(s string) uint64 {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	lines := bufio.NewScanner(f)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "RAFS filesystem metadata is valid") {
		t.Fatalf("%s is not the output of nydus-image check", f.Name())
	}
	var list []checked
	for lines.Scan() {
		m := checkLine.FindStringSubmatch(lines.Text())
		if m == nil || number(m[1]) != uint64(len(list)) {
			t.Fatalf("%s: unexpected line %q", f.Name(), lines.Text())
		}
		list = append(list, checked{m[2], number(m[3]), number(m[4]), uint32(number(m[5])), m[6]})
	}
	return list
}

// TestAgainstNydusImage compares every real bootstrap with what nydus-image says
// of it.
func TestAgainstNydusImage(t *testing.T) {
	for _, name := range names(t) {
		if strings.HasSuffix(name, "-bad-ids") || name == "v6-inline-layer" {
			continue // TestRefusesRealBadIDs
		}
		t.Run(name, func(t *testing.T) {
			b, err := openBytes(load(t, name))
			if err != nil {
				t.Fatal(err)
			}
			if want := name[:2]; b.Version != want {
				t.Errorf("version %s, want %s", b.Version, want)
			}
			want := oracle(t, name)
			if len(b.Blobs) != len(want) {
				t.Fatalf("%d blobs, want %d", len(b.Blobs), len(want))
			}
			for i, w := range want {
				compare(t, b, i, w)
			}
		})
	}
}

func compare(t *testing.T, b *Bootstrap, i int, want checked) {
	t.Helper()
	got := b.Blobs[i]
	if got.ID != want.id || got.Index != uint32(i) {
		t.Errorf("blob %d: id %s, index %d; want %s", i, got.ID, got.Index, want.id)
	}
	if got.CompressedSize != want.compressed || got.UncompressedSize != want.uncompressed || got.ChunkCount != want.chunks {
		t.Errorf("blob %d: %d bytes, %d uncompressed, %d chunks; want %+v", i, got.CompressedSize, got.UncompressedSize, got.ChunkCount, want)
	}
	if b.Version == V6 && uint64(got.Blocks)*4096 != want.uncompressed {
		t.Errorf("blob %d: device slot of %d blocks, want %d bytes", i, got.Blocks, want.uncompressed)
	}
	for feature, word := range map[Features]string{
		FeatureInlinedMeta: "fs-meta", FeatureZran: "zran", FeatureSeparate: "separate",
		FeatureInlinedDigests: "chunk-digest", FeatureTarTOC: "cap_toc",
	} {
		said := false
		for _, w := range strings.Fields(want.features) {
			said = said || w == word
		}
		if got.Features.Has(feature) != said {
			t.Errorf("blob %d: feature %s is %v, want %v", i, word, !said, said)
		}
	}
}

// TestGeometry compares with how the bootstraps were made.
func TestGeometry(t *testing.T) {
	for _, version := range []string{V5, V6} {
		for _, compressor := range []string{"none", "lz4_block", "zstd"} {
			name := version + "-" + compressor
			b, err := openBytes(load(t, name))
			if err != nil {
				t.Fatal(err)
			}
			blob := b.Blobs[0]
			if b.ChunkSize != 4096 || blob.ChunkSize != 4096 || blob.Compressor.String() != compressor || blob.Digester != DigesterSHA256 {
				t.Errorf("%s: %d, %d, %s, %s", name, b.ChunkSize, blob.ChunkSize, blob.Compressor, blob.Digester)
			}
			if blob.MetaID != "" || blob.MetaSize != 0 {
				t.Errorf("%s: has a metadata blob %s of %d bytes", name, blob.MetaID, blob.MetaSize)
			}
		}
	}
	b, err := openBytes(load(t, "v6-merged"))
	if err != nil {
		t.Fatal(err)
	}
	if b.ChunkSize != 1<<20 || b.Blobs[1].ChunkSize != 1<<20 || b.Blobs[1].Digester.String() != "blake3" {
		t.Errorf("v6-merged: %+v", b)
	}
}

// TestZran compares the ids of the metadata blobs with their sha256.
func TestZran(t *testing.T) {
	b, err := openBytes(load(t, "v6-zran-merged"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/v6-zran-merged.meta")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, blob := range b.Blobs {
		fmt.Fprintln(&got, blob.MetaID)
		if blob.MetaSize < 4096 || blob.MetaSize > 16384 || blob.Compressor != CompressorGzip {
			t.Errorf("%+v", blob)
		}
	}
	if got.String() != string(want) {
		t.Errorf("metadata blobs\n%swant\n%s", &got, want)
	}
}

// TestRefusesRealBadIDs: nydus-image makes and nydusd takes these.
func TestRefusesRealBadIDs(t *testing.T) {
	for name, want := range map[string]string{"v5-bad-ids": `"first"`, "v6-bad-ids": `"first"`, "v6-inline-layer": `"xxxx`} {
		refuses(t, name, load(t, name), ErrBlobID, want)
	}
}

func refuses(t *testing.T, what string, data []byte, want error, texts ...string) {
	t.Helper()
	b, err := openBytes(data)
	if !errors.Is(err, want) || b != nil {
		t.Errorf("%s: %v, %v; want %v", what, b, err, want)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: error %q does not name %q", what, err, text)
		}
	}
	if len(err.Error()) > 600 {
		t.Errorf("%s: error of %d bytes", what, len(err.Error()))
	}
}

// edit returns a copy of data with bytes written at offset.
func edit(data []byte, offset int, b ...byte) []byte {
	c := bytes.Clone(data)
	copy(c[offset:], b)
	return c
}

func u16(n uint16) []byte { return le.AppendUint16(nil, n) }
func u32(n uint32) []byte { return le.AppendUint32(nil, n) }
func u64(n uint64) []byte { return le.AppendUint64(nil, n) }

func TestNotRAFS(t *testing.T) {
	refuses(t, "empty", nil, ErrNotRAFS, "empty")
	refuses(t, "three bytes", []byte("abc"), ErrNotRAFS, "3 bytes")
	refuses(t, "text", bytes.Repeat([]byte("text"), 4096), ErrNotRAFS, "0x74786574", "16384 bytes")
	refuses(t, "zeros", make([]byte, 1<<20), ErrNotRAFS)
	refuses(t, "gzip", gzipped(t), ErrNotRAFS)
	refuses(t, "v4", edit(load(t, "v5-merged"), 4, u32(0x400)...), ErrNotRAFS, "0x400")
	refuses(t, "negative size", nil, ErrNotRAFS)
	if _, err := Open(bytes.NewReader(load(t, "v6-merged")), -1); !errors.Is(err, ErrNotRAFS) {
		t.Errorf("negative size: %v", err)
	}
}

func gzipped(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile("testdata/v6-merged.boot.gz")
	if err != nil {
		t.Fatal(err)
	}
	return append(data, make([]byte, 4096)...)
}

func TestHostileV6(t *testing.T) {
	good := load(t, "v6-merged")
	table := int(le.Uint64(good[1160:]))
	slots := int(le.Uint16(good[1112:])) * 128
	id := string(good[table : table+64])
	second := table + 256
	for what, c := range map[string]struct {
		data []byte
		err  error
		text string
	}{
		"two superblocks":          {edit(good, 0, u32(v5Magic)...), ErrInvalid, "both v5 and v6"},
		"block size":               {edit(good, 1024+12, 16), ErrInvalid, "2^16"},
		"chunk size 0":             {edit(good, 1152+20, u32(0)...), ErrInvalid, "chunk size 0"},
		"chunk size not a power":   {edit(good, 1152+20, u32(4097)...), ErrInvalid, "4097"},
		"chunk size of a blob":     {edit(good, table+68, u32(1<<25)...), ErrInvalid, "33554432"},
		"table beyond the end":     {edit(good, 1160, u64(1<<40)...), ErrTruncated, "blob table"},
		"table offset overflows":   {edit(good, 1160, u64(1<<64-4096)...), ErrTruncated, "blob table"},
		"table on the superblock":  {edit(good, 1160, u64(0)...), ErrInvalid, "blob table at 0"},
		"table not aligned":        {edit(good, 1160, u64(uint64(table)+256)...), ErrInvalid, "multiple"},
		"table huge":               {edit(good, 1168, u32(1<<32-256)...), ErrInvalid, "4294967040"},
		"table size odd":           {edit(good, 1168, u32(3*256+1)...), ErrInvalid, "769"},
		"table shorter than slots": {edit(good, 1168, u32(2*256)...), ErrInvalid, "3 device slots"},
		"table absent":             {edit(good, 1168, u32(0)...), ErrInvalid, "3 device slots"},
		"chunk table cut":          {good[:len(good)-4096], ErrTruncated, "chunk table"},
		"chunk table overflows":    {edit(good, 1184, u64(1<<64-1)...), ErrTruncated, "chunk table"},
		"half a block":             {good[:len(good)-2048], ErrTruncated, "multiple of 4096"},
		"slots fewer":              {edit(good, 1110, u16(2)...), ErrInvalid, "2 device slots"},
		"slots beyond the end":     {edit(good, 1112, u16(0xffff)...), ErrTruncated, "device slots"},
		"slots on the superblock":  {edit(good, 1112, u16(1)...), ErrInvalid, "within the superblock"},
		"slots swapped":            {swap(good, slots, slots+128, 128), ErrInvalid, "slot 0"},
		"slot with another tag":    {edit(good, slots+128, 'f', 'f', 'f', 'f', 'f', 'f'), ErrInvalid, "slot 1"},
		"wrong index":              {edit(good, second+64, u32(0)...), ErrInvalid, "entry 1"},
		"same blob twice":          {edit(good, second, []byte(id)...), ErrInvalid, id},
		"chunks":                   {edit(good, table+72, u32(MaxChunks+1)...), ErrInvalid, "16777217"},
		"compressed size":          {edit(good, table+88, u64(1<<63)...), ErrInvalid, "9223372036854775808"},
		"uncompressed size":        {edit(good, table+96, u64(1<<64-1)...), ErrInvalid, "18446744073709551615"},
		"metadata within the blob": {edit(good, table+84, u32(uint32(FeatureInlinedMeta|FeatureTarTOC))...), ErrInvalid, "file's name"},
		"id that climbs":           {edit(good, table, []byte("../outside/evil\x00")...), ErrBlobID, `blob 0 is "../outside/evil\x00`},
		"id with a slash":          {edit(good, table+30, '/'), ErrBlobID, "/"},
		"id in capitals":           {edit(good, second, bytes.ToUpper(good[second:second+64])...), ErrBlobID, "blob 1"},
		"id with a NUL":            {edit(good, table+63, 0), ErrBlobID, "blob 0"},
		"id with a line break":     {edit(good, table, '\n', 0x1b, 0xff), ErrBlobID, `\n\x1b\xff`},
	} {
		refuses(t, what, c.data, c.err, c.text)
	}
}

// swap exchanges two stretches of n bytes.
func swap(data []byte, a, b, n int) []byte {
	c := edit(data, a, data[b:b+n]...)
	copy(c[b:], data[a:a+n])
	return c
}

func TestHostileV5(t *testing.T) {
	good := load(t, "v5-merged")
	table := int(le.Uint64(good[48:]))
	id := string(good[table+8 : table+72])
	ext := int(le.Uint64(good[72:]))
	for what, c := range map[string]struct {
		data []byte
		err  error
		text string
	}{
		"two superblocks":         {edit(good, 1024, u32(v6Magic)...), ErrInvalid, "both v5 and v6"},
		"superblock size":         {edit(good, 8, u32(80)...), ErrInvalid, "80"},
		"chunk size":              {edit(good, 12, u32(12345)...), ErrInvalid, "12345"},
		"table beyond the end":    {edit(good, 48, u64(1<<40)...), ErrTruncated, "blob table"},
		"table offset overflows":  {edit(good, 48, u64(1<<64-8)...), ErrTruncated, "blob table"},
		"table on the superblock": {edit(good, 48, u64(8)...), ErrInvalid, "within the superblock"},
		"table huge":              {edit(good, 64, u32(1<<32-1)...), ErrInvalid, "4294967295"},
		"table of NULs":           {edit(good, table, make([]byte, 72)...), ErrBlobID, `blob 0 is ""`},
		"ids run together":        {edit(good, table+72, 'a'), ErrBlobID, "65 bytes"},
		"id that climbs":          {edit(good, table+8, []byte("../outside/evil")...), ErrBlobID, "../outside/evil"},
		"id cut by a NUL":         {edit(good, table+20, 0), ErrBlobID, "blob 0"},
		"same blob twice":         {edit(good, table+72+1+8, []byte(id)...), ErrInvalid, id},
		"extended beyond the end": {edit(good, 72, u64(1<<63)...), ErrTruncated, "extended"},
		"extended overflows":      {edit(good, 72, u64(1<<64-64)...), ErrTruncated, "extended"},
		"extended on the start":   {edit(good, 72, u64(0)...), ErrInvalid, "extended"},
		"extended too short":      {edit(good, 68, u32(2)...), ErrInvalid, "2 entries"},
		"extended huge":           {edit(good, 68, u32(1<<32-1)...), ErrInvalid, "4294967295"},
		"chunks":                  {edit(good, ext, u32(1<<31)...), ErrInvalid, "2147483648"},
		"uncompressed size":       {edit(good, ext+8, u64(1<<50)...), ErrInvalid, "1125899906842624"},
		"metadata in the blob":    {edit(good, ext+4, u32(uint32(FeatureInlinedMeta))...), ErrInvalid, "file's name"},
	} {
		refuses(t, what, c.data, c.err, c.text)
	}
}

// TestV5WithoutExtendedTable: images of before 2021 tell ids alone.
func TestV5WithoutExtendedTable(t *testing.T) {
	b, err := openBytes(edit(load(t, "v5-merged"), 68, u32(0)...))
	if err != nil {
		t.Fatal(err)
	}
	want := oracle(t, "v5-merged")
	for i, blob := range b.Blobs {
		if blob.ID != want[i].id || blob.ChunkCount != 0 || blob.UncompressedSize != 0 || blob.ChunkSize != 1<<20 {
			t.Errorf("blob %d: %+v", i, blob)
		}
	}
}

// TestTruncated cuts real bootstraps at every byte: what is cut before the end of
// the tables is refused, and what is read beyond is the same as before.
func TestTruncated(t *testing.T) {
	for _, name := range []string{"v5-merged", "v6-merged"} {
		data := load(t, name)
		whole, err := openBytes(data)
		if err != nil {
			t.Fatal(err)
		}
		refused := 0
		for n := range data {
			b, err := openBytes(data[:n])
			switch {
			case err == nil && fmt.Sprint(b) != fmt.Sprint(whole):
				t.Fatalf("%s cut at %d reads differently", name, n)
			case err == nil:
			case errors.Is(err, ErrTruncated), n < 1028 && errors.Is(err, ErrNotRAFS):
				refused++
			default:
				t.Fatalf("%s cut at %d: %v", name, n, err)
			}
		}
		if least := map[string]int{V5: 8192 + 300, V6: len(data)}[whole.Version]; refused < least {
			t.Errorf("%s: only %d cuts were refused, want %d", name, refused, least)
		}
	}
}

// TestTruncatedEmpty: no table shows that these were cut.
func TestTruncatedEmpty(t *testing.T) {
	refuses(t, "v5", load(t, "v5-empty")[:8000], ErrTruncated, "8192", "8000")
	refuses(t, "v6", load(t, "v6-empty")[:2000], ErrTruncated, "2000")
}

// shrunk is a file that is shorter than it was said to be, or broken.
type shrunk struct {
	data []byte
	err  error
}

func (s shrunk) ReadAt(p []byte, offset int64) (int, error) {
	if offset >= int64(len(s.data)) {
		return 0, s.err
	}
	n := copy(p, s.data[offset:])
	if n < len(p) {
		return n, s.err
	}
	return n, nil
}

func TestReaderFails(t *testing.T) {
	data := load(t, "v6-merged")
	if _, err := Open(shrunk{data[:4500], io.EOF}, int64(len(data))); !errors.Is(err, ErrTruncated) {
		t.Errorf("a file that shrank: %v", err)
	}
	broken := errors.New("disk on fire")
	for _, n := range []int{0, 1024, 1100, 4500} {
		if _, err := Open(shrunk{data[:n], broken}, int64(len(data))); !errors.Is(err, broken) {
			t.Errorf("a disk that breaks at %d: %v", n, err)
		}
	}
}

// endless says yes to every read: a sparse file of any size.
type endless struct{ head []byte }

func (e endless) ReadAt(p []byte, offset int64) (int, error) {
	clear(p)
	if offset < int64(len(e.head)) {
		copy(p, e.head[offset:])
	}
	return len(p), nil
}

// TestMemory: a sparse file of terabytes that announces the largest tables.
func TestMemory(t *testing.T) {
	v6 := edit(load(t, "v6-merged"), 1168, u32(MaxBlobs*256)...)
	v5 := edit(load(t, "v5-merged"), 64, u32(v5MaxTable)...)
	huge6 := edit(v6, 1168, u32(1<<32-256)...)
	for what, head := range map[string][]byte{"v6": v6, "v5": v5, "v6 huge": huge6, "zeros": nil} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Open(endless{head}, 1<<62)
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: accepted", what)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 4<<20 {
			t.Errorf("%s: %d bytes allocated", what, used)
		}
	}
}

// TestMaxBlobs: the limit itself can be used, and costs a bounded amount.
func TestMaxBlobs(t *testing.T) {
	data := manyBlobs(MaxBlobs)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	b, err := openBytes(data)
	runtime.ReadMemStats(&after)
	if err != nil || len(b.Blobs) != MaxBlobs {
		t.Fatalf("%d blobs: %v", MaxBlobs, err)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 8<<20 {
		t.Errorf("%d bytes allocated", used)
	}
	refuses(t, "one more", manyBlobs(MaxBlobs+1), ErrInvalid, "at most 4096 blobs")
}

// manyBlobs makes the head of a v6 bootstrap of n blobs.
func manyBlobs(n int) []byte {
	const slots, table = 4096, 4096 + 128*8192
	data := make([]byte, (table+256*n+4095)&^4095)
	put := func(offset int, b []byte) { copy(data[offset:], b) }
	put(1024, u32(v6Magic))
	data[1024+12] = 12
	put(1110, u16(uint16(n)))
	put(1112, u16(slots/128))
	put(1160, u64(table))
	put(1168, u32(uint32(256*n)))
	put(1172, u32(1<<20))
	for i := range n {
		id := fmt.Appendf(nil, "%064x", i)
		put(slots+128*i, id)
		entry := table + 256*i
		put(entry, id)
		put(entry+64, u32(uint32(i)))
		put(entry+68, u32(1<<20))
	}
	return data
}

func TestNames(t *testing.T) {
	for got, want := range map[fmt.Stringer]string{
		CompressorGzip: "gzip", Compressor(4): "unknown (4)", Compressor(1<<32 - 1): "unknown (4294967295)",
		DigesterSHA256: "sha256", Digester(2): "unknown (2)",
	} {
		if got.String() != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// FuzzOpen looks for a panic, and for a bootstrap that breaks a promise of the
// package.
func FuzzOpen(f *testing.F) {
	for _, name := range names(f) {
		f.Add(load(f, name))
	}
	f.Add(manyBlobs(3)[:4096])
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := openBytes(data)
		if err != nil {
			known := errors.Is(err, ErrNotRAFS) || errors.Is(err, ErrTruncated) || errors.Is(err, ErrBlobID) || errors.Is(err, ErrInvalid)
			if !known || b != nil || len(err.Error()) > 1000 {
				t.Fatalf("%v, %v", b, err)
			}
			return
		}
		hex := regexp.MustCompile(`^[0-9a-f]{64}$`)
		seen := map[string]bool{}
		for i, blob := range b.Blobs {
			if !hex.MatchString(blob.ID) || seen[blob.ID] || blob.Index != uint32(i) {
				t.Fatalf("blob %d: %+v", i, blob)
			}
			if blob.MetaID != "" && !hex.MatchString(blob.MetaID) {
				t.Fatalf("blob %d: metadata in %q", i, blob.MetaID)
			}
			seen[blob.ID] = true
		}
		if b.Version != V5 && b.Version != V6 || len(b.Blobs) > MaxBlobs {
			t.Fatalf("%s with %d blobs", b.Version, len(b.Blobs))
		}
	})
}
