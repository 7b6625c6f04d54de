package main

import (
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec/katatest"
)

const password = "canary-pa55word"

// secret is the password as it travels to the registry.
func secret() string { return base64.StdEncoding.EncodeToString([]byte("user:" + password)) }

func login(t *testing.T, dir string) {
	t.Helper()
	write(t, filepath.Join(dir, "docker", "config.json"), fmt.Sprintf(`{"auths":{"registry.example":{"auth":%q}}}`, secret()))
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// pull unpacks a nydus image of one data layer and a bootstrap.
func pull(t *testing.T, sn snapshots.Snapshotter, image string, number int) string {
	t.Helper()
	ctx := testContext(t)
	data, boot := fmt.Sprintf("sha256:%064x", 2*number), fmt.Sprintf("sha256:%064x", 2*number+1)
	labels := func(chain, kind string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotRef: chain, "containerd.io/snapshot/cri.image-ref": image, "containerd.io/snapshot/" + kind: "true",
		})
	}
	key := func(chain string) string { return fmt.Sprintf("k8s.io/%d/extract-%d-x %s", number, number, chain) }
	if _, err := sn.Prepare(ctx, key(data), "", labels(data, "nydus-blob")); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("got %v, want that the data layer exists", err)
	}
	parent := ""
	err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error { parent = i.Name; return nil }, fmt.Sprintf(`labels."containerd.io/snapshot.ref"==%s`, data))
	if err != nil || parent == "" {
		t.Fatalf("containerd does not find the layer: %v", err)
	}
	mounts, err := sn.Prepare(ctx, key(boot), parent, labels(boot, "nydus-bootstrap"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			write(t, filepath.Join(upper, "image", "image.boot"), bootstrap(t))
		}
	}
	name := fmt.Sprintf("k8s.io/%d/%s", number, boot)
	if err := sn.Commit(ctx, name, key(boot), labels(boot, "nydus-bootstrap")); err != nil {
		t.Fatal(err)
	}
	return name
}

