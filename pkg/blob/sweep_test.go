package blob

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

func TestSweepRemovesWhatNothingNeeds(t *testing.T) {
	b := newBed(t)
	one, two := b.dir("one"), b.dir("two")
	for n := range 5 {
		b.blob(one, idOf(n), 9, 1)
	}
	b.blob(two, idOf(0), 9, 1)
	b.image("one", bootstrap(idOf(0), idOf(1)))
	b.image("one", bootstrap(idOf(1), idOf(2))) // shares one
	b.instance("one", bootstrap(idOf(3)))       // its image was removed

	r := b.sweep(b.options())
	for n, want := range []string{"dmc", "dmc", "dmc", "dmc", ""} {
		if got := b.has(one, idOf(n)); got != want {
			t.Errorf("blob %d: %q, want %q", n, got, want)
		}
	}
	if got := b.has(two, idOf(0)); got != "" {
		t.Errorf("the same blob of another repository: %q", got)
	}
	if r.Blobs != 6 || len(r.Removed) != 2 || len(r.Evicted) != 0 || r.Freed != 2*r.Usage/6 || r.Freed < 2*(8192+4096) {
		t.Errorf("%+v", r)
	}
	if r = b.sweep(b.options()); r.Blobs != 4 || len(r.Removed) != 0 || r.Freed != 0 {
		t.Errorf("again: %+v", r)
	}
}

