package blob

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
