package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory is a directory on a tmpfs, which takes overlays also where the disk is
// an overlay itself.
func memory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// snapshots makes n layers as containerd lays them out, uppermost first. Each
// has a file of its own, and all have one in common.
func snapshots(t *testing.T, root string, n int) (lower []string) {
	t.Helper()
	for i := range n {
		dir := filepath.Join(root, strconv.Itoa(i+1), "fs")
		must(t, os.MkdirAll(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d", i)), nil, 0o644))
		must(t, os.WriteFile(filepath.Join(dir, "top"), []byte(strconv.Itoa(i)), 0o644))
		lower = append([]string{dir}, lower...)
	}
	return lower
}

func TestOverlayOfManyLayers(t *testing.T) {
	root := memory(t)
	snaps := filepath.Join(root, "var/lib/nydus-snapshotter/snapshots")
	all := snapshots(t, snaps, 500)
	image := filepath.Join(root, "run/nydus-snapshotter/i/0123456789abcdef0123456789abcdef/g1/mnt")
	upper, work, target := filepath.Join(root, "upper"), filepath.Join(root, "work"), filepath.Join(root, "target")
	for _, dir := range []string{image, upper, work, target} {
		must(t, os.MkdirAll(dir, 0o755))
	}
	must(t, os.WriteFile(filepath.Join(image, "image"), nil, 0o644))
	wd, err := os.Getwd()
	must(t, err)
	for _, n := range []int{1, 2, 3, 10, 40, 41, 42, 43, 44, 45, 60, 119, 120, 121, 250, 400, 499} {
		lower := append(append([]string{}, all[len(all)-n:]...), image)
		must(t, Overlay{Lower: lower, Upper: upper, Work: work, Options: []string{"nodev"}}.Mount(target))
		names, err := os.ReadDir(target)
		must(t, err)
		if len(names) != n+2 {
			t.Errorf("%d layers: %d files, want %d", n, len(names), n+2)
		}
		if top, err := os.ReadFile(filepath.Join(target, "top")); err != nil || string(top) != strconv.Itoa(n-1) {
			t.Errorf("%d layers: top is %q (%v), want that of the uppermost layer, %d", n, top, err, n-1)
		}
		must(t, Detach(target))
	}
	if now, err := os.Getwd(); err != nil || now != wd {
		t.Errorf("the working directory is %s, %v; was %s", now, err, wd)
	}
}

func TestOverlayOfTooManyLayers(t *testing.T) {
	root := memory(t)
	var lower []string
	for i := range 100 {
		// No two have a directory in common that would save much.
		lower = append(lower, filepath.Join(root, fmt.Sprintf("%d-%s", i, strings.Repeat("x", 60)), "a", "fs"))
	}
	err := Overlay{Lower: lower, Upper: "/u", Work: "/w"}.Mount("/target")
	if err == nil {
		t.Fatal("mounted")
	}
	for _, want := range []string{"mount overlay on /target", "100 layers", fmt.Sprint(os.Getpagesize() - 1), "fewer layers or a shorter root directory"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
}

func TestShorten(t *testing.T) {
	for _, c := range []struct {
		paths []string
		dir   string
		short []string
	}{
		{[]string{"/r/s/1/fs", "/r/s/2/fs", "/run/i/mnt"}, "/r/s", []string{"1/fs", "2/fs", "/run/i/mnt"}},
		{[]string{"/r/s/1/fs"}, "/r/s", []string{"1/fs"}},
		// A directory whose name only begins alike is another one.
		{[]string{"/r/s/1/fs", "/r/s/2/fs", "/r/s2/3/fs"}, "/r/s", []string{"1/fs", "2/fs", "/r/s2/3/fs"}},
		{[]string{"/fs", "/"}, "", []string{"/fs", "/"}},
	} {
		dir, short := shorten(c.paths)
		if dir != c.dir || !reflect.DeepEqual(short, c.short) {
			t.Errorf("shorten(%q) = %q, %q; want %q, %q", c.paths, dir, short, c.dir, c.short)
		}
	}
}

func TestOverlayFlags(t *testing.T) {
	root := memory(t)
	lower := snapshots(t, root, 2)
	upper, work, target := filepath.Join(root, "upper"), filepath.Join(root, "work"), filepath.Join(root, "target")
	for _, dir := range []string{upper, work, target} {
		must(t, os.Mkdir(dir, 0o755))
	}
	writable := Overlay{Lower: lower, Upper: upper, Work: work}
	view := Overlay{Lower: lower}
	single := Overlay{Lower: lower[:1]}
	for _, c := range []struct {
		name    string
		overlay Overlay
		options []string
		fstype  string
		has     []string
		hasNot  []string
	}{
		// What mount.fuse3 appends clears flags.
		{"writable", writable, []string{"rw", "dev", "suid"}, "overlay", []string{"rw"}, []string{"nosuid", "nodev", "noexec"}},
		{"later wins", writable, []string{"nodev", "nosuid", "dev"}, "overlay", []string{"nosuid"}, []string{"nodev"}},
		{"overlay's own", writable, []string{"index=off", "noexec"}, "overlay", []string{"noexec"}, nil},
		{"view", view, []string{"nodev"}, "overlay", []string{"ro", "nodev"}, nil},
		{"view of one", single, []string{"index=off", "userxattr", "noexec"}, "tmpfs", []string{"ro", "noexec"}, nil},
	} {
		o := c.overlay
		o.Options = c.options
		if err := o.Mount(target); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		m, ok, err := Lookup(target)
		if err != nil || !ok || m.Type != c.fstype {
			t.Fatalf("%s: mounted is %+v, %v, %v; want %s", c.name, m, ok, err, c.fstype)
		}
		flags := "," + m.Flags + ","
		for _, f := range c.has {
			if !strings.Contains(flags, ","+f+",") {
				t.Errorf("%s: flags %s, want %s", c.name, m.Flags, f)
			}
		}
		for _, f := range c.hasNot {
			if strings.Contains(flags, ","+f+",") {
				t.Errorf("%s: flags %s, want no %s", c.name, m.Flags, f)
			}
		}
		must(t, Detach(target))
	}
}

func TestFailedMountsLeaveNothing(t *testing.T) {
	root := memory(t)
	lower := snapshots(t, root, 2)
	target := filepath.Join(root, "target")
	must(t, os.Mkdir(target, 0o755))
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"missing layer":      {Overlay{Lower: []string{lower[0], root + "/missing"}}.Mount(target), "mount overlay"},
		"missing upper":      {Overlay{Lower: lower, Upper: root + "/u", Work: root + "/w"}.Mount(target), "mount overlay"},
		"unknown option":     {Overlay{Lower: lower, Options: []string{"no_such_option=1"}}.Mount(target), "dmesg"},
		"missing target":     {Overlay{Lower: lower}.Mount(target + "/missing"), "no such file"},
		"missing bind":       {Bind(root+"/missing", target, nil), "bind " + root + "/missing"},
		"missing tmpfs dir":  {Tmpfs(root+"/missing", 1), "mount run directory"},
		"many, unknown root": {Overlay{Lower: missing(200)}.Mount(target), "change to /nowhere"},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.want) {
			t.Errorf("%s: %v, want an error that says %q", name, c.err, c.want)
		}
		if m, ok, err := Lookup(target); ok || err != nil {
			t.Fatalf("%s: left mounted: %+v, %v", name, m, err)
		}
	}
}

func missing(n int) (lower []string) {
	for i := range n {
		lower = append(lower, fmt.Sprintf("/nowhere/snapshots/%d/fs", i))
	}
	return lower
}

func TestDetach(t *testing.T) {
	root := memory(t)
	dir := filepath.Join(root, "dir")
	must(t, os.Mkdir(dir, 0o755))
	must(t, Detach(dir))
	must(t, Detach(root+"/missing"))
	must(t, DetachAll(dir))

	// The uppermost of two, also when it is busy.
	must(t, Bind(root, dir, nil))
	must(t, Bind(root, dir, []string{"ro"}))
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	must(t, Detach(dir))
	if m, ok, err := Lookup(dir); err != nil || !ok || strings.HasPrefix(m.Flags, "ro") {
		t.Errorf("mounted is %+v, %v, %v; want the lower of the two", m, ok, err)
	}
	must(t, Detach(dir))
	if _, ok, err := Lookup(dir); ok || err != nil {
		t.Errorf("still mounted (%v)", err)
	}

	// All that lie on one path.
	for range 5 {
		must(t, Bind(root, dir, nil))
	}
	must(t, DetachAll(dir))
	if _, ok, err := Lookup(dir); ok || err != nil {
		t.Errorf("still mounted (%v)", err)
	}

	// Never through a symbolic link.
	must(t, Bind(root, dir, nil))
	must(t, os.Symlink(dir, root+"/link"))
	must(t, Detach(root+"/link"))
	if _, ok, err := Lookup(dir); !ok || err != nil {
		t.Errorf("a link to the mountpoint was followed (%v)", err)
	}
	must(t, Detach(dir))
}

func TestTmpfs(t *testing.T) {
	dir := filepath.Join(memory(t), "run")
	must(t, os.Mkdir(dir, 0o755))
	must(t, Tmpfs(dir, 2))
	info, err := os.Stat(dir)
	must(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, want 0700", info.Mode())
	}
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	if size := st.Blocks * uint64(st.Bsize); size != 2<<20 {
		t.Errorf("size %d, want 2 MiB", size)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 6 && f[4] == dir && !strings.HasPrefix(f[6], "shared:") {
			t.Errorf("not shared: %s", line)
		}
	}
	must(t, Detach(dir))
}

func TestWatch(t *testing.T) {
	root := memory(t)
	dir := filepath.Join(root, "dir")
	must(t, os.Mkdir(dir, 0o755))
	w, err := NewWatch()
	must(t, err)
	defer w.Close()
	past := time.Now().Add(-time.Hour)
	if changed, err := w.Wait(past); changed || !errors.Is(err, ErrDeadline) {
		t.Errorf("without a change: %v, %v; want ErrDeadline", changed, err)
	}

	// A change between NewWatch and Wait is not lost, and told once.
	must(t, Bind(root, dir, nil))
	if changed, err := w.Wait(time.Now().Add(time.Minute)); !changed || err != nil {
		t.Errorf("after a change: %v, %v", changed, err)
	}
	if changed, err := w.Wait(past); changed || !errors.Is(err, ErrDeadline) {
		t.Errorf("told twice: %v, %v", changed, err)
	}
	must(t, Detach(dir))

	r, p, err := os.Pipe()
	must(t, err)
	defer r.Close()
	must(t, p.Close())
	if changed, err := w.Wait(time.Now().Add(time.Minute)); !changed || err != nil {
		t.Errorf("after an unmount: %v, %v", changed, err)
	}
	if changed, err := w.Wait(time.Now().Add(time.Minute), int(r.Fd())); changed || err != nil {
		t.Errorf("a readable descriptor: %v, %v", changed, err)
	}
}