func TestSweepDry(t *testing.T) {
	b := newBed(t)
	b.blob(b.dir("one"), idOf(1), 9, 1)
	r, err := b.cache().Sweep(t.Context(), true)
	if err != nil || len(r.Removed) != 1 || b.has(b.dir("one"), idOf(1)) != "dmc" {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestSweepGrace: what was just written may be a pull's.
func TestSweepGrace(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 1)
	o := b.options()
	o.Now = func() time.Time { return time.Now().Add(9 * time.Minute) }
	r := b.sweep(o)
	if r.Young != 1 || len(r.Removed) != 0 || b.has(dir, idOf(1)) != "dmc" || time.Until(r.Next) > 10*time.Minute || time.Until(r.Next) < time.Minute {
		t.Errorf("%+v", r)
	}
	o.Now = func() time.Time { return time.Now().Add(11 * time.Minute) }
	if r = b.sweep(o); len(r.Removed) != 1 || b.has(dir, idOf(1)) != "" {
		t.Errorf("%+v", r)
	}
}

// TestSweepBroken: what a bootstrap needs that cannot be read, nobody knows.
func TestSweepBroken(t *testing.T) {
	boot := bootstrap(idOf(0))
	for what, c := range map[string]struct {
		damage func(b *bed)
		others bool // whether it is known that other repositories are not concerned
	}{
		"cut":             {func(b *bed) { b.image("one", boot[:5000]) }, true},
		"no bootstrap":    {func(b *bed) { b.image("one", nil) }, true},
		"missing":         {func(b *bed) { b.must(os.RemoveAll(filepath.Join(b.image("one", boot), "fs", "image"))) }, true},
		"record":          {func(b *bed) { b.write(filepath.Join(b.image("one", boot), "layer.json"), []byte("{")) }, false},
		"instance":        {func(b *bed) { b.instance("one", boot[:5000]) }, true},
		"instance record": {func(b *bed) { b.write(filepath.Join(b.run, "i", b.instance("one", boot), "record.json"), []byte("{")) }, false},
		"instance lost":   {func(b *bed) { b.must(os.RemoveAll(filepath.Join(b.root, "instances", b.instance("one", boot)))) }, true},
	} {
		b := newBed(t)
		one, two := b.dir("one"), b.dir("two")
		for _, dir := range []string{one, two} {
			b.blob(dir, idOf(1), 9, 1)
		}
		c.damage(b)
		o := b.options()
		o.High = Mark{Bytes: 1}
		_, err := New(o).Sweep(t.Context(), false)
		if err == nil || !strings.Contains(err.Error(), "nothing is removed") {
			t.Errorf("%s: %v", what, err)
		}
		if b.has(one, idOf(1)) != "dmc" {
			t.Errorf("%s: removed", what)
		}
		if gone := b.has(two, idOf(1)) == ""; gone != c.others {
			t.Errorf("%s: of another repository: removed %v, want %v", what, gone, c.others)
		}
	}
}

// TestSweepUnknownPlace: an image whose backend is not configured any more keeps its
// blobs wherever they are.
func TestSweepUnknownPlace(t *testing.T) {
	b := newBed(t)
	b.blob(b.dir("any"), idOf(1), 9, 1)
	b.write(filepath.Join(b.image("one", bootstrap(idOf(1))), "layer.json"),
		[]byte(`{"version":1,"kind":"bootstrap","image":"one","backend":"gone","path":"image/image.boot"}`))
	if r := b.sweep(b.options()); len(r.Removed) != 0 {
		t.Errorf("%+v", r)
	}
}

func TestSweepUnknownFiles(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	keep := []string{
		"origin.json", ".new-1", "readme", idOf(1), idOf(1) + ".blob.datax", idOf(1)[1:] + ".blob.data",
		strings.ToUpper(idOf(0xabc)) + ".blob.data", "other/file", "private/x", "private/K.0.lock",
	}
	for _, name := range keep {
		b.write(filepath.Join(dir, name), []byte("{}"))
	}
	b.must(os.Symlink("/etc/passwd", filepath.Join(dir, idOf(2)+".blob.data")))
	b.write(filepath.Join(b.root, "cache", "stray"), nil)
	r := b.sweep(b.options())
	for _, name := range append(keep, idOf(2)+".blob.data", "../stray") {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if len(r.Unknown) != 9 || len(r.Removed) != 0 {
		t.Errorf("%q", r.Unknown)
	}
}

// TestSweepHalves: what is left of a blob that was half removed helps nobody, whether an
// image needs the blob or not.
func TestSweepHalves(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	for n := range 4 {
		b.blob(dir, idOf(n), 9, 1)
	}
	b.must(os.Remove(filepath.Join(dir, idOf(0)+".blob.data.chunk_map")))
	b.must(os.Remove(filepath.Join(dir, idOf(1)+".blob.data")))
	b.must(os.Remove(filepath.Join(dir, idOf(3)+".blob.data.chunk_map")))
	b.image("one", bootstrap(idOf(0), idOf(1), idOf(2)))
	b.instance("one", bootstrap(idOf(3))) // v5 of old has no map
	b.sweep(b.options())
	for n, want := range []string{"", "", "dmc", "dm"} {
		if got := b.has(dir, idOf(n)); got != want {
			t.Errorf("blob %d: %q, want %q", n, got, want)
		}
	}
}

// TestSweepKilled stops at each step: no map is ever there without its data, and the next
// sweep does the rest.
func TestSweepKilled(t *testing.T) {
	const blobs = 3
	setup := func() (*bed, string) {
		b := newBed(t)
		dir := b.dir("one")
		for n := range blobs {
			b.blob(dir, idOf(n), 9, 1)
			b.write(filepath.Join(dir, idOf(n)+".chunk_map"), mapOf(3))
		}
		b.image("one", bootstrap(idOf(0))) // evicted, the others are not needed
		return b, dir
	}
	var steps int
	var killed bool
	for stop := 0; ; stop++ {
		b, dir := setup()
		o, n := b.options(), 0
		o.High = Mark{Bytes: 1}
		mapsGone := map[string]bool{} // as is on disk after a power cut
		o.step = func(what, path string) error {
			if n++; n > stop {
				return errors.New("killed")
			}
			if what == "sync" {
				for i := range blobs {
					mapsGone[idOf(i)] = !strings.ContainsAny(b.has(dir, idOf(i)), "co")
				}
			}
			if id := filepath.Base(path); what == "remove" && strings.HasSuffix(path, ".blob.data") && !mapsGone[id[:64]] {
				t.Errorf("%s goes before its maps have gone on disk", path)
			}
			return nil
		}
		_, err := New(o).Sweep(t.Context(), false)
		killed = errors.Is(err, errStopped)
		for i := range blobs {
			if has := b.has(dir, idOf(i)); strings.ContainsAny(has, "co") && !strings.Contains(has, "d") {
				t.Errorf("killed at step %d: blob %d has %q", stop, i, has)
			}
		}
		o.step = nil
		r := b.sweep(o)
		for i := range blobs {
			if has := b.has(dir, idOf(i)); has != "" {
				t.Errorf("killed at step %d, swept again: blob %d has %q", stop, i, has)
			}
		}
		if r.Short > 0 {
			t.Errorf("killed at step %d: %+v", stop, r)
		}
		if steps = n; !killed {
			break
		}
	}
	// A map is cut and removed, metadata and data are removed, two directories synced.
	if want := blobs*6 + 2; steps != want {
		t.Errorf("%d steps, want %d", steps, want)
	}
}

// TestSweepOpenFiles: a daemon that no record knows of has them open.
func TestSweepOpenFiles(t *testing.T) {
	for _, suffix := range []string{".blob.data", ".blob.meta", ".blob.data.chunk_map"} {
		for _, how := range []int{os.O_RDONLY, os.O_RDWR} {
			b := newBed(t)
			dir := b.dir("one")
			b.blob(dir, idOf(1), 9, 1)
			f, err := os.OpenFile(filepath.Join(dir, idOf(1)+suffix), how, 0)
			b.must(err)
			if r := b.sweep(b.options()); r.Busy != 1 || len(r.Removed) != 0 || b.has(dir, idOf(1)) != "dmc" {
				t.Errorf("%s open: %+v", suffix, r)
			}
			// Closed, but mapped, as nydusd does.
			prot := unix.PROT_READ
			if how == os.O_RDWR {
				prot |= unix.PROT_WRITE
			}
			text, err := unix.Mmap(int(f.Fd()), 0, 4096, prot, unix.MAP_SHARED)
			b.must(err)
			f.Close()
			if r := b.sweep(b.options()); r.Busy != 1 || b.has(dir, idOf(1)) != "dmc" {
				t.Errorf("%s mapped: %+v", suffix, r)
			}
			b.must(unix.Munmap(text))
			if r := b.sweep(b.options()); r.Busy != 0 || b.has(dir, idOf(1)) != "" {
				t.Errorf("%s closed: %+v", suffix, r)
			}
		}
	}
}

// TestSweepAgainstOpener: somebody without a record opens the map just when it goes. It
// must not find a chunk in it.
func TestSweepAgainstOpener(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 1)
	o := b.options()
	type opened struct {
		size int64
		err  error
	}
	done := make(chan opened, 1)
	o.step = func(what, path string) error {
		if what != "cut" {
			return nil
		}
		info, err := os.Stat(path)
		b.must(err)
		go func() {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				done <- opened{0, err}
				return
			}
			defer f.Close()
			info, err := f.Stat()
			done <- opened{info.Size(), err}
		}()
		// It waits for the lease when the kernel is breaking that.
		inode := fmt.Sprintf(":%d ", info.Sys().(*syscall.Stat_t).Ino)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for over := time.After(30 * time.Second); ; {
			locks, err := os.ReadFile("/proc/locks")
			b.must(err)
			for line := range strings.Lines(string(locks)) {
				if strings.Contains(line, "BREAKING") && strings.Contains(line, inode) {
					return nil
				}
			}
			select {
			case <-tick.C:
			case <-over:
				t.Errorf("nobody waits for the lease of%s:\n%s", inode, locks)
				return nil
			}
		}
	}
	if r := b.sweep(o); len(r.Removed) != 1 {
		t.Errorf("%+v", r)
	}
	if got := <-done; got != (opened{}) {
		t.Errorf("it got %+v, want an empty file", got)
	}
}

