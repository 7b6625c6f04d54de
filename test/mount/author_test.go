package mount_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// author writes the layers of an image by chance, and remembers what is there by then.
type author struct {
	random *rand.Rand
	chunk  int // bytes
	empty  bool
	single bool // without hard links
	// deeds is how many things happen in a layer.
	deeds int
	// pool is what files have in common, within a layer and between layers.
	pool [][]byte
	// live are the paths of the image so far, and what they are; dirs end in no slash.
	live map[string]*tar.Header
	n    int // of names
}

// sheet is a layer that is being written.
type sheet struct {
	headers map[string]*tar.Header
	data    map[string][]byte
	order   []string // names of what is no directory, since a hard link comes after its target
	hidden  []string // whiteouts and opaque markers
	gone    map[string]bool
}

func newAuthor(random *rand.Rand, chunk, deeds int, empty bool) *author {
	a := &author{random: random, chunk: chunk, deeds: deeds, empty: empty, live: map[string]*tar.Header{}}
	for range 4 {
		a.pool = append(a.pool, a.noise(chunk))
	}
	return a
}

// noise does not compress.
func (a *author) noise(size int) []byte {
	data := make([]byte, size+8)
	for at := 0; at < size; at += 8 {
		binary.LittleEndian.PutUint64(data[at:], a.random.Uint64())
	}
	return data[:size]
}

// layers are the layers of a whole image.
func (a *author) layers(count int) (layers []kit.Layer) {
	for range count {
		s := a.sheet()
		layers = append(layers, func(w *tar.Writer) error { return s.write(w) })
	}
	return layers
}

func (a *author) sheet() *sheet {
	s := &sheet{headers: map[string]*tar.Header{}, data: map[string][]byte{}, gone: map[string]bool{}}
	lower := maps.Clone(a.live)
	s.put(a.header(".", tar.TypeDir), nil)
	// What is hidden is of lower layers, and goes first.
	for range a.deeds / 6 {
		a.hide(s, lower)
	}
	for range a.deeds {
		a.deed(s)
	}
	maps.Copy(a.live, s.headers)
	return s
}

func (s *sheet) put(h *tar.Header, data []byte) {
	if s.headers[h.Name] == nil && h.Typeflag != tar.TypeDir {
		s.order = append(s.order, h.Name)
	}
	h.Size = int64(len(data))
	s.headers[h.Name], s.data[h.Name] = h, data
}

// hide takes something of the layers below away.
func (a *author) hide(s *sheet, lower map[string]*tar.Header) {
	names := slices.Sorted(maps.Keys(lower))
	names = slices.DeleteFunc(names, func(n string) bool {
		// nydus-image does not see whiteouts of names that are no UTF-8.
		return n == "." || a.live[n] == nil || s.headers[n] != nil || !utf8.ValidString(n)
	})
	if len(names) == 0 {
		return
	}
	name := names[a.random.IntN(len(names))]
	gone := func(below string) {
		maps.DeleteFunc(a.live, func(n string, _ *tar.Header) bool { return strings.HasPrefix(n, below+"/") })
	}
	if a.live[name].Typeflag == tar.TypeDir && a.random.IntN(2) == 0 {
		a.parents(s, name+"/x")
		s.hidden = append(s.hidden, name+"/.wh..wh..opq")
		gone(name)
		return
	}
	a.parents(s, name)
	delete(a.live, name)
	gone(name)
	if len(path.Base(name)) <= 255-len(".wh.") && a.random.IntN(3) > 0 {
		s.hidden = append(s.hidden, path.Join(path.Dir(name), ".wh."+path.Base(name)))
		s.gone[name] = true // no builder of layers puts it there again beside the whiteout
		return
	}
	// Another kind of thing takes its place.
	if a.random.IntN(2) == 0 {
		s.put(a.header(name, tar.TypeDir), nil)
	} else {
		s.put(a.header(name, tar.TypeReg), []byte("instead\n"))
	}
}

