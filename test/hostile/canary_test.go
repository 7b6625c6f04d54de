package hostile_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// canary is a node whose registry demands a password, and everything that looks
// for that password.
type canary struct {
	*kit.Node
	registry *kit.Registry
	docker   string // DOCKER_CONFIG of the snapshotter
	right    *secret
	wrong    *secret
	token    *secret // a registry token; its user counts for nothing
	witness  *witness
	errors   []string
}

func newCanary(t *testing.T, cfg kit.NodeConfig) *canary {
	t.Helper()
	c := &canary{right: newSecret("alice"), wrong: newSecret("alice"), token: newSecret("alice"), docker: t.TempDir()}
	c.registry = kit.NewRegistry(t, kit.RegistryOptions{User: c.right.user, Password: c.right.password})
	cfg.Hook, cfg.Env, cfg.Path = true, []string{"DOCKER_CONFIG=" + c.docker}, t.TempDir()
	if cfg.CRI {
		cfg.SandboxImage = c.registry.MustPush(t, kit.SmallImage(t, "sandbox"), "sandbox:1")
	}
	c.login(t, c.right)
	c.Node = newNode(t, cfg)
	c.witness = newWitness(t, c.right, c.wrong, c.token)
	return c
}

// login writes docker's configuration.
func (c *canary) login(t *testing.T, s *secret) {
	t.Helper()
	c.loginWith(t, "auth", base64.StdEncoding.EncodeToString([]byte(s.user+":"+s.password)))
}

func (c *canary) loginWith(t *testing.T, member, value string) {
	t.Helper()
	text, err := json.Marshal(map[string]any{"auths": map[string]any{c.registry.Host: map[string]string{member: value}}})
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(c.docker, "config.json"), string(text), 0o600)
}

// failed notes an error that there must be.
func (c *canary) failed(t *testing.T, what string, err error, texts ...string) {
	t.Helper()
	refused(t, what, err, texts...)
	if err != nil {
		c.errors = append(c.errors, err.Error())
	}
}

// allowed tells whether a file may hold the password: what the operator wrote
// himself, and a daemon's configuration.
func (c *canary) allowed(f find) bool {
	if strings.HasPrefix(f.path, c.docker+"/") {
		return true
	}
	return f.tmpfs && f.mode == 0o600 && strings.HasPrefix(f.path, c.RunDir()+"/i/") && filepath.Base(f.path) == "config.json"
}

// check looks everywhere, and returns the daemons' configurations that hold a password.
func (c *canary) check(t *testing.T, step string) (configs []string) {
	t.Helper()
	finds, _ := c.witness.take(t)
	s := either(c.right, c.wrong, c.token)
	finds = append(finds, s.processes(t)...)
	for _, f := range s.files(t) {
		switch {
		case !c.allowed(f):
			finds = append(finds, f.String())
		case !strings.HasPrefix(f.path, c.docker):
			configs = append(configs, f.path)
		}
	}
	for _, text := range c.errors {
		if form := s.in([]byte(text)); form != "" {
			finds = append(finds, fmt.Sprintf("error text %.200q…: %s", text, form))
		}
	}
	if len(finds) > 0 {
		t.Errorf("%s: the password shows:\n  %s", step, strings.Join(finds, "\n  "))
	}
	return configs
}

func (c *canary) pull(t *testing.T, img *kit.Image, name string) containerd.Image {
	t.Helper()
	return mustPull(t, c.Node, c.registry.MustPush(t, img, name), kit.PullOptions{User: c.right.user, Password: c.right.password})
}

// TestCanary does everything that the project does with a registry that demands
// a password, also what fails, and looks for that password in the arguments and
// the environment of every process, all logs, all databases, all error texts, the
// mount tables and every file on the node.
func TestCanary(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			c := newCanary(t, kit.NodeConfig{Style: style, CRI: true})
			img := nydusImage(t, "guarded")
			pulled := c.pull(t, img, "guarded:1")
			if configs := c.check(t, "pulled"); len(configs) > 0 {
				t.Errorf("configurations before any mount: %q", configs)
			}
			c.pod(t, img)
			c.run(t, pulled, img)
			c.tokens(t)
			c.failures(t, img)
			if style == "helper" { // nydusd gives up after some 12 seconds
				c.wrongPassword(t)
			}
			c.restarts(t, pulled, img)
			if err := c.RemoveImage(t.Context(), pulled.Name()); err != nil {
				t.Error(err)
			}
			if configs := c.check(t, "removed"); len(configs) > 0 {
				t.Errorf("configurations after the last mount: %q", configs)
			}
			c.sawAll(t)
		})
	}
}

