package blob

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

func TestEvict(t *testing.T) {
	b := newBed(t)
	dir, other := b.dir("one"), b.dir("two")
	for n := range 4 {
		b.blob(dir, idOf(n), 9, 0)
	}
	b.blob(other, idOf(0), 9, 0)
	b.image("one", bootstrap(idOf(0), idOf(1), idOf(2)))
	b.instance("one", bootstrap(idOf(1), idOf(2)))
	text := `{"version":1,"bootstrap":"sha256:` + idOf(7) + `","blobs":[{"id":"` + idOf(0) + `"}]}`
	b.write(proof.Path(dir, "sha256:"+idOf(7)), []byte(text))
	// Young as it is, and needed by a snapshot; one that is not there is none.
	if err := b.cache().Evict(t.Context(), dir, idOf(0), idOf(8)); err != nil {
		t.Error(err)
	}
	if got := b.has(dir, idOf(0)); got != "" {
		t.Errorf("it has %q", got)
	}
	if _, err := os.Stat(proof.Path(dir, "sha256:"+idOf(7))); err == nil {
		t.Error("its proof is still there")
	}
	if err := b.cache().Evict(t.Context(), dir, idOf(1)); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("one that an instance reads: %v", err)
	}
	f, err := os.Open(filepath.Join(dir, idOf(3)+".blob.data"))
	b.must(err)
	defer f.Close()
	if err := b.cache().Evict(t.Context(), dir, idOf(3)); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("one that is open: %v", err)
	}
	for n := 1; n < 4; n++ {
		if got := b.has(dir, idOf(n)); got != "dmc" {
			t.Errorf("blob %d has %q", n, got)
		}
	}
	if got := b.has(other, idOf(0)); got != "dmc" {
		t.Errorf("the one of another repository has %q", got)
	}
}

func TestRoom(t *testing.T) {
	b := newBed(t)
	room := func(high, low Mark) int64 {
		t.Helper()
		o := b.options()
		o.High, o.Low = high, low
		n, err := New(o).Room()
		b.must(err)
		return n
	}
	empty := room(Mark{}, Mark{}) // before there is a cache
	free, err := b.cache().Free()
	b.must(err)
	if empty <= 0 || free <= empty {
		t.Errorf("%d may be added, and %d are free", empty, free)
	}
	b.blob(b.dir("one"), idOf(1), 9, 1)
	usage, err := b.cache().usage()
	b.must(err)
	if usage < 8192 {
		t.Errorf("the cache occupies %d", usage)
	}
	const mib = 1 << 20
	for _, c := range []struct {
		high, low Mark
		want      int64
	}{
		{Mark{Bytes: 2 * mib}, Mark{}, 2*mib - usage},
		{Mark{Bytes: 2 * mib}, Mark{Bytes: mib}, mib - usage},
		{Mark{Bytes: 2 * mib}, Mark{Bytes: 1}, 1 - usage},
	} {
		if got := room(c.high, c.low); got != c.want {
			t.Errorf("%+v, %+v: %d, want %d", c.high, c.low, got, c.want)
		}
	}
	if got := room(Mark{Part: 0.9}, Mark{Part: 0.000001}); got >= 0 {
		t.Errorf("on a disk that is too full: %d", got)
	}
	gone := b.options()
	gone.Root = filepath.Join(b.root, "gone")
	if _, err := New(gone).Room(); err == nil {
		t.Error("a root that is not there has room")
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
