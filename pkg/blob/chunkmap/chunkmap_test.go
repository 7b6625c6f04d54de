package chunkmap

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const id = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// file makes the content of a map of chunks with the given ones there.
func file(chunks uint32, ready ...uint32) []byte {
	text := make([]byte, HeaderSize+(chunks+7)/8)
	for i, word := range []uint32{magic, version, magic2} {
		binary.LittleEndian.PutUint32(text[4*i:], word)
	}
	for _, i := range ready {
		text[HeaderSize+i/8] |= 0x80 >> (i % 8)
	}
	return text
}

func complete(text []byte) []byte {
	binary.LittleEndian.PutUint32(text[12:], allReady)
	return text
}

func put(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func word(text []byte, at int, value uint32) []byte {
	binary.LittleEndian.PutUint32(text[at:], value)
	return text
}

func TestOpen(t *testing.T) {
	all := []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8}
	for what, c := range map[string]struct {
		text []byte
		has  []uint32
	}{
		"empty":          {file(9), nil},
		"first":          {file(9, 0), []uint32{0}},
		"last":           {file(9, 8), []uint32{8}},
		"some":           {file(9, 1, 7, 8), []uint32{1, 7, 8}},
		"full":           {file(9, all...), all},
		"full, marked":   {complete(file(9, all...)), all},
		"just created":   {nil, nil},
		"sized, no head": {make([]byte, HeaderSize+2), nil},
	} {
		for _, name := range Names(id) {
			dir := t.TempDir()
			put(t, filepath.Join(dir, name), c.text)
			m, err := Open(dir, id, 9)
			if err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			has := map[uint32]bool{}
			for _, i := range c.has {
				has[i] = true
			}
			for i := range uint32(20) {
				if m.Has(i) != has[i] {
					t.Errorf("%s, chunk %d: %v", what, i, m.Has(i))
				}
			}
			if m.Ready() != len(c.has) || m.Complete() != (len(c.has) == 9) || m.Len() != 9 || m.path != filepath.Join(dir, name) {
				t.Errorf("%s: %+v", what, m)
			}
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for what, c := range map[string]struct {
		text   []byte
		chunks uint32
		want   string
	}{
		"short header":     {file(9)[:100], 9, "100 bytes"},
		"short bitmap":     {file(9)[:HeaderSize+1], 9, "4097 bytes"},
		"header only":      {file(9)[:HeaderSize], 9, "4096 bytes"},
		"long":             {append(file(9), 0), 9, "4099 bytes"},
		"of another blob":  {file(9), 1000, "4098 bytes"},
		"magic":            {word(file(9, 3), 0, 1), 9, "begins with"},
		"no magic, bits":   {word(file(9, 3), 0, 0), 9, "begins with"},
		"version 0":        {word(file(9), 4, 0), 9, "begins with"},
		"version 2":        {word(file(9), 4, 2), 9, "begins with"},
		"second magic":     {word(file(9), 8, magic), 9, "begins with"},
		"unknown mark":     {word(file(9), 12, 1), 9, "begins with"},
		"bits beyond":      {file(9, 9), 9, "beyond"},
		"bits far beyond":  {file(9, 15), 9, "beyond"},
		"marked, not full": {complete(file(9, 0, 1)), 9, "2 of 9"},
		"no chunks":        {file(0), 0, "0 chunks"},
		"too many chunks":  {file(9), MaxChunks + 1, "chunks"},
		"most u32 chunks":  {file(9), 1<<32 - 1, "chunks"},
	} {
		dir := t.TempDir()
		put(t, filepath.Join(dir, Names(id)[0]), c.text)
		if m, err := Open(dir, id, c.chunks); m != nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", what, err, c.want)
		}
	}
}

func TestOpenOddFiles(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir, id, 9); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrInvalid) {
		t.Errorf("no file: %v", err)
	}
	for _, bad := range []string{"", "../" + id[3:], id[1:], strings.ToUpper(id), id + "0"} {
		if _, err := Open(dir, bad, 9); !errors.Is(err, ErrInvalid) {
			t.Errorf("id %q: %v", bad, err)
		}
	}
	path := filepath.Join(dir, Names(id)[1])
	for what, odd := range map[string]func() error{
		"link":      func() error { return os.Symlink("/dev/zero", path) },
		"FIFO":      func() error { return unix.Mkfifo(path, 0o600) },
		"directory": func() error { return os.Mkdir(path, 0o700) },
	} {
		if err := odd(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, id, 9); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTwoMaps: daemons of both versions left one each.
func TestTwoMaps(t *testing.T) {
	dir := t.TempDir()
	newer, older := filepath.Join(dir, Names(id)[0]), filepath.Join(dir, Names(id)[1])
	put(t, newer, file(9, 0))
	put(t, older, file(9, 1, 2))
	m, err := Open(dir, id, 9)
	if err != nil || m.path != older || m.Ready() != 2 {
		t.Errorf("%+v, %v", m, err)
	}
	put(t, newer, file(9, 3, 4))
	if m, err = Open(dir, id, 9); err != nil || m.path != newer {
		t.Errorf("%+v, %v", m, err)
	}
	put(t, older, file(8))
	if _, err = Open(dir, id, 9); !errors.Is(err, ErrInvalid) {
		t.Errorf("one is wrong: %v", err)
	}
}

// TestSeesWhatIsMapped: nydusd writes through a mapping.
func TestSeesWhatIsMapped(t *testing.T) {
	path := filepath.Join(t.TempDir(), Names(id)[0])
	put(t, path, file(9))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapped, err := unix.Mmap(int(f.Fd()), 0, HeaderSize+2, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped)
	mapped[HeaderSize+1] |= 0x80
	if m, err := Read(path, 9); err != nil || !m.Has(8) || m.Ready() != 1 {
		t.Errorf("%+v, %v", m, err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, text := range [][]byte{nil, file(9, 1), complete(file(9)), complete(file(8, 0, 1, 2, 3, 4, 5, 6, 7)), make([]byte, HeaderSize+2)} {
		f.Add(text, uint32(9))
		f.Add(text, uint32(8))
	}
	f.Fuzz(func(t *testing.T, text []byte, chunks uint32) {
		m, err := decode(text, chunks%MaxChunks)
		if err != nil {
			if m != nil || !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v, %v", m, err)
			}
			return
		}
		n := 0
		for i := range min(m.chunks, 1<<12) + 16 {
			if m.Has(i) {
				n++
			}
		}
		if len(text) > 0 && n != m.Ready() || m.Complete() != (m.Ready() == m.Len()) {
			t.Fatalf("%d there, %d ready of %d, complete %v", n, m.Ready(), m.Len(), m.Complete())
		}
	})
}
