package mount_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// cacheDirs lists the private cache directories of an image, in the order in
// which daemons take them.
func (e *env) cacheDirs(cache string) []string {
	e.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(cache, "private", "*.?"))
	must(e.t, err)
	slices.Sort(dirs)
	return dirs
}

// cacheOf tells which private directory a daemon has locked.
func (e *env) cacheOf(pid int) string {
	e.t.Helper()
	links, _ := filepath.Glob(filepath.Join("/proc", itoa(pid), "fd", "*"))
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && strings.HasSuffix(to, ".lock") {
			return strings.TrimSuffix(to, ".lock")
		}
	}
	e.t.Fatalf("nydusd %d holds no cache lock", pid)
	return ""
}

// Versions before and after nydusd learned to share a cache directory.
const oldVersion, newVersion = "2.2.0", "2.4.0"

// An older nydusd destroys the cache directory that it shares with another.
func TestOldDaemonsDoNotShareACache(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	s.Daemon.Path = e.versioned(oldVersion)
	first := e.mustMount(s)
	e.holds(img, first)
	pid := e.daemons(1)[0].PID
	if got, want := e.cacheOf(pid), filepath.Join(s.CacheDir, "private", s.Instance+".0"); got != want {
		t.Errorf("the first daemon uses %s, want %s", got, want)
	}

	// Released too early: the first one still serves when the second starts.
	must(t, rootfs.Detach(e.record().Current.Mountpoint))
	second := e.mustMount(e.another(s))
	var caches []string
	for _, p := range e.daemons(2) {
		caches = append(caches, filepath.Base(e.cacheOf(p.PID)))
	}
	slices.Sort(caches)
	if want := []string{s.Instance + ".0", s.Instance + ".1"}; !slices.Equal(caches, want) {
		t.Errorf("the daemons use %v, want %v", caches, want)
	}
	e.holds(img, first)
	e.holds(img, second)
	e.unmount(first)
	e.unmount(second)
}

// A newer one shares it.
func TestNewDaemonsShareACache(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	s.Daemon.Path = e.versioned(newVersion)
	first := e.mustMount(s)
	e.holds(img, first)

	// Nothing is read through both: the real nydusd may be older than it says.
	must(t, rootfs.Detach(e.record().Current.Mountpoint))
	second := e.mustMount(e.another(s))
	for _, p := range e.daemons(2) {
		e.checkDescriptors(p.PID, s.Instance, false)
	}
	configs, err := filepath.Glob(filepath.Join(runDir, "i", s.Instance, "g*", "config.json"))
	if err != nil || len(configs) != 2 {
		t.Fatalf("the daemons' configurations: %v, %v; want two", configs, err)
	}
	for _, path := range configs {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), strconv.Quote(s.CacheDir)) {
			t.Errorf("%s does not name the cache directory %s: %s, %v", path, s.CacheDir, text, err)
		}
	}
	if private := filepath.Join(s.CacheDir, "private"); exists(private) {
		t.Errorf("%s was made", private)
	}
	if blobs, err := filepath.Glob(filepath.Join(s.CacheDir, "*.blob.data")); err != nil || len(blobs) == 0 {
		t.Errorf("the cache directory holds no blobs: %v", err)
	}
	e.unmount(first)
	e.unmount(second)
}

// A daemon that ends soon keeps its cache for its successor, who waits for that.
func TestSuccessorUsesTheCache(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	s.Daemon.Path = e.versioned(oldVersion)
	target := e.mustMount(s)
	e.holds(img, target)
	open, err := os.Open(filepath.Join(target, "name"))
	must(t, err)
	defer open.Close()
	before := e.record().Current
	must(t, rootfs.Detach(before.Mountpoint))
	must(t, rootfs.Detach(target))

	again := e.target()
	cmd := e.command(t.Context(), "nydus-overlayfs", s.SnapshotDir, again, "-o", e.option(e.another(s)))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	// The file that is open keeps the first one alive.
	if err := waitsFor(cmd.Process.Pid, before.PID); err != nil {
		t.Error(err)
	}
	must(t, open.Close())
	if err := cmd.Wait(); err != nil || out.Len() > 0 {
		t.Fatalf("the successor: %v: %s", err, &out)
	}
	pid := e.daemons(1)[0].PID
	if got := filepath.Base(e.cacheOf(pid)); got != s.Instance+".0" || len(e.cacheDirs(s.CacheDir)) != 1 {
		t.Errorf("the successor uses %s of %v, want that of its predecessor alone", got, e.cacheDirs(s.CacheDir))
	}
	e.holds(img, again)
	e.unmount(again)
}

// A daemon without a filesystem that does not end by itself is made to: its
// successor gets the cache.
func TestHungPredecessorIsEnded(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	s.Daemon.Path = e.versioned(oldVersion)
	target := e.mustMount(s)
	g := e.record().Current
	kit.Stop(t, g.PID)
	t.Cleanup(func() { _ = unix.Kill(g.PID, unix.SIGCONT) })
	must(t, rootfs.Detach(g.Mountpoint))
	must(t, rootfs.Detach(target))
	again := e.mustMount(e.another(s))
	e.holds(img, again)
	if p := e.daemons(1)[0]; p.PID == g.PID || filepath.Ext(e.cacheOf(p.PID)) != ".0" {
		t.Errorf("nydusd %d (it was %d) uses %s, want a successor on the first cache", p.PID, g.PID, e.cacheOf(p.PID))
	}
	e.unmount(again)
}

// Two repositories never share a cache directory.
func TestCacheOfAnotherOrigin(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	target := e.mustMount(s)
	e.unmount(target)
	must(t, e.tidy(soon))

	other := e.spec(small(t, "two"))
	other.CacheDir = s.CacheDir
	e.fails(e.mount(other, e.target()), failure{
		code: 32, want: []string{"cache directory " + s.CacheDir, "belongs to", "give each repository its own"},
	})
}
