package mount_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// dataOf lists the data files of an image's cache, of which there are two at least.
func (e *env) dataOf(s *mountspec.Spec) []string {
	e.t.Helper()
	data, err := filepath.Glob(filepath.Join(s.CacheDir, "*.blob.data"))
	must(e.t, err)
	if len(data) < 2 {
		e.t.Fatalf("data files %q", data)
	}
	return data
}

// mountFails mounts what must not be served at all.
func (e *env) mountFails(s *mountspec.Spec, driver mountspec.Driver, reason string) {
	e.t.Helper()
	target := e.target()
	if r := e.mount(e.by(driver, s), target); r.code == 0 || !strings.Contains(r.out, reason) {
		e.t.Errorf("by %s: %+v, want %q", driver, r, reason)
	}
	if m := mounted(e.t, target); len(m) > 0 {
		e.t.Errorf("by %s: after a refusal there is %q", driver, m)
	}
	must(e.t, e.tidy(soon))
}

// fallsBack mounts by auto what the kernel must not serve, and compares it.
func (e *env) fallsBack(f *fixture, s *mountspec.Spec, reason string) {
	e.t.Helper()
	target := e.mustMount(e.by(mountspec.DriverAuto, s))
	e.holds(f, target)
	e.served(mountspec.DriverFUSE)
	log, err := os.ReadFile(filepath.Join(e.root, "instances", s.Instance, "nydusd.log"))
	if err != nil || !strings.Contains(string(log), reason) {
		e.t.Errorf("the log does not say %q (%v):\n%s", reason, err, log)
	}
	e.unmount(target)
	must(e.t, e.tidy(soon))
	e.daemons(0)
}

// kernel mounts an image that is proven, and compares it.
func (e *env) kernel(f *fixture, s *mountspec.Spec) {
	e.t.Helper()
	target := e.mustMount(e.by(mountspec.DriverAuto, s))
	e.holds(f, target)
	e.served(mountspec.DriverEROFS)
	e.unmount(target)
	must(e.t, e.tidy(soon))
}

// TestWrongSize has data that became longer or shorter after it was proven.
func TestWrongSize(t *testing.T) {
	for name, by := range map[string]int64{"longer": 1 << 20, "shorter": -4096} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			img := small(t, "one")
			s := e.provable(img)
			e.complete(img, s)
			path := e.dataOf(s)[0]
			info, err := os.Stat(path)
			must(t, err)
			must(t, os.Truncate(path, info.Size()+by))
			e.mountFails(s, mountspec.DriverEROFS, "not proven")
			// What a nydusd makes of it is not proven again.
			_ = os.Remove(proof.Path(s.CacheDir, s.BootstrapDigest))
			if err := e.proven(s, nil); !errors.Is(err, prove.ErrWrong) {
				t.Errorf("it is proven: %v", err)
			}
		})
	}
}

// TestChangedBootstrap changes the image's metadata after it was proven: nobody serves it.
func TestChangedBootstrap(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	e.complete(img, s)
	boot, err := os.OpenFile(s.Bootstrap, os.O_RDWR, 0)
	must(t, err)
	size, err := boot.Seek(0, io.SeekEnd)
	must(t, err)
	for _, at := range []int64{1040, 4096, size / 2, size - 1} { // superblock, inodes and chunks
		flip := func() {
			var b [1]byte
			_, err := boot.ReadAt(b[:], at)
			must(t, err)
			b[0] ^= 0x40
			_, err = boot.WriteAt(b[:], at)
			must(t, err)
		}
		flip()
		for _, driver := range []mountspec.Driver{mountspec.DriverEROFS, mountspec.DriverAuto, mountspec.DriverFUSE} {
			e.mountFails(s, driver, "bootstrap")
		}
		flip()
	}
	must(t, boot.Close())
	e.kernel(img, s)
}

// TestCompressedCache has a nydusd that keeps what it fetches as it comes.
func TestCompressedCache(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.provable(img)
	var config map[string]any
	must(t, json.Unmarshal([]byte(s.Config), &config))
	cache := config["device"].(map[string]any)["cache"].(map[string]any)
	cache["compressed"] = true
	text, err := json.Marshal(config)
	must(t, err)
	s.Config = string(text)
	target := e.mustMount(e.by(mountspec.DriverFUSE, s))
	e.holds(img, target)
	// All is there by its word, in files of another name.
	err = e.proven(s, func(err error) bool { return strings.Contains(err.Error(), ".blob.data: no such file") })
	if !errors.Is(err, prove.ErrIncomplete) {
		t.Errorf("it is proven: %v", err)
	}
	if raw, _ := filepath.Glob(filepath.Join(s.CacheDir, "*.blob.raw")); len(raw) == 0 {
		t.Errorf("this nydusd keeps nothing compressed: this test tests nothing")
	}
	e.unmount(target)
	must(t, e.tidy(soon))
	e.mountFails(s, mountspec.DriverEROFS, "not proven")
	e.fallsBack(img, s, "not proven")
}

// TestStaleProof has a daemon fetch again what was proven, into the same files and into new
// ones, with the proof still there.
func TestStaleProof(t *testing.T) {
	for name, lose := range map[string]string{"into the same files": "*chunk_map", "into new files": "*.blob.*"} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			img := small(t, "one")
			s := e.provable(img)
			e.complete(img, s)
			e.kernel(img, s)
			lost, err := filepath.Glob(filepath.Join(s.CacheDir, lose))
			must(t, err)
			maps, err := filepath.Glob(filepath.Join(s.CacheDir, "*chunk_map"))
			must(t, err)
			for _, path := range append(lost, maps...) {
				if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			// It fetches a part only, and is gone.
			part := e.by(mountspec.DriverFUSE, s)
			part.Config = e.spec(img).Config
			target := e.mustMount(part)
			_, err = os.ReadFile(filepath.Join(target, "name"))
			must(t, err)
			e.unmount(target)
			must(t, e.tidy(soon))

			e.mountFails(s, mountspec.DriverEROFS, "not proven")
			e.fallsBack(img, s, "not proven")
			e.complete(img, s)
			e.kernel(img, s)
		})
	}
}
