package mount_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// recipe is how an image is made.
type recipe struct {
	name   string
	layers int
	deeds  int // in each layer
	empty  bool
	how    kit.Variant
	// dict names the recipe, further up, whose blobs are the chunk dictionary.
	dict string
	// seed is that of the content, when it must not be any: an index that nydus-image 2.2
	// makes may be one that nydusd 2.4 takes for damaged.
	seed uint64
	// never is why the kernel cannot serve it, empty if it can.
	never string
}

func how(compressor, chunk string) kit.Variant {
	return kit.Variant{NydusOptions: kit.NydusOptions{Compressor: compressor, ChunkSize: chunk}}
}

func recipes() []recipe {
	v5 := func(v kit.Variant) kit.Variant { v.Version = "5"; return v }
	apart := func(v kit.Variant) kit.Variant { v.Apart = true; return v }
	const isV5, opaque = "RAFS v5", "no digests"
	return []recipe{
		{name: "one-layer-none-4k", layers: 1, deeds: 120, how: how("none", "0x1000")},
		{name: "two-layers-lz4-4k", layers: 2, deeds: 80, how: how("lz4_block", "0x1000")},
		{name: "three-layers-zstd-4k", layers: 3, deeds: 60, how: how("zstd", "0x1000")},
		{name: "five-layers-none-64k", layers: 5, deeds: 40, how: how("none", "0x10000")},
		{name: "seven-layers-lz4-64k", layers: 7, deeds: 30, how: how("lz4_block", "0x10000")},
		{name: "ten-layers-zstd-64k", layers: 10, deeds: 30, how: how("zstd", "0x10000")},
		{name: "two-layers-none-1m", layers: 2, deeds: 40, how: how("none", "0x100000")},
		{name: "four-layers-lz4-1m", layers: 4, deeds: 30, how: how("lz4_block", "0x100000")},
		{name: "twenty-layers-zstd-1m", layers: 20, deeds: 14, how: how("zstd", "0x100000")},
		{name: "sixty-layers-none-4k", layers: 60, deeds: 10, how: how("none", "0x1000")},
		{name: "forty-layers-lz4-8k", layers: 40, deeds: 10, how: how("lz4_block", "0x2000")},
		{name: "two-layers-none-16m", layers: 2, deeds: 20, how: how("none", "0x1000000")},
		{name: "two-layers-zstd-16m", layers: 2, deeds: 20, how: how("zstd", "0x1000000")},
		{name: "dictionary-zstd-4k", layers: 2, deeds: 60, how: how("zstd", "0x1000"), dict: "three-layers-zstd-4k"},
		{name: "dictionary-lz4-64k", layers: 3, deeds: 40, how: how("lz4_block", "0x10000"), dict: "seven-layers-lz4-64k"},
		{name: "metadata-apart-zstd-1m", layers: 3, deeds: 30, how: apart(how("zstd", "0x100000"))},
		{name: "metadata-apart-lz4-4k", layers: 2, deeds: 60, how: apart(how("lz4_block", "0x1000"))},
		{name: "no-blobs", layers: 3, deeds: 30, empty: true, how: how("zstd", "0x100000")},
		{name: "zran", layers: 3, deeds: 40, how: kit.Variant{Ref: true}, seed: 1, never: opaque},
		{name: "v5-zstd-1m", layers: 4, deeds: 40, how: v5(how("zstd", "0x100000")), never: isV5},
		{name: "v5-lz4-4k", layers: 2, deeds: 60, how: v5(how("lz4_block", "0x1000")), never: isV5},
	}
}

