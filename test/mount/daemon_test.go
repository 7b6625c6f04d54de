package mount_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func proc(pid int, file string) string {
	text, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), file))
	return string(text)
}

// What a daemon is from its first instruction on.
func TestDaemonStartsInAPlaceOfItsOwn(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	seen := t.TempDir()
	s.Daemon.Path = e.wrapper(`for file in cgroup status stat; do echo "$(</proc/$$/$file)" > ` + seen + `/$file; done
exec "$REAL" "$@"`)
	target := e.mustMount(s)
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(seen, name))
		must(t, err)
		return string(text)
	}
	want := s.Daemon.CgroupParent + "/" + s.Instance + ".g1"
	own := strings.Split(proc(os.Getpid(), "cgroup"), "\n")
	checked := 0
	for _, line := range strings.Split(strings.TrimSpace(read("cgroup")), "\n") {
		part := strings.SplitN(line, ":", 3)
		if part[1] == "cpuset" || !hierarchyMounted(t, part[1]) {
			continue
		}
		checked++
		if line == part[0]+":"+part[1]+":/" && slices.Contains(own, line) && part[1] != "" && part[1] != "memory" {
			continue // we are at the top: there was nothing to get away from
		}
		if part[2] != want {
			t.Errorf("nydusd started in cgroup %s, want %s", line, want)
		}
	}
	if checked == 0 {
		t.Error("no cgroup hierarchy was checked")
	}
	if !strings.Contains(read("status"), "SigBlk:\t0000000000004002\n") {
		t.Errorf("nydusd started with another signal mask than INT and TERM blocked:\n%s", read("status"))
	}
	stat := strings.Fields(read("stat"))
	if pid, session := stat[0], stat[5]; pid != session {
		t.Errorf("nydusd %s started in session %s, want its own", pid, session)
	}
	e.unmount(target)
	must(t, e.tidy(soon))
	if left := cgroups(want); len(left) > 0 {
		t.Errorf("cgroups are left: %v", left)
	}
}

func cgroups(path string) []string {
	found, _ := filepath.Glob("/sys/fs/cgroup/*" + path)
	unified, _ := filepath.Glob("/sys/fs/cgroup" + path)
	return append(found, unified...)
}

// hierarchyMounted tells whether a cgroup hierarchy, named as in
// /proc/PID/cgroup, is mounted on this machine.
func hierarchyMounted(t *testing.T, controllers string) bool {
	t.Helper()
	if controllers == "" {
		return len(kit.Mounts(t, "cgroup2")) > 0
	}
	for _, m := range kit.Mounts(t, "cgroup") {
		if strings.Contains(","+m.VFSOptions+",", ","+controllers) {
			return true
		}
	}
	return false
}

func TestDaemonIgnoresStraySignals(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)
	pid := e.daemons(1)[0].PID
	for range 3 {
		must(t, unix.Kill(pid, unix.SIGTERM))
		must(t, unix.Kill(pid, unix.SIGINT))
		must(t, unix.Kill(-pid, unix.SIGTERM)) // a unit's KillMode
	}
	e.holds(img, target)
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d", now, pid)
	}
	e.unmount(target)
	must(t, e.tidy(soon))
	e.daemons(0)
}

