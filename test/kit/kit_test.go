package kit_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m) }

func get(t *testing.T, url, user, password string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestRegistry(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{User: "alice", Password: "s3cret"})
	img := kit.SmallImage(t, "registry")
	r.MustPush(t, img, "some/thing:v1")
	if len(r.Requests()) != 0 {
		t.Errorf("pushing was recorded: %v", r.Requests())
	}
	url := "http://" + r.Host + "/v2/some/thing/blobs/" + img.Layers[0].Desc.Digest.String()
	if code, _ := get(t, url, "", ""); code != http.StatusUnauthorized {
		t.Errorf("without password: %d", code)
	}
	if code, body := get(t, url, "alice", "s3cret"); code != http.StatusOK || int64(len(body)) != img.Layers[0].Desc.Size {
		t.Errorf("blob: %d, %d bytes", code, len(body))
	}
	// It is counted once the answer is given, which the client sees before.
	kit.Eventually(t, fmt.Sprintf("%d blob bytes are counted", img.Layers[0].Desc.Size), 10*time.Second, func() bool {
		return r.BlobTotal() == img.Layers[0].Desc.Size
	})
	r.SetHook(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		kit.AlterBody(w, req, next, func([]byte) []byte { return []byte("other") })
	})
	if _, body := get(t, url, "alice", "s3cret"); body != "other" {
		t.Errorf("the hook did not alter the answer")
	}
}

func TestImagesAreReproducible(t *testing.T) {
	a, b := kit.SmallImage(t, "x"), kit.SmallImage(t, "x")
	if a.Digest() != b.Digest() {
		t.Errorf("two builds differ: %s, %s", a.Digest(), b.Digest())
	}
	if c := kit.SmallImage(t, "y"); c.Digest() == a.Digest() {
		t.Errorf("two names make one image")
	}
}

func TestHostileImage(t *testing.T) {
	img := kit.SmallImage(t, "hostile").MustNydus(t, kit.NydusOptions{})
	boot, err := img.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	blob := img.Layers[0].Desc.Digest.Encoded()
	renamed, err := kit.RenameBlob(boot, blob, "../outside/evil")
	if err != nil {
		t.Fatal(err)
	}
	bad, err := img.Hostile(t.TempDir(), kit.BootstrapLayer(renamed))
	if err != nil {
		t.Fatal(err)
	}
	got, err := bad.BootstrapBytes()
	if err != nil || strings.Contains(string(got), blob) || !strings.Contains(string(got), "../outside/evil\x00") {
		t.Errorf("the blob is not renamed (%v)", err)
	}
	if bad.Digest() == img.Digest() || bad.Layers[0].Desc.Digest != img.Layers[0].Desc.Digest {
		t.Errorf("only the bootstrap layer should differ")
	}
}

