package blob

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// bed is a snapshotter's directories.
type bed struct {
	t         testing.TB
	root, run string
	snapshots int
	now       time.Time
}

func newBed(t testing.TB) *bed {
	b := &bed{t: t, root: t.TempDir(), run: t.TempDir(), now: time.Now().Add(time.Hour)}
	return b
}

func (b *bed) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// dir is the cache directory of a repository.
func (b *bed) dir(repository string) string {
	return mountspec.CacheDir(b.root, "host", repository)
}

func (b *bed) options() Options {
	return Options{
		Root: b.root, RunDir: b.run, Grace: 10 * time.Minute, Now: func() time.Time { return b.now },
		Place: func(_ context.Context, image, backend string) (string, error) {
			if backend != "" {
				return "", errors.New("no such backend")
			}
			return b.dir(image), nil
		},
	}
}

func (b *bed) cache() *Cache { return New(b.options()) }

func idOf(n int) string { return fmt.Sprintf("%064x", n) }

// chunks is how many each blob of a made bootstrap has.
const chunks = 9

// bootstrap makes a v6 bootstrap of blobs with 9 chunks each.
func bootstrap(ids ...string) []byte {
	const slots, table = 4096, 8192
	data := make([]byte, (table+256*len(ids)+4095)&^4095)
	le := binary.LittleEndian
	le.PutUint32(data[1024:], 0xE0F5E1E2)
	data[1024+12] = 12
	le.PutUint16(data[1110:], uint16(len(ids)))
	le.PutUint16(data[1112:], slots/128)
	le.PutUint64(data[1160:], table)
	le.PutUint32(data[1168:], uint32(256*len(ids)))
	le.PutUint32(data[1172:], 1<<20)
	for i, id := range ids {
		copy(data[slots+128*i:], id)
		entry := data[table+256*i:]
		copy(entry, id)
		le.PutUint32(entry[64:], uint32(i))
		le.PutUint32(entry[68:], 1<<20)
		le.PutUint32(entry[72:], chunks)
	}
	return data
}

func (b *bed) write(path string, text []byte) {
	b.t.Helper()
	b.must(os.MkdirAll(filepath.Dir(path), 0o700))
	b.must(os.WriteFile(path, text, 0o600))
}

// image makes a snapshot with a bootstrap, and returns its directory. The image's
// reference is its repository.
func (b *bed) image(repository string, boot []byte) string {
	b.t.Helper()
	b.snapshots++
	dir := filepath.Join(b.root, "snapshots", fmt.Sprint(b.snapshots))
	b.write(filepath.Join(dir, "fs", "image", "image.boot"), boot)
	b.write(filepath.Join(dir, "layer.json"), fmt.Appendf(nil, `{"version":1,"kind":"bootstrap","image":%q,"path":"image/image.boot"}`, repository))
	return dir
}

// instance makes an instance's record and its bootstrap, and returns its key.
func (b *bed) instance(repository string, boot []byte) string {
	b.t.Helper()
	key := mountspec.InstanceKey(fmt.Sprint(len(boot)), "host", repository, b.dir(repository))
	g := instance.Generation{Number: 1, Ready: true, Mountpoint: filepath.Join(b.run, "i", key, "g1", "mnt")}
	rec := instance.Record{Version: 1, Key: key, Image: repository, CacheDir: b.dir(repository), Root: b.root, Last: 1, Current: &g}
	text, err := json.Marshal(rec)
	b.must(err)
	b.write(filepath.Join(b.root, "instances", key, "bootstrap"), boot)
	b.write(filepath.Join(b.run, "i", key, "record.json"), text)
	return key
}

// mapOf is a presence map with the first n chunks.
func mapOf(n int) []byte {
	text := make([]byte, 4096+(chunks+7)/8)
	for i, word := range []uint32{0x424D4150, 1, 0x434D4150} {
		binary.LittleEndian.PutUint32(text[4*i:], word)
	}
	for i := range n {
		text[4096+i/8] |= 0x80 >> (i % 8)
	}
	return text
}

// blob makes a blob's files, of 8 KiB of data, last used days ago.
func (b *bed) blob(dir, id string, ready, days int) {
	b.t.Helper()
	b.write(filepath.Join(dir, id+".blob.data"), make([]byte, 8192))
	b.write(filepath.Join(dir, id+".blob.meta"), make([]byte, 4096))
	b.write(filepath.Join(dir, id+".blob.data.chunk_map"), mapOf(ready))
	at := b.now.Add(-time.Duration(days) * 24 * time.Hour)
	for _, suffix := range []string{".blob.data", ".blob.meta", ".blob.data.chunk_map"} {
		b.must(os.Chtimes(filepath.Join(dir, id+suffix), at, at))
	}
}

// has tells which of a blob's files there are: "dmc", data, metadata, chunk map.
func (b *bed) has(dir, id string) string {
	b.t.Helper()
	out := ""
	for _, f := range []struct{ suffix, is string }{{".blob.data", "d"}, {".blob.meta", "m"}, {".blob.data.chunk_map", "c"}, {".chunk_map", "o"}} {
		if _, err := os.Lstat(filepath.Join(dir, id+f.suffix)); err == nil {
			out += f.is
		}
	}
	return out
}

func (b *bed) sweep(o Options) Report {
	b.t.Helper()
	r, err := New(o).Sweep(context.Background(), false)
	b.must(err)
	return r
}

// prove writes a proof that names blobs, as its times are now.
func (b *bed) prove(dir string, n int, ids ...string) string {
	b.t.Helper()
	digest := "sha256:" + idOf(n)
	r := proof.New(digest, nil)
	for _, id := range ids {
		r.Blobs = append(r.Blobs, proof.Blob{ID: id})
	}
	text, err := json.Marshal(r)
	b.must(err)
	path := proof.Path(dir, digest)
	b.write(path, text)
	return path
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
