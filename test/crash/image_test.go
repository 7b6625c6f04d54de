package crash_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	// coldDir holds what only the cold way reads: each of its files is fetched when
	// its turn comes.
	coldDir   = "cold"
	coldFiles = 24
	coldSize  = 1 << 20 // a chunk of its own
)

// picture is an image, and what it holds.
type picture struct {
	*kit.Image
	tree   kit.Tree
	source string // a directory with the same content, without what programs need
}

// newPicture makes an image of every size and shape that readers need.
func newPicture(t *testing.T) *picture {
	t.Helper()
	p := &picture{source: filepath.Join(t.TempDir(), "source")}
	files := []kit.File{{Name: "./"}}
	random := rand.NewChaCha8([32]byte{1})
	dir := func(name string) {
		files = append(files, kit.File{Name: name + "/"})
		must(t, os.MkdirAll(filepath.Join(p.source, name), 0o755))
	}
	file := func(name string, size int) {
		data := make([]byte, size)
		_, _ = random.Read(data)
		files = append(files, kit.File{Name: name, Data: string(data)})
		must(t, os.WriteFile(filepath.Join(p.source, name), data, 0o644))
	}
	dir(coldDir)
	for n := range coldFiles {
		file(fmt.Sprintf("%s/%02d", coldDir, n), coldSize)
	}
	dir("hot")
	for n, size := range []int{0, 1, 4095, 4096, 4097, 65_536, 100_001, 262_144, 700_000, 1<<20 + 1, 3 << 20} {
		file(fmt.Sprintf("hot/%02d", n), size)
	}
	dir("many")
	for n := range 200 {
		file(fmt.Sprintf("many/%03d", n), n*7)
	}
	deep := "deep"
	dir(deep)
	for n := range 6 {
		deep += fmt.Sprintf("/%d", n)
		dir(deep)
		file(deep+"-file", 10_000+n)
	}
	plain := kit.MustBuildImage(t, kit.Pause, kit.BusyboxLayer(kit.MustTools(t)), kit.FileLayer(files...))
	p.Image = plain.MustNydus(t, kit.NydusOptions{})
	var err error
	p.tree, err = plain.Tree()
	must(t, err)
	return p
}
