package mount_test

import (
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// containerd looks into the snapshot of a running container by a read-only mount
// of it, to find a user's number for exec for example. The container's own mount
// must not notice.
func TestReadOnlyMountOfASnapshotInUse(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	must(t, os.WriteFile(filepath.Join(target, "new"), []byte("new"), 0o600))
	must(t, os.Mkdir(filepath.Join(target, "dir"), 0o700))
	work, err := os.Stat(filepath.Join(s.Work(), "work"))
	must(t, err)

	view := e.mustMount(s, "rw", "ro")
	e.readOnly(view)
	e.answers(view, "one")
	if text, err := os.ReadFile(filepath.Join(view, "new")); err != nil || string(text) != "new" {
		t.Errorf("what the container has written is seen as %q (%v), want new", text, err)
	}
	if now, err := os.Stat(filepath.Join(s.Work(), "work")); err != nil || !os.SameFile(now, work) {
		t.Errorf("the container's work directory was made anew (%v)", err)
	}
	// Each of these needs the work directory.
	must(t, os.Remove(filepath.Join(target, "name")))
	must(t, os.Rename(filepath.Join(target, "new"), filepath.Join(target, "dir", "new")))
	must(t, os.RemoveAll(filepath.Join(target, "etc")))
	e.unmount(view)

	// The last of both counts.
	e.unmount(target)
	target = e.mustMount(s, "ro", "rw")
	must(t, os.WriteFile(filepath.Join(target, "again"), nil, 0o600))
	e.unmount(target)
}

// Whoever unshares a mount namespace has a copy of every mount. In a user
// namespace, which anybody may make, a detach does not reach it.
func TestCopiesOfTheMountpointKeepNoDaemon(t *testing.T) {
	for name, flags := range map[string]uintptr{
		"user namespace": syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		"private":        syscall.CLONE_NEWNS,
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			target := e.mustMount(e.spec(small(t, "one")))
			daemon := e.record().Current
			cmd := exec.CommandContext(t.Context(), "sh", "-c",
				"mount --make-rprivate / && grep -q "+daemon.Mountpoint+" /proc/self/mountinfo && echo seen && read -r _")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
			if flags&syscall.CLONE_NEWUSER != 0 {
				root := []syscall.SysProcIDMap{{HostID: 0, Size: 1}}
				cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = root, root
			}
			in, err := cmd.StdinPipe()
			must(t, err)
			out, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())
			defer func() {
				must(t, in.Close())
				_ = cmd.Wait()
			}()
			if _, err := out.Read(make([]byte, 8)); err != nil {
				t.Fatalf("the copy does not have the mountpoint: %v", err)
			}
			// In the copy the overlay goes by itself: its mountpoint is removed.
			e.unmount(target)
			must(t, os.Remove(target))
			must(t, e.tidy(soon))
			e.daemons(0)
		})
	}
}

// A daemon all of whose threads wait for a registry is neither dead nor hung: a
// second one would soon wait as well.
func TestBusyDaemonIsNotReplaced(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	img := small(t, "one")
	reg.MustPush(t, img.Image, "busy/image:1")
	s := e.registrySpec(img, reg, "busy/image")
	s.Daemon.Threads = 1
	target := e.mustMount(s)
	release := make(chan struct{})
	asked := make(chan struct{}, 64)
	reg.SetHook(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		asked <- struct{}{}
		<-release
		next.ServeHTTP(w, r)
	})
	// In a process of its own: each child of this one would have to close the file.
	reader := exec.CommandContext(t.Context(), "cat", filepath.Join(target, "name"))
	must(t, reader.Start())
	<-asked
	before := e.daemons(1)[0].PID
	other := e.another(s)
	e.fails(e.mount(other, e.target()), failure{code: exitFailure, within: 10*time.Second + slack, want: []string{"is busy", "no answer within", "registry reachable", "nydusd.log"}, mounts: true})
	if r := e.record(); r.Current == nil || r.Current.Failed {
		t.Errorf("the busy instance was taken out of use: %+v", r.Current)
	}
	reg.SetHook(nil)
	close(release)
	must(t, reader.Wait())
	second := e.mustMount(other)
	if now := e.daemons(1)[0].PID; now != before {
		t.Errorf("daemon %d serves, want the one that was busy, %d", now, before)
	}
	e.holds(img, target)
	e.unmount(target)
	e.unmount(second)
}

// Anybody can have any arguments. Who looks for the daemon of a start that was
// interrupted ends nobody else's process.
func TestProcessOfAnotherUserIsNoOrphan(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	// Killed while its daemon starts: the wrapper tells when.
	ready := filepath.Join(t.TempDir(), "ready")
	must(t, unix.Mkfifo(ready, 0o600))
	nydusd := s.Daemon.Path
	s.Daemon.Path = e.wrapper("echo > " + ready + "; sleep 1000")
	cmd := e.command(t.Context(), "nydus-overlayfs", s.SnapshotDir, e.target(), "-o", e.option(s))
	must(t, cmd.Start())
	_, err := os.ReadFile(ready)
	must(t, err)
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	mountpoint := e.record().Current.Mountpoint

	ctx, cancel := context.WithCancel(t.Context())
	stranger := exec.CommandContext(ctx, "/bin/sh", "-c", "echo started; sleep 1000", "x", "--mountpoint", mountpoint)
	stranger.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Setpgid: true}
	out, err := stranger.StdoutPipe()
	must(t, err)
	must(t, stranger.Start())
	defer func() {
		_ = unix.Kill(-stranger.Process.Pid, unix.SIGKILL)
		cancel()
		_ = stranger.Wait()
	}()
	_, err = out.Read(make([]byte, 16))
	must(t, err)

	s.Daemon.Path = nydusd
	target := e.mustMount(e.another(s))
	e.holds(img, target)
	e.unmount(target)
	if text, err := os.ReadFile(filepath.Join("/proc", itoa(stranger.Process.Pid), "stat")); err != nil || strings.Contains(string(text), ") Z ") {
		t.Errorf("the other user's process was ended (%v): %s", err, text)
	}
}