// startedLate sweeps two blobs while an instance begins after the sweep has looked, and
// before it removes.
func startedLate(t *testing.T, b *bed, start func(*bed)) (r Report, err error) {
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 1)
	b.blob(dir, idOf(2), 9, 1)
	// Whoever mounts is just announcing its instance.
	lock, err := instance.LockCache(t.Context(), dir)
	b.must(err)
	looked := make(chan struct{})
	o := b.options()
	// The ages are asked for when all bootstraps were read.
	calls := 0
	o.Now = func() time.Time {
		if calls++; calls == 2 {
			close(looked)
		}
		return b.now
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r, err = New(o).Sweep(context.Background(), false)
	}()
	<-looked // all bootstraps were read
	start(b)
	lock.Close()
	<-done
	return r, err
}

func TestSweepAgainstStart(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	r, err := startedLate(t, b, func(b *bed) { b.instance("one", bootstrap(idOf(1))) })
	if err != nil || len(r.Removed) != 1 || b.has(dir, idOf(1)) != "dmc" || b.has(dir, idOf(2)) != "" {
		t.Errorf("%+v, %v", r, err)
	}
	b = newBed(t)
	r, err = startedLate(t, b, func(b *bed) { b.instance("one", bootstrap(idOf(1))[:5000]) })
	if err == nil || len(r.Removed) != 0 || b.has(b.dir("one"), idOf(2)) != "dmc" {
		t.Errorf("with a broken bootstrap: %+v, %v", r, err)
	}
}

