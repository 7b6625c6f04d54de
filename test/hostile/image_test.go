package hostile_test

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// attack is an image that must be refused while it is pulled.
type attack struct {
	name  string
	parts []part
	want  []string
}

// TestHostileImageIsRefused pulls images that were made to harm. None can be
// pulled, each with an error that says what is wrong with it; nothing is written
// where it may not, nothing runs or stays mounted, and the image beside them goes
// on working.
func TestHostileImageIsRefused(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style})
			good := nydusImage(t, "good")
			neighbour := mustPull(t, n, r.MustPush(t, good, "good:1"), kit.PullOptions{})
			attacks := append(blobIDAttacks(t, good), fileAttacks(t, good)...)
			attacks = append(attacks, contentAttacks(t, good)...)
			attacks = append(attacks, layerAttacks(t, good)...)
			for i, a := range attacks {
				t.Run(a.name, func(t *testing.T) { a.run(t, r, n, i) })
			}
			runs(t, n, neighbour, good, "neighbour")
		})
	}
}

func (a attack) run(t *testing.T, r *kit.Registry, n *kit.Node, number int) {
	leaks := kit.Leaks(t)
	before := outside(t, n)
	ref := r.MustPush(t, forge(t, a.parts...), fmt.Sprintf("attack-%d:1", number))
	_, err := n.Pull(t.Context(), ref, kit.PullOptions{})
	refused(t, a.name, err, append(a.want, "nydus", ref)...)
	untouched(t, n, a.name, before)
	clean(t, a.name, leaks)
	if names := snapshotsWith(t, n, ref); len(names) > len(a.parts)-1 {
		t.Errorf("snapshots of the refused image are left: %q", names)
	}
}

// snapshotsWith lists the snapshots whose image label is ref.
func snapshotsWith(t *testing.T, n *kit.Node, ref string) []string {
	t.Helper()
	var names []string
	walk(t, n, func(info snapshotInfo) {
		if info.Labels[imageLabel] == ref {
			names = append(names, info.Name)
		}
	})
	return names
}

// blobIDAttacks have blob ids that would become file names.
func blobIDAttacks(t *testing.T, good *kit.Image) []attack {
	t.Helper()
	boot, err := good.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	id := good.Layers[0].Desc.Digest.Encoded()
	var attacks []attack
	for name, evil := range map[string]string{
		"parent":      "../x",
		"far":         "../../../../../../../../etc/nydus-evil",
		"absolute":    "/etc/nydus-evil",
		"dot":         ".",
		"empty":       "",
		"short":       id[:63],
		"upper case":  strings.ToUpper(id),
		"slash in it": id[:31] + "/" + id[32:],
		"NUL in it":   id[:31] + "\x00" + id[32:],
		"line break":  id[:63] + "\n",
		"not ASCII":   id[:62] + "é",
	} {
		renamed, err := kit.RenameBlob(boot, id, evil)
		if err != nil {
			t.Fatal(err)
		}
		attacks = append(attacks, attack{
			"blob id " + name, append(dataParts(good), bootstrapPart(t, kit.BootstrapLayer(renamed))),
			[]string{"commit", "the image is refused", "image/image.boot", "blob id is not 64 lowercase hex digits", "blob 0 is"},
		})
	}
	return attacks
}

