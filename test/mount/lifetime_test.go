package mount_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestReconcilerReleasesAfterTheLinger(t *testing.T) {
	e := newEnv(t)
	const linger = 300 * time.Millisecond
	r := e.reconcile(linger)
	defer func() { must(t, r.stop()) }()

	s := e.spec(small(t, "one"))
	first := e.mustMount(s)
	second := e.mustMount(e.another(s))
	pid := e.daemons(1)[0].PID
	e.unmount(first)

	// Idle for a moment only: as containerd's temporary mounts are.
	e.unmount(second)
	third := e.mustMount(e.another(s))
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d: the instance did not linger", now, pid)
	}

	idleSince := time.Now()
	e.unmount(third)
	must(t, r.idle(soon))
	if took := time.Since(idleSince); took < linger {
		t.Errorf("released after %v, want at least %v", took, linger)
	}
	e.daemons(0)
	if left := e.entries(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A use that is over before the reconciler looks counts all the same: the linger
// is for what follows such a one.
func TestShortUseRestartsTheLinger(t *testing.T) {
	e := newEnv(t)
	const linger = 2 * time.Second
	r := e.reconcile(linger)
	defer func() { must(t, r.stop()) }()
	s := e.spec(small(t, "one"))
	e.unmount(e.mustMount(s))
	<-time.After(linger * 3 / 4) // it is the passing of time that is tested
	e.unmount(e.mustMount(e.another(s)))
	used := time.Now()
	must(t, r.idle(soon))
	if took := time.Since(used); took < linger*9/10 {
		t.Errorf("released %v after the last use, want %v", took, linger)
	}
}

func TestReconcilerMayComeLate(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	pid := e.daemons(1)[0].PID
	e.unmount(target)

	// Nobody releases it: the next container finds it.
	again := e.mustMount(e.another(s))
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d", now, pid)
	}
	e.unmount(again)
	e.daemons(1)
	must(t, e.tidy(soon))
	e.daemons(0)
}

// A release that comes too early takes nothing from a running container.
func TestEarlyReleaseIsHarmless(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)
	must(t, rootfs.Detach(e.record().Current.Mountpoint))
	e.holds(img, target)

	// The next mount needs a daemon of its own; both go with their mounts.
	other := e.mustMount(e.another(s))
	e.daemons(2)
	e.holds(img, target)
	e.holds(img, other)
	e.unmount(target)
	e.daemons(1)
	e.unmount(other)
}

// Files that are open, and binds in other mount namespaces, keep an image.
func TestKernelCountsTheUsers(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	f, err := os.Open(filepath.Join(target, "name"))
	must(t, err)
	must(t, rootfs.Detach(target))
	r := e.reconcile(0)
	defer func() { must(t, r.stop()) }()
	must(t, waitFor(func() bool { return len(mounted(t, runDir+"/i/")) == 0 }))
	e.daemons(1)
	text := make([]byte, 3)
	if _, err := f.ReadAt(text, 0); err != nil || string(text) != "one" {
		t.Errorf("read an open file of a released image: %q, %v", text, err)
	}
	must(t, f.Close())
	must(t, r.idle(soon))
	e.daemons(0)
}

// waitFor waits until ok is true, looking after each change of the mount table.
func waitFor(ok func() bool) error {
	w, err := rootfs.NewWatch()
	if err != nil {
		return err
	}
	defer w.Close()
	deadline := time.Now().Add(soon)
	for !ok() {
		if _, err := w.Wait(deadline); err != nil {
			return err
		}
	}
	return nil
}

// nydusd is dead, its mounts are not.
func TestDeadDaemonIsReplaced(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	old := e.mustMount(s)
	dead := e.record().Current
	e.kill(dead.PID)
	target := e.mustMount(e.another(s))
	e.holds(img, target)
	now := e.record().Current
	if now.PID == dead.PID || now.Mountpoint == dead.Mountpoint {
		t.Errorf("the successor is %+v, want another process and mountpoint than %+v", now, dead)
	}
	table, err := rootfs.ReadTable()
	must(t, err)
	n := 0
	for _, m := range table {
		if m.Target == now.Mountpoint {
			n++
		}
	}
	if _, ok := table.At(dead.Mountpoint); ok || n != 1 {
		t.Errorf("%d mounts on %s, the dead one mounted: %v; want 1, false", n, now.Mountpoint, ok)
	}
	e.unmount(old)
	e.unmount(target)
}

// A daemon that hangs gets no new mounts. Those it has are not taken from it: it
// may recover.
func TestHungDaemonIsReplaced(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	old := e.mustMount(s)
	hung := e.daemons(1)[0].PID
	kit.Stop(t, hung)
	t.Cleanup(func() { _ = unix.Kill(hung, unix.SIGCONT) })
	target := e.mustMount(e.another(s))
	e.daemons(2)
	e.holds(img, target)
	log, err := os.ReadFile(filepath.Join(e.root, "instances", s.Instance, "nydusd.log"))
	if want := fmt.Sprintf("nydusd %d does not answer and is replaced", hung); err != nil || !strings.Contains(string(log), want) {
		t.Errorf("the log does not say %q (%v):\n%s", want, err, log)
	}
	must(t, unix.Kill(hung, unix.SIGCONT))
	e.holds(img, old)
	e.unmount(old)
	e.daemons(1)
	e.unmount(target)
}

// A record that somebody damaged is no reason to take a running container's
// files away, nor to guess.
func TestDamagedRecord(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	dir := filepath.Join(runDir, "i", s.Instance)
	file := filepath.Join(dir, "record.json")
	ours, err := os.ReadFile(file)
	must(t, err)
	for _, text := range []string{"", "{", "null", "[]", `{"version":1,"current":7}`, "\x00\x00\x00"} {
		must(t, os.WriteFile(file, []byte(text), 0o600))
		e.fails(e.mount(e.another(s), e.target()), failure{
			code: 32, want: []string{file, "damaged", "unmount " + dir, "remove " + dir}, mounts: true,
		})
	}
	e.answers(target, "one")
	must(t, os.WriteFile(file, ours, 0o600))
	second := e.mustMount(e.another(s))
	e.daemons(1)
	e.unmount(target)
	e.unmount(second)
}

func TestRecordOfALaterVersion(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	file := filepath.Join(runDir, "i", s.Instance, "record.json")
	ours, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, []byte(`{"version":2,"key":"`+s.Instance+`"}`), 0o600))
	e.fails(e.mount(e.another(s), e.target()), failure{
		code: 32, want: []string{file, "version 2, this program knows 1", "end the containers"}, mounts: true,
	})
	e.answers(target, "one")
	must(t, os.WriteFile(file, ours, 0o600))
	e.unmount(target)
}

// After a reboot the run directory is empty, and the disk is as it was.
func TestReboot(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)
	e.holds(img, target)
	daemon := e.record().Current
	e.kill(daemon.PID)
	e.unmount(target)
	must(t, rootfs.Detach(daemon.Mountpoint))
	must(t, unix.Unmount(runDir, 0))
	must(t, instance.SetupRunDir(runDir))
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(e.root)
	must(t, err)
	before := e.key
	e.key = key

	target = e.mustMount(e.another(s))
	e.holds(img, target)
	e.unmount(target)

	// An option from before the reboot is not taken.
	e.key = before
	e.fails(e.mount(e.another(s), e.target()), failure{code: 32, want: []string{"a key that this node does not hold", "before the last boot"}, instance: true})
	e.key = key
}
