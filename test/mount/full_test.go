package mount_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// diskSize is that of a disk that fills up fast, and holds the image twice.
const diskSize = 48 << 20

// disk is a node whose root directory is on a disk of its own.
type disk struct {
	*power
	device *device
	detach func()
}

// newDisk mounts the disk. What a mount needs of the snapshotter is there: in its place no
// snapshot is made on a full disk.
func newDisk(t *testing.T, version string) *disk {
	t.Helper()
	d := &disk{power: newPower(t, version), device: newDevice(t, diskSize)}
	d.dir = d.root
	d.detach = attach(t, d.device.path, d.root, "")
	t.Cleanup(func() {
		must(t, d.tidy(soon))
		d.detach()
	})
	d.spec.Bootstrap, d.spec.SnapshotDir = d.unpack(d.img.boot), d.snapshot()
	d.spec.Driver = mountspec.DriverFUSE
	// As the snapshotter has it by default: what a disk has lost is noticed.
	config, err := nydusd.Config{
		Backend:  nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "http", Host: d.spec.Host, Repository: d.spec.Repository},
		CacheDir: d.spec.CacheDir, Validate: true,
	}.FuseDev()
	must(t, err)
	d.spec.Config = config
	unix.Sync() // the image was pulled some time ago
	return d
}

// refuses checks that a mount fails with what is wanted, and leaves nothing.
func (d *disk) refuses(r result, want ...string) {
	d.t.Helper()
	d.fails(r, failure{code: exitFailure, want: want, mounts: true})
	if keys, err := instance.Keys(runDir); err != nil || len(keys) > 0 {
		d.t.Errorf("instances are left: %v, %v", keys, err)
	}
	if left := mounted(d.t, runDir+"/i"); len(left) > 0 {
		d.t.Errorf("still mounted: %v", left)
	}
	d.daemons(0)
}

func (d *disk) ballast() string { return filepath.Join(d.root, "ballast") }

// fill leaves n blocks of the disk free.
func (d *disk) fill(n int64) {
	d.t.Helper()
	f, err := os.OpenFile(d.ballast(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(d.t, err)
	defer f.Close()
	for size := 1 << 20; size >= block; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else {
			must(d.t, err)
		}
	}
	info, err := f.Stat()
	must(d.t, err)
	must(d.t, f.Truncate(info.Size()-n*block))
	must(d.t, f.Sync())
}

func (d *disk) free() {
	d.t.Helper()
	must(d.t, os.Remove(d.ballast()))
	unix.Sync()
}

// forget drops what the kernel has of the image in memory: what is read comes from the daemon
// and its disk.
func (d *disk) forget() {
	d.t.Helper()
	must(d.t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0))
}

// reads reads all files through target and counts those that fail. One that is wrong fails
// the test.
func (d *disk) reads(target string) (failed int) {
	d.t.Helper()
	for _, layer := range []string{"a", "b"} {
		for n := range 40 {
			name := fmt.Sprintf("%s-%d", layer, n)
			text, err := os.ReadFile(filepath.Join(target, name))
			switch {
			case err != nil:
				failed++
			case d.img.tree[name].SHA256 != fmt.Sprintf("%x", sha256.Sum256(text)):
				d.t.Errorf("%s is wrong", name)
			}
		}
	}
	return failed
}

// right reads all files, and wants that none fails and that nothing wrong is recorded.
// nydusd 2.2.0 ends when it cannot write its log, from which a running snapshotter keeps
// it (TestLogOnAFullDisk): of it is only wanted that nothing is wrong.
func (d *disk) right(what, target string) {
	d.t.Helper()
	d.forget()
	if n := d.reads(target); n > 0 && d.succeeds() {
		d.t.Errorf("%s: %d files cannot be read", what, n)
	}
	d.true(what)
}

func (d *disk) true(what string) {
	d.t.Helper()
	if n := d.untrue(); n > 0 {
		d.t.Errorf("%s: %d chunks are said to be there that are not", what, n)
	}
}

// whole checks that the node has recovered: the image becomes complete, and is served without
// a daemon.
func (d *disk) whole() {
	d.t.Helper()
	target := d.mustMount(d.another(d.spec))
	d.holds(d.img, target)
	if _, err := d.cache.Sync(d.t.Context()); err != nil {
		d.t.Errorf("the cache cannot be synced: %v", err)
	}
	d.unmount(target)
	must(d.t, d.tidy(soon))
	d.true("in the end")
	left, _ := filepath.Glob(filepath.Join(d.spec.CacheDir, proof.Temporary+"*"))
	if len(left) > 0 {
		d.t.Errorf("left behind: %v", left)
	}
}

