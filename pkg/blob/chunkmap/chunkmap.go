// Package chunkmap reads which chunks of a blob nydusd has in its cache.
//
// What the package promises:
//
//   - It believes nothing that a file says about sizes: a map is read only when it is
//     exactly as long as the chunks that the image's bootstrap counts need, so that no file
//     makes it hold more than 2 MiB.
//   - A map that contradicts itself is an error, never an answer: bits beyond the last
//     chunk, or a mark of completeness over missing bits.
//   - It changes and locks nothing. nydusd sets bits through a mapping of the file while
//     this reads it; a bit never goes back, so what was read is a lower bound.
//   - To read a map is not to use the blob: the file's time of access stays.
//   - Only the standard library, golang.org/x/sys and what package proof needs are linked,
//     so the mount path stays light.
//
// What a map says is nydusd's claim, not a proof: nydusd sets a bit after it wrote the
// data but syncs neither, so that after a power cut bits may stand over holes. Do not use
// it to decide that a blob's bytes are right; compare them with the bootstrap's digests.
//
// # On-disk format
//
// All numbers are u32, little endian: magic 0x424D4150 at 0, version 1 at 4, second magic
// 0x434D4150 at 8, and at 12 either 0 or 0x4D4D4150 once all chunks are there, which nydusd
// writes when it opens a full map. The bitmap begins at 4096 and has a bit for each chunk of
// the blob, by its index in the blob, the most significant bit of a byte first; it ends with
// the byte of the last chunk. A file that is empty, or all zero, is one that nydusd is
// making. (nydus-storage 0.6.2 and 0.7.1, src/cache/state/persist_map.rs.)
//
// Beside a blob's data, ID.blob.data, it is ID.chunk_map for nydusd 2.2 and
// ID.blob.data.chunk_map for 2.4.
package chunkmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// MaxChunks is the most chunks that a blob may have: as many as pkg/rafs and nydusd allow.
const MaxChunks = 1 << 24

// ErrInvalid says that a map cannot be what nydusd wrote for the blob, for errors.Is.
var ErrInvalid = errors.New("chunk map is invalid")

// HeaderSize is how many bytes come before the bits, of which Full needs 16.
const HeaderSize = 4096

const (
	magic    = 0x424D4150
	version  = 1
	magic2   = 0x434D4150
	allReady = 0x4D4D4150
)

// Header begins a map. It does not say that all chunks are there, so that nydusd counts.
func Header() []byte {
	head := make([]byte, HeaderSize)
	for i, word := range []uint32{magic, version, magic2} {
		binary.LittleEndian.PutUint32(head[4*i:], word)
	}
	return head
}

// Full tells whether a map that begins like this is marked as one that has all chunks. The
// error wraps ErrInvalid.
func Full(text []byte) (bool, error) {
	le := binary.LittleEndian
	head := [4]uint32{le.Uint32(text), le.Uint32(text[4:]), le.Uint32(text[8:]), le.Uint32(text[12:])}
	if head[0] != magic || head[1] != version || head[2] != magic2 || head[3] != 0 && head[3] != allReady {
		return false, fmt.Errorf("%w: it begins with %#08x, want %#08x, %d, %#08x, and 0 or %#08x", ErrInvalid, head, magic, version, magic2, allReady)
	}
	return head[3] == allReady, nil
}

// Names returns what the map of a blob may be called beside its data.
func Names(id string) []string {
	return []string{id + ".blob.data.chunk_map", id + ".chunk_map"}
}

// Map is what a presence map said when it was read. It does not change afterwards.
type Map struct {
	path   string
	chunks uint32
	ready  uint32
	bits   []byte
}

