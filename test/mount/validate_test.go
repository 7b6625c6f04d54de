package mount_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// validating has a nydusd compare what it reads with its digests.
func validating(blobs string) nydusd.Config {
	return nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: blobs}, Validate: true}
}

// validates tells whether this nydusd does so: from 2.3 on. An older one takes the setting
// and does nothing about it.
func (e *env) validates() bool {
	e.t.Helper()
	yes, err := nydusd.SharesCache(e.t.Context(), e.tools.Nydusd)
	must(e.t, err)
	return yes
}

// damage turns every byte of a stretch in the middle of each file around.
func damage(t *testing.T, files []string) {
	t.Helper()
	for _, path := range files {
		data, err := os.ReadFile(path)
		must(t, err)
		for i := len(data) / 4; i < len(data)*3/4; i++ {
			data[i] ^= 0xff
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(data, 0)
		must(t, errors.Join(err, f.Close()))
	}
}

// What went wrong in the cache is fetched again.
func TestDamagedCacheIsRepaired(t *testing.T) {
	for name, image := range map[string]func(*testing.T) *fixture{"v6": odd, "v5": oddV5} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			img := image(t)
			s := e.backendSpec(img, validating(img.blobs))
			target := e.mustMount(s)
			e.holds(img, target)
			if !e.validates() {
				e.unmount(target)
				return
			}
			cached := cachedBlobs(t, s.CacheDir)
			must(t, rootfs.Detach(e.record().Current.Mountpoint))
			e.unmount(target)
			e.daemons(0)
			damage(t, cached)

			target = e.mustMount(e.another(s))
			e.holds(img, target)
			e.unmount(target)
		})
	}
}

func cachedBlobs(t *testing.T, cache string) (list []string) {
	t.Helper()
	must(t, filepath.WalkDir(cache, func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".blob.data") {
			list = append(list, path)
		}
		return err
	}))
	if len(list) == 0 {
		t.Fatalf("nothing is cached in %s", cache)
	}
	return list
}

// What comes wrong from the backend is an error, and what is right is still read.
func TestWrongContentIsAnError(t *testing.T) {
	for name, image := range map[string]func(*testing.T) *fixture{"v6": odd, "v5": oddV5} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			img := image(t)
			blobs := t.TempDir()
			names, err := os.ReadDir(img.blobs)
			must(t, err)
			for _, n := range names {
				data, err := os.ReadFile(filepath.Join(img.blobs, n.Name()))
				must(t, err)
				// Chunks come first in a blob, what tells where they are last.
				for i := len(data) / 8; i < len(data)/2; i++ {
					data[i] ^= 0x10
				}
				must(t, os.WriteFile(filepath.Join(blobs, n.Name()), data, 0o600))
			}
			s := e.backendSpec(img, validating(blobs))
			target := e.mustMount(s)
			failed := 0
			for path, want := range img.tree {
				if want.Type != "file" || want.Size == 0 {
					continue
				}
				got, err := os.ReadFile(filepath.Join(target, path))
				switch {
				case errors.Is(err, unix.EIO):
					failed++
				case err != nil:
					t.Errorf("%s: %v", path, err)
				case digest.FromBytes(got).Encoded() != want.SHA256 && e.validates():
					t.Errorf("%s: wrong content", path)
				}
			}
			if failed == 0 {
				t.Error("everything was read: nothing was wrong")
			}
			t.Logf("%d files were refused", failed)
			e.unmount(target)
		})
	}
}
