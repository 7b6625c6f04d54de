package kit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The fixture's cache key holds the code that makes it.
var (
	//go:embed fixture.go
	fixtureSource []byte
	//go:embed image.go
	imageSource []byte
	//go:embed nydus.go
	nydusSource []byte
)

// MainCommand is what containers of the main image run: it reads python's
// standard library through the image.
var MainCommand = []string{"/usr/bin/python3", "-c",
	"import json, ssl, sqlite3, decimal, http.client; print('ready', flush=True)"}

// Pause is a command that every fixture image can run and that ends only by a signal.
var Pause = []string{"/usr/bin/busybox", "sleep", "2147483"}

// mainLayers are the layers of the main image that come from Debian packages.
var mainLayers = [][]string{
	{"base-files", "netbase", "busybox-static", "libc6", "libgcc-s1", "gcc-12-base", "coreutils", "bash", "dash",
		"libacl1", "libattr1", "libselinux1", "libpcre2-8-0", "libtinfo6", "libgmp10", "libcrypt1", "perl-base"},
	{"sed", "grep", "gawk", "findutils", "tar", "gzip", "libmpfr6", "libsigsegv2", "libreadline8", "readline-common",
		"tzdata", "media-types", "iso-codes"},
	{"python3-minimal", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libexpat1", "zlib1g",
		"libssl3", "libbz2-1.0", "liblzma5", "libffi8", "libsqlite3-0", "libuuid1", "libncursesw6", "libdb5.3",
		"libnsl2", "libtirpc3"},
	{"perl-modules-5.36", "git", "libcurl3-gnutls"},
	{"libicu72", "libstdc++6", "libxml2", "libllvm14"},
}

// MainImage returns the main fixture as a plain OCI image and converted to
// nydus: Debian packages in five layers, about 280 MB, then two generated
// layers with everything that a file system can get wrong (see OddLower and
// OddUpper). Both are built once and kept in the tool cache.
func MainImage(t TB, opts NydusOptions) (plain, nydus *Image) {
	t.Helper()
	tools := MustTools(t)
	plain, err := cachedImage(tools, "main", nil, func(dir string) (*Image, error) {
		var layers []Layer
		for n, packages := range mainLayers {
			layers = append(layers, DebLayer(tools, n == 0, packages...))
		}
		return BuildImage(dir, Pause, append(layers, OddLower(), OddUpper())...)
	})
	if err != nil {
		t.Fatalf("main image: %v", err)
	}
	nydus, err = cachedImage(tools, "main-nydus", []any{plain.Digest(), opts}, func(dir string) (*Image, error) {
		return plain.Nydus(context.Background(), tools, dir, opts)
	})
	if err != nil {
		t.Fatalf("main image: %v", err)
	}
	nydus.Tars = plain.Tars
	return plain, nydus
}

// SmallImage returns a plain image that differs for each name: busybox, a few
// files, two layers, 2 MB. Nydus converts it in a fraction of a second.
func SmallImage(t TB, name string) *Image {
	t.Helper()
	tools := MustTools(t)
	img, err := BuildImage(t.TempDir(), Pause, BusyboxLayer(tools), FileLayer(
		File{Name: "./"},
		File{Name: "etc/"},
		File{Name: "etc/passwd", Data: passwd},
		File{Name: "etc/group", Data: group},
		File{Name: "name", Data: name},
		File{Name: "data", Data: string(noise(int64(len(name))+int64(digestNumber(name)), 300_000))},
	))
	if err != nil {
		t.Fatalf("small image %s: %v", name, err)
	}
	return img
}

func digestNumber(name string) uint32 {
	sum := sha256.Sum256([]byte(name))
	return binary.LittleEndian.Uint32(sum[:])
}

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
	group  = "root:x:0:\napp:x:1000:\nnogroup:x:65534:\n"
)