func bootstrap(t *testing.T) string {
	t.Helper()
	f, err := os.Open("../pkg/rafs/testdata/v6-merged.boot.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func decode(t *testing.T, p *process, m mount.Mount) *mountspec.Spec {
	t.Helper()
	value, err := mountspec.Find(m.Options)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := mountspec.Decode(value, p.keys())
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// A process as it is shipped: an image is pulled and a container prepared, it is
// stopped and started again, and nowhere does the password show.
func TestServe(t *testing.T) {
	dir := shortDir(t)
	login(t, dir)
	p := start(t, dir, "--log-level", "trace")
	if info, err := os.Stat(p.address); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Fatalf("the socket has mode %v, %v", info.Mode(), err)
	}
	sn := p.client()
	image := pull(t, sn, "registry.example/team/app:v1", 1)
	mounts, err := sn.Prepare(testContext(t), "k8s.io/9/c1", image)
	if err != nil || len(mounts) != 1 {
		t.Fatalf("got %v, %v", mounts, err)
	}
	spec := decode(t, p, mounts[0])
	if spec.Credentials == nil || spec.Credentials.Auth != secret() || spec.Host != "registry.example" || spec.Repository != "team/app" {
		t.Fatalf("got %+v", spec)
	}
	if !strings.Contains(spec.Config, `"scheme":"https"`) || !strings.Contains(spec.Config, spec.CacheDir) || spec.Daemon.Path == "" {
		t.Fatalf("got %+v", spec)
	}
	if err := sn.(snapshots.Cleaner).Cleanup(testContext(t)); err != nil {
		t.Errorf("cleanup: %v", err)
	}
	noSecret(t, "the option", mounts[0].Options[0])
	noSecret(t, "nydusd's configuration", spec.Config)
	noSecret(t, "the argument list", read(t, fmt.Sprintf("/proc/%d/cmdline", p.cmd.Process.Pid)))

	_ = p.cmd.Process.Signal(os.Interrupt)
	if got := p.state(); got != "STOPPING=1" {
		t.Errorf("got state %q", got)
	}
	said, err := p.end()
	if err != nil {
		t.Errorf("it ended with %v:\n%s", err, said)
	}
	noSecret(t, "the log", said)
	if _, err := os.Lstat(p.address); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}

	p = start(t, dir)
	again, err := p.client().Mounts(testContext(t), "k8s.io/9/c1")
	if err != nil {
		t.Fatal(err)
	}
	if got := decode(t, p, again[0]); got.Instance != spec.Instance || got.SnapshotDir != spec.SnapshotDir {
		t.Fatalf("after a restart %+v, before %+v", got, spec)
	}
	p.stop()
	err = filepath.WalkDir(filepath.Join(dir, "root"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			noSecret(t, path, read(t, path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func noSecret(t *testing.T, where, text string) {
	t.Helper()
	if strings.Contains(text, password) || strings.Contains(text, secret()) {
		t.Errorf("%s tells the password", where)
	}
}

func TestServePlainForKata(t *testing.T) {
	dir := shortDir(t)
	login(t, dir)
	p := start(t, dir, "--config", write(t, filepath.Join(dir, "c.toml"), "version = 1\nmount.credentials = \"plain\"\n"))
	sn := p.client()
	mounts, err := sn.Prepare(testContext(t), "k8s.io/9/c1", pull(t, sn, "registry.example/app", 1))
	if err != nil {
		t.Fatal(err)
	}
	spec := decode(t, p, mounts[0])
	if spec.Credentials != nil || !strings.Contains(spec.Config, secret()) {
		t.Fatalf("got %+v", spec)
	}
	var list []katatest.Mount
	for _, m := range mounts {
		list = append(list, katatest.Mount{Type: m.Type, Source: m.Source, Options: m.Options})
	}
	katatest.Takes(t, "a container", katatest.Volume{Source: spec.Bootstrap, Config: spec.Config, SnapshotDir: spec.SnapshotDir, FSVersion: spec.FSVersion}, list...)
	if boot := read(t, spec.Bootstrap); boot != bootstrap(t) {
		t.Error("Kata finds another bootstrap")
	}
	noSecret(t, "the log", p.stop())
}

func TestServeManagedLocalFS(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir, "--config", write(t, filepath.Join(dir, "c.toml"), `version = 1
mount.style = "managed"
daemon = { nydusd_path = "/nonexistent/nydusd", threads = 7 }
log.format = "json"
backend = [{ name = "files", type = "localfs", match = { host = "*" }, dir = "/blobs" }]
`))
	sn := p.client()
	mounts, err := sn.Prepare(testContext(t), "k8s.io/9/c1", pull(t, sn, "registry.example/app", 1))
	if err != nil || len(mounts) != 2 {
		t.Fatalf("got %v, %v", mounts, err)
	}
	spec := decode(t, p, mounts[0])
	if spec.Kind != mountspec.KindImage || spec.Host != "" || spec.Repository != "/blobs" || !strings.Contains(spec.Config, `"localfs"`) ||
		spec.Daemon.Path != "/nonexistent/nydusd" || spec.Daemon.Threads != 7 {
		t.Fatalf("got %+v", spec)
	}
	if said := p.stop(); !strings.Contains(said, `"level":"warning"`) || !strings.Contains(said, "nydusd cannot be executed") {
		t.Errorf("the log does not warn of the missing nydusd:\n%s", said)
	}
}

func TestServeRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(t *testing.T, dir string)
		args    []string
		want    string
	}{
		"same root": {func(t *testing.T, dir string) { start(t, dir); os.Remove(filepath.Join(dir, "notify")) },
			[]string{"--address", "/run/other.sock"}, "another nydus-snapshotter runs with root"},
		"same address": {func(t *testing.T, dir string) { start(t, dir); os.Remove(filepath.Join(dir, "notify")) },
			[]string{"--root", "OTHER"}, "already listens"},
		"address is a file":               {func(t *testing.T, dir string) { write(t, filepath.Join(dir, "sock"), "") }, nil, "is no socket"},
		"missing file":                    {func(*testing.T, string) {}, []string{"--config", "/nonexistent.toml"}, "/nonexistent.toml"},
		"bad value":                       {func(*testing.T, string) {}, []string{"--run-dir", "here"}, `run_dir: "here"`},
		"argument":                        {func(*testing.T, string) {}, []string{"more"}, `unexpected argument "more"`},
		"option":                          {func(*testing.T, string) {}, []string{"--rot", "/x"}, "rot"},
		"root is a file":                  {func(t *testing.T, dir string) { write(t, filepath.Join(dir, "root"), "") }, nil, "create root"},
		"signatures without keys":         {unsigned("/nonexistent.pem"), []string{"--config", "CONFIG"}, "image.public_key_file: stat /nonexistent.pem"},
		"signatures with no key":          {unsigned("CONFIG"), []string{"--config", "CONFIG"}, "it holds no key"},
		"run directory is open to others": {func(*testing.T, string) {}, []string{"--run-dir", "/var/tmp"}, "not trusted"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			c.prepare(t, dir)
			for i, a := range c.args {
				switch a {
				case "OTHER":
					c.args[i] = filepath.Join(dir, "other")
				case "CONFIG":
					c.args[i] = filepath.Join(dir, "config.toml")
				}
			}
			said, err := launch(t, dir, c.args...).end()
			if err == nil || !strings.Contains(said, c.want) {
				t.Fatalf("got %v, %q, want a failure with %q", err, said, c.want)
			}
		})
	}
}

// unsigned writes a configuration that asks for signatures, with a file of keys that holds
// none.
func unsigned(keys string) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		path := filepath.Join(dir, "config.toml")
		if keys == "CONFIG" {
			keys = path
		}
		write(t, path, fmt.Sprintf("version = 1\n[image]\nvalidate_signature = true\npublic_key_file = %q\n", keys))
	}
}