// unproven checks that no proof is there that holds.
func (d *disk) unproven() {
	d.t.Helper()
	if _, err := proof.Read(d.spec.CacheDir, d.spec.BootstrapDigest); !errors.Is(err, proof.ErrNotProven) {
		d.t.Errorf("the image is proven: %v", err)
	}
}

// TestDiskFull mounts on disks with so little room that something of what nydusd needs
// finds none. Either the mount fails and says what to do, or the container can read all.
// Without room reserved nydusd is killed while it serves (SIGBUS).
func TestDiskFull(t *testing.T) {
	d := newDisk(t, newVersion)
	served := 0
	for _, room := range []int64{0, 3, 6, 12, 72, 76, 80, 82, 84, 88, 96, 104, 112, 124} {
		s := d.another(d.spec)
		d.fill(room)
		target := d.target()
		r := d.mount(s, target)
		if r.code == 0 {
			served++
			d.right(fmt.Sprintf("with room for %d blocks", room), target)
			if d.succeeds() {
				d.daemons(1)
			}
			d.unmount(target)
			must(t, d.tidy(soon))
		} else {
			want := []string{d.root}
			if d.succeeds() {
				want = append(want, "no space left on device", "is full: free space, or have nydus-snapshotter cache gc")
			}
			d.refuses(r, want...)
		}
		d.true(fmt.Sprintf("with room for %d blocks", room))
		d.free()
		must(t, os.RemoveAll(filepath.Join(d.root, "cache")))
		must(t, os.RemoveAll(filepath.Join(d.root, "instances")))
	}
	if served == 0 {
		t.Error("no room was enough to be served")
	}
	d.whole()
}

// TestDiskFillsUp fills the disk beneath a daemon that serves.
func TestDiskFillsUp(t *testing.T) {
	d := newDisk(t, newVersion)
	target := d.mustMount(d.spec)
	_, err := os.ReadFile(filepath.Join(target, "a-1"))
	must(t, err)
	second := d.another(d.spec)
	d.fill(0)
	d.right("full", target)
	if _, err := d.cache.Sync(t.Context()); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), d.root) {
		t.Errorf("a full disk is synced to: %v", err)
	}
	if d.tryProve() {
		t.Error("the image is complete on a full disk")
	}
	if d.succeeds() {
		other := d.mustMount(second)
		d.right("full, another container", other)
		d.unmount(other)
	}
	d.free()
	d.right("room again", target)
	d.unmount(target)
	must(t, d.tidy(soon))
	d.whole()
}

// TestDiskFullAfterBoot: what was not synced is taken back also where there is no room to
// write down what is left.
func TestDiskFullAfterBoot(t *testing.T) {
	d := newDisk(t, newVersion)
	target := d.mustMount(d.spec)
	_, err := os.ReadFile(filepath.Join(target, "a-1"))
	must(t, err)
	_, err = d.cache.Sync(t.Context())
	must(t, err)
	d.holds(d.img, target)
	d.unmount(target)
	must(t, d.tidy(soon))
	maps := func() int {
		t.Helper()
		list, err := filepath.Glob(filepath.Join(d.spec.CacheDir, "*.chunk_map"))
		must(t, err)
		return len(list)
	}
	before := maps()
	d.fill(0)
	d.reboot()
	if s, err := d.cache.Sync(t.Context()); err != nil || s.Lost == 0 {
		t.Errorf("on a full disk: %+v, %v", s, err)
	}
	if after := maps(); after >= before {
		t.Errorf("%d maps, %d before: there was room for each, and this test tests nothing", after, before)
	}
	d.true("taken back on a full disk")
	d.free()
	d.whole()
}

// TestDiskFullWhileProving: a proof for which there is no room is none, and says so.
func TestDiskFullWhileProving(t *testing.T) {
	d := newDisk(t, newVersion)
	s := d.completed()
	refused := 0
	for _, step := range []string{"create proof", "write proof", "sync proof"} {
		p, full := d.prover(), false
		p.Step = func(name string) {
			if name == step {
				d.fill(0)
				full = true
			}
		}
		done, err := p.Prove(t.Context(), s.CacheDir, s.Bootstrap, s.BootstrapDigest)
		if !full || done != (err == nil) || err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v, %v", step, done, err)
		}
		// What was written before it was full may have got its block then.
		if step == "create proof" && done {
			t.Error("a proof for which there is no block is one")
		}
		if !done {
			refused++
			d.unproven()
		}
		d.free()
		must(t, proof.Remove(s.CacheDir, d.tables[0].Blob.ID))
	}
	if refused == 0 {
		t.Error("the disk was never too full: this test tests nothing")
	}
	if !d.tryProve() {
		t.Error("the image is not proven with room")
	}
}