func TestSweepStopsWaiting(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 1)
	lock, err := instance.LockCache(t.Context(), dir)
	b.must(err)
	defer lock.Close()
	ctx, cancel := context.WithCancel(t.Context())
	o := b.options()
	o.Now = func() time.Time { cancel(); return b.now }
	if _, err := New(o).Sweep(ctx, false); !errors.Is(err, context.Canceled) || b.has(dir, idOf(1)) != "dmc" {
		t.Error(err)
	}
}

func TestSweepPrivate(t *testing.T) {
	b := newBed(t)
	cache := b.dir("one")
	own, pooled := filepath.Join(cache, "private", "K.0"), filepath.Join(cache, "private", "P.1", "K")
	locks := []string{own + ".lock", filepath.Join(b.root, "instances", "P", "slot1.lock")}
	for i, dir := range []string{own, pooled} {
		b.blob(dir, idOf(1), 9, 1)
		b.write(locks[i], nil)
		f, err := os.Open(locks[i])
		b.must(err)
		b.must(unix.Flock(int(f.Fd()), unix.LOCK_EX))
		if r := b.sweep(b.options()); r.Busy != 1 || b.has(dir, idOf(1)) != "dmc" {
			t.Errorf("%s, locked: %+v", dir, r)
		}
		f.Close()
		if r := b.sweep(b.options()); r.Busy != 0 || len(r.Removed) != 1 || len(r.Unknown) != 0 {
			t.Errorf("%s, free: %+v", dir, r)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s stays: %v", dir, err)
		}
	}
	b.blob(own, idOf(1), 9, 1)
	b.image("one", bootstrap(idOf(1)))
	if r := b.sweep(b.options()); len(r.Removed) != 0 || b.has(own, idOf(1)) != "dmc" {
		t.Errorf("needed: %+v", r)
	}

	// What an image needs, another one's private directory need not have.
	b = newBed(t)
	cache = b.dir("one")
	b.write(filepath.Join(cache, "origin.json"), []byte(`{"host":"host","repository":"one"}`))
	b.write(filepath.Join(b.image("one", bootstrap(idOf(1))), "layer.json"),
		[]byte(`{"version":1,"kind":"bootstrap","image":"one","digest":"sha256:1","path":"image/image.boot"}`))
	living := b.instance("one", bootstrap(idOf(1)))
	pulled := mountspec.InstanceKey("sha256:1", "host", "one", cache)
	for owner, want := range map[string]string{pulled: "dmc", living: "dmc", "other": ""} {
		for _, dir := range []string{filepath.Join(cache, "private", owner+".0"), filepath.Join(cache, "private", "P.0", owner), filepath.Join(cache, "private", "P.0", owner+".2")} {
			b.blob(dir, idOf(1), 9, 1)
			b.sweep(b.options())
			if has := b.has(dir, idOf(1)); has != want {
				t.Errorf("%s: %q, want %q", dir, has, want)
			}
		}
	}
}