// parents puts the directories above a name into the layer, as they are, or changed.
func (a *author) parents(s *sheet, name string) {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if s.headers[dir] != nil {
			continue
		}
		h := a.live[dir]
		if h == nil || a.random.IntN(4) == 0 {
			h = a.header(dir, tar.TypeDir)
		}
		s.put(h, nil)
	}
}

// deed adds one thing to a layer.
func (a *author) deed(s *sheet) {
	name := a.name(s)
	a.parents(s, name)
	kinds := []byte{tar.TypeReg, tar.TypeReg, tar.TypeReg, tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo, tar.TypeChar, tar.TypeBlock}
	kind := kinds[a.random.IntN(len(kinds))]
	if kind == tar.TypeLink && a.single {
		kind = tar.TypeReg
	}
	h := a.header(name, kind)
	var data []byte
	switch kind {
	case tar.TypeReg:
		data = a.content()
	case tar.TypeSymlink:
		targets := []string{"nowhere", "/", "../../../x", name, strings.Repeat("t/", 1+a.random.IntN(1000)) + "t", "\u00fc"}
		h.Linkname, h.Mode = targets[a.random.IntN(len(targets))], 0o777
	case tar.TypeChar, tar.TypeBlock:
		h.Devmajor, h.Devminor = a.random.Int64N(512), a.random.Int64N(1<<18)
	case tar.TypeLink:
		targets := slices.DeleteFunc(slices.Clone(s.order), func(n string) bool { return s.headers[n].Typeflag != tar.TypeReg })
		if len(targets) == 0 {
			return
		}
		to := s.headers[targets[a.random.IntN(len(targets))]]
		*h = *to
		h.Name, h.Typeflag, h.Linkname, h.PAXRecords = name, tar.TypeLink, to.Name, nil
	}
	s.put(h, data)
}

// name is a new one: short, long, odd, or far below.
func (a *author) name(s *sheet) string {
	name := a.anyName(s)
	if len(name) > 90 || strings.ContainsFunc(name, func(r rune) bool { return r > unicode.MaxASCII }) {
		// It, or its whiteout's, is told by a PAX record then, which nydus-image ends at a line's end.
		name = strings.ReplaceAll(name, "\n", "_")
	}
	return name
}

func (a *author) anyName(s *sheet) string {
	a.n++
	base := fmt.Sprintf("%d", a.n)
	switch a.random.IntN(8) {
	case 0:
		base += strings.Repeat("n", 255-len(base))
	case 1:
		base += []string{" ", "\u65e5\u672c", "\n", "\\", "%2f", ".wh", "\xff\xfe", "'\""}[a.random.IntN(8)]
	case 2:
		deep := "deep/" + strings.Repeat(fmt.Sprintf("d%d/", a.random.IntN(3)), 1+a.random.IntN(30)) + base
		if a.clear(s, deep) {
			return deep
		}
	}
	dirs := []string{"."}
	for _, n := range slices.Sorted(maps.Keys(a.live)) {
		if a.live[n].Typeflag == tar.TypeDir && (s.headers[n] == nil || s.headers[n].Typeflag == tar.TypeDir) && len(n) < 2000 {
			dirs = append(dirs, n)
		}
	}
	for _, n := range slices.Sorted(maps.Keys(s.headers)) {
		if s.headers[n].Typeflag == tar.TypeDir && len(n) < 2000 {
			dirs = append(dirs, n)
		}
	}
	return path.Join(dirs[a.random.IntN(len(dirs))], base)
}

// clear tells whether all that lies above a name is directories, or nothing yet.
func (a *author) clear(s *sheet, name string) bool {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		h := s.headers[dir]
		if h == nil {
			h = a.live[dir]
		}
		if s.gone[dir] || h != nil && h.Typeflag != tar.TypeDir {
			return false
		}
	}
	return true
}

