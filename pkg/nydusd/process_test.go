package nydusd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within is a deadline for what should happen at once.
func within() time.Time { return time.Now().Add(10 * time.Second) }

// script is an executable in nydusd's place. Bash, unlike other shells, leaves
// the signal mask as it is.
func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nydusd")
	must(t, os.WriteFile(path, []byte("#!/bin/bash\n"+body+"\n"), 0o755))
	return path
}

// start starts a script as a daemon; its output is at the returned path.
// scriptCommand is c with a shell script as the daemon.
func scriptCommand(t *testing.T, c Command, body string) (Command, string) {
	t.Helper()
	c.Path = script(t, body)
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	c.Log = f
	return c, f.Name()
}

func startScript(t *testing.T, c Command, body string) (p *Process, log string) {
	t.Helper()
	c, log = scriptCommand(t, c, body)
	p, err := Start(c)
	must(t, err)
	cleanUp(t, p)
	return p, log
}

func cleanUp(t *testing.T, p *Process) {
	t.Cleanup(func() {
		must(t, p.Kill(t.TempDir()))
		p.Exit()
		must(t, p.Close())
	})
}

func ended(t *testing.T, p *Process) {
	t.Helper()
	if !p.Wait(within()) {
		t.Fatalf("process %d did not end", p.PID)
	}
}

