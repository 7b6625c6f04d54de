package blob

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
)

// boot empties the run directory, as a start of the machine does.
func (b *bed) boot() { b.run = b.t.TempDir() }

// ready is how many chunks a map says to have.
func (b *bed) ready(path string) int {
	b.t.Helper()
	m, err := chunkmap.Read(path, chunks)
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	b.must(err)
	return m.Ready()
}

// TestSync: after the next start there is what was synced, in private directories too.
func TestSync(t *testing.T) {
	b := newBed(t)
	maps := []string{
		filepath.Join(b.dir("one"), idOf(1)+".blob.data.chunk_map"),
		filepath.Join(b.dir("two"), "private", "k.0", idOf(1)+".chunk_map"),
	}
	fill := func(n int) {
		for _, path := range maps {
			b.write(path, mapOf(n))
			data := filepath.Join(filepath.Dir(path), idOf(1)+".blob.data")
			if _, err := os.Stat(data); err != nil {
				b.write(data, []byte("data"))
			}
		}
	}
	sync := func(want Synced) {
		t.Helper()
		if got, err := b.cache().Sync(t.Context()); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	fill(2)
	sync(Synced{Lost: 4}) // of which nobody knows where it is from
	fill(3)
	sync(Synced{Blobs: 2, Chunks: 6})
	sync(Synced{})
	fill(5)
	b.boot()
	sync(Synced{Lost: 4})
	for _, path := range maps {
		if n := b.ready(path); n != 3 {
			t.Errorf("%s has %d chunks, want 3", path, n)
		}
	}
	_, unknown, err := b.cache().List(t.Context())
	if err != nil || len(unknown) > 0 {
		t.Errorf("unknown files %v, %v", unknown, err)
	}
}

// TestSweepTakesCheckpoints: a blob that goes leaves none, and they go first.
func TestSweepTakesCheckpoints(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	b.write(filepath.Join(dir, "origin.json"), []byte(`{"host":"host","repository":"one"}`))
	for _, name := range chunkmap.Names(idOf(1)) {
		b.write(filepath.Join(dir, name), mapOf(3))
		b.write(filepath.Join(dir, name+checkpoint.Suffix), []byte("{}"))
	}
	b.write(filepath.Join(dir, idOf(1)+".blob.data"), []byte("data"))
	var order []string
	o := b.options()
	o.step = func(what, path string) error {
		if what == "remove" {
			order = append(order, filepath.Base(path)[idSize:])
		}
		return nil
	}
	if _, err := New(o).Sweep(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if len(order) != 5 || !strings.HasSuffix(order[0], checkpoint.Suffix) || !strings.HasSuffix(order[1], checkpoint.Suffix) || order[4] != ".blob.data" {
		t.Errorf("removed in the order %v", order)
	}
}

// TestRunSync: it goes on after failures, which it tells once, and syncs at its end.
func TestRunSync(t *testing.T) {
	b := newBed(t)
	var text bytes.Buffer
	o := b.options()
	o.Log = slog.New(slog.NewTextHandler(&text, nil))
	dir := b.dir("one")
	path := filepath.Join(dir, idOf(1)+".chunk_map")
	b.write(path, []byte("short"))
	b.write(filepath.Join(dir, idOf(1)+".blob.data"), []byte("data"))
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		c := New(o)
		go func() { done <- c.RunSync(ctx, time.Minute, time.Second) }()
		time.Sleep(30 * time.Second) //nolint:forbidigo // the bubble's clock
		b.write(path, []byte("short again"))
		time.Sleep(2 * time.Minute) //nolint:forbidigo // the bubble's clock
		b.write(path, mapOf(2))
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	if n := strings.Count(text.String(), `event="cache failed"`); n != 1 {
		t.Errorf("told %d times, want once:\n%s", n, &text)
	}
	if !strings.Contains(text.String(), "cache mended") {
		t.Errorf("that it works again is not told:\n%s", &text)
	}
	b.boot()
	got, err := b.cache().Sync(t.Context())
	if err != nil || got.Lost != 0 || b.ready(path) != 2 {
		t.Errorf("after the end: %+v, %v", got, err)
	}
}

// TestTellSync: what a person can do about a failure is said.
func TestTellSync(t *testing.T) {
	for want, err := range map[string]error{
		"cache full":      &os.PathError{Op: "write", Path: "x", Err: unix.ENOSPC},
		"cache read-only": &os.PathError{Op: "open", Path: "x", Err: unix.EROFS},
		"level=ERROR":     errors.Join(checkpoint.ErrNotSynced, unix.EIO),
		"cache failed":    errors.New("anything"),
	} {
		var text bytes.Buffer
		o := newBed(t).options()
		o.Log = slog.New(slog.NewTextHandler(&text, nil))
		c := New(o)
		told := c.tellSync(t.Context(), Synced{}, err, "")
		if !strings.Contains(text.String(), want) || told != err.Error() {
			t.Errorf("%v is told as %s", err, &text)
		}
		if text.Reset(); c.tellSync(t.Context(), Synced{}, err, told) != told || text.Len() > 0 {
			t.Errorf("%v is told again: %s", err, &text)
		}
	}
}
