package rafs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"unsafe"
)

const mostChunks = 1 << 20

func chunksOf(data []byte, most int) ([]ChunkTable, error) {
	return Chunks(bytes.NewReader(data), int64(len(data)), most)
}

// TestChunksAgainstNydusImage compares every real bootstrap with what nydus-image says.
// That the digests are right is a matter of pkg/blobcheck's tests, which have the data.
func TestChunksAgainstNydusImage(t *testing.T) {
	for _, name := range names(t) {
		if strings.HasSuffix(name, "-bad-ids") || name == "v6-inline-layer" {
			if _, err := chunksOf(load(t, name), mostChunks); !errors.Is(err, ErrBlobID) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		tables, err := chunksOf(load(t, name), mostChunks)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := oracle(t, name)
		if len(tables) != len(want) {
			t.Errorf("%s: %d tables, want %d", name, len(tables), len(want))
			continue
		}
		for i := range tables {
			table := &tables[i]
			if table.Blob.ID != want[i].id {
				t.Errorf("%s, blob %d: %s, want %s", name, i, table.Blob.ID, want[i].id)
			}
			// Merging leaves chunks out, and so does a dictionary.
			all := !strings.Contains(name, "merged") && !(strings.Contains(name, "dict") && i > 0)
			if n := table.Len() + table.Opaque; n > int(want[i].chunks) || n == 0 || all && n != int(want[i].chunks) {
				t.Errorf("%s, blob %d: %d chunks, want %d", name, i, n, want[i].chunks)
			}
			if opaque := table.Opaque > 0; opaque != strings.Contains(name, "zran") {
				t.Errorf("%s, blob %d: %d opaque", name, i, table.Opaque)
			}
			if has := table.Meta.Size > 0; has != (name[:2] == V6 && !strings.Contains(name, "zran")) {
				t.Errorf("%s, blob %d: %+v", name, i, table.Meta)
			}
			if n := table.Len(); all && name[:2] == V5 && n > 0 && table.At(n-1).End() != want[i].compressed {
				t.Errorf("%s, blob %d: chunks end at %d, want %d", name, i, table.At(n-1).End(), want[i].compressed)
			}
			sound(t, name, table)
		}
	}
}

// sound checks what a table promises.
func sound(t *testing.T, name string, table *ChunkTable) {
	t.Helper()
	end := uint64(0)
	for i := range table.Len() {
		c := table.At(i)
		if c.Offset < end || c.Size == 0 || c.Size > MaxChunkSize || c.RawSize == 0 || c.RawSize > MaxChunkSize || !c.Compressed && c.Size != c.RawSize {
			t.Fatalf("%s, chunk %d: %+v behind %d", name, i, c, end)
		}
		end = c.End()
		if table.Search(c.Offset) != i || table.Search(end-1) != i || table.Search(end) != i+1 && table.At(i+1).Offset >= end {
			t.Fatalf("%s, chunk %d: not found", name, i)
		}
	}
	if table.Search(1<<63) != table.Len() {
		t.Fatalf("%s: there is something behind the end", name)
	}
	if m := table.Meta; m.Size > 0 && m.Offset < end {
		t.Fatalf("%s: metadata at %d, chunks end at %d", name, m.Offset, end)
	}
}

func TestRecordSize(t *testing.T) {
	if n := unsafe.Sizeof(record{}); n != 56 {
		t.Errorf("a chunk takes %d bytes, want 56", n)
	}
}

func TestHostileChunksV6(t *testing.T) {
	good := load(t, "v6-zstd")
	blobs, table := int(le.Uint64(good[1160:])), int(le.Uint64(good[1152+24:]))
	// Where the entries of the chunks 1 and 2 lie.
	var at [3]int
	for i := range at {
		entry := table + chunkEntry*i
		at[le.Uint32(good[entry+72:])] = entry
	}
	second, last := at[1], at[2]
	for what, c := range map[string]struct {
		data []byte
		err  error
		text string
	}{
		"table of half entries":     {edit(good, 1152+32, u64(chunkEntry+1)...), ErrInvalid, "multiple of 80"},
		"table huge":                {edit(good, 1152+32, u64(1<<40/chunkEntry*chunkEntry)...), ErrTruncated, "chunk table"},
		"blob":                      {edit(good, second+32, u32(1)...), ErrInvalid, "blob 1"},
		"blob huge":                 {edit(good, second+32, u32(1<<32-1)...), ErrInvalid, "blob 4294967295"},
		"flags":                     {edit(good, second+36, u32(0x40)...), ErrInvalid, "flags 0x40"},
		"size 0":                    {edit(good, second+40, u32(0)...), ErrInvalid, "16 MiB"},
		"size huge":                 {edit(good, second+40, u32(1<<32-1)...), ErrInvalid, "16 MiB"},
		"uncompressed size 0":       {edit(good, second+44, u32(0)...), ErrInvalid, "16 MiB"},
		"uncompressed size huge":    {edit(good, second+44, u32(MaxChunkSize+1)...), ErrInvalid, "16 MiB"},
		"offset huge":               {edit(good, second+48, u64(1<<40)...), ErrInvalid, "too far"},
		"offset overflows":          {edit(good, second+48, u64(1<<64-1)...), ErrInvalid, "too far"},
		"overlap":                   {edit(good, second+48, u64(7)...), ErrInvalid, "overlap"},
		"into the metadata":         {edit(good, last+48, u64(600)...), ErrInvalid, "among the chunks"},
		"uncompressed offset odd":   {edit(good, second+56, u64(4097)...), ErrInvalid, "4096"},
		"uncompressed offset huge":  {edit(good, second+56, u64(1<<44)...), ErrInvalid, "4096"},
		"uncompressed overlap":      {edit(good, second+56, u64(0)...), ErrInvalid, "order"},
		"index huge":                {edit(good, second+72, u32(1<<31)...), ErrInvalid, "index"},
		"index twice":               {edit(good, second+72, u32(0)...), ErrInvalid, "order"},
		"index beyond":              {edit(good, last+72, u32(3)...), ErrInvalid, "index 3"},
		"stored with two sizes":     {edit(good, second+36, u32(0)...), ErrInvalid, "equal"},
		"other digest, same place":  {edit(good, second+32, good[last+32:last+80]...), ErrInvalid, "overlap"},
		"list far behind":           {edit(good, blobs+112, u64(1<<63)...), ErrInvalid, "list"},
		"list larger than its data": {edit(good, blobs+128, u64(47)...), ErrInvalid, "list"},
		"list huge":                 {edit(good, blobs+128, u64(1<<40)...), ErrInvalid, "list"},
		"contents huge":             {edit(good, blobs+104, u32(1<<20)...), ErrInvalid, "contents"},
	} {
		tables, err := chunksOf(c.data, mostChunks)
		if tables != nil || !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v; want %v with %q", what, err, c.err, c.text)
		}
	}
	for _, flag := range []uint32{chunkHole, chunkEncrypted, chunkBatch} {
		tables, err := chunksOf(edit(good, second+36, u32(flag)...), mostChunks)
		if err != nil || tables[0].Len() != 2 || tables[0].Opaque != 1 {
			t.Errorf("flag %#x: %v", flag, err)
		}
	}
	if tables, err := chunksOf(edit(good, blobs+84, u32(uint32(FeatureTarTOC|featureBatch))...), mostChunks); err != nil || tables[0].Opaque != 3 {
		t.Errorf("a batch blob: %v", err)
	}
	if _, err := chunksOf(good, 2); !errors.Is(err, ErrInvalid) {
		t.Errorf("more than most: %v", err)
	}
}

