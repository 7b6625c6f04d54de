package snapshot

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// What an image may put where its bootstrap belongs, and what its pull says. A
// device or FIFO that were opened would hang or act.
func TestHostileBootstrapFailsThePull(t *testing.T) {
	boot := func(dir string) string { return filepath.Join(dir, "image", "image.boot") }
	good := bootstrap(t, "v6-merged")
	for name, c := range map[string]struct {
		fill func(t *testing.T, dir string)
		want string
	}{
		"nothing":          {func(*testing.T, string) {}, "the layer has no file image/image.boot"},
		"a file for image": {func(t *testing.T, dir string) { place(t, filepath.Join(dir, "image"), good) }, "no file image/image.boot"},
		"link to a file": {func(t *testing.T, dir string) {
			place(t, filepath.Join(dir, "image", "other"), good)
			must(t, os.Symlink("other", boot(dir)))
		}, "is a symbolic link"},
		"link to the host": {func(t *testing.T, dir string) {
			must(t, os.Mkdir(filepath.Join(dir, "image"), 0o755), os.Symlink("/etc/passwd", boot(dir)))
		}, "is a symbolic link"},
		"directory is a link": {func(t *testing.T, dir string) {
			place(t, filepath.Join(dir, "real", "image.boot"), good)
			must(t, os.Symlink("real", filepath.Join(dir, "image")))
		}, "symbolic link is on the way"},
		"directory is a link to the host": {func(t *testing.T, dir string) { must(t, os.Symlink("/etc", filepath.Join(dir, "image"))) }, "symbolic link is on the way"},
		"directory":                       {func(t *testing.T, dir string) { must(t, os.MkdirAll(boot(dir), 0o755)) }, "is a directory"},
		"fifo": {func(t *testing.T, dir string) {
			must(t, os.Mkdir(filepath.Join(dir, "image"), 0o755), unix.Mkfifo(boot(dir), 0o644))
		}, "is a FIFO"},
		"device": {func(t *testing.T, dir string) {
			must(t, os.Mkdir(filepath.Join(dir, "image"), 0o755), unix.Mknod(boot(dir), unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))))
		}, "is a device"},
		"socket": {func(t *testing.T, dir string) {
			must(t, os.Mkdir(filepath.Join(dir, "image"), 0o755))
			short, err := os.MkdirTemp("", "s")
			must(t, err)
			t.Cleanup(func() { os.RemoveAll(short) })
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(short, "s"), Net: "unix"})
			must(t, err)
			l.SetUnlinkOnClose(false)
			must(t, l.Close(), os.Rename(filepath.Join(short, "s"), boot(dir)))
		}, "is a socket"},
		"huge": {func(t *testing.T, dir string) {
			place(t, boot(dir), good)
			must(t, os.Truncate(boot(dir), rafs.MaxSize+1))
		}, "more than the limit"},
		"empty":     {func(t *testing.T, dir string) { place(t, boot(dir), nil) }, "it is empty"},
		"not RAFS":  {func(t *testing.T, dir string) { place(t, boot(dir), []byte(strings.Repeat("text ", 4000))) }, "not a RAFS bootstrap"},
		"truncated": {func(t *testing.T, dir string) { place(t, boot(dir), good[:1500]) }, "truncated"},
		"bad ids":   {func(t *testing.T, dir string) { place(t, boot(dir), bootstrap(t, "v6-bad-ids")) }, "64 lowercase hex digits"},
		"bad ids, v5": {func(t *testing.T, dir string) {
			place(t, boot(dir), bootstrap(t, "v5-bad-ids"))
		}, "64 lowercase hex digits"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			l := n.bootstrap("v6-merged")
			l.fill = func(dir string) { c.fill(t, dir) }
			chain, err := n.tryPull(n.ctx, n.data(), l)
			if err == nil {
				t.Fatalf("pulled as %s", chain)
			}
			for _, want := range []string{c.want, testImage, "refused"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error lacks %q: %v", want, err)
				}
			}
			if errdefs.IsAlreadyExists(err) {
				t.Errorf("containerd would take the layer as pulled: %v", err)
			}
			if records := n.records(kindBootstrap); len(records) > 0 {
				t.Errorf("there is a record: %v", records)
			}
		})
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// records returns those of one kind by their path.
func (n *node) records(kind string) map[string]record {
	n.t.Helper()
	found := map[string]record{}
	err := filepath.WalkDir(filepath.Join(n.root, "snapshots"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != recordName {
			return err
		}
		r, err := readRecord(filepath.Dir(path))
		if err == nil && r.Kind == kind {
			found[path] = *r
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

func TestBootstrapRecord(t *testing.T) {
	for _, c := range []struct {
		name, path, version string
		blobs               int
	}{
		{"v6-merged", "image/image.boot", "v6", 3},
		{"v5-merged", "image/image.boot", "v5", 3},
		{"v6-empty", "image.boot", "v6", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			l := n.bootstrap(c.name)
			text := bootstrap(t, c.name)
			l.fill = func(dir string) { place(t, filepath.Join(dir, c.path), text) }
			n.pull(n.data(), l)
			records := n.records(kindBootstrap)
			if len(records) != 1 {
				t.Fatalf("got records %v", records)
			}
			for path, r := range records {
				if r.Version != 1 || r.Image != testImage || r.Path != c.path || r.FSVersion != c.version ||
					r.Size != int64(len(text)) || r.Digest != digestOf(text) || len(r.Blobs) != c.blobs {
					t.Errorf("got %+v", r)
				}
				if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
					t.Errorf("mode %v, %v", info.Mode(), err)
				}
				if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
			}
		})
	}
}

func TestRecordsThatCannotBeUsed(t *testing.T) {
	for text, want := range map[string]string{
		"":                               "unexpected end",
		"{":                              "unexpected end",
		`{"version": 2, "kind": "data"}`: "version 2",
		`{"version": 1, "kind": "x"}`:    `kind "x"`,
		`{"version": 1, "kind": "bootstrap", "path": "../../x"}`: "../../x",
		strings.Repeat(" ", maxRecord+1):                         "at most",
	} {
		dir := t.TempDir()
		place(t, filepath.Join(dir, recordName), []byte(text))
		if r, err := readRecord(dir); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%.40q: got %v, %v, want an error with %q", text, r, err, want)
		}
	}
	dir := t.TempDir()
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, recordName)))
	if r, err := readRecord(dir); err == nil {
		t.Errorf("followed a link: %v", r)
	}
	if r, err := readRecord(t.TempDir()); r != nil || err != nil {
		t.Errorf("a plain layer: got %v, %v", r, err)
	}
}

// The longest record that a bootstrap can make is read again.
func TestRecordOfManyBlobs(t *testing.T) {
	dir := t.TempDir()
	r := record{Kind: kindBootstrap, Path: bootstrapPaths()[0]}
	for i := range 4096 {
		r.Blobs = append(r.Blobs, fmt.Sprintf("%064x", i))
	}
	must(t, writeRecord(dir, r))
	if got, err := readRecord(dir); err != nil || len(got.Blobs) != 4096 {
		t.Fatalf("got %v", err)
	}
}
