package checkpoint

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/draft"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

const (
	// Suffix ends the names of checkpoints, behind that of the map.
	Suffix = ".synced"
	// temporary begins the names of files that are being written; what a killed writer
	// left of them is removed by a later Take, see tidy.
	temporary = ".new-"
	version   = 1
	idSize    = 64
	// maxMap bounds a map, maxRecord a checkpoint, in bytes.
	maxMap    = chunkmap.HeaderSize + chunkmap.MaxChunks/8
	maxRecord = 2 * maxMap
)

// metadata lists what nydusd keeps of a blob beside data and map: suffixes behind its id.
func metadata() []string {
	return []string{".blob.meta", ".blob.digest", ".blob.toc"}
}

// record is a checkpoint.
type record struct {
	Version int `json:"version"`
	// Data is the file that the chunks are in.
	Data file `json:"data"`
	// Bits has a bit for each chunk, as in the map. Full says that the map was marked so.
	Bits []byte `json:"bits"`
	Full bool   `json:"full,omitempty"`
	// Metadata are the blob's other files.
	Metadata []file `json:"metadata,omitempty"`
}

// file names a file and, for metadata, its content. Changed is the time of the last change
// in nanoseconds: it saves reading the file again, and nothing is believed for it.
type file struct {
	Name    string `json:"name"`
	Inode   uint64 `json:"inode"`
	Size    int64  `json:"size"`
	Changed int64  `json:"changed,omitempty"`
	SHA256  string `json:"sha256,omitempty"`
}

// Report is what was done in a directory.
type Report struct {
	// Blobs is how many blobs something was done for.
	Blobs int
	// Chunks is how many chunks were synced, or were not believed.
	Chunks int
}

// blob is what a directory has of one.
type blob struct {
	dir, id string
	names   map[string]bool
	// proofs reads what the proofs in the directory say about data, by blob; it does so once
	// for all blobs, and only when somebody asks.
	proofs func() map[string][]proof.File
}

// blobs lists those of a directory.
func blobs(dir string) ([]*blob, error) {
	f, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	byID := map[string]*blob{}
	proofs := sync.OnceValue(func() map[string][]proof.File { return proofsIn(dir, names) })
	var list []*blob
	for _, name := range names {
		if len(name) <= idSize || !rafs.IsID(name[:idSize]) || strings.HasSuffix(name, proof.Suffix) {
			continue
		}
		b := byID[name[:idSize]]
		if b == nil {
			b = &blob{dir: dir, id: name[:idSize], names: map[string]bool{}, proofs: proofs}
			byID[b.id], list = b, append(list, b)
		}
		b.names[name] = true
	}
	slices.SortFunc(list, func(a, b *blob) int { return strings.Compare(a.id, b.id) })
	return list, nil
}

// proofsIn reads what the proofs in a directory say, by blob.
func proofsIn(dir string, names []string) map[string][]proof.File {
	found := map[string][]proof.File{}
	for _, name := range names {
		hex, ok := strings.CutSuffix(name, proof.Suffix)
		if !ok {
			continue
		}
		r, err := proof.Read(dir, "sha256:"+hex)
		if err != nil {
			continue
		}
		for _, b := range r.Blobs {
			found[b.ID] = append(found[b.ID], b.File)
		}
	}
	return found
}

// proven tells whether all of the blob's data was on the disk when somebody last wrote to it:
// it was complete and synced before it was compared.
func (b *blob) proven() bool {
	f, err := proof.OpenRegular(b.path(proof.DataName(b.id)))
	if err != nil {
		return false
	}
	defer f.Close()
	now, err := proof.Stat(f)
	return err == nil && slices.Contains(b.proofs()[b.id], now)
}

func (b *blob) path(name string) string { return filepath.Join(b.dir, name) }

// bitmap is what a map says.
type bitmap struct {
	bits []byte
	// full is nydusd's mark that all chunks are there.
	full bool
}

// readMap reads a map. The error wraps chunkmap.ErrInvalid when there is no sense in it; an
// empty one, as nydusd makes it first, has nil for its bits.
func readMap(path string) (m bitmap, err error) {
	text, err := read(path, maxMap)
	if err != nil || len(text) == 0 {
		return m, err
	}
	if len(text) <= chunkmap.HeaderSize {
		return m, fmt.Errorf("%w: it has %d bytes", chunkmap.ErrInvalid, len(text))
	}
	m.bits = text[chunkmap.HeaderSize:]
	if !slices.ContainsFunc(text, func(b byte) bool { return b != 0 }) {
		return m, nil
	}
	m.full, err = chunkmap.Full(text)
	return m, err
}

func read(path string, most int64) ([]byte, error) {
	f, err := proof.OpenQuiet(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("%w: %s has more than %d bytes", chunkmap.ErrInvalid, path, most)
	}
	return text, err
}

// load reads the checkpoint of a map; nil when there is none that could be used.
func (b *blob) load(name string) *record {
	if !b.names[name+Suffix] {
		return nil
	}
	text, err := read(b.path(name+Suffix), maxRecord)
	if err != nil {
		return nil
	}
	r := &record{}
	if json.Unmarshal(text, r) != nil || r.Version != version {
		return nil
	}
	return r
}

// identify tells which file it is.
func identify(f *os.File) (file, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return file{}, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return file{Name: filepath.Base(f.Name()), Inode: st.Ino, Size: st.Size, Changed: max(st.Mtim.Nano(), st.Ctim.Nano())}, nil
}

// same tells whether it is the same file, whatever is in it.
func (f file) same(other file) bool { return f.Inode == other.Inode && f.Size == other.Size }

// write replaces a file in the directory, so that it is on the disk as either the old or
// the new one.
func (b *blob) write(name string, text []byte) error {
	return draft.Write(b.path(name), temporary, text)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func digest(f io.Reader) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
