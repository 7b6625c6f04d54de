package blob

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

// A proof that names a blob goes before the blob does; others, and half-written ones, are
// neither removed nor unknown.
func TestProofsGoWithTheirBlobs(t *testing.T) {
	b := newBed(t)
	dir := b.dir("a")
	kept, gone := idOf(1), idOf(2)
	b.image("a", bootstrap(kept))
	b.blob(dir, kept, chunks, 1)
	b.blob(dir, gone, chunks, 1)
	stays, goes := b.prove(dir, 11, kept), b.prove(dir, 12, kept, gone)
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
	if exists(goes) {
		t.Error("the proof is still there when its blob begins to go")
	}
	r := b.sweep(b.options())
	if len(r.Unknown) > 0 || len(r.Removed) != 1 || r.Removed[0].ID != gone {
		t.Errorf("%+v", r)
	}
	if !exists(stays) {
		t.Error("the proof of what is still there is gone")
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
	pulled("a", digest(11))
	pulled("b", digest(12))
	b.blob(dir, shared, chunks, 1)
	b.blob(elsewhere, shared, chunks, 1)
	key := b.instance("a", bootstrap(shared))
	record := filepath.Join(b.run, "i", key, "record.json")
	text, err := os.ReadFile(record)
	b.must(err)
	b.write(record, bytes.Replace(text, []byte(`"bootstrap_digest":""`), []byte(`"bootstrap_digest":"`+digest(13)+`"`), 1))
	stays := []string{b.prove(dir, 11, shared), b.prove(elsewhere, 12, shared), b.prove(dir, 13, shared)}
	goes := []string{b.prove(dir, 12, shared), b.prove(elsewhere, 11, shared), b.prove(elsewhere, 14, shared)}

	now := b.now
	b.now = time.Now()
	if r := b.sweep(b.options()); r.Orphans > 0 || r.Next.IsZero() {
		t.Errorf("young ones: %+v", r)
	}
	b.now = now
	o := b.options()
	if r, err := New(o).Sweep(t.Context(), true); err != nil || r.Orphans != len(goes) || !exists(goes[0]) {
		t.Errorf("dry: %+v, %v", r, err)
	}
	if r := b.sweep(o); r.Orphans != len(goes) || len(r.Removed) > 0 || len(r.Unknown) > 0 {
		t.Errorf("%+v", r)
	}
	for _, path := range stays {
		if !exists(path) {
			t.Errorf("%s is gone", path)
		}
	}
	for _, path := range goes {
		if exists(path) {
			t.Errorf("%s is still there", path)
		}
	}
	if b.has(dir, shared) != "dmc" || b.has(elsewhere, shared) != "dmc" {
		t.Error("a blob is gone")
	}

	// While it is not known what images there are none goes.
	layer := pulled("a", "")
	b.prove(dir, 12, shared)
	if r := b.sweep(o); r.Orphans > 0 || !exists(goes[0]) {
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