func TestStart(t *testing.T) {
	t.Setenv("SECRET_OF_THE_POD", "1")
	t.Setenv("https_proxy", "http://proxy.test")
	lock, err := os.CreateTemp(t.TempDir(), "lock")
	must(t, err)
	defer lock.Close()
	// Not marked close-on-exec, as what a careless caller leaves open.
	open, err := unix.Open(lock.Name(), unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(open)
	p, log := startScript(t, Command{
		Env: Environment(os.Environ(), ""), Config: "/c", Bootstrap: "/b", Mountpoint: "/m", Socket: "/s", LogLevel: "warn", Threads: 3, OOMScoreAdj: 300, CacheLock: lock,
	}, `printf '%s\n' "$@" "cwd $(pwd)" "fd0 $(readlink /proc/$$/fd/0)" "fd3 $(readlink /proc/$$/fd/3)"
for fd in /proc/$$/fd/*; do echo "open ${fd##*/}"; done
while read -r line; do echo "$line"; done < /proc/$$/status
read -r -d '' environ < /proc/$$/environ; tr '\0' '\n' < /proc/$$/environ | sed 's/^/env /'
exec 2> /dev/null; echo done`)
	ended(t, p)
	text, err := os.ReadFile(log)
	must(t, err)
	lines := map[string]bool{}
	for _, l := range strings.Split(string(text), "\n") {
		lines[l] = true
	}
	args := "fuse\n--config\n/c\n--bootstrap\n/b\n--mountpoint\n/m\n--apisock\n/s\n--rlimit-nofile\n0\n--log-level\nwarn\n--fuse-threads\n3\n"
	if !strings.HasPrefix(string(text), args) {
		t.Errorf("started with %q, want %q", text[:min(len(text), len(args))], args)
	}
	for _, want := range []string{
		"cwd /", "fd0 /dev/null", "fd3 " + lock.Name(), "SigBlk:\t0000000000004002",
		"env https_proxy=http://proxy.test", "env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	} {
		if !lines[want] {
			t.Errorf("the process did not see %q:\n%s", want, text)
		}
	}
	if lines["env SECRET_OF_THE_POD=1"] {
		t.Error("the starter's environment was inherited")
	}
	if lines["open "+strconv.Itoa(open)] {
		t.Errorf("descriptor %d of the starter was inherited", open)
	}
	if got := p.Exit(); got != "exit status 0" {
		t.Errorf("it ended with %q", got)
	}
}

// The caller's own signal mask, session and working directory stay.
func TestStartChangesNothingHere(t *testing.T) {
	state := func() string {
		var mask unix.Sigset_t
		must(t, unix.PthreadSigmask(unix.SIG_BLOCK, nil, &mask))
		sid, err := unix.Getsid(0)
		must(t, err)
		cgroup, err := os.ReadFile("/proc/self/cgroup")
		must(t, err)
		return fmt.Sprint(mask, sid, string(cgroup))
	}
	before := state()
	p, _ := startScript(t, Command{}, "exit 0")
	ended(t, p)
	if after := state(); after != before {
		t.Errorf("now %s, was %s", after, before)
	}
	if sid, err := unix.Getsid(p.PID); err == nil && sid != p.PID {
		t.Errorf("session %d, want one of its own, %d", sid, p.PID)
	}
}

// However fast it ends, its end is what is reported.
func TestStartOfWhatEndsAtOnce(t *testing.T) {
	for n := range 100 {
		p, _ := startScript(t, Command{}, fmt.Sprintf("exit %d", n))
		ended(t, p)
		if got, want := p.Exit(), fmt.Sprintf("exit status %d", n); got != want {
			t.Fatalf("it ended with %q, want %q", got, want)
		}
	}
	p, _ := startScript(t, Command{}, "kill -9 $$")
	ended(t, p)
	if got := p.Exit(); got != "killed by SIGKILL" {
		t.Errorf("it ended with %q", got)
	}
	// Reaped, it is like a process of somebody else: newer kernels still tell.
	if got := p.Exit(); got != "" && got != "killed by SIGKILL" {
		t.Errorf("asked again, it ended with %q", got)
	}
}

func TestStartFails(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/plain", nil, 0o644))
	must(t, os.WriteFile(dir+"/text", []byte("no program"), 0o755))
	log, err := os.Create(dir + "/log")
	must(t, err)
	defer log.Close()
	for name, want := range map[string]string{
		"missing": "install nydusd or set [daemon] nydusd_path", "plain": "is the file executable?", "text": "exec format error",
	} {
		path := filepath.Join(dir, name)
		if _, err := Start(Command{Path: path, Log: log}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "start nydusd "+path) {
			t.Errorf("%s: %v; want an error that says %q", name, err, want)
		}
	}
}

func TestStartInACgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("making cgroups needs root; run make test as root")
	}
	v1, v2, err := hierarchies()
	must(t, err)
	if len(v1)+len(v2) == 0 {
		t.Fatal("no cgroup file system is mounted")
	}
	all := append(slices.Clone(v1), v2...)
	parent := fmt.Sprintf("/nydusd-test-%d", os.Getpid())
	// A starter that is in a cgroup everywhere, as a pod's shim is.
	pod := Cgroup{Parent: parent, Name: "pod"}
	for _, h := range all {
		must(t, os.MkdirAll(filepath.Join(h.Target, pod.Parent, pod.Name), 0o755))
	}
	t.Cleanup(func() {
		must(t, pod.Remove())
		for _, h := range all {
			must(t, os.Remove(filepath.Join(h.Target, parent)))
		}
	})
	before, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	for name, enter := range map[string]func(){
		"as we are": func() {},
		"pod": func() {
			for _, h := range v1 {
				must(t, join(filepath.Join(h.Target, pod.Parent, pod.Name)))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := Cgroup{Parent: parent, Name: "one"}
			command, log := scriptCommand(t, Command{Cgroup: c}, "while read -r line; do echo \"$line\"; done < /proc/self/cgroup")
			var p *Process
			var homes []byte
			thread.Throwaway(func() {
				enter()
				if homes, err = os.ReadFile("/proc/thread-self/cgroup"); err == nil {
					p, err = start(command)
				}
			})
			must(t, err)
			cleanUp(t, p)
			if len(p.Warnings) > 0 {
				t.Errorf("warnings: %q", p.Warnings)
			}
			ended(t, p)
			text, err := os.ReadFile(log)
			must(t, err)
			for _, h := range v1 {
				got, want := home(string(text), h), c.Parent+"/"+c.Name
				if home(string(homes), h) == "/" && !strings.Contains(h.Options, "memory") {
					want = "/"
				}
				if got != want {
					t.Errorf("%s: started in %s, want %s", h.Target, got, want)
				}
			}
			if len(v2) > 0 && !strings.Contains(string(text), "0::"+c.Parent+"/"+c.Name+"\n") {
				t.Errorf("not in its cgroup of version 2:\n%s", text)
			}
			p.Exit()
			// Our thread has left with its end: the cgroup can go.
			must(t, c.Remove())
			must(t, c.Remove())
			if after, err := os.ReadFile("/proc/self/cgroup"); err != nil || !bytes.Equal(after, before) {
				t.Errorf("this process is in %s now (%v), was in %s", after, err, before)
			}
		})
	}
}

