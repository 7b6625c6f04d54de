package hostile_test

import (
	"bytes"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// flip inverts every byte.
func flip(body []byte) []byte {
	out := bytes.Clone(body)
	for i := range out {
		out[i] ^= 0xff
	}
	return out
}

// lie alters what the registry answers for the blobs of an image's data: f gets
// the body of each answer to a GET of one of them in a repository. With firstOnly
// these are only the ranges at a blob's beginning, where the first, compressed
// chunks are; what describes the blob is at its end.
func lie(img *kit.Image, repo string, firstOnly bool, f func([]byte) []byte) kit.Hook {
	data := map[string]bool{}
	for _, l := range img.Layers[:img.Bootstrap()] {
		data[l.Desc.Digest.String()] = true
	}
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		path, id, isBlob := strings.Cut(req.URL.Path, "/blobs/")
		if req.Method != http.MethodGet || !isBlob || !data[id] || path != "/v2/"+repo ||
			firstOnly && !strings.HasPrefix(req.Header.Get("Range"), "bytes=0-") {
			next.ServeHTTP(w, req)
			return
		}
		kit.AlterBody(w, req, next, f)
	}
}

// copyOf is an image of the same bootstrap and data in another layer, so that
// containerd takes it for another image.
func copyOf(t *testing.T, img *kit.Image, note string) *kit.Image {
	t.Helper()
	return forge(t, append(dataParts(img), bootstrapPart(t, layers(
		kit.BootstrapLayer(mustBootstrap(t, img)), kit.FileLayer(kit.File{Name: "note", Data: note}))))...)
}

// readAll reads every file of an image's view. Each must be right or fail with an
// input/output error.
func readAll(t *testing.T, root string, img *kit.Image) (right, failed int) {
	t.Helper()
	tree, err := img.Tree()
	if err != nil {
		t.Fatal(err)
	}
	for path, entry := range tree {
		if entry.Type != "file" {
			continue
		}
		content, err := os.ReadFile(filepath.Join(root, path))
		switch {
		case err == nil && digest.FromBytes(content).Encoded() == entry.SHA256:
			right++
		case err == nil:
			t.Errorf("%s is read without an error, but with other content than it has", path)
		case errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EINVAL):
			failed++
		default:
			t.Errorf("reading fails with %v, want an input/output error", err)
		}
	}
	return right, failed
}

// readOnce reads the beginning of a file past the page cache, which would ask a
// second time after a failure: nydusd takes some 12 seconds for each.
func readOnce(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	_, err = unix.Read(fd, page)
	return err
}

// touchAll reads every file, whatever comes of it.
func touchAll(root string) {
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			_, _ = os.ReadFile(path)
		}
		return nil
	})
}

// TestForeignBytes pulls an image whose registry answers with other bytes under
// the ids of another image's blobs, once from another host and once from another
// repository of the same host. The other image is not touched: neither what it
// reads at the time, nor what it reads later from its cache.
func TestForeignBytes(t *testing.T) {
	for _, style := range styles {
		for _, where := range []string{"host", "repository"} {
			t.Run(style+"/"+where, func(t *testing.T) {
				home := kit.NewRegistry(t, kit.RegistryOptions{})
				away, repo := home, "evil"
				if where == "host" {
					away, repo = kit.NewRegistry(t, kit.RegistryOptions{}), "good"
				}
				// With validation nydusd would notice.
				n := newNode(t, kit.NodeConfig{Style: style, Config: map[string]any{"daemon.validate": false}})
				good := nydusImage(t, "good")
				evil := copyOf(t, good, "evil")
				ref := home.MustPush(t, good, "good:1")
				evilRef := away.MustPush(t, evil, repo+":evil")
				// The chunk of the file data is not compressed: nydusd does not notice.
				away.SetHook(lie(good, repo, false, func(body []byte) []byte {
					if len(body) < 300_000 || len(body) > 310_000 {
						return body
					}
					return flip(body)
				}))

				evilImage := mustPull(t, n, evilRef, kit.PullOptions{})
				poisoned, err := mountView(t, n, evilImage, "poisoned")
				if err != nil {
					t.Fatal(err)
				}
				removed := false
				defer func() {
					if !removed {
						poisoned.remove()
					}
				}()
				touchAll(poisoned.dir)
				wrong, err := os.ReadFile(filepath.Join(poisoned.dir, "data"))
				if tree, fault := good.Tree(); err != nil || fault != nil || digest.FromBytes(wrong).Encoded() == tree["data"].SHA256 {
					t.Errorf("the lying registry told the truth (%v): nothing is proven", err)
				}
				img := mustPull(t, n, ref, kit.PullOptions{})
				runs(t, n, img, good, "beside")
				poisoned.remove()
				removed = true
				if err := n.WaitDaemons(0, soon); err != nil {
					t.Error(err)
				}
				runs(t, n, img, good, "after")
				caches, err := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "cache", "*", "origin.json"))
				if err != nil || len(caches) != 2 {
					t.Errorf("caches %q (%v), want one for each repository", caches, err)
				}
			})
		}
	}
}

// TestLyingRegistry changes what an image's own registry answers while the image
// is mounted: for compressed chunks, which nydusd notices, and for what describes a
// blob. Reads fail rather than hang or lie, other images go on, nothing is left, and
// when the registry is honest again the next container reads what is right.
func TestLyingRegistry(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	n := newNode(t, kit.NodeConfig{Style: "helper"})
	neighbour := nydusImage(t, "neighbour")
	other := mustPull(t, n, r.MustPush(t, neighbour, "neighbour:1"), kit.PullOptions{})
	for _, c := range []struct {
		name      string
		firstOnly bool
		fails     bool
		f         func([]byte) []byte
	}{
		{"other bytes", true, true, flip},
		{"zeros", true, true, func(b []byte) []byte { return make([]byte, len(b)) }},
		{"truncated", true, true, func(b []byte) []byte { return b[:len(b)/2] }},
		{"empty", true, true, func([]byte) []byte { return nil }},
		{"oversized", true, false, func(b []byte) []byte { return append(bytes.Clone(b), make([]byte, 1<<20)...) }},
		{"other description", false, true, flip},
	} {
		t.Run(c.name, func(t *testing.T) {
			leaks := kit.Leaks(t)
			before := outside(t, n)
			repo := "lied-" + strings.ReplaceAll(c.name, " ", "-")
			img := nydusImage(t, repo)
			pulled := mustPull(t, n, r.MustPush(t, img, repo+":1"), kit.PullOptions{})
			r.SetHook(lie(img, repo, c.firstOnly, c.f))
			v, err := mountView(t, n, pulled, "lied")
			if err != nil {
				t.Fatal(err)
			}
			right, failed := readAll(t, v.dir, img)
			t.Logf("%d files could be read, %d not", right, failed)
			if c.fails && failed == 0 {
				t.Error("every file could be read")
			}
			runs(t, n, other, neighbour, "neighbour")
			r.SetHook(nil)
			v.remove()
			clean(t, c.name, leaks)
			untouched(t, n, c.name, before)
			runs(t, n, pulled, img, "honest")
			if err := n.WaitDaemons(0, soon); err != nil {
				t.Error(err)
			}
		})
	}
}