func TestServeReplacesStaleSocket(t *testing.T) {
	dir := shortDir(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	p := start(t, dir)
	if _, err := p.client().Stat(testContext(t), "nothing"); !errdefs.IsNotFound(err) {
		t.Fatalf("got %v", err)
	}
}

// The snapshotter is killed, and what it answered stays valid.
func TestServeAfterKill(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir)
	sn := p.client()
	image := pull(t, sn, "registry.example/app", 1)
	_ = p.cmd.Process.Kill()
	_, _ = p.end()
	p = start(t, dir)
	mounts, err := p.client().Prepare(testContext(t), "k8s.io/9/c1", image)
	if err != nil {
		t.Fatal(err)
	}
	decode(t, p, mounts[0])
}

// 20 images and 200 snapshots fit into 40 MiB.
func TestServeMemory(t *testing.T) {
	const limitKiB = 40 << 10
	p := start(t, shortDir(t))
	sn := p.client()
	for i := range 20 {
		image := pull(t, sn, fmt.Sprintf("registry.example/app%d", i), i)
		for c := range 10 {
			if _, err := sn.Prepare(testContext(t), fmt.Sprintf("k8s.io/1/c-%d-%d", i, c), image); err != nil {
				t.Fatal(err)
			}
		}
	}
	got := p.rss()
	t.Logf("RSS %.1f MiB", float64(got)/1024)
	if got > limitKiB {
		t.Errorf("RSS is %d KiB, more than %d", got, limitKiB)
	}
}

func TestConfigCommands(t *testing.T) {
	good := write(t, filepath.Join(t.TempDir(), "good.toml"), config.DefaultTOML)
	bad := write(t, filepath.Join(t.TempDir(), "bad.toml"), "version = 1\nrot = 1\n\n[log]\nlevel = \"loud\"\n")
	for name, c := range map[string]struct {
		args []string
		fail bool
		want []string
	}{
		"default":     {args: []string{"config", "default"}, want: []string{config.DefaultTOML}},
		"check":       {args: []string{"config", "check", good}, want: []string{good + ": ok"}},
		"check bad":   {args: []string{"config", "check", bad}, fail: true, want: []string{"2 faults", "line 2: rot", "line 5: log.level"}},
		"json":        {args: []string{"config", "check", "--format", "json", good}, want: []string{`"ok": true`, `"faults": []`}},
		"json bad":    {args: []string{"config", "check", "--format", "json", bad}, fail: true, want: []string{`"ok": false`, `"key": "log.level"`, `"line": 5`}},
		"format":      {args: []string{"config", "check", "--format", "xml", bad}, fail: true, want: []string{"xml"}},
		"missing":     {args: []string{"config", "check", "/nonexistent"}, fail: true, want: []string{"/nonexistent"}},
		"no file":     {args: []string{"config", "check"}, fail: true, want: []string{"FILE"}},
		"version":     {args: []string{"--version"}, want: []string{"nydus-snapshotter version"}},
		"no command":  {args: nil, fail: true, want: []string{"USAGE", "a command is missing"}},
		"bad command": {args: []string{"sevre"}, fail: true, want: []string{`"sevre"`}},
		"help":        {args: []string{"serve", "--help"}, want: []string{"--run-dir", "--log-level"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command(program(t), c.args...).CombinedOutput()
			if (err != nil) != c.fail {
				t.Errorf("got %v", err)
			}
			for _, want := range c.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("want %q in:\n%s", want, out)
				}
			}
		})
	}
}

// A run directory that the configuration accepts is one that instances accept.
func TestRunDirLimit(t *testing.T) {
	if config.MaxRunDir > instance.MaxRunDir {
		t.Fatalf("the configuration allows %d bytes, instances %d", config.MaxRunDir, instance.MaxRunDir)
	}
}
