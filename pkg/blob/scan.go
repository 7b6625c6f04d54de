package blob

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// kind says what one of a blob's files is, in the order in which they are removed.
type kind int

const (
	// kindSynced are checkpoints of maps.
	kindSynced kind = iota
	kindMap
	kindMeta
	kindData
)

// suffixes are what nydusd puts behind a blob's id, or behind that of the blob that has
// the index of an OCI layer (zran with nydusd 2.2).
func suffixes() map[string]kind {
	return map[string]kind{
		".blob.data.chunk_map": kindMap,
		".chunk_map":           kindMap,
		".blob.data.chunk_map" + checkpoint.Suffix: kindSynced,
		".chunk_map" + checkpoint.Suffix:           kindSynced,
		".blob.meta":                               kindMeta,
		".blob.digest":                             kindMeta,
		".blob.toc":                                kindMeta,
		// Left by one that was killed.
		".blob.digest_downloading": kindMeta,
		".blob.toc_downloading":    kindMeta,
		".blob.data":               kindData,
		".blob.raw":                kindData,
	}
}

// file is one of a blob's.
type file struct {
	name  string
	kind  kind
	usage int64
	// used is the newest of the times of access and of change of its content, written
	// the newest of changes of any sort.
	used, written int64 // nanoseconds since 1970
}

// cached is a blob in a directory.
type cached struct {
	dir   *directory
	id    string
	files []file
}

func (c *cached) has(k kind) bool {
	return slices.ContainsFunc(c.files, func(f file) bool { return f.kind == k })
}

func (c *cached) usage() (n int64) {
	for i := range c.files {
		n += c.files[i].usage
	}
	return n
}

// lastUse is when the blob was last read or written, see Blob.LastUse.
func (c *cached) lastUse() time.Time {
	newest := int64(0)
	for i := range c.files {
		newest = max(newest, c.files[i].used)
	}
	return time.Unix(0, newest)
}

func (c *cached) written() time.Time {
	newest := int64(0)
	for i := range c.files {
		newest = max(newest, c.files[i].written)
	}
	return time.Unix(0, newest)
}

// directory holds blobs: a cache directory, or a private one within it.
type directory struct {
	path string
	// cache is the cache directory, which is path unless it is private.
	cache            string
	lock             string // whoever uses a private one holds it
	owner            string // the instance whose private one it is
	host, repository string
	blobs            []*cached
	unknown          []string
	// proofs says that there are proofs of images, which go before the blobs do. proven are
	// the names of those that are whole.
	proofs bool
	proven []string
}

// scan lists the directories below root/cache.
func scan(root string) ([]*directory, error) {
	top := filepath.Join(root, "cache")
	entries, err := os.ReadDir(top)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list cache directories: %w", err)
	}
	// Most of the time goes into asking what each file is like, which takes many directories
	// at once.
	found, errs := make([][]*directory, len(entries)), make([]error, len(entries))
	var all errgroup.Group
	all.SetLimit(beside)
	for i, e := range entries {
		if !e.IsDir() {
			found[i] = []*directory{{path: top, cache: top, unknown: []string{filepath.Join(top, e.Name())}}}
			continue
		}
		all.Go(func() error {
			found[i], errs[i] = scanCache(root, filepath.Join(top, e.Name()))
			return nil
		})
	}
	errs = append(errs, all.Wait())
	return slices.Concat(found...), errors.Join(errs...)
}

// scanCache lists a cache directory and the private ones in it.
func scanCache(root, path string) ([]*directory, error) {
	d := &directory{path: path, cache: path}
	var origin struct{ Host, Repository string }
	if text, err := os.ReadFile(filepath.Join(path, "origin.json")); err == nil && json.Unmarshal(text, &origin) == nil {
		d.host, d.repository = origin.Host, origin.Repository
	}
	private, err := d.read(func(e fs.DirEntry) bool {
		return e.Name() == "origin.json" || unfinished(e) || d.proof(e.Name())
	})
	list := []*directory{d}
	if err != nil || !slices.Contains(private, "private") {
		d.unknown = append(d.unknown, d.join(private)...)
		return list, err
	}
	d.unknown = append(d.unknown, d.join(slices.DeleteFunc(private, func(name string) bool { return name == "private" }))...)
	more, err := d.scanPrivate(root)
	return append(list, more...), err
}