func TestWatermarks(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	// The oldest is read by an instance, the next two are just being fetched.
	for n, days := range []int{9, 8, 3, 5, 4, 1} {
		b.blob(dir, idOf(n), 9, days)
	}
	b.image("one", bootstrap(idOf(0), idOf(1), idOf(2), idOf(3), idOf(4), idOf(5)))
	b.instance("one", bootstrap(idOf(0)))
	b.must(os.Chtimes(filepath.Join(dir, idOf(1)+".blob.data"), b.now, b.now))
	all := b.sweep(b.options()).Usage
	each := all / 6

	o := b.options()
	o.High, o.Low = Mark{Bytes: all}, Mark{Bytes: each}
	if r := b.sweep(o); len(r.Evicted) != 0 {
		t.Errorf("at the mark: %+v", r)
	}
	o.High, o.Low = Mark{Bytes: all - 1}, Mark{Bytes: 4*each + 1}
	r := b.sweep(o)
	if len(r.Evicted) != 2 || r.Evicted[0].ID != idOf(3) || r.Evicted[1].ID != idOf(4) || r.Short != 0 || r.Freed != 2*each {
		t.Errorf("above: %+v", r)
	}
	o.High, o.Low = Mark{Bytes: 1}, Mark{}
	if r = b.sweep(o); len(r.Evicted) != 2 || r.Short != 2*each-1 {
		t.Errorf("as much as possible: %+v", r)
	}
	if b.has(dir, idOf(0)) != "dmc" || b.has(dir, idOf(1)) != "dmc" {
		t.Error("what is read or fetched was evicted")
	}
}

func TestWatermarkOfDisk(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 1)
	b.image("one", bootstrap(idOf(1)))
	o := b.options()
	if o.High = (Mark{Part: 1}); len(b.sweep(o).Evicted) != 0 {
		t.Error("the disk is not full")
	}
	if o.High = (Mark{Part: 1e-9}); len(b.sweep(o).Evicted) != 1 || b.has(dir, idOf(1)) != "" {
		t.Error("the disk is fuller than this")
	}
}

