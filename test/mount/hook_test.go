package mount_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// hookTimeout is what the bundles' hooks are given.
const hookTimeout = time.Second

// bundle is an OCI bundle for runc, with our hooks.
type bundle struct {
	*env
	dir, rootfs, id string
}

// bundle writes a bundle whose process prints the image's name.
func (e *env) bundle(args ...string) *bundle {
	e.t.Helper()
	b := &bundle{env: e, dir: e.target(), id: "nydus-" + itoa(os.Getpid()) + "-" + itoa(*e.snaps)}
	b.rootfs = filepath.Join(b.dir, "rootfs")
	must(e.t, os.Mkdir(b.rootfs, 0o755))
	e.ok(e.run(e.tools.Runc, "spec", "-b", b.dir))
	text, err := os.ReadFile(filepath.Join(b.dir, "config.json"))
	must(e.t, err)
	var s specs.Spec
	must(e.t, json.Unmarshal(text, &s))
	s.Process.Terminal, s.Process.Args = false, []string{"/usr/bin/busybox", "cat", "/name"}
	if len(args) > 0 {
		s.Process.Args = args
	}
	s.Root.Readonly = false
	s.Linux.CgroupsPath = kit.CgroupRoot() + "/runc/" + b.id
	var namespaces []specs.LinuxNamespace
	for _, n := range s.Linux.Namespaces {
		if n.Type != specs.NetworkNamespace {
			namespaces = append(namespaces, n)
		}
	}
	s.Linux.Namespaces = namespaces
	hook := func(name string) []specs.Hook {
		return []specs.Hook{{Path: filepath.Join(e.bin, "nydus-shim-hook"), Args: []string{"nydus-shim-hook", "--timeout", hookTimeout.String(), name}}}
	}
	s.Hooks = &specs.Hooks{CreateRuntime: hook("createRuntime"), Poststop: hook("poststop")}
	text, err = json.Marshal(s)
	must(e.t, err)
	must(e.t, os.WriteFile(filepath.Join(b.dir, "config.json"), text, 0o644))
	return b
}

// start runs the bundle's container to its end, as container managers call runc:
// until all who hold its output have closed it. What runc keeps in /run goes with the
// test.
func (b *bundle) start() result {
	b.t.Helper()
	r := runc.Runc{Command: b.tools.Runc, Root: kit.RunRoot + "/runc"}
	b.t.Cleanup(func() {
		must(b.t, os.RemoveAll(r.Root))
		for _, dir := range cgroups(kit.CgroupRoot() + "/runc") {
			must(b.t, os.Remove(dir))
		}
	})
	ctx, cancel := context.WithTimeout(b.t.Context(), 30*time.Second)
	defer cancel()
	var out output
	started := time.Now()
	code, err := r.Run(ctx, b.id, b.dir, &runc.CreateOpts{IO: &out})
	if ctx.Err() != nil {
		b.t.Fatalf("runc did not end, or somebody keeps its output open: %v\n%s", ctx.Err(), &out.text)
	}
	var exit *runc.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.t.Fatalf("runc: %v", err)
	}
	return result{out.text.String(), code, time.Since(started)}
}

// output collects what a container and runc itself write.
type output struct{ text bytes.Buffer }

func (o *output) Set(cmd *exec.Cmd) {
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &o.text, &o.text, 2*time.Second
}
func (o *output) Stdin() io.WriteCloser { return nil }
func (o *output) Stdout() io.ReadCloser { return nil }
func (o *output) Stderr() io.ReadCloser { return nil }
func (o *output) Close() error          { return nil }

// mountOn mounts the image as the bundle's root filesystem.
func (b *bundle) mountOn(r result) {
	b.t.Helper()
	b.ok(r)
	b.t.Cleanup(func() { _ = rootfs.Detach(b.rootfs) })
}

func (b *bundle) printed(r result, want string) {
	b.t.Helper()
	if r.code != 0 || r.out != want {
		b.t.Errorf("the container: exit status %d: %q, want %q", r.code, r.out, want)
	}
}

func TestHookLetsAHealthyContainerStart(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	b := e.bundle()
	b.mountOn(e.mount(s, b.rootfs))
	e.daemons(1)
	b.printed(b.start(), "one")

	// poststop has released it: it goes with the mount, though nobody looks.
	e.daemons(1)
	if r := e.record(); r.Current != nil {
		t.Errorf("after poststop the instance is still in use: %+v", r.Current)
	}
	e.unmount(b.rootfs)
	e.daemons(0)
}

