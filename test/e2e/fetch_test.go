package e2e_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// fetching is a node on which images are fetched.
type fetching struct {
	*kit.Node
	t *testing.T
}

func newFetching(t *testing.T, s style, more map[string]any) fetching {
	t.Helper()
	cfg := map[string]any{"mount.driver": "auto", "daemon.nydusd_path": shares(t)}
	maps.Copy(cfg, more)
	return fetching{s.node(t, kit.NodeConfig{Hook: s.mount == "helper", Config: cfg}), t}
}

func (f fetching) command(args ...string) *osexec.Cmd {
	return f.Command(f.t.Context(), "nydus-snapshotter", append([]string{"image", "fetch", "--config", f.SnapshotterConfig()}, args...)...)
}

// fetch runs image fetch.
func (f fetching) fetch(args ...string) (out string, err error) {
	f.t.Helper()
	text, err := f.command(args...).CombinedOutput()
	return string(text), err
}

func (f fetching) mustFetch(args ...string) string {
	f.t.Helper()
	out, err := f.fetch(args...)
	if err != nil {
		f.t.Fatalf("image fetch %q: %v\n%s", args, err, out)
	}
	return out
}

// nothingLeft checks that nobody fetches any more.
func (f fetching) nothingLeft() {
	f.t.Helper()
	daemonsNow(f.t, f.Node, 0)
	imageMounts(f.t, 0)
	if mounts := f.RunEntries(); len(mounts) > 0 {
		f.t.Errorf("the run directory has %q", mounts)
	}
	if left, _ := filepath.Glob(filepath.Join(f.SnapshotterRoot(), "instances", "*")); len(left) > 0 {
		f.t.Errorf("left on disk: %q", left)
	}
}

// fetchedJSON is what --format json prints of an image.
type fetchedJSON struct {
	Image, State, Reason, Error string
	Fetched                     int64
	Repaired                    []string
	Blobs                       []struct{ Chunks, Ready int }
}

func (f fetching) json(args ...string) (list []fetchedJSON, err error) {
	f.t.Helper()
	cmd := f.command(append([]string{"--format", "json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err := json.Unmarshal(out, &list); err != nil {
		f.t.Fatalf("%v: %s\n%s", err, out, &stderr)
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, &stderr)
	}
	return list, err
}

// warm runs an image that is complete, for which no nydusd is started.
func (f fetching) warm(img containerd.Image, id string, want kit.Tree) {
	f.t.Helper()
	c := run(f.t, f.Node, img, id, kit.RunOptions{})
	daemonsNow(f.t, f.Node, 0)
	kit.EqualTrees(f.t, "through EROFS", want, kit.MustWalk(f.t, c.Root()))
	remove(f.t, c)
}

// oddNydus pushes an image of everything that a file system can get wrong.
func oddNydus(t *testing.T, r *kit.Registry, name string) (string, *kit.Image, kit.Tree) {
	t.Helper()
	plain := kit.MustBuildImage(t, kit.Pause, kit.BusyboxLayer(kit.MustTools(t)), kit.OddLower(), kit.OddUpper())
	img := plain.MustNydus(t, kit.NydusOptions{})
	return r.MustPush(t, img, name+":nydus"), img, tree(t, plain)
}

// TestFetch completes an image that was never mounted, which then runs without nydusd and
// without its registry.
func TestFetch(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	eachStyle(t, func(t *testing.T, s style) {
		f := newFetching(t, s, nil)
		img := pull(t, f.Node, ref)
		r.ResetRequests()
		out := f.mustFetch(ref)
		if !strings.Contains(out, "complete and compared") || !strings.Contains(out, "needs no nydusd") {
			t.Errorf("image fetch says:\n%s", out)
		}
		f.nothingLeft()
		if r.BlobTotal() == 0 {
			t.Error("nothing was fetched")
		}

		r.ResetRequests()
		list, err := f.json(ref, "--verify")
		if err != nil || len(list) != 1 || list[0].State != "proven" || list[0].Fetched != 0 || len(list[0].Blobs) == 0 {
			t.Errorf("%+v, %v", list, err)
		}
		if got := r.Requests(); len(got) > 0 {
			t.Errorf("an image that is complete: %+v", got)
		}

		c := run(t, f.Node, img, "warm", kit.RunOptions{})
		daemonsNow(t, f.Node, 0)
		imageMounts(t, 1)
		kit.EqualTrees(t, "through EROFS", want, kit.MustWalk(t, c.Root()))
		if got := r.BlobTotal(); got > 0 {
			t.Errorf("%d bytes were fetched of an image that is complete", got)
		}
		remove(t, c)
		if err := f.WaitRunEntries(soon); err != nil {
			t.Error(err)
		}
	})
}

// ranges is a registry's hook for ranges of blobs.
func ranges(do func(w http.ResponseWriter, r *http.Request, next http.Handler)) kit.Hook {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" {
			do(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

// holding has a registry give out the first ranges of blobs, and hold back the others. await
// returns while it holds one back; release lets go of all, at the latest when the test ends.
func holding(t *testing.T, r *kit.Registry, first int64) (await, release func()) {
	t.Helper()
	var asked, held atomic.Int64
	over := make(chan struct{})
	r.SetHook(ranges(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		if asked.Add(1) > first {
			held.Add(1)
			defer held.Add(-1)
			select {
			case <-over:
			case <-req.Context().Done():
				return
			}
		}
		next.ServeHTTP(w, req)
	}))
	release = sync.OnceFunc(func() {
		r.SetHook(nil)
		close(over)
	})
	t.Cleanup(release)
	await = func() {
		t.Helper()
		eventually(t, "somebody waits for a range of a blob", func() bool { return held.Load() > 0 })
	}
	return await, release
}

// TestFetchFails has a registry that gives out a part of an image, and nothing of another.
func TestFetchFails(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	small, _ := smallNydus(t, r, "small")
	f := newFetching(t, helper24, nil)
	img := pull(t, f.Node, ref)
	pull(t, f.Node, small)
	var n atomic.Int64
	r.SetHook(ranges(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		if strings.Contains(req.URL.Path, "/odd/") && n.Add(1) > 3 {
			http.Error(w, "the disk of this registry is broken", http.StatusInternalServerError)
			return
		}
		next.ServeHTTP(w, req)
	}))
	list, err := f.json(ref, "no.such/image:1", small)
	if err == nil || len(list) != 3 {
		t.Fatalf("%+v, %v", list, err)
	}
	if bad := list[0]; bad.State != "failed" || !strings.Contains(bad.Error, "nydusd gets no more of it: blob ") || !strings.Contains(bad.Error, "500") {
		t.Errorf("a registry that fails: %+v", bad)
	}
	if bad := list[1]; bad.State != "failed" || !strings.Contains(bad.Error, "is not pulled") {
		t.Errorf("an image that is not there: %+v", bad)
	}
	if list[2].State != "proven" {
		t.Errorf("the one after those: %+v", list[2])
	}
	f.nothingLeft()

	r.SetHook(nil)
	f.mustFetch(ref)
	f.warm(img, "warm", want)
}

// TestFetchInterrupted interrupts and kills, and goes on.
func TestFetchInterrupted(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	f := newFetching(t, helper24, nil)
	img := pull(t, f.Node, ref)
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGKILL} {
		// Some ranges come, and then one that does not.
		await, release := holding(t, r, 2)
		cmd := f.command(ref)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		await()
		daemonsNow(t, f.Node, 1)
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		err := cmd.Wait()
		if err == nil {
			t.Errorf("%v: it succeeds: %s", sig, &out)
		}
		if sig == unix.SIGKILL {
			// The reconciler finds it.
			if err := f.WaitRunEntries(soon); err != nil {
				t.Error(err)
			}
			wantDaemons(t, f.Node, 0, soon)
		} else if !strings.Contains(out.String(), "not complete") {
			t.Errorf("interrupted, it says %s", &out)
		}
		release()
		f.nothingLeft()
	}
	r.ResetRequests()
	f.mustFetch(ref)
	if got := r.BlobTotal(); got == 0 {
		t.Error("nothing was left to fetch")
	}
	f.warm(img, "warm", want)
}