// fileAttacks have something else in the bootstrap's place.
func fileAttacks(t *testing.T, good *kit.Image) []attack {
	t.Helper()
	boot, err := good.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	const file = "image/image.boot"
	dir := tar.Header{Name: "image/", Typeflag: tar.TypeDir}
	link := func(name, to string) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}
	}
	real := kit.FileLayer(kit.File{Name: "other/"}, kit.File{Name: "other/image.boot", Data: string(boot)})
	symlink := []string{"the image is refused", "symbolic link"}
	cases := []struct {
		name  string
		layer kit.Layer
		want  []string
	}{
		{"symlink absolute", entries(dir, link(file, "/etc/shadow")), symlink},
		{"symlink relative", entries(dir, link(file, "../../../../../../../etc/shadow")), symlink},
		{"symlink to a bootstrap in the layer", layers(real, entries(dir, link(file, "../other/image.boot"))), symlink},
		{"symlink to nothing", entries(dir, link(file, "nothing")), symlink},
		{"directory is a symlink", layers(real, entries(link("image", "other"))), symlink},
		{"directory is a symlink out", entries(link("image", "/etc")), symlink},
		{"short name is a symlink", entries(link("image.boot", "/etc/shadow")), symlink},
		{"symlink to /proc/self/fd", entries(dir, link(file, "/proc/self/fd/0")), symlink},
		{"character device", entries(dir, tar.Header{Name: file, Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 5}), []string{"is a device, want a regular file"}},
		{"block device", entries(dir, tar.Header{Name: file, Typeflag: tar.TypeBlock, Devmajor: 254, Devminor: 0}), []string{"is a device, want a regular file"}},
		{"FIFO", entries(dir, tar.Header{Name: file, Typeflag: tar.TypeFifo}), []string{"is a FIFO, want a regular file"}},
		{"directory", entries(dir, tar.Header{Name: file + "/", Typeflag: tar.TypeDir}), []string{"is a directory, want a regular file"}},
		{"hard link to a symlink", entries(link("shadow", "/etc/shadow"), dir, tar.Header{Name: file, Typeflag: tar.TypeLink, Linkname: "shadow"}), []string{"image.boot"}},
	}
	var attacks []attack
	for _, c := range cases {
		attacks = append(attacks, attack{"bootstrap is " + c.name, append(dataParts(good), bootstrapPart(t, c.layer)), c.want})
	}
	return attacks
}

// contentAttacks have a bootstrap that is none, or a bad one.
func contentAttacks(t *testing.T, good *kit.Image) []attack {
	t.Helper()
	boot, err := good.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	random := make([]byte, 64<<10)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	both := bytes.Clone(boot)
	binary.LittleEndian.PutUint32(both, 0x52414653)
	slots := bytes.Clone(boot)
	id := []byte(good.Layers[0].Desc.Digest.Encoded())
	copy(slots[bytes.Index(slots, id):], strings.Repeat("0", 64))
	const limit = 1 << 30
	cases := []struct {
		name string
		part part
		want []string
	}{
		{"empty", bootstrapPart(t, kit.BootstrapLayer(nil)), []string{"not a RAFS bootstrap", "empty"}},
		{"random", bootstrapPart(t, kit.BootstrapLayer(random)), []string{"not a RAFS bootstrap", "65536 bytes"}},
		{"half", bootstrapPart(t, kit.BootstrapLayer(boot[:len(boot)/8192*4096])), []string{"bootstrap is truncated"}},
		{"one block short", bootstrapPart(t, kit.BootstrapLayer(boot[:len(boot)-4096])), []string{"bootstrap is truncated"}},
		{"one byte short", bootstrapPart(t, kit.BootstrapLayer(boot[:len(boot)-1])), []string{"bootstrap is truncated"}},
		{"of two versions", bootstrapPart(t, kit.BootstrapLayer(both)), []string{"superblocks of both v5 and v6"}},
		{"of two opinions", bootstrapPart(t, kit.BootstrapLayer(slots)), []string{"bootstrap is invalid", "device slot"}},
		{"too large", bombPart(t, limit+4096), []string{fmt.Sprintf("has %d bytes, more than the limit of %d", limit+4096, limit)}},
		{"missing", bootstrapPart(t, kit.FileLayer(kit.File{Name: "image/"}, kit.File{Name: "image/other", Data: string(boot)})), []string{"has no file image/image.boot"}},
	}
	var attacks []attack
	for _, c := range cases {
		attacks = append(attacks, attack{
			"bootstrap is " + c.name, append(dataParts(good), c.part), append(c.want, "commit", "the image is refused"),
		})
	}
	return attacks
}

// layerAttacks have layers that do not fit together.
func layerAttacks(t *testing.T, good *kit.Image) []attack {
	t.Helper()
	boot, err := good.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	bootstrap := bootstrapPart(t, kit.BootstrapLayer(boot))
	other := nydusImage(t, "other of two")
	second, err := other.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	return []attack{
		{"layer is data and bootstrap", append(dataParts(good), bootstrap.labelled(dataLabel)),
			[]string{"prepare", "labelled both as nydus data and as nydus bootstrap"}},
		{"two bootstraps", append(dataParts(good), bootstrap, bootstrapPart(t, kit.BootstrapLayer(second))),
			[]string{"commit", "the image is refused", "another nydus bootstrap"}},
		{"two images in one", append(append(append(dataParts(good), bootstrap), dataParts(other)...), bootstrapPart(t, kit.BootstrapLayer(second))),
			[]string{"commit", "the image is refused", "another nydus bootstrap"}},
	}
}