func TestHookKeepsWhatOthersUse(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	other := e.mustMount(s)
	b := e.bundle()
	b.mountOn(e.mount(e.another(s), b.rootfs))
	b.printed(b.start(), "one")
	e.unmount(b.rootfs)
	pid := e.daemons(1)[0].PID
	third := e.mustMount(e.another(s))
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d: another container's instance was released", now, pid)
	}
	e.unmount(third)
	e.unmount(other)
}

// known makes the kernel know all names and attributes beneath the root
// filesystem. runc looks at some of them before it runs any hook: with a daemon
// that is gone it fails there, and with one that hangs it hangs there.
func (b *bundle) known() {
	b.t.Helper()
	kit.MustWalk(b.t, b.rootfs)
}

func TestContainerWithoutItsDaemonFails(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	b := e.bundle()
	b.mountOn(e.mount(s, b.rootfs))
	e.kill(e.daemons(1)[0].PID)
	if r := b.start(); r.code == 0 || !strings.Contains(r.out, "transport endpoint is not connected") {
		t.Errorf("exit status %d: %s", r.code, r.out)
	}
	e.unmount(b.rootfs)
	e.ok(e.mount(s, b.rootfs))
	b.printed(b.start(), "one")
	e.unmount(b.rootfs)
	e.daemons(0)
}

func TestHookStopsAContainerWithoutItsDaemon(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	b := e.bundle()
	b.mountOn(e.mount(s, b.rootfs))
	b.known()
	e.kill(e.daemons(1)[0].PID)
	r := b.start()
	if r.code == 0 {
		t.Errorf("the container started: %s", r.out)
	}
	for _, want := range []string{
		"nydus-shim-hook: createRuntime of container " + b.id, "image " + s.Image, "instance " + s.Instance, b.rootfs,
		"does not answer", "transport endpoint is not connected", "start the container again",
	} {
		if !strings.Contains(r.out, want) {
			t.Errorf("runc's error does not say %q: %s", want, r.out)
		}
	}

	// The retry, as a container manager makes it.
	e.unmount(b.rootfs)
	e.ok(e.mount(s, b.rootfs))
	b.printed(b.start(), "one")
	e.unmount(b.rootfs)
	e.daemons(0)
}

func TestHookDoesNotWaitForAHungDaemon(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	// Another container of the image keeps poststop from releasing it.
	other := e.mustMount(e.another(s))
	b := e.bundle()
	b.mountOn(e.mount(s, b.rootfs))
	b.known()
	hung := e.daemons(1)[0].PID
	kit.Stop(t, hung)
	t.Cleanup(func() { _ = unix.Kill(hung, unix.SIGCONT) })
	r := b.start()
	if r.code == 0 || !strings.Contains(r.out, "no answer in time") || !strings.Contains(r.out, s.Image) {
		t.Errorf("exit status %d: %s", r.code, r.out)
	}
	if r.took > hookTimeout+slack {
		t.Errorf("the container failed after %v, the hook has %v", r.took, hookTimeout)
	}
	// The hung instance was taken out of use: the retry gets another daemon.
	if r := e.record(); r.Current != nil {
		t.Errorf("the hung instance is still in use: %+v", r.Current)
	}
	e.unmount(b.rootfs)
	e.ok(e.mount(s, b.rootfs))
	b.printed(b.start(), "one")
	e.daemons(2)
	e.unmount(b.rootfs)

	// The other container's daemon recovers.
	must(t, unix.Kill(hung, unix.SIGCONT))
	e.holds(img, other)
	e.unmount(other)
	e.daemons(0)
}

func TestHookLeavesOtherContainersAlone(t *testing.T) {
	e := newEnv(t)
	// An ordinary root filesystem with the image's busybox.
	plain := e.target()
	image := e.mustMount(e.spec(small(t, "one")))
	program, err := os.ReadFile(filepath.Join(image, "usr/bin/busybox"))
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(plain, "usr/bin"), 0o755))
	must(t, os.WriteFile(filepath.Join(plain, "usr/bin/busybox"), program, 0o755))
	must(t, os.WriteFile(filepath.Join(plain, "name"), []byte("plain"), 0o644))
	before := e.record()

	b := e.bundle()
	snap := e.snapshot()
	must(t, rootfs.Overlay{Lower: []string{plain}, Upper: filepath.Join(snap, "fs"), Work: filepath.Join(snap, "work")}.Mount(b.rootfs))
	b.printed(b.start(), "plain")
	e.unmount(b.rootfs)
	must(t, rootfs.Bind(plain, b.rootfs, nil))
	b.printed(b.start(), "plain")
	e.unmount(b.rootfs)
	if after := e.record(); fmt.Sprint(after.Current) != fmt.Sprint(before.Current) {
		t.Errorf("another container's instance changed: %+v, was %+v", after.Current, before.Current)
	}
	e.unmount(image)
}

