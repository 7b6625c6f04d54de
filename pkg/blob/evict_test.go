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