// TestDataWithoutBootstrap pulls images whose layers claim to be nydus data, so
// that they are not downloaded, without a bootstrap that has their content: a root
// filesystem that silently lacks files must not come of it.
func TestDataWithoutBootstrap(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style})
			good := nydusImage(t, "good")
			ordinary := kit.SmallImage(t, "ordinary")
			plain := tarPart(t, kit.FileLayer(kit.File{Name: "./"}, kit.File{Name: "hello", Data: "hello"}))
			for name, parts := range map[string][]part{
				"nothing else":         dataParts(good),
				"a plain layer above":  append(dataParts(good), plain),
				"ordinary layer":       {plain.labelled(dataLabel)},
				"bootstrap beneath it": {bootstrapPart(t, kit.BootstrapLayer(mustBootstrap(t, good))), dataParts(good)[0]},
			} {
				t.Run(name, func(t *testing.T) {
					leaks := kit.Leaks(t)
					before := outside(t, n)
					ref := r.MustPush(t, forge(t, parts...), "x"+fmt.Sprint(len(name))+":1")
					img := mustPull(t, n, ref, kit.PullOptions{})
					_, err := n.Run(t.Context(), img, "none", kit.RunOptions{})
					refused(t, name, err, "mounts of", "holds data of the nydus image", ref, "no layer above it holds that image's bootstrap", "remove both and pull again")
					untouched(t, n, name, before)
					clean(t, name, leaks)
					if err := n.RemoveImage(t.Context(), ref); err != nil {
						t.Error(err)
					}
				})
			}
			// A layer that some image declared as data is not taken for the
			// content of another: the ordinary image fails to start, with both
			// names, and works once the culprit is gone.
			stolen := forge(t, part{ordinary.Layers[0], diffOf(t, ordinary, 0)}.labelled(dataLabel))
			culprit := r.MustPush(t, stolen, "culprit:1")
			mustPull(t, n, culprit, kit.PullOptions{})
			ref := r.MustPush(t, ordinary, "ordinary:1")
			img, err := n.Pull(t.Context(), ref, kit.PullOptions{})
			if err == nil {
				_, err = n.Run(t.Context(), img, "victim", kit.RunOptions{})
			}
			refused(t, "stolen layer", err, culprit, "remove both and pull again")
			for _, name := range []string{ref, culprit} {
				if err := n.RemoveImage(t.Context(), name); err != nil {
					t.Error(err)
				}
			}
			runs(t, n, mustPull(t, n, ref, kit.PullOptions{}), ordinary, "again")
		})
	}
}

// TestBootstrapWithCorruptInodes mounts an image whose bootstrap has a sound
// head, and garbage where its files are described.
func TestBootstrapWithCorruptInodes(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style})
			good := nydusImage(t, "good")
			boot := mustBootstrap(t, good)
			root := rootInode(boot)
			for i := range boot[root:][:64] {
				boot[root+i] = 0xff
			}
			ref := r.MustPush(t, forge(t, append(dataParts(good), bootstrapPart(t, kit.BootstrapLayer(boot)))...), "corrupt:1")
			leaks := kit.Leaks(t)
			img := mustPull(t, n, ref, kit.PullOptions{})
			_, err := n.Run(t.Context(), img, "corrupt", kit.RunOptions{})
			refused(t, "container of a corrupt image", err, "nydusd", ref, "the end of", filepath.Join(n.SnapshotterRoot(), "instances"))
			clean(t, "container of a corrupt image", leaks)
			runs(t, n, mustPull(t, n, r.MustPush(t, good, "good:1"), kit.PullOptions{}), good, "good")
		})
	}
}

// rootInode is where a bootstrap describes its root directory.
func rootInode(boot []byte) int {
	const super, inode, block = 1024, 32, 4096
	le := binary.LittleEndian
	return int(le.Uint32(boot[super+40:]))*block + int(le.Uint16(boot[super+14:]))*inode
}

func mustBootstrap(t *testing.T, img *kit.Image) []byte {
	t.Helper()
	boot, err := img.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	return boot
}
