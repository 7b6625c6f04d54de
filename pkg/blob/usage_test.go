package blob

import (
	"path/filepath"
	"testing"
)

func TestUsage(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	c := b.cache()
	if n, err := c.Usage(dir, idOf(1)); n != 0 || err != nil {
		t.Errorf("no directory: %d, %v", n, err)
	}
	b.blob(dir, idOf(1), 9, 1)
	b.blob(dir, idOf(2), 9, 1)
	list, _, err := c.List(t.Context())
	b.must(err)
	each := list[0].Usage
	if n, err := c.Usage(dir, idOf(1)); n != each || err != nil || n == 0 {
		t.Errorf("%d, %v; want %d", n, err, each)
	}
	b.write(filepath.Join(dir, "private", "K.0.lock"), nil)
	b.blob(filepath.Join(dir, "private", "K.0"), idOf(1), 9, 1)
	b.blob(filepath.Join(dir, "private", "P.0", "K"), idOf(1), 9, 1)
	if n, err := c.Usage(dir, idOf(1)); n != 3*each || err != nil {
		t.Errorf("with private ones: %d, %v; want %d", n, err, 3*each)
	}
	if n, err := c.Usage(dir, "../"+idOf(1)[3:]); err == nil {
		t.Errorf("a bad id: %d", n)
	}
}