// TestFetchKilledWithoutSnapshotter kills while no snapshotter runs: the next run ends what
// the killed one left.
func TestFetchKilledWithoutSnapshotter(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, _ := oddNydus(t, r, "odd")
	f := newFetching(t, helper24, nil)
	pull(t, f.Node, ref)
	if err := f.StopSnapshotter(); err != nil {
		t.Fatal(err)
	}
	await, release := holding(t, r, 0)
	cmd := f.command(ref)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	await()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	daemonsNow(t, f.Node, 1)
	release()
	f.mustFetch(ref)
	f.nothingLeft()
	if err := f.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestFetchFrom takes blobs from files while the registry is away.
func TestFetchFrom(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, image, want := oddNydus(t, r, "odd")
	f := newFetching(t, helper24, nil)
	img := pull(t, f.Node, ref)
	r.SetHook(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		http.Error(w, "nobody is there", http.StatusServiceUnavailable)
	})
	r.ResetRequests()
	for _, c := range []struct {
		name string
		file func(id string) string
	}{
		{"ids", func(id string) string { return id }},
		{"digests", func(id string) string { return "sha256:" + id }},
		{"layout", func(id string) string { return filepath.Join("blobs", "sha256", id) }},
	} {
		dir := t.TempDir()
		var files []string
		for i, l := range image.Layers {
			if i == image.Bootstrap() {
				continue
			}
			file := filepath.Join(dir, c.file(l.Desc.Digest.Encoded()))
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(l.Path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
			files = append(files, file)
		}
		// One is not what it says, or is missing.
		good, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(files[0], append([]byte("x"), good[1:]...), 0o600); err != nil {
			t.Fatal(err)
		}
		if list, err := f.json("--from", dir, ref); err == nil || len(list) != 1 || !strings.Contains(list[0].Error, "is not what its name says") {
			t.Errorf("%s: a wrong file: %+v, %v", c.name, list, err)
		}
		if err := os.Remove(files[0]); err != nil {
			t.Fatal(err)
		}
		if list, err := f.json("--from", dir, ref); err == nil || len(list) != 1 || !strings.Contains(list[0].Error, "lacks 1 of the image's") {
			t.Errorf("%s: a missing file: %+v, %v", c.name, list, err)
		}
		f.nothingLeft()
		if err := os.WriteFile(files[0], good, 0o600); err != nil {
			t.Fatal(err)
		}
		list, err := f.json("--from", dir, ref)
		if err != nil || len(list) != 1 || list[0].State != "proven" || list[0].Fetched == 0 {
			t.Errorf("%s: %+v, %v", c.name, list, err)
		}
		f.nothingLeft()
		if got := r.Requests(); len(got) > 0 {
			t.Errorf("%s: the registry was asked: %+v", c.name, got)
		}
		f.warm(img, c.name, want)
		if err := f.WaitRunEntries(soon); err != nil {
			t.Error(err)
		}
		f.emptyCache()
	}
}

// emptyCache removes what is cached, which nobody may use.
func (f fetching) emptyCache() {
	f.t.Helper()
	all, _ := filepath.Glob(filepath.Join(f.SnapshotterRoot(), "cache", "*", "*"))
	for _, path := range all {
		if filepath.Base(path) == "origin.json" {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			f.t.Fatal(err)
		}
	}
}

// TestFetchVerify damages what is proven.
func TestFetchVerify(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	f := newFetching(t, helper24, nil)
	img := pull(t, f.Node, ref)
	f.mustFetch(ref)
	data, _ := filepath.Glob(filepath.Join(f.SnapshotterRoot(), "cache", "*", "*.blob.data"))
	if len(data) == 0 {
		t.Fatal("there is no data")
	}
	// The disk returns something else than what was compared.
	rot(t, data[0], 0)
	list, err := f.json(ref)
	if err == nil || !strings.Contains(list[0].Error, "--verify fetches it again") {
		t.Errorf("without --verify: %+v, %v", list, err)
	}
	r.ResetRequests()
	list, err = f.json("--verify", ref)
	if err != nil || list[0].State != "proven" || len(list[0].Repaired) != 1 || !strings.HasPrefix(filepath.Base(data[0]), list[0].Repaired[0]) {
		t.Errorf("with --verify: %+v, %v", list, err)
	}
	if r.BlobTotal() == 0 {
		t.Error("nothing was fetched again")
	}
	f.nothingLeft()
	f.warm(img, "warm", want)
}

// TestFetchOldNydusd has a nydusd that shares no cache.
func TestFetchOldNydusd(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "small")
	old := filepath.Join(t.TempDir(), "nydusd")
	script := "#!/bin/sh\n[ \"$1\" = --version ] && exec echo 'Version: v2.2.0'\nexec false\n"
	if err := os.WriteFile(old, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	f := newFetching(t, helper24, map[string]any{"daemon.nydusd_path": old})
	pull(t, f.Node, ref)
	if out, err := f.fetch(ref); err == nil || !strings.Contains(out, "has version 2.2") || !strings.Contains(out, "install 2.3 or newer") {
		t.Errorf("%v: %s", err, out)
	}
	f.nothingLeft()
}

// TestFetchCredentials fetches from a registry with a login, by nydusd itself and through
// the gateway, and leaves none behind.
func TestFetchCredentials(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{User: user, Password: password})
	ref, _ := smallNydus(t, r, "small")
	logins := dockerConfig(t, r)
	for _, way := range []string{"never", "always"} {
		t.Run("gateway "+way, func(t *testing.T) {
			gateway := kit.NewGateway(t)
			n := managed24.node(t, kit.NodeConfig{Env: logins, Config: map[string]any{
				"daemon.nydusd_path": shares(t), "remote.gateway": way, "remote.gateway_address": gateway.Address,
			}})
			gateway.Start(n.SnapshotterConfig(), 0, logins...)
			f := fetching{n, t}
			if _, err := n.Pull(t.Context(), ref, kit.PullOptions{User: user, Password: password}); err != nil {
				t.Fatal(err)
			}
			r.ResetRequests()
			out := f.mustFetch(ref)
			f.nothingLeft()
			asked := 0
			for _, q := range r.Requests() {
				if q.Authenticated && strings.Contains(q.Path, "/blobs/") {
					asked++
				}
				if through := strings.HasPrefix(q.UserAgent, "Go-http-client/"); through != (way == "always") {
					t.Errorf("the registry is asked by %q", q.UserAgent)
				}
			}
			if asked == 0 {
				t.Error("nobody asks for blobs with a login")
			}
			for _, secret := range []string{password, loginOf()} {
				if strings.Contains(out, secret) {
					t.Errorf("it tells the login: %s", out)
				}
				found, err := kit.FindSecret(secret, n.RunDir(), n.SnapshotterRoot(), n.SnapshotterLog())
				if err != nil || len(found) > 0 {
					t.Errorf("the login is in %q, %v", found, err)
				}
			}
		})
	}
}

func loginOf() string { return base64.StdEncoding.EncodeToString([]byte(user + ":" + password)) }
