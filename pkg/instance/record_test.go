package instance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

const testKey = "0123456789abcdef0123456789abcdef"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func nothingOnDisk() error { return nil }

func mustOpen(t *testing.T, d dir, mode openMode) *Instance {
	t.Helper()
	i, err := open(t.Context(), d, mode, 0)
	must(t, err)
	return i
}

func TestRecordRoundTrip(t *testing.T) {
	run := t.TempDir()
	d := dirOf(run, testKey)
	i := mustOpen(t, d, openCreate)
	if want := (Record{Version: recordVersion, Key: testKey}); !reflect.DeepEqual(i.rec, want) {
		t.Errorf("a new instance's record is %+v, want %+v", i.rec, want)
	}
	g := Generation{
		Number: 3, Ready: true, Mountpoint: "/run/i/g3/mnt", Socket: "/run/i/g3/api.sock", Dev: "0:77", PID: 42, StartTime: 1 << 60,
		Nydusd: "/usr/bin/nydusd", Cgroup: "/nydus", Started: time.Now().UTC().Round(0),
	}
	old := g
	old.Number = 2
	i.rec = Record{
		Version: recordVersion, Key: testKey, Image: "r.test/a:1", BootstrapDigest: "sha256:00", Host: "r.test", Repository: "a",
		CacheDir: "/c", Root: "/root", Driver: mountspec.DriverFUSE, Last: 3, Current: &g, Retired: []Generation{old},
	}
	must(t, i.write())
	must(t, i.Close())
	for range 2 {
		again := mustOpen(t, d, openExisting)
		if !reflect.DeepEqual(again.rec, i.rec) {
			t.Errorf("read %+v, wrote %+v", again.rec, i.rec)
		}
		must(t, again.Close())
	}
	free, err := ReadRecord(run, testKey)
	if err != nil || !reflect.DeepEqual(*free, i.rec) {
		t.Errorf("ReadRecord: %+v, %v", free, err)
	}
	if _, err := ReadRecord(run, strings.Repeat("f", 32)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadRecord of none: %v", err)
	}
	info, err := os.Stat(d.record())
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the record has mode %v (%v)", info.Mode(), err)
	}
}

func TestRecordOfAnotherVersionOrInstance(t *testing.T) {
	d := dirOf(t.TempDir(), testKey)
	must(t, mustOpen(t, d, openCreate).Close())
	for text, want := range map[string]string{
		`{"version":2,"key":"` + testKey + `"}`:                 "version 2, this program knows 1",
		`{"version":1,"key":"` + strings.Repeat("0", 32) + `"}`: "not the record of this instance",
		`{"version":1}`: "not the record of this instance",
		"":              "unexpected end of JSON input",
		"null":          "not the record of this instance",
		`{"version":1,"key":"` + testKey + `","current":"canary"}`: "cannot unmarshal",
	} {
		must(t, os.WriteFile(d.record(), []byte(text), 0o600))
		_, err := open(t.Context(), d, openExisting, 0)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), d.record()) {
			t.Errorf("%s: %v; want an error that says %q", text, err, want)
		}
		// The failure has given the lock back.
		if _, err := open(t.Context(), d, openTry, 0); errors.Is(err, errLocked) {
			t.Errorf("%s: still locked", text)
		}
	}
}

func TestOpenModes(t *testing.T) {
	d := dirOf(t.TempDir(), testKey)
	for _, mode := range []openMode{openExisting, openTry} {
		if _, err := open(t.Context(), d, mode, 0); !errors.Is(err, errGone) {
			t.Errorf("mode %d of a missing instance: %v, want errGone", mode, err)
		}
	}
	i := mustOpen(t, d, openCreate)
	if _, err := open(t.Context(), d, openTry, 0); !errors.Is(err, errLocked) {
		t.Errorf("try a locked one: %v, want errLocked", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := open(ctx, d, openExisting, 0)
	if !errors.Is(err, errLocked) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), string(d)) {
		t.Errorf("wait for a locked one: %v, want errLocked and the deadline", err)
	}
	must(t, i.Close())
	// The one that gave up waiting does not keep the lock.
	must(t, mustOpen(t, d, openExisting).Close())
}

