package mount_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/blobcheck"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// cuts is how many power cuts are made of each recording; POWER_CUTS asks for another
// number, POWER_SEED repeats a run as far as the kernel does.
func cuts(t *testing.T) int {
	t.Helper()
	n := 10
	if text := os.Getenv("POWER_CUTS"); text != "" {
		var err error
		n, err = strconv.Atoi(text)
		must(t, err)
	}
	return n
}

func powerSeed(t *testing.T) *rand.Rand {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if text := os.Getenv("POWER_SEED"); text != "" {
		var err error
		n, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	t.Logf("POWER_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0))
}

// chunky is an image of several megabytes in many chunks of two layers.
func chunky(t *testing.T) *fixture {
	t.Helper()
	return makeFixture(t, "chunky", kit.NydusOptions{ChunkSize: "0x4000", Compressor: "lz4_block"}, func(tb kit.TB) *kit.Image {
		random := rand.New(rand.NewPCG(1, 2))
		layer := func(name string) kit.Layer {
			files := []kit.File{{Name: "./"}}
			for n := range 40 {
				text := make([]byte, 1000+random.IntN(200_000))
				for i := range text {
					text[i] = byte(random.Uint32())
				}
				files = append(files, kit.File{Name: fmt.Sprintf("%s-%d", name, n), Data: string(text)})
			}
			return kit.FileLayer(files...)
		}
		return kit.MustBuildImage(tb, kit.Pause, kit.BusyboxLayer(kit.MustTools(tb)), layer("a"), layer("b"))
	})
}

// power is a node whose cache is on a disk that loses its power.
type power struct {
	*env
	img    *fixture
	spec   *mountspec.Spec
	random *rand.Rand
	cache  *blob.Cache
	dir    string // where the cache's disk is mounted
	tables []rafs.ChunkTable
}

func newPower(t *testing.T, version string) *power {
	t.Helper()
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	p := &power{env: newEnv(t), img: chunky(t), random: powerSeed(t)}
	p.dir = filepath.Join(p.root, "cache")
	must(t, os.Mkdir(p.dir, 0o700))
	reg.MustPush(t, p.img.Image, "chunky:nydus")
	p.spec = p.registrySpec(p.img, reg, "chunky")
	p.spec.Daemon.Path = p.versioned(version)
	p.cache = blob.New(blob.Options{
		Root: p.root, RunDir: runDir, Now: time.Now,
		Place: func(context.Context, string, string) (string, error) { return p.spec.CacheDir, nil },
	})
	var err error
	p.tables, err = rafs.Chunks(bytes.NewReader(p.img.boot), int64(len(p.img.boot)), 1<<20)
	must(t, err)
	return p
}

// reboot ends what ends with a boot, but for the mounts.
func (p *power) reboot() {
	p.t.Helper()
	notes, err := filepath.Glob(filepath.Join(runDir, "cache-*"))
	must(p.t, err)
	for _, note := range notes {
		must(p.t, os.Remove(note))
	}
}

// fill reads the image in random order through a daemon, while the snapshotter and the
// kernel bring to the disk what they please.
func (p *power) fill(d *device) {
	p.t.Helper()
	d.recording(true) // what a mount writes is part of it
	detach := attach(p.t, d.path, p.dir, "commit=1")
	defer detach()
	target := p.mustMount(p.spec)
	var files []string
	for _, layer := range []string{"a", "b"} {
		for n := range 40 {
			files = append(files, fmt.Sprintf("%s-%d", layer, n))
		}
	}
	p.random.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	for n, name := range files {
		_, err := os.ReadFile(filepath.Join(target, name))
		must(p.t, err)
		switch {
		case n%17 == 16:
			_, err := p.cache.Sync(p.t.Context())
			must(p.t, err)
		case n%5 == 4:
			p.writeBack()
		}
	}
	p.holds(p.img, target)
	if p.shares() {
		p.tryProve()
	}
	p.unmount(target)
	must(p.t, p.tidy(soon))
	_, err := p.cache.Sync(p.t.Context())
	must(p.t, err)
	d.recording(false)
}

// shares tells whether daemons share the cache directory: only there anything is proven.
func (p *power) shares() bool {
	_, err := os.Stat(filepath.Join(p.spec.CacheDir, "private"))
	return errors.Is(err, fs.ErrNotExist)
}

// tryProve proves the image if it is complete, which not every chunk of it has to be.
func (p *power) tryProve() bool {
	p.t.Helper()
	// What was just written counts as settled.
	later := prove.Prover{Now: func() time.Time { return time.Now().Add(time.Hour) }}
	_, err := later.Prove(p.t.Context(), p.spec.CacheDir, p.spec.Bootstrap, p.spec.BootstrapDigest)
	if err != nil && !errors.Is(err, prove.ErrIncomplete) {
		p.t.Fatal(err)
	}
	return err == nil
}

// writeBack has the kernel write maps or metadata before data, as it may at any time.
func (p *power) writeBack() {
	p.t.Helper()
	p.each(func(path string) {
		if strings.HasSuffix(path, ".chunk_map") || strings.HasSuffix(path, ".meta") && p.random.IntN(2) == 0 {
			f, err := os.Open(path)
			must(p.t, err)
			must(p.t, f.Sync())
			f.Close()
		}
	})
}

// each calls f for each file of the cache.
func (p *power) each(f func(path string)) {
	p.t.Helper()
	must(p.t, filepath.WalkDir(p.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			f(path)
		}
		return err
	}))
}

