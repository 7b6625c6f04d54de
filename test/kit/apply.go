package kit

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
)

// ApplyLayers computes the tree that OCI layers (tar files, lowest first) make,
// without a file system and without anyone else's code: the reference that mounted
// images are compared with. Hard links must point into their own layer, and each
// layer must hold the parents of its entries, as image builders write them.
func ApplyLayers(tars ...string) (Tree, error) {
	merged := map[string]*node{}
	for _, path := range tars {
		if err := applyLayer(merged, path); err != nil {
			return nil, fmt.Errorf("apply layer %s: %w", path, err)
		}
	}
	groups := map[*node][]string{}
	for p, n := range merged {
		groups[n] = append(groups[n], p)
	}
	tree := Tree{}
	for n, paths := range groups {
		sort.Strings(paths)
		e := n.Entry
		if len(paths) > 1 {
			e.Links = paths
		}
		for _, p := range paths {
			tree[p] = e
		}
	}
	return tree, nil
}

// node is an inode: hard links share one.
type node struct{ Entry }

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

func applyLayer(merged map[string]*node, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	layer := map[string]*node{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "/"))
		dir, base := path.Split(name)
		switch {
		case base == opaqueMarker:
			removeBelow(merged, path.Clean(dir))
		case strings.HasPrefix(base, whiteoutPrefix):
			gone := dir + strings.TrimPrefix(base, whiteoutPrefix)
			delete(merged, gone)
			removeBelow(merged, gone)
		case h.Typeflag == tar.TypeLink:
			target := layer[path.Clean(strings.TrimPrefix(h.Linkname, "/"))]
			if target == nil {
				return fmt.Errorf("hard link %s: its target %s is not in the layer", name, h.Linkname)
			}
			layer[name] = target
		default:
			if layer[name], err = newNode(h, r); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	for name, n := range layer {
		if name != "." && layer[path.Dir(name)] == nil {
			return fmt.Errorf("%s: its parent is not in the layer", name)
		}
		if old := merged[name]; old != nil && old.Type == "dir" && n.Type != "dir" {
			removeBelow(merged, name)
		}
		merged[name] = n
	}
	return nil
}

func removeBelow(merged map[string]*node, dir string) {
	for p := range merged {
		if strings.HasPrefix(p, dir+"/") {
			delete(merged, p)
		}
	}
}

func newNode(h *tar.Header, content io.Reader) (*node, error) {
	e := Entry{Mode: uint32(h.Mode) & 0o7777, UID: h.Uid, GID: h.Gid, Mtime: h.ModTime}
	var err error
	switch h.Typeflag {
	case tar.TypeReg:
		e.Type, e.Size = "file", h.Size
		e.SHA256, err = hashOf(content)
	case tar.TypeDir:
		e.Type = "dir"
	case tar.TypeSymlink:
		e.Type, e.Target, e.Mode = "symlink", h.Linkname, 0
	case tar.TypeChar:
		e.Type, e.Major, e.Minor = "char", uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeBlock:
		e.Type, e.Major, e.Minor = "block", uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		e.Type = "fifo"
	default:
		return nil, fmt.Errorf("tar entry of unknown type %q", h.Typeflag)
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[name] = value
		}
	}
	return &node{e}, err
}