func TestDaemonHoldsNothingOfItsStarter(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.target()

	// A pipe and a file that the caller forgot to mark close-on-exec, a
	// stdin, and an output that must end with the helper.
	var extra []*os.File
	for range 20 {
		r, w, err := os.Pipe()
		must(t, err)
		defer r.Close()
		extra = append(extra, w)
	}
	forgotten, err := os.Create(filepath.Join(t.TempDir(), "forgotten"))
	must(t, err)
	extra = append(extra, forgotten)
	out, w, err := os.Pipe()
	must(t, err)
	defer out.Close()

	cmd := e.command(t.Context(), "nydus-overlayfs", s.SnapshotDir, target, "-o", e.option(s))
	cmd.Env = append(cmd.Env, "HTTPS_PROXY=http://proxy.test:3128", "LD_PRELOAD=", "KUBERNETES_SERVICE_HOST=10.0.0.1")
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = w, w, extra
	cmd.Dir = t.TempDir()
	must(t, cmd.Run())
	w.Close()
	for _, f := range extra {
		f.Close()
	}
	if err := out.SetReadDeadline(time.Now().Add(soon)); err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(out); err != nil || len(text) > 0 {
		t.Errorf("the helper's output is %q, %v; want nothing, and its end", text, err)
	}

	pid := e.daemons(1)[0].PID
	shares, err := nydusd.SharesCache(t.Context(), s.Daemon.Path)
	must(t, err)
	e.checkDescriptors(pid, s.Instance, !shares)
	env := strings.Split(strings.TrimRight(proc(pid, "environ"), "\x00"), "\x00")
	wantEnv := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HTTPS_PROXY=http://proxy.test:3128",
		"NO_PROXY=localhost,127.0.0.1,127.0.0.0/8,::1", "no_proxy=localhost,127.0.0.1,127.0.0.0/8,::1"}
	if fmt.Sprint(env) != fmt.Sprint(wantEnv) {
		t.Errorf("nydusd's environment is %q, want %q", env, wantEnv)
	}
	if cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); cwd != "/" {
		t.Errorf("nydusd works in %s, want /", cwd)
	}
	if got := strings.TrimSpace(proc(pid, "oom_score_adj")); got != strconv.Itoa(oomScore) {
		t.Errorf("nydusd's oom_score_adj is %s, want %d", got, oomScore)
	}
	var limit unix.Rlimit
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit))
	if limit.Cur < limit.Max {
		t.Errorf("nydusd's file limit is %d of %d that it could have", limit.Cur, limit.Max)
	}
	e.unmount(target)
}

// checkDescriptors allows the null device, the log, what nydusd opens itself, and
// the lock of a cache directory of its own, which it must have then.
func (e *env) checkDescriptors(pid int, key string, private bool) {
	e.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	must(e.t, err)
	log := filepath.Join(e.root, "instances", key, "nydusd.log")
	want := map[string]string{"0": os.DevNull, "1": log, "2": log}
	lock := false
	for _, fd := range fds {
		to, _ := os.Readlink(filepath.Join(dir, fd.Name()))
		if w, ok := want[fd.Name()]; ok && to != w {
			e.t.Errorf("descriptor %s of nydusd is %s, want %s", fd.Name(), to, w)
		}
		switch {
		case want[fd.Name()] != "":
		case to == filepath.Join(e.root, "instances", key, "bootstrap"), to == "/dev/fuse", strings.HasPrefix(to, "anon_inode:"):
		case strings.HasPrefix(to, filepath.Join(e.root, "cache")) && strings.HasSuffix(to, ".lock"):
			lock = true
		case strings.HasPrefix(to, filepath.Join(e.root, "cache")), strings.HasPrefix(to, filepath.Join(kit.Scratch(), "images")):
		case strings.HasPrefix(to, "socket:"), strings.HasPrefix(to, "pipe:"):
			e.ownEnd(pid, to)
		default:
			e.t.Errorf("descriptor %s of nydusd is %s", fd.Name(), to)
		}
	}
	if lock != private {
		e.t.Errorf("nydusd holds a cache directory's lock: %v, want %v", lock, private)
	}
}

// ownEnd checks that no other process holds the same pipe or socket.
func (e *env) ownEnd(pid int, object string) {
	e.t.Helper()
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && to == object && !strings.HasPrefix(link, fmt.Sprintf("/proc/%d/", pid)) {
			e.t.Errorf("nydusd shares %s with %s", object, link)
		}
	}
}

// A shell pipeline ends although the daemon lives on.
func TestOutputIsNotHeldOpen(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.target()
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `"$@" 2>&1 | cat; echo done`, "sh",
		filepath.Join(e.bin, "nydus-overlayfs"), s.SnapshotDir, target, "-o", e.option(s))
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Equal(out, []byte("done\n")) {
		t.Fatalf("%v: %s", err, out)
	}
	e.daemons(1)
	e.unmount(target)
}