// untrue counts the chunks that are said to be there and are wrong.
func (p *power) untrue() (n int) {
	p.t.Helper()
	p.each(func(path string) {
		if strings.HasSuffix(path, ".chunk_map") {
			n += p.untrueIn(path)
		}
	})
	return n
}

func (p *power) untrueIn(path string) (n int) {
	p.t.Helper()
	id := filepath.Base(path)[:64]
	for i := range p.tables {
		t := &p.tables[i]
		if t.Blob.ID != id {
			continue
		}
		m, err := chunkmap.Read(path, t.Blob.ChunkCount)
		if err != nil {
			return 0 // nydusd does not read it either
		}
		data, err := os.Open(filepath.Join(filepath.Dir(path), proof.DataName(id)))
		if errors.Is(err, fs.ErrNotExist) {
			return m.Ready()
		}
		must(p.t, err)
		defer data.Close()
		for j := range t.Len() {
			c := t.At(j)
			if !m.Has(c.Index) {
				continue
			}
			text := make([]byte, c.RawSize)
			if _, err := data.ReadAt(text, int64(c.RawOffset)); err != nil && !errors.Is(err, io.EOF) {
				p.t.Fatal(err)
			}
			ok, err := blobcheck.Matches(t.Blob.Digester, c.Digest, text)
			must(p.t, err)
			if !ok {
				n++
			}
		}
	}
	return n
}

// examine starts from a disk as a cut left it, and returns how many chunks were said to be
// there and were not.
func (p *power) examine(image string) (found int) {
	p.t.Helper()
	p.reboot()
	defer attach(p.t, image, p.dir, "")()
	found = p.untrue()
	if p.random.IntN(2) == 0 {
		_, err := p.cache.Sync(p.t.Context()) // the snapshotter comes first, else the helper
		must(p.t, err)
		if n := p.untrue(); n > 0 {
			p.t.Errorf("%d chunks are said to be there that are not, after the snapshotter's start", n)
		}
	}
	s := p.by(mountspec.DriverAuto, p.spec)
	first := p.mustMount(s)
	if n := p.untrue(); n > 0 {
		p.t.Errorf("%d chunks are said to be there that are not, while a daemon serves", n)
	}
	p.holds(p.img, first)
	proven := p.shares() && p.tryProve()
	p.unmount(first)
	must(p.t, p.tidy(soon))
	if proven {
		second := p.mustMount(p.by(mountspec.DriverEROFS, p.spec))
		p.holds(p.img, second)
		p.unmount(second)
		must(p.t, p.tidy(soon))
	}
	return found
}

// TestPowerCut records what is written to the cache's disk, cuts the power at random moments,
// and starts anew from each of what may be left.
func TestPowerCut(t *testing.T) {
	for _, version := range []string{newVersion, oldVersion} {
		t.Run(version, func(t *testing.T) {
			p := newPower(t, version)
			d := newDevice(t, 96<<20)
			p.fill(d)
			image := filepath.Join(t.TempDir(), "image")
			damaged, chunks, lost := 0, 0, 0
			for n := range cuts(t) {
				at := 1 + p.random.IntN(d.length())
				gone := d.cut(p.random, at, image)
				found := p.examine(image)
				if t.Failed() {
					t.Fatalf("cut %d, after %d of %d writes and flushes, %d blocks lost", n, at, d.length(), gone)
				}
				lost, chunks = lost+gone, chunks+found
				if found > 0 {
					damaged++
				}
			}
			t.Logf("%d writes and flushes, %d cuts, %d blocks lost; %d cuts left %d chunks in all that are not there", d.length(), cuts(t), lost, damaged, chunks)
			if damaged == 0 {
				t.Error("no cut has left anything wrong: nothing was tested")
			}
		})
	}
}
