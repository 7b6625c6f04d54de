package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// TestPlaceIsTheMountsPlace: what is not found where it is looked for would be removed.
func TestPlaceIsTheMountsPlace(t *testing.T) {
	all := []config.Backend{
		rules()[0],
		{Name: "bucket", Type: config.BackendS3, AllowLabel: true, Endpoint: "s3.example", Region: "eu", BucketName: "b", ObjectPrefix: "p/"},
		{Name: "dir", Type: config.BackendLocalFS, AllowLabel: true, Dir: "/srv/blobs"},
		{Name: "reg", Type: config.BackendRegistry, AllowLabel: true},
	}
	cfg := config.Default()
	cfg.Backends = all
	for _, c := range [][2]string{{"alpine", ""}, {"localhost:5000/a/b:1", ""}, {"r.example/x:1", "bucket"}, {"r.example/x:1", "dir"}, {"r.example/x@sha256:" + strings.Repeat("0", 64), "reg"}} {
		with := testBackends(all, "")
		with.endpoints = endpoints(config.Remote{}, oneLogin(registry.Credentials{}))
		b, err := with.Backend(t.Context(), c[0], c[1])
		must(t, err)
		want := mountspec.CacheDir(cfg.Root, b.Host, b.Repository)
		if got, err := placed(cfg)(t.Context(), c[0], c[1]); got != want || err != nil {
			t.Errorf("%s: %s, %v; want %s", c, got, err, want)
		}
	}
	if dir, err := placed(cfg)(t.Context(), "r.example/x:1", "gone"); err == nil {
		t.Errorf("a backend that is not configured: %s", dir)
	}
}

// cacheBed is a root with one real image whose blob is in the cache, and with a blob that
// nothing needs.
type cacheBed struct {
	t            *testing.T
	root         string
	config, dir  string
	image, stray string // blob ids
}

func newCacheBed(t *testing.T) *cacheBed {
	root := t.TempDir()
	b := &cacheBed{t: t, root: root, config: filepath.Join(t.TempDir(), "config.toml"), stray: strings.Repeat("5", 64)}
	b.write(b.config, fmt.Appendf(nil, "version = 1\nroot = %q\nrun_dir = %q\n[cache]\ngrace = \"0s\"\n", root, filepath.Join(t.TempDir(), "run")))
	b.dir = mountspec.CacheDir(root, "r.example", "team/app")
	testdata := filepath.Join("..", "pkg", "blobcheck", "testdata")
	boot := b.unzip(filepath.Join(testdata, "v6-none-4k.boot.gz"))
	layer := filepath.Join(root, "snapshots", "1")
	b.write(filepath.Join(layer, "fs", "image", "image.boot"), boot)
	b.write(filepath.Join(layer, "layer.json"), []byte(`{"version":1,"kind":"bootstrap","image":"r.example/team/app:1","path":"image/image.boot"}`))
	tables, err := rafs.Chunks(bytes.NewReader(boot), int64(len(boot)), 1<<20)
	must(t, err)
	table := &tables[0]
	b.image = table.Blob.ID
	raw := b.unzip(filepath.Join(testdata, "blobs", b.image+".gz"))
	data, bits := make([]byte, table.Blob.UncompressedSize), make([]byte, 4096+(table.Blob.ChunkCount+7)/8)
	copy(bits, "PAMB\x01\x00\x00\x00PAMC")
	for i := range table.Len() {
		c := table.At(i)
		copy(data[c.RawOffset:], raw[c.Offset:c.End()])
		bits[4096+c.Index/8] |= 0x80 >> (c.Index % 8)
	}
	b.write(filepath.Join(b.dir, "origin.json"), []byte(`{"host":"r.example","repository":"team/app"}`))
	b.write(filepath.Join(b.dir, b.image+".blob.data"), data)
	b.write(filepath.Join(b.dir, b.image+".chunk_map"), bits)
	b.write(filepath.Join(b.dir, b.stray+".blob.data"), data)
	return b
}

