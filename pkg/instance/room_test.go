package instance

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

func TestMappedFiles(t *testing.T) {
	id, meta := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	for what, c := range map[string]struct {
		blob  rafs.Blob
		older bool
		want  map[string]int64
	}{
		"no chunks": {rafs.Blob{ListSize: 100}, false, nil},
		"a bit for each chunk": {rafs.Blob{ChunkCount: 9}, false, map[string]int64{
			id + ".blob.data.chunk_map": page + 2,
		}},
		"a list of chunks, in whole pages": {rafs.Blob{ChunkCount: 8, ListSize: page + 1}, false, map[string]int64{
			id + ".blob.data.chunk_map": page + 1, id + ".blob.meta": 3 * page,
		}},
		"older names": {rafs.Blob{ChunkCount: 8, ListSize: 1}, true, map[string]int64{
			id + ".chunk_map": page + 1, id + ".blob.meta": 2 * page,
		}},
		"metadata of its own": {rafs.Blob{ChunkCount: 8, ListSize: 1, MetaID: meta}, false, map[string]int64{
			id + ".blob.data.chunk_map": page + 1, id + ".blob.meta": 2 * page,
		}},
		"metadata of its own, older names": {rafs.Blob{ChunkCount: 8, ListSize: 1, MetaID: meta}, true, map[string]int64{
			meta + ".chunk_map": page + 1, meta + ".blob.meta": 2 * page,
		}},
		"as much as is reserved": {rafs.Blob{ChunkCount: 8, ListSize: maxReserve}, false, map[string]int64{
			id + ".blob.data.chunk_map": page + 1, id + ".blob.meta": maxReserve + page,
		}},
		// Whatever the image says, it is more than is reserved, and no number that overflows.
		"more than is reserved": {rafs.Blob{ChunkCount: 8, ListSize: 1<<64 - 1}, false, map[string]int64{
			id + ".blob.data.chunk_map": page + 1, id + ".blob.meta": maxReserve + 1,
		}},
	} {
		c.blob.ID = id
		if got := mappedFiles(&c.blob, c.older); !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
}

func TestReserveFile(t *testing.T) {
	const size = 10 * page
	dir := t.TempDir()
	for name, text := range map[string]string{"new": "", "old": "what nydusd has written"} {
		path := filepath.Join(dir, name)
		if text != "" {
			must(t, os.WriteFile(path, []byte(text), 0o600))
		}
		must(t, reserveFile(path, size))
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("%s: it has %q (%v), want %q", name, got, err, text)
		}
		if st.Blocks*512 < size {
			t.Errorf("%s: %d bytes are reserved, want %d", name, st.Blocks*512, size)
		}
	}
	// A longer one has room already, and stays as it is.
	long := filepath.Join(dir, "long")
	must(t, os.WriteFile(long, bytes.Repeat([]byte("x"), 2*size), 0o600))
	must(t, reserveFile(long, size))
	if info, err := os.Stat(long); err != nil || info.Size() != 2*size {
		t.Errorf("a long one: %v (%v)", info, err)
	}

	link := filepath.Join(dir, "link")
	must(t, os.Symlink("elsewhere", link))
	if err := reserveFile(link, size); !errors.Is(err, unix.ELOOP) || !strings.Contains(err.Error(), link) {
		t.Errorf("through a symbolic link: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "elsewhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what the link leads to: %v", err)
	}
	missing := filepath.Join(dir, "missing", "file")
	if err := reserveFile(missing, size); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), missing) {
		t.Errorf("in no directory: %v", err)
	}
}
