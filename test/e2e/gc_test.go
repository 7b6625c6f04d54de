package e2e_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// load is a node with many images and containers, and what must be in its cache.
type load struct {
	t      *testing.T
	n      *kit.Node
	random *rand.Rand
	stock  []*ware
	boxes  []*loaded
	made   int
}

// ware is an image that can be had.
type ware struct {
	ref    string
	blobs  []string
	files  map[string]string
	pulled containerd.Image // nil when it is not on the node
	read   bool             // all of it is in the cache
}

// loaded is a container that runs.
type loaded struct {
	*kit.Container
	of *ware
}

// shelf is how many layers images have in common, aisle how many images there are, and
// crowd how many containers are alive.
const shelf, aisle, crowd = 6, 12, 30

// newStock makes images that share layers: all have one, and each two of a row another.
func newStock(t *testing.T, r *kit.Registry) []*ware {
	t.Helper()
	base := kit.BusyboxLayer(kit.MustTools(t))
	file := func(name string) kit.File {
		return kit.File{Name: name, Data: strings.Repeat(name+"\n", 20_000)}
	}
	var stock []*ware
	for n := range aisle {
		common, own := fmt.Sprintf("common-%d", n%shelf), fmt.Sprintf("own-%d", n)
		plain := kit.MustBuildImage(t, kit.Pause, base, kit.FileLayer(file(common)), kit.FileLayer(file(own)))
		img := plain.MustNydus(t, kit.NydusOptions{})
		w := &ware{ref: r.MustPush(t, img, fmt.Sprintf("load:%d", n)), files: map[string]string{common: file(common).Data, own: file(own).Data}}
		for i, l := range img.Layers {
			if i != img.Bootstrap() {
				w.blobs = append(w.blobs, l.Desc.Digest.Encoded())
			}
		}
		stock = append(stock, w)
	}
	return stock
}

// TestSweepsUnderLoad pulls, runs and removes images in random order with many containers
// alive, while sweeps go on: what is in use stays, all else goes. GC_SEED repeats a run,
// GC_DEEDS says how long it is.
func TestSweepsUnderLoad(t *testing.T) {
	seed, deeds := number(t, "GC_SEED", uint64(time.Now().UnixNano())), number(t, "GC_DEEDS", 40)
	t.Logf("GC_SEED=%d", seed)
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	l := &load{t: t, random: rand.New(rand.NewPCG(seed, 0)), stock: newStock(t, r)}
	l.n = helper24.node(t, kit.NodeConfig{Hook: true, Config: map[string]any{
		"cache.grace": "0s", "cache.sweep_interval": "1s", "mount.idle_linger": "300ms",
	}})
	for len(l.boxes) < crowd {
		l.run()
	}
	for range deeds {
		switch l.random.IntN(5) {
		case 0:
			l.drop()
			l.run()
		case 1:
			l.forget()
		case 2:
			l.settled()
		default:
			l.look(l.boxes[l.random.IntN(len(l.boxes))])
		}
		l.kept()
	}
	for _, b := range l.boxes {
		l.look(b)
	}
	l.settled()
	l.wane()
	eventually(t, "usage as it was", func() bool { return du(t, l.n) == 0 })
	if got := usage(t, l.n); got != 0 {
		t.Errorf("the data layers have %d bytes", got)
	}
}

// wane removes some images, then all containers, then the other images: first there are
// containers whose image is gone, and then images that nothing runs.
func (l *load) wane() {
	l.t.Helper()
	for range aisle / 3 {
		l.forget()
	}
	l.settled()
	for left := len(l.boxes); left > 0; left-- {
		l.drop()
		l.kept()
		if left%6 == 1 {
			l.settled()
		}
	}
	for len(l.there()) > 0 {
		l.forget()
		l.settled()
	}
}