// TestEvictionKnowsReaders: no time of the file tells that an instance read it.
func TestEvictionKnowsReaders(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 5)
	b.blob(dir, idOf(2), 9, 3)
	b.image("one", bootstrap(idOf(1), idOf(2)))
	key := b.instance("one", bootstrap(idOf(1)))
	o := b.options()
	c := New(o)
	r, err := c.Sweep(t.Context(), false)
	b.must(err)
	b.must(os.RemoveAll(filepath.Join(b.run, "i", key)))
	c.o.High = Mark{Bytes: r.Usage - 1}
	if r, err = c.Sweep(t.Context(), false); err != nil || len(r.Evicted) != 1 || r.Evicted[0].ID != idOf(2) {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestList(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.write(filepath.Join(dir, "origin.json"), []byte(`{"host":"host","repository":"one"}`))
	b.blob(dir, idOf(1), 9, 1)
	b.blob(dir, idOf(2), 4, 1)
	b.blob(dir, idOf(3), 9, 1)
	b.write(filepath.Join(dir, idOf(4)+".blob.data"), nil)
	b.write(filepath.Join(dir, idOf(4)+".chunk_map"), []byte("short"))
	b.image("one", bootstrap(idOf(1), idOf(2)))
	key := b.instance("one", bootstrap(idOf(2), idOf(4)))
	list, _, err := b.cache().List(t.Context())
	if err != nil || len(list) != 4 {
		t.Fatal(list, err)
	}
	for n, want := range []string{"9/9 true [one] []", "4/9 false [one] [" + key + "]", "0/0 false [] []", "0/9 false [one] [" + key + "]"} {
		l := list[n]
		if got := fmt.Sprintf("%d/%d %v %v %v", l.Ready, l.Chunks, l.Complete(), l.Images, l.Instances); got != want {
			t.Errorf("blob %d: %s, want %s", n, got, want)
		}
		if l.Host != "host" || l.Repository != "one" || l.Directory != dir || (l.Fault != "") != (n == 3) {
			t.Errorf("%+v", l)
		}
	}
	if want := b.now.Add(-24 * time.Hour); !list[0].LastUse.Equal(want) || list[0].Usage < 8192+4096 || list[0].Usage > 64<<10 {
		t.Errorf("%+v, want last use at %s", list[0], want)
	}
}

// TestRun sweeps at start and after it was woken.
func TestRun(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.blob(dir, idOf(1), 9, 1)
	removed := make(chan string, 10)
	o := b.options()
	o.step = func(what, path string) error {
		if what == "remove" && strings.HasSuffix(path, ".blob.data") {
			removed <- filepath.Base(path)[:64]
		}
		return nil
	}
	c := New(o)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, time.Hour) }()
	if id := <-removed; id != idOf(1) {
		t.Error(id)
	}
	b.blob(dir, idOf(2), 9, 1)
	c.Wake()
	c.Wake()
	if id := <-removed; id != idOf(2) {
		t.Error(id)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// BenchmarkSweep marks and sweeps 1,000 images with 10 blobs each, of which a tenth is
// not needed. All that is allocated bounds what is held.
func BenchmarkSweep(b *testing.B) {
	const images, each = 1000, 10
	bed := newBed(b)
	fill := func(n int) {
		dir := bed.dir(fmt.Sprint("repository", n/10))
		ids := make([]string, each)
		for i := range ids {
			ids[i] = idOf(n*each + i)
			bed.blob(dir, ids[i], 9, 1)
		}
		if n%10 != 0 {
			bed.image(fmt.Sprint("repository", n/10), bootstrap(ids...))
		}
	}
	for n := range images {
		fill(n)
	}
	var removed int
	var peak uint64
	var mark, cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		for n := 0; n < images; n += 10 {
			fill(n)
		}
		unix.Sync() // or the sweep's sync would wait for what was just made
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		o := bed.options()
		begun := time.Now()
		if _, err := New(o).Sweep(b.Context(), true); err != nil {
			b.Fatal(err)
		}
		mark += time.Since(begun)
		runtime.ReadMemStats(&before)
		spent := spentCPU(b)
		b.StartTimer()
		r, err := New(o).Sweep(b.Context(), false)
		b.StopTimer()
		cpu += spentCPU(b) - spent
		runtime.ReadMemStats(&after)
		peak = max(peak, after.TotalAlloc-before.TotalAlloc)
		if err != nil || r.Blobs != images*each {
			b.Fatal(r.Blobs, err)
		}
		removed = len(r.Removed)
		b.StartTimer()
	}
	if removed != images*each/10 {
		b.Fatal(removed)
	}
	b.ReportMetric(float64(mark.Milliseconds())/float64(b.N), "ms-without-removing")
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms")
	b.ReportMetric(float64(peak)/(1<<20), "MiB-allocated")
}

// spentCPU is what the process has used so far.
func spentCPU(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A proof that names a blob goes before the blob does; others, and half-written ones, are
// neither removed nor unknown.
func TestProofsGoWithTheirBlobs(t *testing.T) {
	b := newBed(t)
	dir := b.dir("a")
	kept, gone := idOf(1), idOf(2)
	b.image("a", bootstrap(kept))
	b.blob(dir, kept, chunks, 1)
	b.blob(dir, gone, chunks, 1)
	record := func(n int, blobs ...string) string {
		digest := "sha256:" + idOf(n)
		r := proof.New(digest, nil)
		for _, id := range blobs {
			r.Blobs = append(r.Blobs, proof.Blob{ID: id})
		}
		text, err := json.Marshal(r)
		b.must(err)
		path := proof.Path(dir, digest)
		b.write(path, text)
		return path
	}
	stays, goes := record(11, kept), record(12, kept, gone)
	b.write(filepath.Join(dir, proof.Temporary+"1"), nil)
	// Killed before its first file is gone, it has left no proof of a blob that is not there.
	o := b.options()
	o.step = func(what, _ string) error {
		if what == "cut" || what == "remove" {
			return errors.New("killed")
		}
		return nil
	}
	if _, err := New(o).Sweep(t.Context(), false); err == nil {
		t.Error("the sweep was not stopped")
	}
	if _, err := os.Lstat(goes); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the proof is still there when its blob begins to go: %v", err)
	}
	r := b.sweep(b.options())
	if len(r.Unknown) > 0 || len(r.Removed) != 1 || r.Removed[0].ID != gone {
		t.Errorf("%+v", r)
	}
	if _, err := os.Lstat(stays); err != nil {
		t.Errorf("the proof of what is still there: %v", err)
	}
}