// prover takes what was just written for settled.
func (d *disk) prover() *prove.Prover {
	return &prove.Prover{Now: func() time.Time { return time.Now().Add(time.Hour) }}
}

// completed makes all of the image be there.
func (d *disk) completed() *mountspec.Spec {
	d.t.Helper()
	target := d.mustMount(d.spec)
	d.holds(d.img, target)
	d.unmount(target)
	must(d.t, d.tidy(soon))
	return d.spec
}

// TestDiskReadOnly: what runs goes on, and what is to begin says why it cannot.
func TestDiskReadOnly(t *testing.T) {
	d := newDisk(t, newVersion)
	target := d.mustMount(d.spec)
	_, err := os.ReadFile(filepath.Join(target, "a-1"))
	must(t, err)
	d.unmount(target)
	must(t, d.tidy(soon))
	remount := func(flags uintptr) {
		t.Helper()
		must(t, unix.Mount("", d.root, "", unix.MS_REMOUNT|flags, ""))
	}
	second := d.another(d.spec)
	remount(unix.MS_RDONLY)
	d.reboot()
	d.refuses(d.mount(second, d.target()), d.root, "read-only file")
	if _, err := d.cache.Sync(t.Context()); !errors.Is(err, unix.EROFS) {
		t.Errorf("a read-only disk is synced to: %v", err)
	}
	remount(0)
	d.whole()
}

// TestDiskFails has the disk fail while a daemon keeps on it what it fetches.
func TestDiskFails(t *testing.T) {
	for _, all := range []bool{false, true} {
		t.Run(map[bool]string{false: "writes", true: "everything"}[all], func(t *testing.T) {
			d := newDisk(t, newVersion)
			target := d.mustMount(d.spec)
			_, err := os.ReadFile(filepath.Join(target, "a-1"))
			must(t, err)
			_, err = d.cache.Sync(t.Context())
			must(t, err)
			d.device.fail(syscall.EIO, all)
			// What has no room in memory is lost on the way to the disk.
			failed := d.reads(target)
			if failed > 0 && !all {
				t.Errorf("%d files cannot be read", failed)
			}
			if _, err := d.cache.Sync(t.Context()); err == nil {
				t.Error("a disk that fails is synced to")
			} else if !errors.Is(err, checkpoint.ErrNotSynced) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EIO) {
				t.Errorf("a disk that fails: %v", err)
			}
			if done, err := d.prover().Prove(t.Context(), d.spec.CacheDir, d.spec.Bootstrap, d.spec.BootstrapDigest); done || err == nil {
				t.Errorf("an image is proven on a disk that fails: %v", err)
			}
			if d.succeeds() { // an older one compares nothing
				d.forget()
				d.reads(target) // which may fail, but never be wrong
			}
			d.unmount(target)
			r := d.reconcile(0) // which can remove nothing from the disk
			d.daemons(0)
			must(t, r.stop())

			// Mended, as after a start of the machine.
			d.device.fail(0, false)
			d.detach()
			d.reboot()
			d.detach = attach(t, d.device.path, d.root, "")
			if _, err := d.cache.Sync(t.Context()); err != nil {
				t.Errorf("the mended disk is not synced to: %v", err)
			}
			d.unproven()
			d.true("mended")
			d.whole()
		})
	}
}

// TestCacheVanishes removes the cache, and then takes the disk away, beneath a daemon.
func TestCacheVanishes(t *testing.T) {
	d := newDisk(t, newVersion)
	target := d.mustMount(d.spec)
	_, err := os.ReadFile(filepath.Join(target, "a-1"))
	must(t, err)
	second, third := d.another(d.spec), d.another(d.spec)
	must(t, os.RemoveAll(filepath.Join(d.root, "cache")))
	// nydusd cannot make files any more in a directory that is gone.
	d.forget()
	d.reads(target)
	other := d.mustMount(second)
	d.reads(other)
	d.true("cache removed")
	if _, err := d.cache.Sync(t.Context()); err != nil {
		t.Errorf("no cache: %v", err)
	}
	d.unmount(other)
	d.unmount(target)
	must(t, d.tidy(soon))
	d.whole()

	target = d.mustMount(d.another(d.spec))
	must(t, unix.Unmount(d.root, unix.MNT_DETACH))
	d.right("disk taken away", target)
	d.unmount(target)
	must(t, d.tidy(soon))
	d.refuses(d.mount(third, d.target()), third.Bootstrap, "no such file")
	d.detach = attach(t, d.device.path, d.root, "")
	d.whole()
}