func TestHostileChunksV5(t *testing.T) {
	good := load(t, "v5-zstd")
	inodes, entries := int(le.Uint64(good[32:])), int(le.Uint32(good[56:]))
	file := 0
	for i := range entries {
		at := int(le.Uint32(good[inodes+4*i:])) * 8
		if at != 0 && le.Uint32(good[at+60:])&v5FileType == v5Regular {
			file = at
		}
	}
	if file == 0 {
		t.Fatal("no file in the image")
	}
	for what, c := range map[string]struct {
		data []byte
		err  error
		text string
	}{
		"inodes beyond the end": {edit(good, 32, u64(1<<40)...), ErrTruncated, "inode table"},
		"inodes overflow":       {edit(good, 32, u64(1<<64-4)...), ErrTruncated, "inode table"},
		"inodes huge":           {edit(good, 56, u32(1<<32-1)...), ErrTruncated, "inode table"},
		"inode in superblock":   {edit(good, inodes, u32(1)...), ErrInvalid, "superblock"},
		"inode beyond the end":  {edit(good, inodes, u32(1<<32-1)...), ErrTruncated, "inode"},
		"chunks beyond the end": {edit(good, file+96, u32(1000)...), ErrTruncated, "chunks"},
		"chunks huge":           {edit(good, file+96, u32(1<<32-1)...), ErrInvalid, "more than"},
		"names beyond the end":  {edit(good, file+100, 0xff, 0xff), ErrTruncated, "chunks"},
		"attributes":            {edit(good, file+80, u64(v5Xattr)...), ErrTruncated, "attributes"},
	} {
		tables, err := chunksOf(c.data, mostChunks)
		if tables != nil || !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v; want %v with %q", what, err, c.err, c.text)
		}
	}
}