// Open reads the map of the blob id in a cache directory, of which chunks is the number
// that the image's bootstrap tells (rafs.Blob.ChunkCount). The id is 64 lowercase hex
// digits. When daemons of both versions have been at work there are two maps for the same
// data: both are true, and the one that knows more is returned. The error wraps
// fs.ErrNotExist when there is none, and ErrInvalid when one of them cannot be right.
func Open(dir, id string, chunks uint32) (*Map, error) {
	if !rafs.IsID(id) {
		return nil, fmt.Errorf("read chunk map: %w: blob id %.80q is not 64 lowercase hex digits", ErrInvalid, id)
	}
	var best *Map
	for _, name := range Names(id) {
		m, err := Read(filepath.Join(dir, name), chunks)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if best == nil || m.ready > best.ready {
			best = m
		}
	}
	if best == nil {
		return nil, fmt.Errorf("read chunk map of blob %s in %s: %w", id, dir, fs.ErrNotExist)
	}
	return best, nil
}

// Read reads the map at path, see Open.
func Read(path string, chunks uint32) (*Map, error) {
	m, err := read(path, chunks)
	if err != nil {
		return nil, fmt.Errorf("read chunk map %s: %w", path, err)
	}
	return m, nil
}

func read(path string, chunks uint32) (*Map, error) {
	if chunks == 0 || chunks > MaxChunks {
		return nil, fmt.Errorf("%w: no blob has %d chunks", ErrInvalid, chunks)
	}
	f, err := proof.OpenQuiet(path)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%w: it is a symbolic link", ErrInvalid)
	case errors.Is(err, proof.ErrNotRegular):
		return nil, fmt.Errorf("%w: it is no regular file", ErrInvalid)
	case err != nil:
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if size := info.Size(); size != 0 && size != fileSize(chunks) {
		return nil, wrongSize(size, chunks)
	}
	text := make([]byte, info.Size())
	if n, err := f.ReadAt(text, 0); n < len(text) {
		if err == nil || errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: it was cut to %d bytes", ErrInvalid, n)
		}
		return nil, err
	}
	m, err := decode(text, chunks)
	if err != nil {
		return nil, err
	}
	m.path = path
	return m, nil
}

func fileSize(chunks uint32) int64 { return HeaderSize + (int64(chunks)+7)/8 }

func wrongSize(size int64, chunks uint32) error {
	return fmt.Errorf("%w: it has %d bytes, one of %d chunks has %d", ErrInvalid, size, chunks, fileSize(chunks))
}

// decode takes a file's content.
func decode(text []byte, chunks uint32) (*Map, error) {
	m := &Map{chunks: chunks}
	if len(text) == 0 {
		m.bits = make([]byte, fileSize(chunks)-HeaderSize)
		return m, nil
	}
	if size := int64(len(text)); size != fileSize(chunks) {
		return nil, wrongSize(size, chunks)
	}
	m.bits = text[HeaderSize:]
	if !slices.ContainsFunc(text, func(b byte) bool { return b != 0 }) {
		return m, nil
	}
	full, err := Full(text)
	if err != nil {
		return nil, err
	}
	for _, b := range m.bits {
		m.ready += uint32(bits.OnesCount8(b))
	}
	if rest := chunks % 8; rest != 0 && m.bits[len(m.bits)-1]<<rest != 0 {
		// nydusd counts them, and would take the blob for complete too early.
		return nil, fmt.Errorf("%w: it has bits beyond the last of %d chunks", ErrInvalid, chunks)
	}
	if full && !m.Complete() {
		return nil, fmt.Errorf("%w: it is marked as complete and has %d of %d chunks", ErrInvalid, m.ready, chunks)
	}
	return m, nil
}

// Len is the number of chunks that the blob has.
func (m *Map) Len() int { return int(m.chunks) }

// Ready is the number of chunks that are there.
func (m *Map) Ready() int { return int(m.ready) }

// Complete tells whether all chunks are there.
func (m *Map) Complete() bool { return m.ready == m.chunks }

// Has tells whether the chunk i is there, by its index in the blob (rafs.Chunk.Index). One
// that the blob does not have is not.
func (m *Map) Has(i uint32) bool {
	return i < m.chunks && m.bits[i/8]&(0x80>>(i%8)) != 0
}