// scanPrivate lists private/K.n, and private/P.n/K of a pool.
func (d *directory) scanPrivate(root string) ([]*directory, error) {
	top := filepath.Join(d.path, "private")
	entries, err := os.ReadDir(top)
	if err != nil {
		return nil, fmt.Errorf("list private cache directories: %w", err)
	}
	var list []*directory
	var errs []error
	for _, e := range entries {
		path := filepath.Join(top, e.Name())
		if !e.IsDir() {
			if !strings.HasSuffix(path, ".lock") {
				d.unknown = append(d.unknown, path)
			}
			continue
		}
		key, n, _ := strings.Cut(e.Name(), ".")
		p := &directory{path: path, cache: d.path, host: d.host, repository: d.repository, lock: path + ".lock", owner: key}
		pooled, err := p.read(unfinished)
		list, errs = append(list, p), append(errs, err)
		for _, name := range pooled {
			in := *p
			in.owner, _, _ = strings.Cut(name, ".") // of its later berths it is K.m
			in.path, in.blobs, in.unknown = filepath.Join(path, name), nil, nil
			in.lock = filepath.Join(root, "instances", key, "slot"+n+".lock")
			deeper, err := in.read(unfinished)
			in.unknown = append(in.unknown, in.join(deeper)...)
			list, errs = append(list, &in), append(errs, err)
		}
	}
	return list, errors.Join(errs...)
}

// unfinished tells whether a file is one that somebody is writing, under its later name.
func unfinished(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".new-") }

// proof tells whether a file is a proof that an image is complete, or one that is being
// written, and notes that there are any.
func (d *directory) proof(name string) bool {
	is := proof.Is(name)
	d.proofs = d.proofs || is
	if strings.HasSuffix(name, proof.Suffix) {
		d.proven = append(d.proven, name)
	}
	return is
}

func (d *directory) join(names []string) []string {
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = filepath.Join(d.path, name)
	}
	return paths
}

// read takes in the blobs of a directory, and returns what directories there are. What
// known tells is neither a blob nor unknown.
func (d *directory) read(known func(fs.DirEntry) bool) (dirs []string, err error) {
	f, err := os.Open(d.path)
	if err != nil {
		return nil, fmt.Errorf("list cache directory: %w", err)
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, fmt.Errorf("list cache directory: %w", err)
	}
	known2, blobs := suffixes(), map[string]*cached{}
	for _, e := range entries {
		id, k, ok := parse(e.Name(), known2)
		switch {
		case e.IsDir():
			dirs = append(dirs, e.Name())
		case ok && e.Type().IsRegular():
			c := blobs[id]
			if c == nil {
				c = &cached{dir: d, id: id}
				blobs[id], d.blobs = c, append(d.blobs, c)
			}
			if err := c.add(f, e.Name(), k); err != nil {
				return nil, err
			}
		case !known(e):
			d.unknown = append(d.unknown, filepath.Join(d.path, e.Name()))
		}
	}
	d.blobs = slices.DeleteFunc(d.blobs, func(c *cached) bool { return len(c.files) == 0 })
	slices.SortFunc(d.blobs, func(a, b *cached) int { return cmp.Compare(a.id, b.id) })
	return dirs, nil
}

// parse tells which blob a file belongs to.
func parse(name string, known map[string]kind) (id string, k kind, ok bool) {
	if len(name) <= idSize || !rafs.IsID(name[:idSize]) {
		return "", 0, false
	}
	k, ok = known[name[idSize:]]
	return name[:idSize], k, ok
}

const idSize = 64

// add looks at one of the blob's files. One that is gone by now is none.
func (c *cached) add(dir *os.File, name string, k kind) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "stat", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	of := file{
		name: name, kind: k, usage: st.Blocks * 512,
		used:    max(st.Atim.Nano(), st.Mtim.Nano()),
		written: max(st.Mtim.Nano(), st.Ctim.Nano()),
	}
	if k == kindSynced {
		of.used = 0 // it is the snapshotter that uses it
	}
	c.files = append(c.files, of)
	return nil
}

// again looks at the blob's files once more.
func (c *cached) again(dir *os.File) (*cached, error) {
	now := &cached{dir: c.dir, id: c.id}
	for suffix, k := range suffixes() {
		if err := now.add(dir, c.id+suffix, k); err != nil {
			return nil, err
		}
	}
	return now, nil
}
