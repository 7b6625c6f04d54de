package hostile_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// serve runs the snapshotter's real binary, which must end by itself, and returns
// what it said and its exit code.
func serve(t *testing.T, as func(*exec.Cmd), args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(kit.Binaries(t, "nydus-snapshotter"), "nydus-snapshotter"), args...)
	if as != nil {
		as(cmd)
	}
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Errorf("%q still ran after %v:\n%s", args, soon, out)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v", args, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// fails runs the snapshotter and expects exit code 1 and the texts.
func fails(t *testing.T, what string, as func(*exec.Cmd), texts []string, args ...string) {
	t.Helper()
	out, code := serve(t, as, args...)
	if code != 1 {
		t.Errorf("%s: exit code %d, want 1:\n%s", what, code, out)
	}
	refused(t, what, errors.New(out), texts...)
}

// TestConfigurationFaults gives the real binary a file in which much is wrong.
// One message has it all, with the lines.
func TestConfigurationFaults(t *testing.T) {
	kit.Baseline(t)
	file := filepath.Join(t.TempDir(), "config.toml")
	writeFile(t, file, `version = 1
root = "relative"
address = 5
colour = "blue"
[daemon]
log-level = "info"
threads = -1
start_timeout = "soon"
[mount]
style = "managed"
credentials = "plain"
[remote]
gateway = "sometimes"
plain_http = ["https://registry.example"]
`, 0o644)
	want := []string{file, "root", "relative", "address", "colour", "log-level", "did you mean log_level", "threads", "start_timeout", "soon",
		"mount.credentials", "remote.gateway", "plain_http", "line 2", "line 3", "line 4", "line 6", "line 7", "line 8"}
	for _, args := range [][]string{{"serve", "--config", file}, {"config", "check", file}} {
		fails(t, strings.Join(args, " "), nil, want, args...)
	}
	broken := filepath.Join(t.TempDir(), "broken.toml")
	writeFile(t, broken, "version = 1\nroot = \"/x\n", 0o644)
	fails(t, "no TOML", nil, []string{broken, "line 2"}, "serve", "--config", broken)
	fails(t, "no file", nil, []string{"read configuration", "/nonexistent.toml", "no such file"}, "serve", "--config", "/nonexistent.toml")
	fails(t, "no number", nil, []string{"log.level", "loud", "trace"}, "serve", "--root", t.TempDir(), "--log-level", "loud")
	fails(t, "argument", nil, []string{"unexpected argument", "please"}, "serve", "please")
	fails(t, "command", nil, []string{"unknown command", "dance"}, "dance")
}

// TestServeConflicts starts the snapshotter where another one is in its way.
func TestServeConflicts(t *testing.T) {
	n := newNode(t, kit.NodeConfig{})
	leaks := kit.Leaks(t)
	other := t.TempDir()
	common := []string{"serve", "--config", n.SnapshotterConfig()}
	fails(t, "same root", nil, []string{"another nydus-snapshotter runs with root", n.SnapshotterRoot()},
		append(common, "--address", filepath.Join(other, "s.sock"))...)
	fails(t, "same address", nil, []string{"another process already listens on", n.SnapshotterAddress()},
		append(common, "--root", filepath.Join(other, "root"))...)
	file := filepath.Join(other, "file")
	writeFile(t, file, "precious", 0o644)
	fails(t, "address is a file", nil, []string{file, "is no socket", "another address"},
		append(common, "--root", filepath.Join(other, "root"), "--address", file)...)
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file at the address is %q now (%v)", text, err)
	}
	clean(t, "snapshotters that could not start", leaks)
	if c, err := net.Dial("unix", n.SnapshotterAddress()); err != nil {
		t.Errorf("the first snapshotter does not answer any more: %v", err)
	} else if err := c.Close(); err != nil {
		t.Error(err)
	}
	// A socket that a killed snapshotter left is no obstacle.
	if err := n.KillSnapshotter(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestServePlaces starts the snapshotter in places that it must not trust, and as
// somebody who may not.
func TestServePlaces(t *testing.T) {
	kit.Baseline(t)
	// The binary where another user can reach it.
	dir, err := os.MkdirTemp("/tmp", "nydus-hostile-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	public := copyProgram(t, "nydus-snapshotter", dir)
	nobody := func(cmd *exec.Cmd) { cmd.Path, cmd.SysProcAttr, cmd.Dir = public, asNobody(), "/" }
	args := func(run string) []string {
		return []string{"serve", "--root", filepath.Join(t.TempDir(), "root"), "--address", filepath.Join(t.TempDir(), "s.sock"), "--run-dir", run}
	}
	theirs := filepath.Join(dir, "theirs")
	if err := errors.Join(os.Mkdir(theirs, 0o700), os.Chown(theirs, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	fails(t, "not root", nobody, []string{"serve", "run it as root"}, "serve", "--root", filepath.Join(theirs, "root"), "--address", filepath.Join(theirs, "s.sock"), "--run-dir", filepath.Join(theirs, "run"))

	fails(t, "foreign run directory", nil, []string{"run directory " + theirs, "not trusted", "owner 65534", "want owner 0"}, args(theirs)...)
	open := filepath.Join(kit.RunRoot, "open")
	if err := errors.Join(os.Mkdir(open, 0o755)); err != nil {
		t.Fatal(err)
	}
	fails(t, "open run directory", nil, []string{"run directory " + open, "not trusted", "0755", "0700"}, args(open)...)
	link := filepath.Join(kit.RunRoot, "link")
	if err := os.Symlink(open, link); err != nil {
		t.Fatal(err)
	}
	fails(t, "linked run directory", nil, []string{"run directory " + link, "symbolic link"}, args(link)...)
	fails(t, "run directory below a link", nil, []string{"run directory " + link + "/x", "symbolic link"}, args(link+"/x")...)
	long := filepath.Join(kit.RunRoot, strings.Repeat("l", 60))
	fails(t, "long run directory", nil, []string{"run_dir", "sockets"}, args(long)...)
	full := filepath.Join(dir, "read-only")
	if err := os.Mkdir(full, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", full, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	fails(t, "read-only root", nil, []string{full, "read-only file system"}, "serve", "--root", filepath.Join(full, "root"),
		"--address", filepath.Join(dir, "s.sock"), "--run-dir", filepath.Join(dir, "run"))
	if err := unix.Unmount(full, 0); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(link), os.Remove(open)); err != nil {
		t.Error(err)
	}
	for unix.Unmount("/run/nydus-snapshotter", 0) == nil {
	}
}

// copyProgram copies one of the project's binaries to where anybody can run it.
func copyProgram(t *testing.T, name, dir string) string {
	t.Helper()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	in, err := os.ReadFile(filepath.Join(kit.Binaries(t, name), name))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, bytes.NewReader(in))
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}
