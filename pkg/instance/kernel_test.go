package instance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// A device number is used again once its filesystem is gone: what is mounted with it then
// is not the generation's.
func TestDaemonlessHolds(t *testing.T) {
	g := Generation{Driver: mountspec.DriverEROFS, Dev: "0:77", Source: "/r/instances/a/bootstrap", Mountpoint: "/run/i/a/g1/mnt"}
	mine := rootfs.Mount{Target: "/x", Root: "/", Type: rootfs.TypeEROFS, Dev: "0:77", Source: g.Source}
	if !g.holds(mine) {
		t.Error("its own mount does not count")
	}
	for what, change := range map[string]func(*rootfs.Mount){
		"another number":  func(m *rootfs.Mount) { m.Dev = "0:78" },
		"another type":    func(m *rootfs.Mount) { m.Type = "overlay" },
		"another image's": func(m *rootfs.Mount) { m.Source = "/r/instances/b/bootstrap" },
	} {
		m := mine
		change(&m)
		if g.holds(m) {
			t.Errorf("%s counts", what)
		}
	}
}

func TestDaemonlessStates(t *testing.T) {
	r, _ := newTestReconciler(t, 0)
	d := dirOf(r.cfg.RunDir, testKey)
	g := Generation{Number: 1, Ready: true, Driver: mountspec.DriverEROFS, Dev: "0:77", Source: "/b", Mountpoint: d.gen(1).mountpoint()}
	own := rootfs.Mount{Target: g.Mountpoint, Root: "/", Type: rootfs.TypeEROFS, Dev: "0:77", Source: "/b"}
	bind := own
	bind.Target = "/somewhere"
	for _, c := range []struct {
		table   rootfs.Table
		current bool
		want    State
	}{
		{nil, true, StateDead},
		{rootfs.Table{own}, true, StateIdle},
		{rootfs.Table{own, bind}, true, StateServing},
		{rootfs.Table{bind}, false, StateRetired},
		{nil, false, StateDead},
	} {
		rec := &Record{Key: testKey, Retired: []Generation{g}}
		if c.current {
			rec = &Record{Key: testKey, Current: &g}
		}
		list, err := statusOf(d, rec, indexOf(c.table))
		must(t, err)
		if len(list) != 1 || list[0].State != c.want || list[0].Driver != mountspec.DriverEROFS || list[0].PID != 0 {
			t.Errorf("mounted %v: %+v, want %s", c.table, list, c.want)
		}
	}
}

// A retired generation ends although its number, type and source are a newer one's.
func TestDaemonlessOutlived(t *testing.T) {
	r, _ := newTestReconciler(t, 0)
	d := dirOf(r.cfg.RunDir, testKey)
	i := mustOpen(t, d, openCreate)
	defer i.Close()
	old := Generation{Number: 1, Ready: true, Driver: mountspec.DriverEROFS, Dev: "0:77", Mountpoint: d.gen(1).mountpoint()}
	now := old
	now.Number, now.Mountpoint = 2, d.gen(2).mountpoint()
	i.rec.Current, i.rec.Retired = &now, []Generation{old}
	if !i.outlived(&old) || i.outlived(&now) {
		t.Errorf("outlived: the old one %t, the new one %t", i.outlived(&old), i.outlived(&now))
	}
	must(t, os.MkdirAll(filepath.Dir(old.Mountpoint), 0o700))
	must(t, i.sweep())
	if len(i.rec.Retired) > 0 || i.rec.Current == nil {
		t.Errorf("after a sweep: %+v", i.rec)
	}
	if _, err := os.Stat(filepath.Dir(old.Mountpoint)); err == nil {
		t.Error("its directory is left")
	}
}

// A mount on an instance without a daemon fetches metadata that the kernel has dropped.
func TestMetadataAhead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bootstrap")
	must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	must(t, f.Sync())
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	cached := func() int {
		var stat unix.Cachestat_t
		must(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0))
		return int(stat.Cache) * os.Getpagesize()
	}
	readMetadataAhead(&Generation{Source: path, Driver: mountspec.DriverFUSE})
	if n := cached(); n > 0 {
		t.Fatalf("%d bytes are in memory after they were dropped, or were read for a daemon", n)
	}
	readMetadataAhead(&Generation{Source: path, Driver: mountspec.DriverEROFS})
	if n := cached(); n != 1<<20 {
		t.Errorf("%d bytes are in memory or on their way", n)
	}
	readMetadataAhead(&Generation{Source: path + "-missing", Driver: mountspec.DriverEROFS})
}

func TestVerdict(t *testing.T) {
	s := Spec{RunDir: t.TempDir(), Root: "/var/lib/one"}
	must(t, condemned(s))
	must(t, condemn(s, fmt.Errorf("mount: %w", unix.EINVAL)))
	must(t, condemned(s))
	must(t, condemn(s, fmt.Errorf("mount: %w", unix.ENOTBLK)))
	if err := condemned(s); err == nil || !strings.Contains(err.Error(), unix.ENOTBLK.Error()) || !strings.Contains(err.Error(), s.RunDir) {
		t.Errorf("after a refusal: %v", err)
	}
	other := s
	other.Root = "/var/lib/two"
	must(t, condemned(other))
}

// A verdict in which there is no sense is none, and one that cannot be had is an error.
func TestVerdictBroken(t *testing.T) {
	s := Spec{RunDir: t.TempDir(), Root: "/var/lib/one"}
	for _, text := range []string{"", "\n", "word", s.Root, s.Root + " \nreason"} {
		must(t, os.WriteFile(verdictPath(s.RunDir), []byte(text), 0o600))
		if err := condemned(s); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	must(t, os.Remove(verdictPath(s.RunDir)))
	must(t, os.Mkdir(verdictPath(s.RunDir), 0o700))
	if err := condemned(s); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a directory in its place: %v", err)
	}
	if err := condemn(s, unix.ENOTBLK); err == nil || !strings.Contains(err.Error(), verdictPath(s.RunDir)) {
		t.Errorf("written in place of a directory: %v", err)
	}
	s.RunDir = filepath.Join(s.RunDir, "gone")
	must(t, condemned(s))
	if err := condemn(s, unix.ENOTBLK); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), s.RunDir) {
		t.Errorf("no run directory: %v", err)
	}
}