// runMain runs the plain fixture and compares what the container sees.
func runMain(t *testing.T, version kit.Version) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain, _ := kit.MainImage(t, kit.NydusOptions{})
	ref := r.MustPush(t, plain, "main:plain")
	n := kit.NewNode(t, kit.NodeConfig{Containerd: version})
	start := time.Now()
	img, err := n.Pull(t.Context(), ref, kit.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("pulled in %v", time.Since(start))
	if r.BlobTotal() < plain.Size() {
		t.Errorf("%d blob bytes counted, the image has %d", r.BlobTotal(), plain.Size())
	}
	c, err := n.Run(t.Context(), img, "one", kit.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want, err := plain.Tree()
	if err != nil {
		t.Fatal(err)
	}
	kit.EqualTrees(t, "seen from inside", want, kit.MustWalk(t, c.Root()))
	kit.EqualTrees(t, "seen from outside", want, kit.MustWalk(t, c.Rootfs()))
	out, code, err := c.Exec(t.Context(), kit.MainCommand...)
	if err != nil || code != 0 || out != "ready\n" {
		t.Errorf("exec: %q, code %d, %v", out, code, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c.Kill(ctx, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if code, err := c.Wait(ctx); code != 137 || err != nil {
		t.Errorf("killed container: code %d, %v", code, err)
	}
	if err := c.Remove(ctx); err != nil {
		t.Error(err)
	}
}

func TestNodeContainerd24(t *testing.T) { runMain(t, kit.V24) }
func TestNodeContainerd16(t *testing.T) { runMain(t, kit.V16) }

func TestNodeSurvivesRestart(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{User: "bob", Password: "pw"})
	n := kit.NewNode(t, kit.NodeConfig{})
	img, err := n.Pull(t.Context(), r.MustPush(t, kit.SmallImage(t, "restart"), "small:1"), kit.PullOptions{User: "bob", Password: "pw"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.Run(t.Context(), img, "stays", kit.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := n.Ctr(t.Context(), "task", "ls"); err != nil || !strings.Contains(out, "stays") || !strings.Contains(out, "RUNNING") {
		t.Errorf("after the restart: %q, %v", out, err)
	}
	if _, err := os.Stat(c.Root()); err != nil {
		t.Error(err)
	}
}

// A connection that was refused while the snapshotter was away is not what the next call
// of containerd meets.
func TestRestartSnapshotter(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	n := kit.NewNode(t, kit.NodeConfig{Snapshotter: true})
	if _, err := n.Pull(t.Context(), r.MustPush(t, kit.SmallImage(t, "refused"), "small:1"), kit.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	ask := func() error {
		return n.Client().SnapshotService(n.SnapshotterName()).Walk(t.Context(), func(context.Context, snapshots.Info) error { return nil })
	}
	if err := n.StopSnapshotter(); err != nil {
		t.Fatal(err)
	}
	// The pause after a refusal grows.
	refused := 0
	kit.Eventually(t, "containerd is refused", 10*time.Second, func() bool {
		if err := ask(); err != nil {
			refused++
		}
		return refused > 3
	})
	if err := n.RestartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := ask(); err != nil {
		t.Error(err)
	}
}

func TestCRI(t *testing.T) {
	for _, version := range []kit.Version{kit.V24, kit.V16} {
		t.Run(string(version), func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{User: "bob", Password: "pw"})
			pause := kit.NewRegistry(t, kit.RegistryOptions{})
			ref := r.MustPush(t, kit.SmallImage(t, "cri"), "small:1")
			n := kit.NewNode(t, kit.NodeConfig{Containerd: version, CRI: true,
				SandboxImage: pause.MustPush(t, kit.SmallImage(t, "pause"), "pause:1")})
			if err := n.CRIPull(t.Context(), ref, "bob", "pw"); err != nil {
				t.Fatal(err)
			}
			pod, err := n.RunPod(t.Context(), "pod")
			if err != nil {
				t.Fatal(err)
			}
			id, err := pod.Run(t.Context(), "main", ref)
			if err != nil {
				t.Fatal(err)
			}
			if out, code, err := pod.Exec(t.Context(), id, "busybox", "cat", "/name"); out != "cri" || code != 0 || err != nil {
				t.Errorf("exec: %q, %d, %v", out, code, err)
			}
			if err := pod.Stop(t.Context(), id); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLeakCheckTurnsRed proves that the check sees what tests may forget.
func TestLeakCheckTurnsRed(t *testing.T) {
	leak := map[string]struct {
		make func(t kit.TB)
		want string
	}{
		"mount": {func(t kit.TB) {
			if err := unix.Mount("tmpfs", t.TempDir(), "tmpfs", 0, ""); err != nil {
				t.Fatalf("%v", err)
			}
		}, "mount "},
		"process": {func(t kit.TB) {
			cmd := exec.Command("sleep", "1000")
			if err := cmd.Start(); err != nil {
				t.Fatalf("%v", err)
			}
			go cmd.Wait()
		}, "sleep 1000"},
		"orphan": {func(t kit.TB) {
			if err := exec.Command("sh", "-c", "sleep 2000 >/dev/null 2>&1 &").Run(); err != nil {
				t.Fatalf("%v", err)
			}
		}, "sleep 2000"},
		"run-directory entry": {func(t kit.TB) {
			dir := "/run/leak/instance"
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatalf("%v", err)
			}
			if err := os.WriteFile(filepath.Join(dir, "record"), nil, 0o644); err != nil {
				t.Fatalf("%v", err)
			}
		}, "/run/leak/instance/record"},
		"instance's directory": {func(t kit.TB) {
			if err := os.MkdirAll("/run/leak/i/key/g1/mnt", 0o755); err != nil {
				t.Fatalf("%v", err)
			}
		}, "run-directory entry /run/leak/i/key/g1/mnt"},
	}
	for name, l := range leak {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			ok := kit.RunTB(&out, "leaky", func(t kit.TB) {
				kit.BaselineWithin(t, 50*time.Millisecond)
				l.make(t)
			})
			if ok || !strings.Contains(out.String(), l.want) {
				t.Errorf("the leak was not reported: %q", out.String())
			}
		})
	}
	t.Run("cgroup", func(t *testing.T) {
		tops, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
		if err != nil || len(tops) == 0 {
			tops = []string{"/sys/fs/cgroup/cgroup.procs"}
		}
		dir := filepath.Join(filepath.Dir(tops[0]), kit.CgroupRoot(), "forgotten")
		var out strings.Builder
		ok := kit.RunTB(&out, "leaky", func(t kit.TB) {
			kit.BaselineWithin(t, 50*time.Millisecond)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatalf("%v", err)
			}
		})
		if ok || !strings.Contains(out.String(), "cgroup "+dir) {
			t.Errorf("the leak was not reported: %q", out.String())
		}
	})
	t.Run("nothing", func(t *testing.T) {
		var out strings.Builder
		if !kit.RunTB(&out, "clean", func(t kit.TB) {
			kit.Baseline(t)
			// Ends while the check waits: no leak.
			cmd := exec.Command("sleep", "0.2")
			if err := cmd.Start(); err != nil {
				t.Fatalf("%v", err)
			}
			go cmd.Wait()
		}) {
			t.Errorf("a false alarm: %s", out.String())
		}
	})
}

func TestTreeDifferencesAreNamed(t *testing.T) {
	img := kit.MustBuildImage(t, kit.Pause, kit.OddLower(), kit.OddUpper())
	want, err := img.Tree()
	if err != nil {
		t.Fatal(err)
	}
	if len(want) < 10_000 {
		t.Errorf("only %d paths", len(want))
	}
	for path, change := range map[string]func(*kit.Entry){
		"odd/modes/file-4755":    func(e *kit.Entry) { e.Mode = 0o755 },
		"odd/sizes/4097":         func(e *kit.Entry) { e.SHA256 = strings.Repeat("0", 64) },
		"odd/links/two":          func(e *kit.Entry) { e.Links = nil },
		"odd/xattrs/capability":  func(e *kit.Entry) { e.Xattrs = nil },
		"odd/devices/null":       func(e *kit.Entry) { e.Minor = 5 },
		"odd/times/4294967296":   func(e *kit.Entry) { e.Mtime = time.Unix(0, 0) },
		"odd/owners/1234567":     func(e *kit.Entry) { e.UID = 0 },
		"odd/links/dangling":     func(e *kit.Entry) { e.Target = "x" },
		"odd/lower/file-to-link": func(e *kit.Entry) { e.Type = "file" },
	} {
		got := kit.Tree{}
		for p, e := range want {
			got[p] = e
		}
		e, ok := got[path]
		if !ok {
			t.Errorf("%s is not in the fixture", path)
			continue
		}
		change(&e)
		got[path] = e
		if d := kit.Diff(want, got); len(d) != 1 || !strings.Contains(d[0], path) {
			t.Errorf("%s: %q", path, d)
		}
	}
	for _, gone := range []string{"odd/lower/gone", "odd/lower/gone-dir/sub/b", "odd/lower/opaque/old", "odd/lower/dir-to-file/x", "odd/lower/emptied/1"} {
		if _, ok := want[gone]; ok {
			t.Errorf("%s should be hidden", gone)
		}
	}
}

// TestNydusImageIsFaithful proves that the converted fixture, served by nydusd
// alone, is the same tree: what differs later is the project's doing.
func TestNydusImageIsFaithful(t *testing.T) {
	for name, opts := range map[string]kit.NydusOptions{"v6": {}, "v6-lz4": {Compressor: "lz4_block"}, "v5": {Version: "5"}} {
		t.Run(name, func(t *testing.T) {
			img := kit.MustBuildImage(t, kit.Pause, kit.OddLower(), kit.OddUpper())
			want, err := img.Tree()
			if err != nil {
				t.Fatal(err)
			}
			m := kit.MountBare(t, img.MustNydus(t, opts))
			kit.EqualTrees(t, "nydusd's mount", want, kit.MustWalk(t, m.Mountpoint))
		})
	}
}
