package instance

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
)

// TestTrustCache: once in a boot a cache directory, with the private ones in it, is made to
// say no more than what was synced.
func TestTrustCache(t *testing.T) {
	id := strings.Repeat("ab", 32)
	run, cache := t.TempDir(), t.TempDir()
	head := append(append([]byte("PAMB\x01\x00\x00\x00PAMC"), make([]byte, 4084)...), 0x80)
	dirs := []string{cache, filepath.Join(cache, "private", "k.0"), filepath.Join(cache, "private", "p.0", "k")}
	maps := func(want bool) {
		t.Helper()
		for _, dir := range dirs {
			if _, err := os.Lstat(filepath.Join(dir, id+".chunk_map")); (err == nil) != want {
				t.Errorf("map in %s: %v, want that it is there: %v", dir, err, want)
			}
		}
	}
	fill := func() {
		t.Helper()
		for _, dir := range dirs {
			must(t, os.MkdirAll(dir, 0o700))
			must(t, os.WriteFile(filepath.Join(dir, id+".chunk_map"), head, 0o600))
			must(t, os.WriteFile(filepath.Join(dir, id+".blob.data"), []byte("data"), 0o600))
		}
	}
	trust := func(want int) {
		t.Helper()
		lost, err := TrustCache(t.Context(), run, cache)
		if err != nil || lost.Blobs != want || lost.Chunks != want {
			t.Errorf("%+v, %v, want %d", lost, err, want)
		}
	}
	fill()
	trust(len(dirs))
	maps(false)
	fill()
	trust(0) // whatever is there now is of this boot
	maps(true)
	for _, dir := range dirs {
		_, err := checkpoint.Take(t.Context(), dir, time.Now(), func() (func(), error) { return func() {}, nil })
		must(t, err)
	}
	run = t.TempDir() // the next boot
	trust(0)
	maps(true)

	// Another directory of this name.
	must(t, os.Rename(cache, cache+".old"))
	must(t, os.Rename(cache+".old/private/k.0", cache+".k"))
	must(t, os.Rename(cache+".k", cache))
	must(t, os.Remove(filepath.Join(cache, id+".chunk_map.synced")))
	dirs = dirs[:1]
	trust(1)

	if _, err := TrustCache(t.Context(), run, filepath.Join(cache, "none")); err == nil {
		t.Error("a directory that is not there is trusted")
	}
	if _, err := TrustCache(t.Context(), filepath.Join(run, "none"), cache); err == nil || !strings.Contains(err.Error(), cache) {
		t.Errorf("without a run directory: %v", err)
	}
}

// TestNotesGoWithTheirDirectories: what is noted about a cache directory that is gone goes.
func TestNotesGoWithTheirDirectories(t *testing.T) {
	root, run := t.TempDir(), t.TempDir()
	stays, goes := filepath.Join(root, "cache", "stays"), filepath.Join(root, "cache", "goes")
	other := filepath.Join(t.TempDir(), "cache", "other") // another root's, with the same run directory
	for _, dir := range []string{stays, goes, other} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := TrustCache(t.Context(), run, dir); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(goes); err != nil {
		t.Fatal(err)
	}
	if err := pruneNotes(run); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{stays: true, goes: false, other: true} {
		if _, err := os.Stat(trustNote(run, dir)); (err == nil) != want {
			t.Errorf("the note about %s is there: %t, want %t", dir, err == nil, want)
		}
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(root, "cache")), os.RemoveAll(other), pruneNotes(run)); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(run, notePrefix+"*")); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
}