// Whoever waits for the lock of an instance that is removed meanwhile gets the
// new one's.
func TestLockIsHandedOverAcrossRemoval(t *testing.T) {
	d := dirOf(t.TempDir(), testKey)
	first := mustOpen(t, d, openCreate)
	type result struct {
		i   *Instance
		err error
	}
	results := make(chan result, 2)
	for _, mode := range []openMode{openCreate, openExisting} {
		go func() {
			i, err := open(context.Background(), d, mode, 0)
			if i != nil {
				if !sameFile(i.lock, d.lock()) {
					err = errors.Join(err, errors.New("the lock is not the one that others find"))
				}
				err = errors.Join(err, i.Close())
			}
			results <- result{i, err}
		}()
	}
	waiting(t, d.lock(), 2)
	removed, err := first.removeIfEmpty(nothingOnDisk)
	if !removed || err != nil {
		t.Fatalf("remove: %v, %v", removed, err)
	}
	must(t, first.Close())
	for range 2 {
		// openExisting may come before or after the other has made it again.
		if r := <-results; r.err != nil && !errors.Is(r.err, errGone) {
			t.Error(r.err)
		}
	}
}

// waiting waits until n requests for a file's lock are blocked, which the kernel
// tells only when asked.
func waiting(t *testing.T, path string, n int) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	inode := fmt.Sprintf(":%d ", st.Ino)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); <-tick.C {
		text, err := os.ReadFile("/proc/locks")
		must(t, err)
		blocked := 0
		for _, line := range strings.Split(string(text), "\n") {
			if strings.Contains(line, "-> FLOCK") && strings.Contains(line, inode) {
				blocked++
			}
		}
		if blocked >= n {
			return
		}
	}
	t.Fatalf("%d requests do not wait for %s", n, path)
}