// TestCanaryOfOldContainerd is what kubelet does on containerd 1.6.
func TestCanaryOfOldContainerd(t *testing.T) {
	c := newCanary(t, kit.NodeConfig{Containerd: kit.V16, CRI: true})
	c.pod(t, nydusImage(t, "guarded"))
	if configs := c.check(t, "ended"); len(configs) > 0 {
		t.Errorf("configurations after the last mount: %q", configs)
	}
	c.sawAll(t)
}

// sawAll fails the test unless every program that the password could reach was looked at.
func (c *canary) sawAll(t *testing.T) {
	t.Helper()
	_, seen := c.witness.take(t)
	for _, program := range []string{"mount.fuse", "sh", "nydus-overlayfs", "nydusd", "nydus-shim-hook", "runc", "containerd-shim-runc-v2"} {
		if !slices.Contains(seen, program) {
			t.Errorf("%s was never looked at: nothing is proven about its arguments; seen were %q", program, seen)
		}
	}
}

// run runs a container, and looks while it runs and after.
func (c *canary) run(t *testing.T, pulled containerd.Image, img *kit.Image) {
	t.Helper()
	one, err := c.Run(t.Context(), pulled, "one", kit.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := img.Tree()
	if err != nil {
		t.Fatal(err)
	}
	kit.EqualTrees(t, "container", tree, kit.MustWalk(t, one.Root())) // cold: from the registry
	configs := c.check(t, "running")
	if len(configs) != 1 {
		t.Errorf("%d configurations hold the password, want the one daemon's: %q", len(configs), configs)
	}
	c.modes(t)
	if err := one.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
	if configs := c.check(t, "ended"); len(configs) > 0 {
		t.Errorf("configurations after the container: %q", configs)
	}
}

// pod does what kubelet does.
func (c *canary) pod(t *testing.T, img *kit.Image) {
	t.Helper()
	ref := c.registry.MustPush(t, img, "guarded-pod:1")
	for _, name := range []string{c.registry.Ref("sandbox:1"), ref} {
		if err := c.CRIPull(t.Context(), name, c.right.user, c.right.password); err != nil {
			t.Fatal(err)
		}
	}
	pod, id := c.startPod(t, ref)
	if out, code, err := pod.Exec(t.Context(), id, "/usr/bin/busybox", "md5sum", "/data"); err != nil || code != 0 {
		t.Errorf("read in the pod: %q, %d, %v", out, code, err)
	}
	if configs := c.check(t, "pod"); len(configs) != 1 {
		t.Errorf("%d configurations hold the password, want the one daemon's: %q", len(configs), configs)
	}
	if err := pod.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
}

// startPod starts a pod with one container; like kubelet again after the one failure
// that is containerd 1.6's own, see runPod.
func (c *canary) startPod(t *testing.T, ref string) (*kit.Pod, string) {
	t.Helper()
	const attempts = 5
	for attempt := 1; ; attempt++ {
		pod, err := c.RunPod(t.Context(), fmt.Sprintf("guarded-%d", attempt))
		if err != nil {
			t.Fatal(err)
		}
		id, err := pod.Run(t.Context(), "c", ref)
		if err == nil {
			return pod, id
		}
		c.errors = append(c.errors, err.Error())
		if attempt == attempts || !strings.Contains(err.Error(), "failed with ECHILD (retired 10 times)") {
			t.Fatal(err)
		}
		if err := pod.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// tokens logs in with a registry token instead of a password.
func (c *canary) tokens(t *testing.T) {
	t.Helper()
	img := nydusImage(t, "tokened")
	pulled := c.pull(t, img, "tokened:1")
	c.loginWith(t, "registrytoken", c.token.password)
	var shown atomic.Int32
	c.registry.SetHook(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Header.Get("Authorization") == "Bearer "+c.token.password {
			shown.Add(1)
			r.SetBasicAuth(c.right.user, c.right.password)
		}
		next.ServeHTTP(w, r)
	})
	c.run(t, pulled, img)
	c.registry.SetHook(nil)
	if shown.Load() == 0 {
		t.Error("the registry never saw the token: nothing is proven")
	}
	c.login(t, c.right)
}

// failures are what can go wrong while a password is at hand.
func (c *canary) failures(t *testing.T, img *kit.Image) {
	t.Helper()
	boot := mustBootstrap(t, img)
	// A pull with the wrong password, and one of a hostile image.
	_, err := c.Pull(t.Context(), c.registry.MustPush(t, img, "never:1"), kit.PullOptions{User: c.wrong.user, Password: c.wrong.password})
	c.failed(t, "pull with a wrong password", err, "never:1", "401")
	renamed, err := kit.RenameBlob(boot, img.Layers[0].Desc.Digest.Encoded(), "../x")
	if err != nil {
		t.Fatal(err)
	}
	ref := c.registry.MustPush(t, forge(t, append(dataParts(img), bootstrapPart(t, kit.BootstrapLayer(renamed)))...), "hostile:1")
	_, err = c.Pull(t.Context(), ref, kit.PullOptions{User: c.right.user, Password: c.right.password})
	c.failed(t, "pull of a hostile image", err, "blob id is not 64 lowercase hex digits")
	// A mount that fails, with the option in containerd's error text.
	root := rootInode(boot)
	copy(boot[root:], strings.Repeat("\xff", 64))
	corrupt := c.pull(t, forge(t, append(dataParts(img), bootstrapPart(t, kit.BootstrapLayer(boot)))...), "corrupt:1")
	_, err = c.Run(t.Context(), corrupt, "corrupt", kit.RunOptions{})
	c.failed(t, "container of a corrupt image", err, "corrupt:1", "nydusd")
	c.check(t, "failures")
	c.lookups(t)
}

// wrongPassword mounts with a password that the registry refuses: the mount works,
// since it needs nothing of the registry, and every read fails.
func (c *canary) wrongPassword(t *testing.T) {
	t.Helper()
	img := nydusImage(t, "refused")
	pulled := c.pull(t, img, "refused:1")
	c.login(t, c.wrong)
	c.registry.ResetRequests()
	v, err := mountView(t, c.Node, pulled, "refused")
	if err != nil {
		t.Fatalf("mount with a wrong password: %v", err)
	}
	if err := readOnce(filepath.Join(v.dir, "name")); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("reading with a wrong password gives %v, want an input/output error", err)
	}
	if !slices.ContainsFunc(c.registry.Requests(), func(r kit.Request) bool { return r.Authenticated && r.Status == http.StatusUnauthorized }) {
		t.Errorf("the registry was never asked with the wrong password: nothing is proven")
	}
	c.check(t, "wrong password")
	v.remove()
	if err := c.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
	c.login(t, c.right)
	runs(t, c.Node, pulled, img, "right-again")
}

// lookups breaks the places where credentials come from, with the password in them.
func (c *canary) lookups(t *testing.T) {
	t.Helper()
	img := nydusImage(t, "looked-up")
	pulled := c.pull(t, img, "looked-up:1")
	file := filepath.Join(c.docker, "config.json")
	writeFile(t, file, `{"auths": {"`+c.registry.Host+`": {"auth": "`+c.right.password+`"`, 0o600)
	restart(t, c.Node) // one that runs goes on with the login that was there before
	_, err := c.Run(t.Context(), pulled, "broken-login", kit.RunOptions{})
	c.failed(t, "login that is no JSON", err, "looked-up:1", file, "not JSON as docker login writes it")

	helper := filepath.Join(c.docker, "answer")
	writeFile(t, helper, c.right.password, 0o600)
	bin := strings.Split(os.Getenv("PATH"), ":")[0]
	writeFile(t, filepath.Join(bin, "docker-credential-canary"), "#!/bin/sh\n/bin/cat "+helper+"\n/bin/cat "+helper+" >&2\nexit 1\n", 0o755)
	writeFile(t, file, `{"credHelpers": {"`+c.registry.Host+`": "canary"}}`, 0o600)
	_, err = c.Run(t.Context(), pulled, "broken-helper", kit.RunOptions{})
	c.failed(t, "credential helper that fails", err, "looked-up:1", "docker-credential-canary", "exit status 1")
	if err := os.Remove(helper); err != nil {
		t.Error(err)
	}
	c.login(t, c.right)
	c.check(t, "broken lookups")
}

// restarts restarts both servers while a container runs, and starts it once more.
func (c *canary) restarts(t *testing.T, pulled containerd.Image, img *kit.Image) {
	t.Helper()
	ctx := t.Context()
	two, err := c.Run(ctx, pulled, "two", kit.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	restart(t, c.Node)
	if err := c.RestartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	c.check(t, "restarted")
	task, err := two.Container.Task(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := task.Delete(ctx, containerd.WithProcessKill); err != nil {
		t.Error(err)
	}
	if err := two.Start(ctx); err != nil {
		t.Errorf("start again: %v", err)
	} else if err := two.Remove(ctx); err != nil {
		t.Error(err)
	}
	if err := c.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
}

// modes checks who may read what, while a container runs.
func (c *canary) modes(t *testing.T) {
	t.Helper()
	if !onTmpfs(c.RunDir()) {
		t.Errorf("%s is not on tmpfs", c.RunDir())
	}
	for _, top := range []string{c.RunDir(), filepath.Join(c.SnapshotterRoot(), "cache"), filepath.Join(c.SnapshotterRoot(), "instances")} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.Name() == "mnt" {
				return fs.SkipDir // the image
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			if st.Uid != 0 || d.IsDir() && info.Mode().Perm() != 0o700 {
				t.Errorf("%s: mode %v, owner %d; want 0700 and root", path, info.Mode(), st.Uid)
			}
			if filepath.Base(filepath.Dir(path)) == "keys" && info.Mode() != 0o600 {
				t.Errorf("%s: mode %v, want 0600", path, info.Mode())
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	keys, err := filepath.Glob(c.RunDir() + "/keys/*")
	if err != nil || len(keys) == 0 {
		t.Errorf("no keys (%v)", err)
	}
	nobody := exec.Command("/bin/ls", filepath.Join(c.RunDir(), "i"))
	nobody.SysProcAttr = asNobody()
	if out, err := nobody.CombinedOutput(); err == nil {
		t.Errorf("another user can list the instances: %s", out)
	}
}

// TestPlainCredentials is the documented exception: with credentials = "plain",
// for Kata, the option carries the password where everybody can read it. It shows
// as well that whatever else TestCanary looks at would not be overlooked.
func TestPlainCredentials(t *testing.T) {
	c := newCanary(t, kit.NodeConfig{Config: map[string]any{"mount.credentials": "plain"}})
	img := nydusImage(t, "plain")
	pulled := c.pull(t, img, "plain:1")
	c.check(t, "pulled")
	v, err := newView(t, c.Node, pulled, "plain")
	if err != nil {
		t.Fatal(err)
	}
	if option := strings.Join(v.mounts[0].Options, ","); c.right.in([]byte(option)) == "" {
		t.Errorf("the option does not carry the password: %s", option)
	}
	c.witness.take(t)
	if err := mount.All(v.mounts, v.dir); err != nil {
		t.Fatal(err)
	}
	if right, failed := readAll(t, v.dir, img); failed > 0 || right == 0 {
		t.Errorf("%d files could be read, %d not", right, failed)
	}
	finds, _ := c.witness.take(t)
	for _, program := range []string{"mount.fuse", "nydus-overlayfs"} {
		if !slices.ContainsFunc(finds, func(f string) bool { return strings.HasPrefix(f, "cmdline") && strings.Contains(f, program) }) {
			t.Errorf("the password was not seen in the arguments of %s, where it is: %q", program, finds)
		}
	}
	v.remove()
	if err := c.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
	// The same node, sealed: nothing of it shows any more.
	c.Configure("mount.credentials", "sealed")
	restart(t, c.Node)
	runs(t, c.Node, pulled, img, "sealed")
	c.check(t, "sealed")
}
