package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
)

// pull makes another image of a name, with the bootstrap of the first one or another, and
// returns its digest.
func (b *cacheBed) pull(layer, image string, boot []byte) string {
	b.t.Helper()
	sum := sha256.Sum256(boot)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	dir := filepath.Join(b.root, "snapshots", layer)
	b.write(filepath.Join(dir, "fs", "image", "image.boot"), boot)
	b.write(filepath.Join(dir, "layer.json"), fmt.Appendf(nil, `{"version":1,"kind":"bootstrap","image":%q,"digest":%q,"path":"image/image.boot"}`, image, digest))
	return digest
}

func (b *cacheBed) prove(args ...string) ([]proven, error) {
	b.t.Helper()
	out, err := b.run(append([]string{"prove", "--format", "json"}, args...)...)
	var list []proven
	must(b.t, json.Unmarshal([]byte(out), &list))
	return list, err
}

func TestCacheProve(t *testing.T) {
	b := newCacheBed(t)
	testdata := filepath.Join("..", "pkg", "blobcheck", "testdata")
	good := b.pull("1", "r.example/team/app:1", b.unzip(filepath.Join(testdata, "v6-none-4k.boot.gz")))
	b.pull("2", "r.example/team/app:2", b.unzip(filepath.Join(testdata, "v6-none-4k.boot.gz"))) // by another name
	b.pull("3", "r.example/other:1", b.unzip(filepath.Join(testdata, "v6-merged.boot.gz")))
	b.pull("4", "r.example/old:5", b.unzip(filepath.Join("..", "pkg", "rafs", "testdata", "v5-merged.boot.gz")))

	// It waits until what was just written has settled.
	list, err := b.prove("r.example/team/app:1")
	if err != nil || len(list) != 1 || !list[0].Proven || !list[0].New || list[0].Digest != good || list[0].Directory != b.dir {
		t.Fatalf("got %+v, %v", list, err)
	}
	if _, err := os.Stat(proof.Path(b.dir, good)); err != nil {
		t.Error(err)
	}
	list, err = b.prove("r.example/team/app:2", "r.example/team/app:1")
	if err != nil || len(list) != 2 || !list[0].Proven || list[0].New || list[0].Image != "r.example/team/app:2" {
		t.Errorf("got %+v, %v", list, err)
	}
	list, err = b.prove()
	if err == nil || !strings.Contains(err.Error(), "2 of 4 images are not proven") || len(list) != 4 {
		t.Fatalf("got %+v, %v", list, err)
	}
	byName := map[string]proven{}
	for _, p := range list {
		byName[p.Image] = p
	}
	if p := byName["r.example/other:1"]; len(p.Missing) == 0 || p.Missing[0].Chunks == 0 || p.Missing[0].Ready > 0 {
		t.Errorf("of what is missing it says %+v", p)
	}
	if p := byName["r.example/old:5"]; len(p.Missing) > 0 || !strings.Contains(p.Reason, "the kernel reads v6") {
		t.Errorf("of v5 it says %+v", p)
	}
	out, err := b.run("prove")
	for _, want := range []string{"IMAGE ", good[7:19] + "  before", "chunks of blob", "the kernel reads v6"} {
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("it says\n%s(%v) without %q", out, err, want)
		}
	}
	out, err = b.run("prove", "r.example/team/app:1", "--format", "json") // an option behind
	if list = nil; err != nil || json.Unmarshal([]byte(out), &list) != nil || len(list) != 1 {
		t.Errorf("with an option behind it says\n%s(%v)", out, err)
	}
	if list, err := b.prove("r.example/team/app:1", "r.example/none:1"); err == nil || !strings.Contains(err.Error(), "r.example/none:1 is not pulled") || len(list) != 1 || !list[0].Proven {
		t.Errorf("an image that is not there: %+v, %v", list, err)
	}
}

// TestPulledImages lists them again only when there may be others, or when not all of them
// could be listed. One without a place in the cache is left out without a word.
func TestPulledImages(t *testing.T) {
	b := newCacheBed(t)
	now := time.Now()
	reads := 0
	p := &pulled{now: func() time.Time { return now }, read: func() ([]pulledImage, error) {
		reads++
		return pulledImages(config.Config{Root: b.root})
	}}
	expect := func(want, after int, fault string) {
		t.Helper()
		list, err := p.images()
		if len(list) != want || reads != after || (err != nil) != (fault != "") || err != nil && !strings.Contains(err.Error(), fault) {
			t.Errorf("got %+v, %v after %d lists; want %d after %d, %q", list, err, reads, want, after, fault)
		}
	}
	expect(1, 1, "")
	b.pull("2", "r.example/a:1", []byte("a"))
	b.write(filepath.Join(b.root, "snapshots", "3", "layer.json"), []byte(`{"version":1,"kind":"bootstrap","image":"r.example/b:1","backend":"gone","digest":"sha256:1","path":"image/image.boot"}`))
	expect(1, 1, "")
	p.Changed()
	expect(2, 2, "")
	expect(2, 2, "")
	b.pull("4", "r.example/c:1", []byte("c"))
	now = now.Add(relist)
	expect(3, 3, "")
	broken := filepath.Join(b.root, "snapshots", "5", "layer.json")
	b.write(broken, []byte("{"))
	p.Changed()
	expect(3, 4, broken)
	expect(3, 5, broken)
	must(t, os.Remove(broken))
	expect(3, 6, "")
	expect(3, 6, "")
}

// TestHomeless has an image whose backend is not configured: who names it is told.
func TestHomeless(t *testing.T) {
	b := newCacheBed(t)
	b.write(filepath.Join(b.root, "snapshots", "3", "layer.json"), []byte(`{"version":1,"kind":"bootstrap","image":"r.example/b:1","backend":"gone","digest":"sha256:1","path":"image/image.boot"}`))
	list, err := b.prove("r.example/b:1")
	if err == nil || len(list) != 1 || list[0].Proven || !strings.Contains(list[0].Reason, `"gone"`) {
		t.Errorf("got %+v, %v", list, err)
	}
	if list, _ := b.prove(); len(list) != 1 || list[0].Image == "r.example/b:1" {
		t.Errorf("of all: %+v", list)
	}
}