// What must not keep its thread never gets the main one, which would stay for
// good in the cgroups it joined.
func TestThrowawayThread(t *testing.T) {
	seen := map[int]bool{}
	for range 50 {
		thread.Throwaway(func() {
			id := unix.Gettid()
			if id == unix.Getpid() {
				t.Error("ran on the main thread")
			}
			if seen[id] {
				t.Errorf("thread %d was used twice", id)
			}
			seen[id] = true
		})
	}
}

// A daemon in the wrong cgroup is better than none.
func TestStartWithoutItsCgroup(t *testing.T) {
	p, _ := startScript(t, Command{Cgroup: Cgroup{Parent: "/\x00", Name: "one"}}, "exit 7")
	ended(t, p)
	if len(p.Warnings) == 0 || !strings.Contains(p.Warnings[0], "join cgroup") {
		t.Errorf("warnings: %q", p.Warnings)
	}
	if got := p.Exit(); got != "exit status 7" {
		t.Errorf("it ended with %q", got)
	}
}

func TestCgroupHome(t *testing.T) {
	const text = "5:cpu,cpuacct:/kubepods/a:b\n4:memory:/m\n1:name=systemd:/system.slice/x\n0::/unified\n"
	for options, want := range map[string]string{
		"rw,cpu,cpuacct": "/kubepods/a:b", "rw,memory": "/m", "rw,xattr,name=systemd": "/system.slice/x", "rw,freezer": "/",
	} {
		if got := home(text, rootfs.Mount{Options: options}); got != want {
			t.Errorf("home in %s is %s, want %s", options, got, want)
		}
	}
}

func TestStartTimeOfOddNames(t *testing.T) {
	for _, name := range []string{"plain", ") R 1 (x", "a b", "(", ")", "))", "a\nb", "1 2 3 4"} {
		path := filepath.Join(t.TempDir(), name)
		sleep, err := exec.LookPath("sleep")
		must(t, err)
		program, err := os.ReadFile(sleep)
		must(t, err)
		must(t, os.WriteFile(path, program, 0o755))
		cmd := exec.CommandContext(t.Context(), path, "1000")
		cmd.Args[0] = "sleep"
		must(t, cmd.Start())
		got, err := StartTime(cmd.Process.Pid)
		if err != nil || got == 0 {
			t.Errorf("%q: %d, %v", name, got, err)
		}
		p, err := Find(cmd.Process.Pid, got)
		if err != nil || p == nil {
			t.Fatalf("%q: Find: %v, %v", name, p, err)
		}
		if other, err := Find(cmd.Process.Pid, got+1); err != nil || other != nil {
			t.Errorf("%q: another start time was found: %v, %v", name, other, err)
		}
		if has, err := p.Connected(); has || err != nil {
			t.Errorf("%q: has a filesystem: %v, %v", name, has, err)
		}
		must(t, p.Kill(t.TempDir()))
		// A zombie runs no more.
		if _, err := StartTime(p.PID); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("%q: start time of a zombie: %v", name, err)
		}
		if again, err := Find(p.PID, got); err != nil || again != nil {
			t.Errorf("%q: a zombie was found: %v, %v", name, again, err)
		}
		must(t, p.Close())
		_ = cmd.Wait()
		if gone, err := Find(p.PID, got); err != nil || gone != nil {
			t.Errorf("%q: a process that is gone was found: %v, %v", name, gone, err)
		}
	}
}