// BusyboxLayer is the least that a container can run: a static busybox with the
// usual directories and an applet link for sh.
func BusyboxLayer(tools Tools) Layer {
	return func(w *tar.Writer) error {
		d := newDebWriter(w)
		if err := d.skeleton(); err != nil {
			return err
		}
		d.only = func(name string) bool { return name == "usr/bin/busybox" }
		if err := d.add(tools, "busybox-static"); err != nil {
			return err
		}
		return d.put(&tar.Header{Name: "usr/bin/sh", Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
}

// DebLayer is a layer with the files of Debian packages, in the merged /usr
// layout; base adds the root directory, the links into /usr, and users.
func DebLayer(tools Tools, base bool, packages ...string) Layer {
	return func(w *tar.Writer) error {
		d := newDebWriter(w)
		if base {
			if err := d.skeleton(); err != nil {
				return err
			}
		}
		for _, p := range packages {
			if err := d.add(tools, p); err != nil {
				return fmt.Errorf("package %s: %w", p, err)
			}
		}
		if !base {
			return nil
		}
		return d.put(&tar.Header{Name: "usr/bin/sh", Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
}

// debWriter copies packages' tar streams into one layer.
type debWriter struct {
	w    *tar.Writer
	seen map[string]bool
	only func(name string) bool // nil: everything
}

func newDebWriter(w *tar.Writer) *debWriter { return &debWriter{w: w, seen: map[string]bool{}} }

// put writes an entry once, its parents before it.
func (d *debWriter) put(h *tar.Header, content io.Reader) error {
	h.Name = path.Clean(h.Name)
	if d.seen[h.Name] {
		return nil
	}
	if h.Name != "." {
		if err := d.put(&tar.Header{Name: path.Dir(h.Name), Typeflag: tar.TypeDir, Mode: 0o755}, nil); err != nil {
			return err
		}
	}
	d.seen[h.Name] = true
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	h.Uname, h.Gname, h.Format = "", "", tar.FormatPAX
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	if h.Typeflag == tar.TypeDir {
		h.Name += "/"
	}
	if err := d.w.WriteHeader(h); err != nil {
		return err
	}
	if content != nil && h.Typeflag == tar.TypeReg {
		_, err := io.Copy(d.w, content)
		return err
	}
	return nil
}

func (d *debWriter) skeleton() error {
	for _, dir := range []string{".", "dev", "proc", "sys", "run", "etc", "usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "root", "tmp", "var"} {
		mode := int64(0o755)
		if dir == "tmp" {
			mode = 0o1777
		}
		if err := d.put(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: mode}, nil); err != nil {
			return err
		}
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := d.put(&tar.Header{Name: link, Typeflag: tar.TypeSymlink, Linkname: "usr/" + link, Mode: 0o777}, nil); err != nil {
			return err
		}
	}
	for _, f := range []File{{Name: "etc/group", Data: group}, {Name: "etc/passwd", Data: passwd}} {
		h := &tar.Header{Name: f.Name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.Data))}
		if err := d.put(h, strings.NewReader(f.Data)); err != nil {
			return err
		}
	}
	return nil
}

// add copies one package.
func (d *debWriter) add(tools Tools, name string) error {
	debs, _ := filepath.Glob(filepath.Join(tools.FixtureDebs, name+"_*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("%d packages %s in %s: run 'make tools'", len(debs), name, tools.FixtureDebs)
	}
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", debs[0])
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = d.copy(out)
	if _, drain := io.Copy(io.Discard, out); err == nil {
		err = drain
	}
	if waited := cmd.Wait(); waited != nil {
		return fmt.Errorf("dpkg-deb: %w: %s", waited, stderr.Bytes())
	}
	return err
}

func (d *debWriter) copy(stream io.Reader) error {
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		h.Name = mergedUsr(h.Name)
		if h.Typeflag == tar.TypeLink {
			h.Linkname = mergedUsr(h.Linkname)
		}
		if d.only != nil && !d.only(h.Name) {
			continue
		}
		h.PAXRecords = nil
		if err := d.put(h, r); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

// mergedUsr moves /bin, /sbin, /lib and /lib64 below /usr, as on any current Debian.
func mergedUsr(name string) string {
	name = path.Clean(strings.TrimPrefix(name, "./"))
	top, _, _ := strings.Cut(name, "/")
	switch top {
	case "bin", "sbin", "lib", "lib64":
		return "usr/" + name
	}
	return name
}

// odd writes the entries of the generated layers. The first error sticks.
type odd struct {
	w     *tar.Writer
	modes map[string]int64 // of what was written, for hard links
	err   error
}

func newOdd(w *tar.Writer) *odd { return &odd{w: w, modes: map[string]int64{}} }

func (o *odd) put(h *tar.Header, data []byte) {
	if o.err != nil {
		return
	}
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	if h.Typeflag == tar.TypeLink { // extracting it sets the mode of the file that has both names
		h.Mode = o.modes[h.Linkname]
	}
	o.modes[h.Name] = h.Mode
	h.Format, h.Size = tar.FormatPAX, int64(len(data))
	if o.err = o.w.WriteHeader(h); o.err == nil {
		_, o.err = o.w.Write(data)
	}
	if o.err != nil {
		o.err = fmt.Errorf("%q: %w", h.Name, o.err)
	}
}

func (o *odd) dir(name string, mode int64) {
	o.put(&tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: mode}, nil)
}

func (o *odd) file(name string, mode int64, data []byte) {
	o.put(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode}, data)
}

func (o *odd) special(name string, kind byte, mode, major, minor int64) {
	o.put(&tar.Header{Name: name, Typeflag: kind, Mode: mode, Devmajor: major, Devminor: minor}, nil)
}

func (o *odd) link(name, target string, kind byte) {
	o.put(&tar.Header{Name: name, Typeflag: kind, Linkname: target, Mode: 0o777}, nil)
}

func (o *odd) xattrs(name string, kind byte, attrs map[string]string) {
	h := &tar.Header{Name: name, Typeflag: kind, Mode: 0o755, PAXRecords: map[string]string{}}
	for k, v := range attrs {
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	o.put(h, nil)
}

// noise is reproducible data that does not compress.
func noise(seed int64, size int) []byte {
	data := make([]byte, size)
	rand.New(rand.NewSource(seed)).Read(data)
	return data
}

// OddLower is a generated layer below /odd: setuid files, devices, hard links,
// symlinks, xattrs and file capabilities, sparse and empty files, sizes around
// page and chunk borders, 10,000 small files, odd names, times, owners and
// modes, and what OddUpper hides. What nydus-image 2.2.0 itself gets wrong is left
// out: hard links of devices (RAFS v6), owners above 2^21-1 and times above 2^33-1
// (they need PAX records in the tar), times of zero (shown as the time of the mount).
func OddLower() Layer {
	return func(w *tar.Writer) error {
		o := newOdd(w)
		o.dir(".", 0o755)
		o.dir("odd", 0o755)
		o.permissions()
		o.links()
		o.attributes()
		o.sizes()
		o.names()
		o.times()
		o.many()
		o.toHide()
		return o.err
	}
}

func (o *odd) permissions() {
	o.dir("odd/modes", 0o755)
	for _, mode := range []int64{0, 0o111, 0o444, 0o600, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777} {
		o.file(fmt.Sprintf("odd/modes/file-%04o", mode), mode, fmt.Appendf(nil, "mode %04o\n", mode))
		o.dir(fmt.Sprintf("odd/modes/dir-%04o", mode), mode)
	}
	o.dir("odd/owners", 0o755)
	for _, id := range []int{1, 1000, 65534, 65536, 1234567, 2097150} {
		o.put(&tar.Header{Name: fmt.Sprintf("odd/owners/%d", id), Typeflag: tar.TypeReg, Mode: 0o640, Uid: id, Gid: id + 1}, []byte("owned"))
	}
	o.dir("odd/devices", 0o755)
	o.special("odd/devices/null", tar.TypeChar, 0o666, 1, 3)
	o.special("odd/devices/large", tar.TypeChar, 0o600, 240, 65537)
	o.special("odd/devices/block", tar.TypeBlock, 0o660, 7, 200)
	o.special("odd/devices/fifo", tar.TypeFifo, 0o622, 0, 0)
}

func (o *odd) links() {
	o.dir("odd/links", 0o755)
	o.dir("odd/links/elsewhere", 0o755)
	o.file("odd/links/one", 0o644, []byte("three names"))
	o.link("odd/links/two", "odd/links/one", tar.TypeLink)
	o.link("odd/links/elsewhere/three", "odd/links/one", tar.TypeLink)
	o.link("odd/links/relative", "elsewhere/three", tar.TypeSymlink)
	o.link("odd/links/absolute", "/odd/links/one", tar.TypeSymlink)
	o.link("odd/links/dangling", "no/such/file", tar.TypeSymlink)
	o.link("odd/links/loop", "loop", tar.TypeSymlink)
	o.link("odd/links/escaping", "../../../../../etc/passwd", tar.TypeSymlink)
	o.link("odd/links/long", strings.Repeat("sixteen-letters/", 200), tar.TypeSymlink)
}

func (o *odd) attributes() {
	// A version 2 file capability: cap_net_raw, effective and permitted.
	capability := make([]byte, 20)
	binary.LittleEndian.PutUint32(capability, 0x02000001)
	binary.LittleEndian.PutUint32(capability[4:], 1<<unix.CAP_NET_RAW)
	o.dir("odd/xattrs", 0o755)
	o.xattrs("odd/xattrs/capability", tar.TypeReg, map[string]string{"security.capability": string(capability)})
	o.xattrs("odd/xattrs/user", tar.TypeReg, map[string]string{"user.one": "1", "user.two": "zwei \u00fc", "user.long": strings.Repeat("x", 2000)})
	o.xattrs("odd/xattrs/dir/", tar.TypeDir, map[string]string{"user.of": "a directory"})
}

func (o *odd) sizes() {
	o.dir("odd/sizes", 0o755)
	o.dir("odd/sizes/empty", 0o755)
	for n, size := range []int{0, 1, 4095, 4096, 4097, 1<<20 - 1, 1 << 20, 1<<20 + 1, 5<<20 + 12345} {
		o.file(fmt.Sprintf("odd/sizes/%d", size), 0o644, noise(int64(n), size))
	}
	sparse := make([]byte, 16<<20)
	copy(sparse[9<<20:], noise(99, 5000))
	o.file("odd/sizes/sparse", 0o644, sparse)
	o.file("odd/sizes/zeros", 0o644, make([]byte, 3<<20))
	o.file("odd/sizes/same-as-4097", 0o644, noise(4, 4097))
}

func (o *odd) names() {
	o.dir("odd/names", 0o755)
	for n, name := range []string{
		strings.Repeat("l", 255), strings.Repeat("\u00e4", 127), "\u65e5\u672c\u8a9e", "\U0001f40b", "nai\u0308ve", "na\u00efve",
		"two words", " lead and trail ", "-dash", "a,b", "a:b", "a=b", `back\slash`, "quote\"'", "tab\tnewline\n", "*?[x]", "..hidden", "%41",
	} {
		o.file("odd/names/"+name, 0o644, fmt.Appendf(nil, "name %d\n", n))
	}
	deep := "odd/names/deep"
	o.dir(deep, 0o755)
	for n := range 20 {
		deep += fmt.Sprintf("/%02d-%s", n, strings.Repeat("d", 40))
		o.dir(deep, 0o755)
	}
	o.file(deep+"/bottom", 0o644, []byte("down here\n"))
}

func (o *odd) times() {
	o.dir("odd/times", 0o755)
	for _, sec := range []int64{1, 86_399, 951_782_400, 1<<31 - 1, 1 << 31, 1 << 32, 1<<33 - 1} {
		o.put(&tar.Header{Name: fmt.Sprintf("odd/times/%d", sec), Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(sec, 0)}, nil)
	}
	o.put(&tar.Header{Name: "odd/times/dir/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(12345, 0)}, nil)
	o.put(&tar.Header{Name: "odd/times/link", Typeflag: tar.TypeSymlink, Linkname: "dir", Mode: 0o777, ModTime: time.Unix(54321, 0)}, nil)
}

func (o *odd) many() {
	o.dir("odd/many", 0o755)
	for d := range 100 {
		o.dir(fmt.Sprintf("odd/many/%02d", d), 0o755)
		for f := range 100 {
			o.file(fmt.Sprintf("odd/many/%02d/%02d.txt", d, f), 0o644, noise(int64(d*100+f), 16+(d*7+f*13)%400))
		}
	}
}

func (o *odd) toHide() {
	o.dir("odd/lower", 0o755)
	for _, dir := range []string{"gone-dir", "gone-dir/sub", "opaque", "opaque/sub", "dir-to-file", "changed-dir", "emptied"} {
		o.dir("odd/lower/"+dir, 0o755)
	}
	for _, file := range []string{"kept", "gone", "gone-dir/a", "gone-dir/sub/b", "opaque/old", "opaque/sub/old", "opaque/again",
		"dir-to-file/x", "file-to-dir", "file-to-link", "changed-mode", "changed-content", "changed-dir/kept", "emptied/1", "emptied/2"} {
		o.file("odd/lower/"+file, 0o644, []byte("lower "+file+"\n"))
	}
}

// OddUpper hides, replaces and changes parts of OddLower by whiteouts, opaque
// directories and entries of other types.
func OddUpper() Layer {
	return func(w *tar.Writer) error {
		o := newOdd(w)
		o.dir(".", 0o755)
		o.dir("odd", 0o755)
		o.dir("odd/lower", 0o751)
		o.file("odd/lower/.wh.gone", 0, nil)
		o.file("odd/lower/.wh.gone-dir", 0, nil)
		o.dir("odd/lower/opaque", 0o700)
		o.file("odd/lower/opaque/"+opaqueMarker, 0, nil)
		o.file("odd/lower/opaque/new", 0o600, []byte("upper"))
		o.file("odd/lower/opaque/again", 0o600, []byte("upper again"))
		o.file("odd/lower/dir-to-file", 0o644, []byte("was a directory"))
		o.dir("odd/lower/file-to-dir", 0o755)
		o.file("odd/lower/file-to-dir/in", 0o644, []byte("was a file"))
		o.link("odd/lower/file-to-link", "kept", tar.TypeSymlink)
		o.file("odd/lower/changed-mode", 0o4711, []byte("lower changed-mode\n"))
		o.put(&tar.Header{Name: "odd/lower/changed-content", Typeflag: tar.TypeReg, Mode: 0o644, Uid: 7, Gid: 8, ModTime: time.Unix(1_600_000_000, 0)}, []byte("upper"))
		o.put(&tar.Header{Name: "odd/lower/changed-dir/", Typeflag: tar.TypeDir, Mode: 0o2775, Uid: 5, Gid: 6}, nil)
		o.file("odd/lower/changed-dir/added", 0o644, []byte("upper"))
		o.dir("odd/lower/emptied", 0o755)
		o.file("odd/lower/emptied/.wh.1", 0, nil)
		o.file("odd/lower/emptied/.wh.2", 0, nil)
		return o.err
	}
}

// cachedImage keeps what build makes in the tool cache, under a key of the
// code, the packages and the given inputs. Runs at the same time wait.
func cachedImage(tools Tools, name string, inputs []any, build func(dir string) (*Image, error)) (*Image, error) {
	key, err := fixtureKey(tools, inputs)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(tools.Cache, "fixture-"+name+"-"+key)
	if img, err := loadImage(dir); err == nil {
		return img, nil
	}
	lock, err := os.OpenFile(filepath.Join(tools.Cache, ".fixture.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	if img, err := loadImage(dir); err == nil {
		return img, nil
	}
	remains, _ := filepath.Glob(filepath.Join(tools.Cache, ".fixture-tmp-*"))
	for _, r := range remains { // of killed runs: the lock is ours
		_ = os.RemoveAll(r)
	}
	tmp, err := os.MkdirTemp(tools.Cache, ".fixture-tmp-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	img, err := build(tmp)
	if err != nil {
		return nil, err
	}
	if err := saveImage(img, tmp); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return nil, err
	}
	return loadImage(dir)
}

func fixtureKey(tools Tools, inputs []any) (string, error) {
	sum := sha256.New()
	for _, source := range [][]byte{fixtureSource, imageSource, nydusSource} {
		sum.Write(source)
	}
	debs, err := filepath.Glob(filepath.Join(tools.FixtureDebs, "*.deb"))
	if err != nil || len(debs) == 0 {
		return "", fmt.Errorf("no packages in %s: run 'make tools'", tools.FixtureDebs)
	}
	for _, deb := range debs {
		fmt.Fprintln(sum, filepath.Base(deb))
	}
	if len(inputs) > 0 {
		fmt.Fprintln(sum, tools.NydusImage, fmt.Sprint(inputs...))
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:8]), nil
}

const imageRecord = "image.json"

// saveImage writes a record with paths relative to dir; tars elsewhere stay out.
func saveImage(img *Image, dir string) error {
	rel := *img
	rel.Config.Path = filepath.Base(img.Config.Path)
	rel.Layers = append([]Blob(nil), img.Layers...)
	for n := range rel.Layers {
		rel.Layers[n].Path = filepath.Base(rel.Layers[n].Path)
	}
	rel.Tars = nil
	for _, t := range img.Tars {
		if filepath.Dir(t) == dir {
			rel.Tars = append(rel.Tars, filepath.Base(t))
		}
	}
	text, err := json.Marshal(rel)
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, imageRecord), text, 0o644)
}

func loadImage(dir string) (*Image, error) {
	text, err := os.ReadFile(filepath.Join(dir, imageRecord))
	if err != nil {
		return nil, err
	}
	var img Image
	if err := json.Unmarshal(text, &img); err != nil {
		return nil, err
	}
	img.Config.Path = filepath.Join(dir, img.Config.Path)
	for n := range img.Layers {
		img.Layers[n].Path = filepath.Join(dir, img.Layers[n].Path)
	}
	for n := range img.Tars {
		img.Tars[n] = filepath.Join(dir, img.Tars[n])
	}
	return &img, nil
}