// Many processes open, create and remove one instance: never do two hold it.
func TestConcurrentOpenCreateRemove(t *testing.T) {
	run := t.TempDir()
	root := t.TempDir()
	d := dirOf(run, testKey)
	disk := diskDirOf(root, testKey)
	var holders, opened, removals atomic.Int32
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for round := range 60 {
				mode := []openMode{openCreate, openExisting, openTry}[(worker+round)%3]
				i, err := open(context.Background(), d, mode, 0)
				if errors.Is(err, errGone) || errors.Is(err, errLocked) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d hold the instance", n)
				}
				opened.Add(1)
				i.rec.Root, i.rec.Last = root, i.rec.Last+1
				err = errors.Join(i.write(), os.MkdirAll(string(disk), 0o700), os.WriteFile(disk.bootstrap(), []byte{byte(worker)}, 0o600))
				// Nobody removes what belongs to the holder.
				if text, rerr := os.ReadFile(disk.bootstrap()); rerr != nil || len(text) != 1 || text[0] != byte(worker) {
					err = errors.Join(err, fmt.Errorf("the holder's bootstrap: %v, %w", text, rerr))
				}
				holders.Add(-1)
				if round%2 == 0 {
					var removed bool
					var rerr error
					removed, rerr = i.removeIfEmpty(i.removeBootstrap)
					if removed {
						removals.Add(1)
					}
					err = errors.Join(err, rerr)
				}
				if err = errors.Join(err, i.Close()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("opened %d times, removed %d times", opened.Load(), removals.Load())
	if removals.Load() == 0 || opened.Load() <= removals.Load() {
		t.Error("too little happened")
	}
	if gone, _ := filepath.Glob(filepath.Join(instancesDir(run), ".gone-*")); len(gone) > 0 {
		t.Errorf("left behind: %v", gone)
	}
}

func TestRemovalKeepsWhatLives(t *testing.T) {
	i := mustOpen(t, dirOf(t.TempDir(), testKey), openCreate)
	defer i.Close()
	onDisk := func() error { t.Error("the disk was cleared"); return nil }
	for _, rec := range []Record{{Current: &Generation{}}, {Retired: []Generation{{}}}} {
		i.rec = rec
		if removed, err := i.removeIfEmpty(onDisk); removed || err != nil {
			t.Errorf("%+v: %v, %v", rec, removed, err)
		}
	}
	i.rec = Record{}
	fault := errors.New("disk fault")
	if removed, err := i.removeIfEmpty(func() error { return fault }); removed || !errors.Is(err, fault) {
		t.Errorf("%v, %v; want the fault, and nothing removed", removed, err)
	}
}

func TestKeys(t *testing.T) {
	run := t.TempDir()
	if keys, err := Keys(run); err != nil || len(keys) > 0 {
		t.Errorf("of an empty run directory: %v, %v", keys, err)
	}
	for _, name := range []string{testKey, ".gone-x.1"} {
		must(t, os.MkdirAll(filepath.Join(instancesDir(run), name), 0o700))
	}
	if keys, err := Keys(run); err != nil || !reflect.DeepEqual(keys, []string{testKey}) {
		t.Errorf("%v, %v", keys, err)
	}
}

func TestUsers(t *testing.T) {
	i := mustOpen(t, dirOf(t.TempDir(), testKey), openCreate)
	defer i.Close()
	i.rec.Current = &Generation{Number: 1, Dev: "0:50", Mountpoint: "/run/mnt"}
	for _, u := range []User{
		{Target: "/a", Generation: 1, Dev: "0:60", Upper: "/s/1/fs"},
		{Target: "/b", Generation: 1, Dev: "0:61", Upper: "/s/2/fs"},  // unmounted since
		{Target: "/c", Generation: 1, Dev: "0:62", Upper: "/s/3/fs"},  // its number is another overlay's by now
		{Target: "/d", Generation: 1, Upper: "/s/4/fs"},               // pending, and made
		{Target: "/e", Generation: 1},                                 // pending, and never made
		{Target: "/moved", Generation: 1, Dev: "0:66", Upper: "/s/6"}, // seen at another place
		{Target: "/view", Generation: 1, Dev: "0:67"},                 // without an upper directory
	} {
		must(t, i.writeUser(u))
	}
	must(t, os.WriteFile(filepath.Join(i.dir.users(), ".new-1"), []byte("{"), 0o600))
	table := rootfs.Table{
		{Target: "/run/mnt", Type: "fuse.rafs", Dev: "0:50"},
		{Target: "/image", Type: "fuse.rafs", Dev: "0:50"},
		{Target: "/other", Type: "fuse.rafs", Dev: "0:51"},
		{Target: "/a", Type: "overlay", Dev: "0:60", Options: "rw,lowerdir=/l,upperdir=/s/1/fs"},
		{Target: "/c", Type: "overlay", Dev: "0:62", Options: "rw,lowerdir=/l,upperdir=/s/9/fs"},
		{Target: "/d", Type: "overlay", Dev: "0:64", Options: "rw,lowerdir=/l,upperdir=/s/4/fs"},
		{Target: "/e", Type: "tmpfs", Dev: "0:65"},
		{Target: "/elsewhere", Type: "overlay", Dev: "0:66", Options: "rw,lowerdir=/l,upperdir=/s/6"},
		{Target: "/view", Type: "overlay", Dev: "0:67", Options: "ro,lowerdir=/l:/m"},
	}
	for range 2 {
		users, err := i.usedBy(indexOf(table))
		must(t, err)
		got := map[string]bool{}
		for _, u := range users {
			got[u] = true
		}
		want := map[string]bool{"/image": true, "/a": true, "/d": true, "/elsewhere": true, "/view": true}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("used by %v, want %v", got, want)
		}
	}
	left, err := os.ReadDir(i.dir.users())
	if err != nil || len(left) != 4 {
		t.Errorf("%d files of users are left (%v), want those of the four that live", len(left), err)
	}
}

func TestUseUndoesAFailedMount(t *testing.T) {
	i := mustOpen(t, dirOf(t.TempDir(), testKey), openCreate)
	defer i.Close()
	i.rec.Current = &Generation{Number: 1}
	fault := errors.New("mount fault")
	pending := false
	err := i.Use(t.Context(), "/target", "/upper", func() error {
		u, err := readUser(i.dir.user("/target"))
		pending = err == nil && u.Target == "/target" && u.Dev == ""
		return fault
	})
	if !errors.Is(err, fault) || !pending {
		t.Errorf("%v; written down before the mount: %v", err, pending)
	}
	if left, err := os.ReadDir(i.dir.users()); err != nil || len(left) > 0 {
		t.Errorf("users are left: %v, %v", left, err)
	}
}

// The record is public on the node.
func TestRecordHoldsNoSecret(t *testing.T) {
	i := mustOpen(t, dirOf(t.TempDir(), testKey), openCreate)
	defer i.Close()
	i.describe(Spec{Key: testKey, Image: "a", Config: `{"auth":"canary"}`, Host: "h", Repository: "r"})
	text, err := json.Marshal(i.rec)
	if err != nil || strings.Contains(string(text), "canary") {
		t.Errorf("%s, %v", text, err)
	}
}