func (b *cacheBed) write(path string, text []byte) {
	b.t.Helper()
	must(b.t, os.MkdirAll(filepath.Dir(path), 0o700))
	must(b.t, os.WriteFile(path, text, 0o600))
}

func (b *cacheBed) unzip(path string) []byte {
	b.t.Helper()
	f, err := os.Open(path)
	must(b.t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(b.t, err)
	text, err := io.ReadAll(z)
	must(b.t, err)
	return text
}

func (b *cacheBed) run(args ...string) (string, error) {
	b.t.Helper()
	var out bytes.Buffer
	app := newApp()
	app.Writer, app.ErrWriter = &out, &bytes.Buffer{}
	err := app.Run(append([]string{"nydus-snapshotter", "cache", args[0], "--config", b.config}, args[1:]...))
	return out.String(), err
}

func TestCacheCommands(t *testing.T) {
	b := newCacheBed(t)
	out, err := b.run("ls")
	must(t, err)
	for _, want := range []string{"BLOB ", b.image[:12], b.stray[:12], "100%", "r.example/team/app:1", "r.example/team/app "} {
		if !strings.Contains(out, want) {
			t.Errorf("ls says\n%s without %q", out, want)
		}
	}
	out, err = b.run("ls", "--format", "json")
	must(t, err)
	var list []blob.Blob
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 || list[0].ID != b.stray && list[1].ID != b.stray {
		t.Errorf("ls says %s, %v", out, err)
	}
	if out, err = b.run("verify"); err != nil || !strings.Contains(out, "ok") {
		t.Errorf("verify says %s, %v", out, err)
	}
	if out, err = b.run("gc", "--dry-run"); err != nil || !strings.Contains(out, "would remove  "+b.stray[:12]) {
		t.Errorf("gc --dry-run says %s, %v", out, err)
	}
	out, err = b.run("gc", "--format", "json")
	must(t, err)
	var report blob.Report
	if err := json.Unmarshal([]byte(out), &report); err != nil || len(report.Removed) != 1 || report.Removed[0].ID != b.stray || report.Freed == 0 {
		t.Errorf("gc says %s, %v", out, err)
	}
	if left, _ := filepath.Glob(filepath.Join(b.dir, b.stray+"*")); len(left) > 0 {
		t.Errorf("gc left %s", left)
	}

	data := filepath.Join(b.dir, b.image+".blob.data")
	text, err := os.ReadFile(data)
	must(t, err)
	text[0] ^= 1
	b.write(data, text)
	if out, err = b.run("verify"); err == nil || !strings.Contains(err.Error(), "1 of 1 blobs are wrong") || !strings.Contains(out, "removed") {
		t.Errorf("verify says %s, %v", out, err)
	}
	if _, err := os.Stat(data); !os.IsNotExist(err) {
		t.Errorf("what is wrong stays: %v", err)
	}
	if out, err = b.run("verify", "--format", "json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("verify says %s, %v", out, err)
	}
}

func TestCacheCalledWrongly(t *testing.T) {
	b := newCacheBed(t)
	for _, args := range [][]string{{"ls", "--format", "yaml"}, {"gc", "extra"}, {"nonsense"}} {
		if out, err := b.run(args...); err == nil {
			t.Errorf("cache %q says %s", args, out)
		}
	}
}

// TestCacheUsage: what is wrong is told in one line, and is no cache that has nothing.
func TestCacheUsage(t *testing.T) {
	b := newCacheBed(t)
	for _, command := range []string{"ls", "gc", "sync", "verify", "prove"} {
		for want, args := range map[string][]string{
			"cache " + command + " --help":  {"--what"},
			"cache " + command + ": --form": {"--format", "xml"},
			"/no/such/root":                 {"--root", "/no/such/root"},
		} {
			out, err := b.run(append([]string{command}, args...)...)
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || out != "" {
				t.Errorf("%s %q: %v, want %q; it says\n%s", command, args, err, want, out)
			}
		}
	}
}