// imagesSeed is what images are made from by chance; IMAGES_SEED repeats a run.
func imagesSeed(t *testing.T) uint64 {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if text := os.Getenv("IMAGES_SEED"); text != "" {
		var err error
		n, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	t.Logf("IMAGES_SEED=%d", n)
	return n
}

// bake makes the image of a recipe in a directory of its own.
func bake(ctx context.Context, tools kit.Tools, dir string, r recipe, seed, number uint64, dict *fixture) (*fixture, error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs"), 0o755); err != nil {
		return nil, err
	}
	chunk := int64(1 << 20)
	if r.how.ChunkSize != "" {
		var err error
		if chunk, err = strconv.ParseInt(r.how.ChunkSize, 0, 64); err != nil {
			return nil, err
		}
	}
	if r.seed != 0 {
		seed = r.seed
	}
	random := rand.New(rand.NewPCG(seed, number))
	a := newAuthor(random, int(chunk), r.deeds, r.empty)
	a.single = r.how.Version == "5" // nydus-image 2.2 rejects what it makes of hard links there
	if dict != nil {
		// It has chunks of the dictionary only if it is made of the same.
		a.pool = newAuthor(rand.New(rand.NewPCG(seed, dict.number)), int(chunk), 0, false).pool
	}
	plain, err := kit.BuildImage(dir, nil, a.layers(r.layers)...)
	if err != nil {
		return nil, err
	}
	if dict != nil {
		r.how.ChunkDict = filepath.Join(dir, "dictionary.boot")
		if err := os.WriteFile(r.how.ChunkDict, dict.boot, 0o644); err != nil {
			return nil, err
		}
	}
	c, err := plain.Variant(ctx, tools, dir, r.how)
	if err != nil {
		return nil, err
	}
	f := &fixture{Image: plain, boot: c.Bootstrap, blobs: filepath.Join(dir, "blobs"), number: number}
	if r.how.Version == "5" {
		f.version = "v5"
	}
	if f.tree, err = plain.Tree(); err != nil {
		return nil, err
	}
	asBuilt(f.tree)
	for id, path := range c.Blobs {
		err = errors.Join(err, os.Link(path, filepath.Join(f.blobs, id)))
	}
	if dict != nil {
		blobs, _ := filepath.Glob(filepath.Join(dict.blobs, "*"))
		for _, path := range blobs {
			if e := os.Link(path, filepath.Join(f.blobs, filepath.Base(path))); e != nil && !errors.Is(e, os.ErrExist) {
				err = errors.Join(err, e)
			}
		}
	}
	return f, err
}

// asBuilt changes a tree to what nydus-image makes of it: it knows no fractions of a
// second and nothing before 1970.
func asBuilt(tree kit.Tree) {
	for name, e := range tree {
		e.Mtime = time.Unix(max(0, e.Mtime.Unix()), 0)
		tree[name] = e
	}
}

// throughFUSE is a tree without what nydusd is known to get wrong: it shows the time of the
// mount for a time of zero, and a root directory that everybody may enter.
func throughFUSE(want, got kit.Tree) kit.Tree {
	for name, e := range got {
		if w, ok := want[name]; ok && w.Mtime.Unix() == 0 {
			e.Mtime = w.Mtime
			got[name] = e
		}
	}
	root := got["."]
	root.Mode = want["."].Mode
	got["."] = root
	return got
}

// TestImages compares images of every kind with what they were made of: through a nydusd
// that fetches, through one that has all, and through the kernel. IMAGES_ROUNDS says how
// many times, each with other content; from the second on with ten times as much.
func TestImages(t *testing.T) {
	seed, rounds := imagesSeed(t), 1
	if text := os.Getenv("IMAGES_ROUNDS"); text != "" {
		var err error
		rounds, err = strconv.Atoi(text)
		must(t, err)
	}
	e := newEnv(t)
	for round := range rounds {
		todo := recipes()
		for i := range todo {
			if round > 0 {
				todo[i].deeds *= 4
			}
		}
		made := e.bakery(todo, seed+uint64(round))
		for i, r := range todo {
			t.Run(r.name, func(t *testing.T) {
				f, err := made.fetch(i)
				must(t, err)
				e.in(t).everyWay(f, r)
			})
		}
	}
}

// bakery makes images in the background, as they are wanted.
type bakery struct {
	ctx   context.Context
	tools kit.Tools
	dir   string
	seed  uint64
	todo  []recipe
	all   []*baked
}

// baked is an image that is being made.
type baked struct {
	*fixture
	err   error
	begin sync.Once
	done  chan struct{}
}

func (e *env) bakery(todo []recipe, seed uint64) *bakery {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	b := &bakery{ctx: ctx, tools: e.tools, dir: e.t.TempDir(), seed: seed, todo: todo}
	for range todo {
		b.all = append(b.all, &baked{done: make(chan struct{})})
	}
	e.t.Cleanup(func() {
		cancel()
		for _, one := range b.all {
			one.begin.Do(func() { close(one.done) })
			<-one.done
		}
	})
	return b
}

// order begins to make an image, if there is such a one.
func (b *bakery) order(i int) {
	if i < len(b.all) {
		b.all[i].begin.Do(func() { go b.make(i) })
	}
}

func (b *bakery) make(i int) {
	one, r := b.all[i], b.todo[i]
	defer close(one.done)
	var dict *fixture
	if at := slices.IndexFunc(b.todo, func(o recipe) bool { return o.name == r.dict }); at >= 0 {
		b.order(at)
		<-b.all[at].done
		if dict, one.err = b.all[at].fixture, b.all[at].err; one.err != nil {
			return
		}
	}
	one.fixture, one.err = bake(b.ctx, b.tools, filepath.Join(b.dir, r.name), r, b.seed, uint64(i), dict)
}