// collect has containerd remove what nothing refers to.
func collect(t *testing.T, n *kit.Node) {
	t.Helper()
	service := n.Client().LeasesService()
	lease, err := service.Create(t.Context(), leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := service.Delete(t.Context(), lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
}

// number is what a variable of the environment says, if it is set.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// run starts a container of some image, which is pulled if it is not there.
func (l *load) run() {
	l.t.Helper()
	w := l.stock[l.random.IntN(len(l.stock))]
	if w.pulled == nil {
		w.pulled = pull(l.t, l.n, w.ref)
	}
	l.made++
	b := &loaded{run(l.t, l.n, w.pulled, fmt.Sprintf("load-%d", l.made), kit.RunOptions{}), w}
	l.boxes = append(l.boxes, b)
	l.look(b)
}

// look reads all of what a container has.
func (l *load) look(b *loaded) {
	l.t.Helper()
	for name, want := range b.of.files {
		got, err := os.ReadFile(filepath.Join(b.Root(), name))
		if err != nil || !bytes.Equal(got, []byte(want)) {
			l.t.Fatalf("%s of %s: %d bytes, %v; want %d", name, b.ID(), len(got), err, len(want))
		}
	}
	b.of.read = true
}

// drop removes some container.
func (l *load) drop() {
	l.t.Helper()
	i := l.random.IntN(len(l.boxes))
	remove(l.t, l.boxes[i].Container)
	l.boxes = slices.Delete(l.boxes, i, i+1)
	l.unread()
}

// forget removes some image, which containers may still run.
func (l *load) forget() {
	l.t.Helper()
	there := l.there()
	if len(there) == 0 {
		return
	}
	w := there[l.random.IntN(len(there))]
	if err := l.n.RemoveImage(l.t.Context(), w.ref); err != nil {
		l.t.Fatal(err)
	}
	w.pulled = nil
	l.unread()
}

// there are the images that are pulled.
func (l *load) there() (list []*ware) {
	for _, w := range l.stock {
		if w.pulled != nil {
			list = append(list, w)
		}
	}
	return list
}

// unread notes which images need nothing any more.
func (l *load) unread() {
	for _, w := range l.stock {
		if w.pulled == nil && !slices.ContainsFunc(l.boxes, func(b *loaded) bool { return b.of == w }) {
			w.read = false
		}
	}
}

// needed are the blobs that must be cached: those of images that are there or run, which
// were all read then.
func (l *load) needed() (ids []string) {
	for _, w := range l.stock {
		if w.read {
			ids = append(ids, w.blobs...)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// kept checks that nothing that is needed has gone.
func (l *load) kept() {
	l.t.Helper()
	have := blobsIn(l.n)
	for _, id := range l.needed() {
		if !slices.Contains(have, id) {
			l.t.Fatalf("blob %s is in use and has gone; cached are %q", id, have)
		}
	}
}

// settled waits until nothing is cached but what is needed. Removing a container alone does
// not make containerd collect the layers of an image that is gone.
func (l *load) settled() {
	l.t.Helper()
	collect(l.t, l.n)
	wantBlobs(l.t, l.n, l.needed())
}

// TestBlobsOutliveTheirImage keeps an image's filesystem in use after container, image and
// snapshots are gone.
func TestBlobsOutliveTheirImage(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	w := newStock(t, r)[0]
	n := helper24.node(t, kit.NodeConfig{Hook: true, Config: map[string]any{"cache.grace": "0s", "cache.sweep_interval": "1s"}})
	img := pull(t, n, w.ref)
	c := run(t, n, img, "first", kit.RunOptions{})
	var at string
	for _, m := range kit.Mounts(t, "") {
		if strings.HasPrefix(m.FSType, "fuse") && strings.HasPrefix(m.Mountpoint, n.RunDir()+"/") {
			at = m.Mountpoint
		}
	}
	hold := t.TempDir()
	if err := unix.Mount(at, hold, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("bind %q: %v", at, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(hold, unix.MNT_DETACH) })
	read := func() {
		t.Helper()
		for name, want := range w.files {
			if got, err := os.ReadFile(filepath.Join(hold, name)); err != nil || string(got) != want {
				t.Fatalf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
			}
		}
	}
	remove(t, c)
	if err := n.RemoveImage(t.Context(), w.ref); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no snapshot", func() bool {
		left, _ := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "snapshots", "*"))
		return len(left) == 0
	})
	read() // some of it for the first time
	swept := sweeps(t, n)
	eventually(t, "two more sweeps", func() bool { return sweeps(t, n) >= swept+2 })
	read()
	wantBlobs(t, n, w.blobs)
	daemonsNow(t, n, 1)
	if err := unix.Unmount(hold, 0); err != nil {
		t.Fatal(err)
	}
	wantDaemons(t, n, 0, 4*soon)
	wantBlobs(t, n, nil)
}

// sweeps is how many the snapshotter has told of.
func sweeps(t *testing.T, n *kit.Node) int {
	t.Helper()
	log, err := os.ReadFile(n.SnapshotterLog())
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(log, []byte("cache swept"))
}

// newHeavy makes images with one blob of a size each, besides what all have.
func newHeavy(t *testing.T, r *kit.Registry, images, size int) (stock []*ware) {
	t.Helper()
	base := kit.BusyboxLayer(kit.MustTools(t))
	random := rand.NewChaCha8([32]byte{7})
	for i := range images {
		data := make([]byte, size)
		_, _ = random.Read(data)
		plain := kit.MustBuildImage(t, kit.Pause, base, kit.FileLayer(kit.File{Name: "data", Data: string(data)}))
		img := plain.MustNydus(t, kit.NydusOptions{})
		stock = append(stock, &ware{ref: r.MustPush(t, img, fmt.Sprintf("marks:%d", i)), blobs: []string{img.Layers[1].Desc.Digest.Encoded()}, files: map[string]string{"data": string(data)}})
	}
	return stock
}

// TestWatermarks fills a small filesystem: the least recently used go first, and never what
// is read. Six images fit below the high watermark and nine do not, whether they share the
// layer that all have (2 MiB) or a nydusd older than 2.3 keeps one for each in its private
// directory.
func TestWatermarks(t *testing.T) {
	const images, size, disk = 9, 12 << 20, 136 << 20
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	stock := newHeavy(t, r, images, size)
	n := helper24.node(t, kit.NodeConfig{Hook: true, Config: map[string]any{
		"cache.grace": "0s", "cache.sweep_interval": "1s", "cache.high_watermark": "75%", "cache.low_watermark": "60%",
	}})
	if err := n.StopSnapshotter(); err != nil {
		t.Fatal(err)
	}
	smallDisk(t, filepath.Join(n.SnapshotterRoot(), "cache"), disk)
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := &load{t: t, n: n}
	use := func(i int) *loaded {
		t.Helper()
		w := stock[i]
		if w.pulled == nil {
			w.pulled = pull(t, n, w.ref)
		}
		l.made++
		b := &loaded{run(t, n, w.pulled, fmt.Sprintf("marks-%d", l.made), kit.RunOptions{}), w}
		l.look(b)
		// It is seen to be in use.
		swept := sweeps(t, n)
		eventually(t, "a sweep", func() bool { return sweeps(t, n) >= swept+2 })
		return b
	}
	has := func(i int) bool { return slices.Contains(blobsIn(n), stock[i].blobs[0]) }
	keeps := use(1) // is in use all the time
	for _, i := range []int{0, 2, 3, 4, 5, 0} {
		remove(t, use(i).Container)
	}
	for i := range 6 {
		if !has(i) {
			t.Fatalf("blob %d is gone below the high watermark: %q", i, blobsIn(n))
		}
	}
	for i := 6; has(2) && i < images; i++ {
		remove(t, use(i).Container)
	}
	eventually(t, "the oldest goes", func() bool { return !has(2) })
	if !has(0) || !has(1) {
		t.Errorf("what was used last, or is in use, has gone: %t, %t", has(0), has(1))
	}
	if has(3) && !has(4) || has(3) && !has(5) || has(4) && !has(5) {
		t.Errorf("not the least recently used went first: 3 %t, 4 %t, 5 %t", has(3), has(4), has(5))
	}
	l.look(keeps)
	again := use(2) // it is fetched once more
	remove(t, again.Container)
	remove(t, keeps.Container)
	if err := n.WaitRunEntries(2 * soon); err != nil {
		t.Error(err)
	}
}

// smallDisk mounts a filesystem of so many bytes.
func smallDisk(t *testing.T, dir string, size int64) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", file}, {"mount", "-o", "loop", file, dir}} {
		if out, err := osexec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	_ = os.RemoveAll(filepath.Join(dir, "lost+found"))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}