// A proof goes with its image, also when all its blobs stay.
func TestProofsGoWithTheirImages(t *testing.T) {
	b := newBed(t)
	dir, elsewhere := b.dir("a"), b.dir("b")
	shared := idOf(1)
	pulled := func(repository, digest string) string {
		layer := b.image(repository, bootstrap(shared))
		b.write(filepath.Join(layer, "layer.json"), fmt.Appendf(nil, `{"version":1,"kind":"bootstrap","image":%q,"digest":%q,"path":"image/image.boot"}`, repository, digest))
		return layer
	}
	digest := func(n int) string { return "sha256:" + idOf(n) }
	proved := func(dir string, n int) string {
		text, err := json.Marshal(proof.New(digest(n), []proof.Blob{{ID: shared}}))
		b.must(err)
		path := proof.Path(dir, digest(n))
		b.write(path, text)
		return path
	}
	there := func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	}
	pulled("a", digest(11))
	pulled("b", digest(12))
	b.blob(dir, shared, chunks, 1)
	b.blob(elsewhere, shared, chunks, 1)
	key := b.instance("a", bootstrap(shared))
	record := filepath.Join(b.run, "i", key, "record.json")
	text, err := os.ReadFile(record)
	b.must(err)
	b.write(record, bytes.Replace(text, []byte(`"bootstrap_digest":""`), []byte(`"bootstrap_digest":"`+digest(13)+`"`), 1))
	stays := []string{proved(dir, 11), proved(elsewhere, 12), proved(dir, 13)}
	goes := []string{proved(dir, 12), proved(elsewhere, 11), proved(elsewhere, 14)}

	now := b.now
	b.now = time.Now()
	if r := b.sweep(b.options()); r.Orphans > 0 || r.Next.IsZero() {
		t.Errorf("young ones: %+v", r)
	}
	b.now = now
	o := b.options()
	if r, err := New(o).Sweep(t.Context(), true); err != nil || r.Orphans != len(goes) || !there(goes[0]) {
		t.Errorf("dry: %+v, %v", r, err)
	}
	if r := b.sweep(o); r.Orphans != len(goes) || len(r.Removed) > 0 || len(r.Unknown) > 0 {
		t.Errorf("%+v", r)
	}
	for _, path := range stays {
		if !there(path) {
			t.Errorf("%s is gone", path)
		}
	}
	for _, path := range goes {
		if there(path) {
			t.Errorf("%s is still there", path)
		}
	}
	if b.has(dir, shared) != "dmc" || b.has(elsewhere, shared) != "dmc" {
		t.Error("a blob is gone")
	}

	// While it is not known what images there are none goes.
	layer := pulled("a", "")
	proved(dir, 12)
	if r := b.sweep(o); r.Orphans > 0 || !there(goes[0]) {
		t.Errorf("with an image of an unknown digest: %+v", r)
	}
	b.must(os.RemoveAll(layer))
	if r := b.sweep(o); r.Orphans != 1 {
		t.Errorf("without it: %+v", r)
	}
}

// However many blobs go, the proofs are looked through once: mounts wait for the lock
// meanwhile.
func TestProofsAreReadOnce(t *testing.T) {
	b := newBed(t)
	dir := b.dir("a")
	b.image("a", bootstrap(idOf(100)))
	for n := range batch {
		b.blob(dir, idOf(n), chunks, 1)
	}
	b.write(proof.Path(dir, "sha256:"+idOf(200)), []byte("{}"))
	o, times := b.options(), 0
	o.step = func(what, _ string) error {
		if what == "disprove" {
			times++
		}
		return nil
	}
	if r := b.sweep(o); len(r.Removed) != batch || times != 1 {
		t.Errorf("%d blobs are removed, the proofs looked through %d times", len(r.Removed), times)
	}
}