// fetch waits for an image, while the next one is begun.
func (b *bakery) fetch(i int) (*fixture, error) {
	b.order(i)
	b.order(i + 1)
	<-b.all[i].done
	return b.all[i].fixture, b.all[i].err
}

// everyWay compares an image with what it was made of, in every way in which it is served.
func (e *env) everyWay(f *fixture, r recipe) {
	e.t.Helper()
	full := e.provable(f)
	cold := e.by(mountspec.DriverFUSE, full)
	cold.Config = e.spec(f).Config // which fetches what is read
	cold.Kind = mountspec.KindImage
	e.compare("through FUSE, cold", f, cold, mountspec.DriverFUSE)

	warm := e.by(mountspec.DriverFUSE, full)
	target := e.mustMount(warm)
	err := e.proven(full, nil)
	e.same("through FUSE, warm", f, warm, target, mountspec.DriverFUSE)
	e.unmount(target)
	must(e.t, e.tidy(soon))
	e.daemons(0)
	if r.never != "" {
		if !errors.Is(err, proof.ErrNotProven) || !strings.Contains(err.Error(), r.never) {
			e.t.Errorf("it is proven, or not because of %q: %v", r.never, err)
		}
		e.refused(f, full)
		return
	}
	must(e.t, err)
	view := e.by(mountspec.DriverAuto, full)
	view.Kind = mountspec.KindImage
	e.compare("through EROFS", f, view, mountspec.DriverEROFS)
	e.compare("through an overlay on EROFS", f, e.by(mountspec.DriverAuto, full), mountspec.DriverEROFS)
}

// refused mounts an image that is not proven: auto takes a daemon, erofs fails.
func (e *env) refused(f *fixture, s *mountspec.Spec) {
	e.t.Helper()
	if r := e.mount(e.by(mountspec.DriverEROFS, s), e.target()); r.code == 0 || !strings.Contains(r.out, "not proven") {
		e.t.Errorf("by erofs: %+v", r)
	}
	e.compare("by auto", f, e.by(mountspec.DriverAuto, s), mountspec.DriverFUSE)
}

// proven waits until the image is proven or cannot be, or until enough, if there is such,
// says that it is not going to be.
func (e *env) proven(s *mountspec.Spec, enough func(error) bool) error {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), time.Minute)
	defer cancel()
	// A map that is complete is written after the last data.
	p := prove.Prover{Now: func() time.Time { return time.Now().Add(time.Minute) }}
	tick := time.NewTicker(20 * time.Millisecond) // nothing tells
	defer tick.Stop()
	for {
		_, err := p.Prove(ctx, s.CacheDir, s.Bootstrap, s.BootstrapDigest)
		if !errors.Is(err, prove.ErrIncomplete) || enough != nil && enough(err) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			e.t.Fatal(err)
		}
	}
}

// compare mounts an image, compares it and takes it off.
func (e *env) compare(what string, f *fixture, s *mountspec.Spec, by mountspec.Driver) {
	e.t.Helper()
	target := e.mustMount(s)
	e.same(what, f, s, target, by)
	e.unmount(target)
	must(e.t, e.tidy(soon))
	e.daemons(0)
}

// same compares what is mounted with what it was made of.
func (e *env) same(what string, f *fixture, s *mountspec.Spec, target string, by mountspec.Driver) {
	e.t.Helper()
	e.served(by)
	daemons := 1
	if by == mountspec.DriverEROFS {
		daemons = 0
	}
	e.daemons(daemons)
	got := kit.MustWalk(e.t, target)
	if by == mountspec.DriverFUSE {
		got = throughFUSE(f.tree, got)
	}
	if s.Kind == mountspec.KindRootfs {
		got["."] = f.tree["."] // is that of the writable layer
	}
	kit.EqualTrees(e.t, what, f.tree, got)
	linked(e.t, what, f.tree, target)
}

// linked checks that names of one file are of one inode, which has as many links.
func linked(t *testing.T, what string, tree kit.Tree, target string) {
	t.Helper()
	for name, entry := range tree {
		if len(entry.Links) == 0 {
			continue
		}
		var st, first unix.Stat_t
		must(t, errors.Join(unix.Lstat(filepath.Join(target, name), &st), unix.Lstat(filepath.Join(target, entry.Links[0]), &first)))
		if st.Ino != first.Ino || int(st.Nlink) != len(entry.Links) {
			t.Errorf("%s: %q is inode %d with %d links; %q is inode %d; want %d links", what, name, st.Ino, st.Nlink, entry.Links[0], first.Ino, len(entry.Links))
		}
	}
}
