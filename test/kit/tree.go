package kit

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Entry is everything about one path that an image must preserve.
type Entry struct {
	Type   string // file, dir, symlink, char, block, fifo, socket; mount: see Walk
	Mode   uint32 // permissions with setuid, setgid and sticky; not of symlinks
	UID    int
	GID    int
	Mtime  time.Time
	Size   int64             // of files
	SHA256 string            // of a file's content, in hex
	Xattrs map[string]string // without the overlay's own; not of symlinks
	Target string            // of a symlink
	Major  uint32            // of devices
	Minor  uint32
	Links  []string // all paths of a group of hard links, sorted; nil without others
}

// Tree maps paths without a leading slash to entries; the root is ".".
type Tree map[string]Entry

type inode struct{ dev, ino uint64 }

// Walk reads the tree below root, which may be /proc/PID/root of a container.
// It does not enter other mounts: their place is an entry of type "mount".
func Walk(root string) (Tree, error) {
	root = strings.TrimRight(root, "/") + "/" // follows /proc/PID/root
	w := walker{root: root, tree: Tree{}, groups: map[inode][]string{}}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, root, 0, unix.STATX_MNT_ID, &st); err != nil {
		return nil, fmt.Errorf("walk %s: %w", root, err)
	}
	w.mount = st.Mnt_id
	if err := filepath.WalkDir(root, w.visit); err != nil {
		return nil, fmt.Errorf("walk %s: %w", root, err)
	}
	for _, paths := range w.groups {
		if len(paths) < 2 {
			continue
		}
		sort.Strings(paths)
		for _, p := range paths {
			e := w.tree[p]
			e.Links = paths
			w.tree[p] = e
		}
	}
	return w.tree, nil
}

// MustWalk is Walk for a test.
func MustWalk(t TB, root string) Tree {
	t.Helper()
	tree, err := Walk(root)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return tree
}

type walker struct {
	root   string
	mount  uint64
	tree   Tree
	groups map[inode][]string
}

func (w *walker) visit(path string, _ fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	rel := strings.TrimPrefix(path, w.root)
	if rel == "" {
		rel = "."
	}
	flags, at := unix.AT_SYMLINK_NOFOLLOW, path
	if rel == "." {
		flags, at = 0, w.root
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, at, flags, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st); err != nil {
		return &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	if st.Mnt_id != w.mount {
		w.tree[rel] = Entry{Type: "mount"}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return fs.SkipDir
		}
		return nil
	}
	e, err := readEntry(at, &st)
	if err != nil {
		return err
	}
	w.tree[rel] = e
	if e.Type != "dir" && st.Nlink > 1 {
		id := inode{uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), st.Ino}
		w.groups[id] = append(w.groups[id], rel)
	}
	return nil
}

func readEntry(path string, st *unix.Statx_t) (Entry, error) {
	e := Entry{
		Mode: uint32(st.Mode) & 0o7777, UID: int(st.Uid), GID: int(st.Gid),
		Mtime: time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec)),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type, e.Size = "file", int64(st.Size)
		e.SHA256, err = hashFile(path)
	case unix.S_IFDIR:
		e.Type = "dir"
	case unix.S_IFLNK:
		e.Type, e.Mode = "symlink", 0
		e.Target, err = os.Readlink(path)
		return e, err
	case unix.S_IFCHR:
		e.Type, e.Major, e.Minor = "char", st.Rdev_major, st.Rdev_minor
	case unix.S_IFBLK:
		e.Type, e.Major, e.Minor = "block", st.Rdev_major, st.Rdev_minor
	case unix.S_IFIFO:
		e.Type = "fifo"
	case unix.S_IFSOCK:
		e.Type = "socket"
	}
	if err != nil {
		return Entry{}, err
	}
	e.Xattrs, err = readXattrs(path)
	return e, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return hashOf(f)
}

func hashOf(r io.Reader) (string, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, r); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func readXattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "llistxattr", Path: path, Err: err}
	}
	var attrs map[string]string
	for _, name := range strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, &fs.PathError{Op: "lgetxattr " + name, Path: path, Err: err}
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[name] = string(value[:n])
	}
	return attrs, nil
}

// Diff lists how got differs from want, one line a path, sorted. What lies under
// a mount in got is not compared, nor is the root's modification time, which belongs to the
// writable layer.
func Diff(want, got Tree) []string {
	var lines []string
	for path, w := range want {
		if hidden(got, path) {
			continue
		}
		g, ok := got[path]
		if !ok {
			lines = append(lines, fmt.Sprintf("%q: missing (want %s)", path, w.Type))
			continue
		}
		if path == "." {
			g.Mtime = w.Mtime
		}
		if d := w.diff(g); len(d) > 0 {
			lines = append(lines, fmt.Sprintf("%q: %s", path, strings.Join(d, "; ")))
		}
	}
	for path, g := range got {
		if _, ok := want[path]; !ok && g.Type != "mount" {
			lines = append(lines, fmt.Sprintf("%q: unexpected %s", path, g.Type))
		}
	}
	sort.Strings(lines)
	return lines
}

// hidden reports whether a mount lies on path or above it.
func hidden(t Tree, path string) bool {
	for ; path != "." && path != "/"; path = filepath.Dir(path) {
		if t[path].Type == "mount" {
			return true
		}
	}
	return false
}

func (w Entry) diff(g Entry) []string {
	var d []string
	differ := func(what string, want, got any) {
		if want != got {
			d = append(d, fmt.Sprintf("%s is %v, want %v", what, got, want))
		}
	}
	differ("type", w.Type, g.Type)
	if w.Type != g.Type {
		return d
	}
	differ("mode", fmt.Sprintf("%04o", w.Mode), fmt.Sprintf("%04o", g.Mode))
	differ("owner", fmt.Sprintf("%d:%d", w.UID, w.GID), fmt.Sprintf("%d:%d", g.UID, g.GID))
	if !w.Mtime.Equal(g.Mtime) {
		differ("mtime", w.Mtime.UTC().Format(time.RFC3339Nano), g.Mtime.UTC().Format(time.RFC3339Nano))
	}
	differ("size", w.Size, g.Size)
	differ("sha256", w.SHA256, g.SHA256)
	differ("target", w.Target, g.Target)
	differ("device", fmt.Sprintf("%d:%d", w.Major, w.Minor), fmt.Sprintf("%d:%d", g.Major, g.Minor))
	differ("hard links", fmt.Sprintf("%q", w.Links), fmt.Sprintf("%q", g.Links))
	differ("xattrs", fmt.Sprintf("%q", w.Xattrs), fmt.Sprintf("%q", g.Xattrs))
	return d
}

// EqualTrees fails the test with the first differences unless the trees are equal.
func EqualTrees(t TB, what string, want, got Tree) {
	t.Helper()
	lines := Diff(want, got)
	if len(lines) == 0 {
		return
	}
	shown := lines[:min(len(lines), 40)]
	t.Errorf("%s: %d of %d paths differ:\n  %s", what, len(lines), len(want), strings.Join(shown, "\n  "))
}