// header is that of something with all that can be said about it.
func (a *author) header(name string, kind byte) *tar.Header {
	h := &tar.Header{Name: name, Typeflag: kind, Format: tar.FormatPAX, PAXRecords: map[string]string{}}
	modes := []int64{0o644, 0o755, 0o600, 0, 0o4755, 0o2711, 0o1777, 0o7777, a.random.Int64N(0o10000)}
	h.Mode = modes[a.random.IntN(len(modes))]
	h.Uid, h.Gid = a.random.IntN(2), a.random.IntN(1<<21-1)
	times := []time.Time{
		time.Unix(1, 0), time.Unix(1_700_000_000, 0), time.Unix(1<<31, 0), time.Unix(1<<32+5, 0), time.Unix(a.random.Int64N(1<<33-1)+1, 0),
		time.Unix(0, 0), time.Unix(-86_400, 0), time.Unix(1_600_000_000, 123_456_789),
	}
	h.ModTime = times[a.random.IntN(len(times))]
	if kind == tar.TypeReg || kind == tar.TypeDir {
		a.attributes(h)
	}
	return h
}

func (a *author) attributes(h *tar.Header) {
	switch a.random.IntN(6) {
	case 0:
		for n := range 1 + a.random.IntN(12) {
			h.PAXRecords[fmt.Sprintf("SCHILY.xattr.user.%d-%s", n, strings.Repeat("k", a.random.IntN(200)))] = strings.Repeat("v", a.random.IntN(300))
		}
	case 1:
		capability := make([]byte, 20) // version 2, effective
		binary.LittleEndian.PutUint32(capability, 0x02000001)
		binary.LittleEndian.PutUint32(capability[4:], 1<<unix.CAP_NET_RAW|1<<unix.CAP_CHOWN)
		if h.Typeflag == tar.TypeReg {
			h.PAXRecords["SCHILY.xattr.security.capability"] = string(capability)
		}
	}
}

// content is that of a file: of every size that matters, and made of what others have too.
func (a *author) content() []byte {
	if a.empty {
		return nil
	}
	large := a.chunk
	if large >= 1<<20 && a.random.IntN(4) > 0 {
		large = 1 << 16 // few files are as large as the largest chunks
	}
	switch a.random.IntN(9) {
	case 0:
		return nil
	case 1:
		return a.noise(1 + a.random.IntN(4096))
	case 2: // about one chunk
		return a.noise(large - 1 + a.random.IntN(3))
	case 3: // about a page
		return a.noise(4095 + a.random.IntN(3))
	case 4: // duplicates, and a rest of its own
		one := a.pool[a.random.IntN(len(a.pool))][:large]
		return slices.Concat(one, a.pool[a.random.IntN(len(a.pool))][:large], a.noise(a.random.IntN(100)))
	case 5: // the same chunk three times
		return bytes.Repeat(a.pool[0][:large], 3)
	case 6: // sparse: islands in zeros
		data := make([]byte, 3*large+a.random.IntN(10_000))
		copy(data[a.random.IntN(len(data)):], a.noise(500))
		return data
	case 7:
		return []byte(strings.Repeat("text that compresses well\n", a.random.IntN(5000)))
	}
	return a.noise(a.random.IntN(300))
}

// write writes the layer: directories from the top, the rest, then what hides.
func (s *sheet) write(w *tar.Writer) error {
	put := func(h *tar.Header, data []byte) error {
		c := *h
		if c.Typeflag == tar.TypeDir {
			c.Name += "/"
		}
		if err := w.WriteHeader(&c); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
		_, err := w.Write(data)
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(s.headers)) {
		if h := s.headers[name]; h.Typeflag == tar.TypeDir {
			if err := put(h, nil); err != nil {
				return err
			}
		}
	}
	for _, name := range s.order {
		if h := s.headers[name]; h.Typeflag != tar.TypeDir {
			if err := put(h, s.data[name]); err != nil {
				return err
			}
		}
	}
	for _, name := range s.hidden {
		if err := put(&tar.Header{Name: name, Typeflag: tar.TypeReg, Format: tar.FormatPAX, ModTime: time.Unix(1, 0)}, nil); err != nil {
			return err
		}
	}
	return nil
}