func TestHookWithoutARunDirectory(t *testing.T) {
	e := newEnv(t)
	b := e.bundle()
	r := b.hook("poststop", fmt.Sprintf(`{"ociVersion":"1.0.2","id":"x","status":"stopped","bundle":%q}`, b.dir), "--run-dir", "/nowhere")
	if r.code != 0 || r.out != "" {
		t.Errorf("exit status %d: %s", r.code, r.out)
	}
}

// hook calls the hook as a runtime does.
func (e *env) hook(name, state string, options ...string) result {
	e.t.Helper()
	cmd := exec.CommandContext(e.t.Context(), filepath.Join(e.bin, "nydus-shim-hook"), append(options, name)...)
	cmd.Stdin = strings.NewReader(state)
	started := time.Now()
	out, _ := cmd.CombinedOutput()
	return result{string(out), cmd.ProcessState.ExitCode(), time.Since(started)}
}

func TestHookCalledWrongly(t *testing.T) {
	e := newEnv(t)
	b := e.bundle()
	text := e.target()
	must(t, os.WriteFile(filepath.Join(text, "config.json"), []byte("no JSON"), 0o644))
	lost := e.target()
	must(t, os.WriteFile(filepath.Join(lost, "config.json"), []byte(`{"root":{"path":"/nowhere/at/all/rootfs"}}`), 0o644))
	for name, c := range map[string]struct {
		hook, state string
		want        []string
	}{
		"no input":        {"createRuntime", "", []string{"createRuntime: read the container's state from standard input", "EOF"}},
		"half a state":    {"createRuntime", `{"id":"x"`, []string{"read the container's state from standard input", "unexpected EOF"}},
		"no JSON":         {"poststop", "state", []string{"poststop: read the container's state from standard input", "invalid character"}},
		"no bundle":       {"createRuntime", `{"id":"x"}`, []string{`bundle "" is not an absolute path`}},
		"relative bundle": {"createRuntime", `{"id":"x","bundle":"b"}`, []string{`bundle "b" is not an absolute path`}},
		"missing bundle":  {"createRuntime", `{"id":"x","bundle":"/nowhere"}`, []string{"read the bundle", "/nowhere/config.json", "no such file"}},
		"bundle is text":  {"createRuntime", fmt.Sprintf(`{"id":"x","bundle":%q}`, text), []string{"read the bundle " + text, "invalid character"}},
		"root is missing": {"createRuntime", fmt.Sprintf(`{"id":"x","bundle":%q}`, lost), []string{"find the root filesystem", "/nowhere", "no such file"}},
		"unknown hook":    {"prestart", fmt.Sprintf(`{"id":"x","bundle":%q}`, b.dir), []string{`unknown hook "prestart": want createRuntime or poststop`}},
	} {
		t.Run(name, func(t *testing.T) {
			r := e.in(t).hook(c.hook, c.state)
			if r.code != 1 || strings.Count(r.out, "\n") != 1 || !strings.HasPrefix(r.out, "nydus-shim-hook: ") {
				t.Errorf("exit status %d: %s", r.code, r.out)
			}
			for _, want := range c.want {
				if !strings.Contains(r.out, want) {
					t.Errorf("the error does not say %q: %s", want, r.out)
				}
			}
		})
	}
	for _, args := range [][]string{nil, {"createRuntime", "poststop"}, {"--no-such-option", "poststop"}} {
		if r := e.run("nydus-shim-hook", args...); r.code != 1 || !strings.Contains(r.out, "nydus-shim-hook: ") {
			t.Errorf("%q: exit status %d: %s", args, r.code, r.out)
		}
	}
	if r := e.run("nydus-shim-hook", "--help"); r.code != 0 || !strings.Contains(r.out, "Usage: nydus-shim-hook") {
		t.Errorf("--help: exit status %d: %s", r.code, r.out)
	}
}
