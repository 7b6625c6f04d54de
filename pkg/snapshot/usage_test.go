package snapshot

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// blobsOf tells usages by directory and id; the directory is the image's reference.
type blobsOf map[[2]string]int64

func (b blobsOf) Place(_ context.Context, ref, backend string) (string, error) {
	if backend != "" {
		return "", errors.New("no such backend")
	}
	return ref, nil
}

func (b blobsOf) Usage(dir, id string) (int64, error) { return b[[2]string{dir, id}], nil }

// TestUsageOfDataLayers: a blob counts once for each place where it is cached.
func TestUsageOfDataLayers(t *testing.T) {
	needRoot(t)
	one, two := strings.Repeat("1", 64), strings.Repeat("2", 64)
	cached := blobsOf{{testImage, one}: 1_000_000, {testImage, two}: 20_000_000, {"r.example/other:1", one}: 300_000_000}
	n := newNode(t, func(o *Options) { o.Blobs = cached })
	data := func(image, blob string) layer {
		return layer{labels: map[string]string{labelData: "true", labelImage: image, labelLayer: "sha256:" + blob}}
	}
	sums := func() (total int64) {
		t.Helper()
		must(t, n.sn.Walk(n.ctx, func(ctx context.Context, info snapshots.Info) error {
			u, err := n.sn.Usage(ctx, info.Name)
			total += u.Size
			return err
		}))
		return total
	}
	base := data(testImage, one)
	first := n.pull(base)
	if u, err := n.top.Usage(n.ctx, first); err != nil || u.Size < 1_000_000 || u.Size > 1_100_000 {
		t.Errorf("one layer has %+v, %v", u, err)
	}
	// Twice the same blob, on another parent, and once in another place.
	upper := n.pull(data(testImage, two), base)
	other := n.pull(data("r.example/other:1", one))
	within := func(what string, want int64) {
		t.Helper()
		if got := sums(); got < want || got > want+1_000_000 {
			t.Errorf("%s: %d bytes in all, want %d", what, got, want)
		}
	}
	within("all", 321_000_000)
	// Who had it goes, and another one has it.
	drop := func(chain string) {
		t.Helper()
		var names []string
		must(t, n.sn.Walk(n.ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Labels[snapshots.LabelSnapshotRef] == chain {
				names = append(names, info.Name)
			}
			return nil
		}))
		if len(names) != 1 {
			t.Fatalf("%s is %q", chain, names)
		}
		must(t, n.sn.Remove(n.ctx, names[0]))
	}
	drop(first)
	within("without the first", 321_000_000)
	drop(upper)
	within("without the second", 320_000_000)
	drop(other)
	within("without the other place", 20_000_000)
	n.restart()
	within("after a restart", 20_000_000)
}

func TestUsageWithoutBlob(t *testing.T) {
	needRoot(t)
	n := newNode(t, func(o *Options) { o.Blobs = blobsOf{{testImage, ""}: 1 << 40} })
	for _, label := range []string{"", "sha256:../x", "md5:" + strings.Repeat("1", 64)} {
		chain := n.pull(layer{labels: map[string]string{labelData: "true", labelImage: testImage, labelLayer: label}})
		if u, err := n.top.Usage(n.ctx, chain); err != nil || u.Size > 1<<20 {
			t.Errorf("%q: %+v, %v", label, u, err)
		}
	}
}

func TestImages(t *testing.T) {
	needRoot(t)
	n := newNode(t)
	if list, err := Images(t.TempDir()); err != nil || len(list) > 0 {
		t.Errorf("of an empty root: %v, %v", list, err)
	}
	n.pull(n.data(), n.bootstrap("v6-zstd"))
	list, err := Images(n.root)
	if err != nil || len(list) != 1 || list[0].Ref != testImage {
		t.Fatal(list, err)
	}
	f, err := list[0].Open()
	must(t, err)
	f.Close()
	must(t, writeRecord(filepath.Join(n.root, "snapshots", filepath.Base(list[0].Dir())), record{Kind: "new"}))
	if list, err := Images(n.root); err == nil || len(list) > 0 {
		t.Errorf("with a broken record: %v, %v", list, err)
	}
}

// Only of a layer that is gone it is said that it does not exist: who looks for what needs a
// blob passes over those.
func TestImageWithoutItsBootstrap(t *testing.T) {
	n := newNode(t)
	n.pull(n.data(), n.bootstrap("v6-merged"))
	list, err := Images(n.root)
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	must(t, os.RemoveAll(filepath.Join(list[0].Dir(), "fs")))
	if _, err := list[0].Open(); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), list[0].Dir()) {
		t.Errorf("without its bootstrap: %v", err)
	}
	must(t, os.RemoveAll(list[0].Dir()))
	if _, err := list[0].Open(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without its layer: %v", err)
	}
}
