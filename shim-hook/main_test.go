package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test program be the probe that ask starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == lookUpCommand {
		os.Exit(lookUp(os.Args[2]))
	}
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bundle makes one with a root path and returns the state of its container.
func bundle(t *testing.T, root string) (dir, state string) {
	t.Helper()
	// The mount table has real paths.
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.Mkdir(filepath.Join(dir, "rootfs"), 0o755))
	config, err := json.Marshal(map[string]any{"root": map[string]any{"path": root}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600))
	text, err := json.Marshal(map[string]any{"ociVersion": "1.2.0", "id": "c1", "status": "created", "pid": 1, "bundle": dir})
	must(t, err)
	return dir, string(text)
}

func TestReadState(t *testing.T) {
	dir, state := bundle(t, "rootfs")
	s, root, err := readState(strings.NewReader(state))
	if err != nil || s.ID != "c1" || root != filepath.Join(dir, "rootfs") {
		t.Errorf("%+v, %s, %v", s, root, err)
	}
	other := t.TempDir()
	must(t, os.Symlink(dir, filepath.Join(other, "link")))
	for _, path := range []string{filepath.Join(other, "link", "rootfs"), dir + "/./x/../rootfs/"} {
		_, state = bundle(t, path)
		if _, root, err := readState(strings.NewReader(state)); err != nil || root != filepath.Join(dir, "rootfs") {
			t.Errorf("%s: %s, %v; want the real path %s/rootfs", path, root, err, dir)
		}
	}
}

func TestReadStateRefuses(t *testing.T) {
	dir, state := bundle(t, "rootfs")
	for in, want := range map[string]string{
		"": "EOF", "x": "invalid character", `{"bundle":"x"}`: `bundle "x" is not an absolute path`, `{"id":7}`: "cannot unmarshal",
		`{"bundle":"/nowhere"}`:                          "/nowhere/config.json",
		`{"id":"` + strings.Repeat("x", maxState) + `"}`: "unexpected EOF",
	} {
		if _, _, err := readState(strings.NewReader(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v; want an error that says %q", in, err, want)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte("{"), 0o600))
	if _, _, err := readState(strings.NewReader(state)); err == nil || !strings.Contains(err.Error(), "read the bundle "+dir) {
		t.Errorf("half a bundle: %v", err)
	}
}

func TestRunArguments(t *testing.T) {
	_, state := bundle(t, "rootfs")
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "want one of createRuntime, poststop"},
		{[]string{"createRuntime", "poststop"}, "want one of"},
		{[]string{"prestart"}, `unknown hook "prestart"`},
		{[]string{"--nonsense", "poststop"}, "nonsense"},
		{[]string{"--timeout", "soon", "poststop"}, "timeout"},
	} {
		if err := run(c.args, strings.NewReader(state), io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v; want an error that says %q", c.args, err, c.want)
		}
	}
	for _, args := range [][]string{{"--help"}, {"--version"}} {
		var out strings.Builder
		if err := run(args, strings.NewReader(""), &out); err != nil || !strings.Contains(out.String(), "nydus-shim-hook") {
			t.Errorf("%q: %q, %v", args, out.String(), err)
		}
	}
	// A container that is none of ours, with and without a run directory.
	for _, hook := range []string{"createRuntime", "poststop"} {
		for _, dir := range []string{t.TempDir(), "/nowhere"} {
			must(t, run([]string{"--run-dir", dir, hook}, strings.NewReader(state), io.Discard))
		}
	}
}

func TestAsk(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	dir := t.TempDir()
	must(t, ask(ctx, dir))
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("asking left %v, %v", left, err)
	}
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if err := ask(ctx, file); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("of a file: %v", err)
	}
}

func TestAskGivesUp(t *testing.T) {
	dir := silent(t)
	started := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := ask(ctx, dir); err == nil || !strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("of a filesystem that does not answer: %v", err)
	}
	if took := time.Since(started); took > 10*time.Second {
		t.Errorf("gave up after %v", took)
	}
}

// silent mounts a filesystem that nobody serves, for this thread and the processes
// that it starts alone.
func silent(t *testing.T) string {
	t.Helper()
	runtime.LockOSThread() // and never unlocked: the thread goes with the test
	must(t, unix.Unshare(unix.CLONE_NEWNS))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(t, err)
	dir := t.TempDir()
	must(t, unix.Mount("silent", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device.Fd())))
	t.Cleanup(func() {
		must(t, device.Close()) // whoever waits gets an error
		must(t, unix.Unmount(dir, unix.MNT_DETACH))
	})
	return dir
}