// manyChunks makes a v6 bootstrap with n chunks in one blob.
func manyChunks(n int) []byte {
	head := manyBlobs(1)
	table := len(head)
	size := (chunkEntry*n + 4095) &^ 4095
	data := append(head, make([]byte, size)...)
	put := func(offset int, b []byte) { copy(data[offset:], b) }
	put(1152+24, u64(uint64(table)))
	put(1152+32, u64(uint64(chunkEntry*n)))
	for i := range n {
		e := table + chunkEntry*i
		put(e, u32(uint32(i)))
		put(e+36, u32(chunkCompressed))
		put(e+40, u32(300))
		put(e+44, u32(4096))
		put(e+48, u64(uint64(300*i)))
		put(e+56, u64(uint64(4096*i)))
		put(e+72, u32(uint32(i)))
	}
	return data
}

// TestManyChunks: 200,000 chunks take 56 bytes each and not much while they are read.
func TestManyChunks(t *testing.T) {
	const n = 200_000
	data := manyChunks(n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	tables, err := chunksOf(data, n)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if err != nil || tables[0].Len() != n {
		t.Fatal(err)
	}
	if kept := int64(after.HeapAlloc) - int64(before.HeapAlloc); kept > 60*n+1<<20 {
		t.Errorf("%d bytes are kept for %d chunks", kept, n)
	}
	sound(t, "many", &tables[0])
	if _, err := chunksOf(data, n-1); !errors.Is(err, ErrInvalid) {
		t.Errorf("one more than allowed: %v", err)
	}
}

// TestChunksOfEndlessFile: no sparse file makes us hold or read much.
func TestChunksOfEndlessFile(t *testing.T) {
	v6 := edit(load(t, "v6-zstd"), 1152+32, u64(1<<60/chunkEntry*chunkEntry)...)
	v5 := edit(load(t, "v5-zstd"), 56, u32(1<<32-1)...)
	for what, head := range map[string][]byte{"v6": v6, "v5": v5} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Chunks(endless{head}, 1<<61, mostChunks)
		runtime.ReadMemStats(&after)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 4<<20 {
			t.Errorf("%s: %d bytes allocated", what, used)
		}
	}
}

func TestChunksReaderFails(t *testing.T) {
	broken := errors.New("disk on fire")
	for _, name := range []string{"v5-zstd", "v6-zstd"} {
		data := load(t, name)
		for n := 0; n < len(data); n += 97 {
			tables, err := Chunks(shrunk{data[:n], broken}, int64(len(data)), mostChunks)
			if err != nil && !errors.Is(err, broken) || err == nil && n < 8000 {
				t.Fatalf("%s breaks at %d: %d tables, %v", name, n, len(tables), err)
			}
		}
		if _, err := Chunks(shrunk{data[:8200], io.EOF}, int64(len(data)), mostChunks); !errors.Is(err, ErrTruncated) {
			t.Errorf("%s shrank: %v", name, err)
		}
	}
}

// FuzzChunks looks for a panic, and for a table that breaks a promise.
func FuzzChunks(f *testing.F) {
	for _, name := range names(f) {
		f.Add(load(f, name))
	}
	f.Add(manyChunks(2))
	f.Fuzz(func(t *testing.T, data []byte) {
		const most = 1000
		tables, err := chunksOf(data, most)
		if err != nil {
			if tables != nil || len(err.Error()) > 1000 {
				t.Fatalf("%v, %v", tables, err)
			}
			return
		}
		total := 0
		for i := range tables {
			sound(t, fmt.Sprint("blob ", i), &tables[i])
			total += tables[i].Len()
		}
		if total > most {
			t.Fatalf("%d chunks", total)
		}
	})
}