func TestWaitContext(t *testing.T) {
	p, _ := startScript(t, Command{}, "exec sleep 1000")
	if p.Wait(time.Now()) {
		t.Error("a running process has ended")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p.WaitContext(ctx) {
		t.Error("a running process has ended with the context")
	}
	must(t, unix.Kill(p.PID, unix.SIGKILL))
	if !p.WaitContext(t.Context()) {
		t.Error("the end was not seen")
	}
}

func TestOrphans(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(t.TempDir(), "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	// Waits without a child, which would have the same argument list, and without
	// executing another program, which would not; and no longer than this test has
	// the other end open, also when it is killed.
	open, err := os.OpenFile(fifo, os.O_RDWR, 0)
	must(t, err)
	defer open.Close()
	wait := fmt.Sprintf("read -r x < %q", fifo)
	mine, _ := startScript(t, Command{Mountpoint: dir + "/g1/mnt"}, wait)
	startScript(t, Command{Mountpoint: dir + "2/g1/mnt"}, wait)
	startScript(t, Command{Config: dir + "/g1/mnt", Mountpoint: "/elsewhere"}, wait)
	found, err := Orphans(dir)
	must(t, err)
	if len(found) != 1 || found[0].PID != mine.PID || found[0].StartTime != mine.StartTime {
		t.Errorf("found %+v, want process %d alone", found, mine.PID)
	}
	for _, p := range found {
		must(t, p.Kill(t.TempDir()))
		must(t, p.Close())
	}
	if found, err := Orphans(dir); err != nil || len(found) > 0 {
		t.Errorf("after its end: %+v, %v", found, err)
	}
}

func TestSharesCache(t *testing.T) {
	for text, want := range map[string]bool{
		"Version: v2.2.0": false, "Version: 2.2.9": false, "Version: v2.3.0": true, "Version: v2.10.1": true, "Version: v3.0.0": true,
		"Version: v1.9.9": false, "Version: unknown": false, "": false, "x\nVersion: \tv2.4.0-rc1\nGit: y": true,
	} {
		got, err := SharesCache(t.Context(), script(t, "cat <<'E'\n"+text+"\nE"))
		if err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
	if _, err := SharesCache(t.Context(), script(t, "exit 1")); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("a program that fails: %v", err)
	}
	// Even when what it started itself holds the pipe.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	started := time.Now()
	_, err := SharesCache(ctx, script(t, "sleep 3; exit 0"))
	if err == nil || !strings.Contains(err.Error(), "no answer in time") || time.Since(started) > 10*time.Second {
		t.Errorf("a program that hangs: %v after %v", err, time.Since(started))
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if got := Tail(path, 0, 3); got != "" {
		t.Errorf("of no file: %q", got)
	}
	for text, want := range map[string]string{
		"": "", "one": "one", "one\ntwo\n": "one | two", "1\n2\n3\n4\n": "2 | 3 | 4",
		"\x1b[0m[\x1b[38;5;196mERROR\x1b[0m] x\n": "[ERROR] x",
		strings.Repeat("x", 9<<10) + "\nlast\n":   strings.Repeat("x", 8<<10-6) + " | last",
	} {
		must(t, os.WriteFile(path, []byte(text), 0o600))
		if got := Tail(path, 0, 3); got != want {
			t.Errorf("of %.20q: %.40q, want %.40q", text, got, want)
		}
	}
	// Not what an earlier daemon wrote.
	must(t, os.WriteFile(path, []byte("before\nnow\n"), 0o600))
	if got := Tail(path, int64(len("before\n")), 3); got != "now" {
		t.Errorf("behind the first line: %q", got)
	}
}
