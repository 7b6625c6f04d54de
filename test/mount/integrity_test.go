package mount_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// What docs/integrity.md says of each kind of image and each place where data can go wrong
// is what happens. The images are those of pkg/blobcheck: of version 5, of version 6 with
// digests in their blobs, and of version 6 without.

// checkedIn is an image that was built once.
func checkedIn(t *testing.T, name string) *fixture {
	t.Helper()
	const testdata = "../../pkg/blobcheck/testdata"
	unzip := func(path string) []byte {
		f, err := os.Open(path)
		must(t, err)
		defer f.Close()
		z, err := gzip.NewReader(f)
		must(t, err)
		text, err := io.ReadAll(z)
		must(t, err)
		return text
	}
	f := &fixture{boot: unzip(filepath.Join(testdata, name+".boot.gz")), blobs: t.TempDir(), version: name[:2]}
	blobs, err := filepath.Glob(filepath.Join(testdata, "blobs", "*.gz"))
	must(t, err)
	for _, path := range blobs {
		id := filepath.Base(path[:len(path)-len(".gz")])
		if bytes.Contains(f.boot, []byte(id)) {
			must(t, os.WriteFile(filepath.Join(f.blobs, id), unzip(path), 0o600))
		}
	}
	return f
}

// contents reads all files below dir. What cannot be read is nil.
func contents(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		// The latter, when what describes a blob is wrong.
		if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) {
			text, err = nil, nil
		}
		all[path[len(dir):]] = text
		return err
	}))
	return all
}

// outcome is what becomes of data that went wrong.
type outcome string

const (
	isRight outcome = "right" // as if nothing had happened
	isError outcome = "error" // of reading, and never a wrong byte
	isWrong outcome = "wrong" // and nobody says so
)

// compare tells the outcome by what was read before and after.
func compare(t *testing.T, before, after map[string][]byte) outcome {
	t.Helper()
	if len(before) == 0 || len(after) != len(before) {
		t.Fatalf("%d files, were %d", len(after), len(before))
	}
	out := isRight
	for path, want := range before {
		switch got := after[path]; {
		case want == nil:
			t.Fatalf("%s cannot be read although nothing is wrong", path)
		case got == nil:
			if out == isRight {
				out = isError
			}
		case !bytes.Equal(got, want):
			out = isWrong
		}
	}
	return out
}

// TestIntegrity: by nydusd alone, which compares what has digests beside it.
func TestIntegrity(t *testing.T) {
	for _, c := range []struct {
		image          string
		backend, cache outcome // with a nydusd that compares
		metadata       outcome
	}{
		{"v5-none-4k", isError, isRight, ""}, // it has none
		{"v6-none-4k", isWrong, isWrong, isError},
		{"v6-inline", isError, isRight, isError},
	} {
		t.Run(c.image, func(t *testing.T) {
			e := newEnv(t)
			img := checkedIn(t, c.image)
			if !e.validates() {
				// It compares nothing. Wrong data that is compressed may be noticed by its
				// decompressor, or not.
				c.backend, c.cache = isWrong, isWrong
			}
			s := e.backendSpec(img, validating(img.blobs))
			target := e.mustMount(s)
			right := contents(t, target)
			cached := cachedBlobs(t, s.CacheDir)
			e.gone(target)

			damage(t, cached)
			target = e.mustMount(e.another(s))
			if got := compare(t, right, contents(t, target)); got != c.cache {
				t.Errorf("wrong in the cache: what is read is %s, want %s", got, c.cache)
			}
			e.gone(target)

			// Nothing is cached any more, and what is fetched is wrong: chunks come first in
			// a blob, what tells where they are last.
			got := e.fetched(s, img, right, func(size int) (from, to int) { return size / 16, size / 4 })
			if got != c.backend && (e.validates() || got == isRight) {
				t.Errorf("wrong in the backend: what is read is %s, want %s", got, c.backend)
			}
			if c.metadata == "" {
				return
			}
			if got := e.fetched(s, img, right, func(size int) (from, to int) { return size - 4096, size }); got == isWrong || e.validates() && got != c.metadata {
				t.Errorf("wrong is what describes the blob: what is read is %s, want %s", got, c.metadata)
			}
		})
	}
}

// fetched tells what becomes of an image of which nothing is cached, when a stretch of each
// blob is wrong.
func (e *env) fetched(s *mountspec.Spec, img *fixture, right map[string][]byte, stretch func(size int) (from, to int)) outcome {
	t := e.t
	t.Helper()
	must(t, os.RemoveAll(s.CacheDir))
	blobs, err := filepath.Glob(filepath.Join(img.blobs, "*"))
	must(t, err)
	flip := func() {
		for _, path := range blobs {
			text, err := os.ReadFile(path)
			must(t, err)
			from, to := stretch(len(text))
			for i := from; i < to; i++ {
				text[i] ^= 0x10
			}
			must(t, os.WriteFile(path, text, 0o600))
		}
	}
	flip()
	target := e.mustMount(e.another(s))
	got := compare(t, right, contents(t, target))
	e.gone(target)
	flip()
	return got
}

// gone unmounts the target, and waits until the image's daemon has ended.
func (e *env) gone(target string) {
	e.t.Helper()
	must(e.t, rootfs.Detach(e.record().Current.Mountpoint))
	e.unmount(target)
	e.daemons(0)
}

// TestIntegrityOfTheKernel: what is mounted by the kernel is read as the file is. Whoever
// writes to it keeps the image from being mounted so again.
func TestIntegrityOfTheKernel(t *testing.T) {
	e := newEnv(t)
	img := small(t, "integrity")
	s := e.provable(img)
	target := e.mustMount(s)
	right := contents(t, target)
	e.prove(s)
	e.unmount(target)
	must(t, e.tidy(soon))
	target = e.mustMount(e.by(mountspec.DriverEROFS, s))
	e.served(mountspec.DriverEROFS)
	damage(t, cachedBlobs(t, s.CacheDir))
	if got := compare(t, right, contents(t, target)); got != isWrong {
		t.Errorf("wrong beneath a mount of the kernel: what is read is %s, want %s", got, isWrong)
	}
	e.unmount(target)
	must(t, e.tidy(soon))
	e.mountFails(s, mountspec.DriverEROFS, proof.ErrNotProven.Error())

	// A disk that returns other bytes leaves the times alone, which is as if the proof had
	// those of now: nobody notices.
	rec, err := proof.Read(s.CacheDir, s.BootstrapDigest)
	must(t, err)
	for i := range rec.Blobs {
		f, err := os.Open(filepath.Join(s.CacheDir, proof.DataName(rec.Blobs[i].ID)))
		must(t, err)
		rec.Blobs[i].File, err = proof.Stat(f)
		must(t, errors.Join(err, f.Close()))
	}
	record, err := json.Marshal(rec)
	must(t, err)
	must(t, os.WriteFile(proof.Path(s.CacheDir, s.BootstrapDigest), record, 0o600))
	target = e.mustMount(e.by(mountspec.DriverEROFS, s))
	if got := compare(t, right, contents(t, target)); got != isWrong {
		t.Errorf("wrong before it is mounted by the kernel: what is read is %s, want %s", got, isWrong)
	}
	e.unmount(target)
	must(t, e.tidy(soon))
}
