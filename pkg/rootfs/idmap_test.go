package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseIDMap(t *testing.T) {
	m, err := ParseIDMap("0:100000:1000,1000:5:1", "0:200000:65536")
	must(t, err)
	if got, want := fmt.Sprint(m.UIDs, m.GIDs), "[{0 100000 1000} {1000 5 1}] [{0 200000 65536}]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	good := "0:1:1"
	for _, bad := range []string{"", ",", "0", "0:1", "0:1:0", "0:1:1:1", "0:1:1,", "-1:1:1", "0:1:4294967296", "a:b:c", "0::1", strings.Repeat("0:1:1,", 340) + "0:1:1"} {
		for _, pair := range [][2]string{{bad, good}, {good, bad}} {
			if m, err := ParseIDMap(pair[0], pair[1]); err == nil {
				t.Errorf("%q and %q are read as %v", pair[0], pair[1], m)
			}
		}
	}
}

// mapped is a mapping under which 0 is 100000 and 7 is 100007.
func mapped(t *testing.T) *IDMap {
	t.Helper()
	m, err := ParseIDMap("0:100000:1000", "0:200000:1000")
	must(t, err)
	return m
}

// ownedBy checks who a file belongs to.
func ownedBy(t *testing.T, path string, uid, gid uint32) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	if st.Uid != uid || st.Gid != gid {
		t.Errorf("%s belongs to %d:%d, want %d:%d", path, st.Uid, st.Gid, uid, gid)
	}
}

// nothingLeft checks that only these are mounted beneath root, and that none of this
// program's descriptors is a user namespace's.
func nothingLeft(t *testing.T, root string, mounted ...string) {
	t.Helper()
	table, err := ReadTable()
	must(t, err)
	var have []string
	for _, m := range table {
		if strings.HasPrefix(m.Target, root+"/") {
			have = append(have, m.Target)
		}
	}
	if fmt.Sprint(have) != fmt.Sprint(mounted) {
		t.Errorf("mounted are %q, want %q", have, mounted)
	}
	own, err := os.Readlink("/proc/self/ns/user")
	must(t, err)
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		link, _ := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if link != own && strings.HasPrefix(link, "user:") {
			t.Errorf("descriptor %s is still %s", fd.Name(), link)
		}
	}
}

func TestMappedOverlay(t *testing.T) {
	root := memory(t)
	for _, layers := range []int{1, 2, 120} {
		dir := filepath.Join(root, fmt.Sprint(layers))
		all := snapshots(t, filepath.Join(dir, "snapshots"), layers)
		// Nobody but containerd's own keeps them beneath one directory.
		far := filepath.Join(dir, "run/image")
		upper, work, target := filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "target")
		for _, d := range []string{far, upper, work, target} {
			must(t, os.MkdirAll(d, 0o755))
		}
		must(t, os.WriteFile(filepath.Join(far, "theirs"), []byte("image"), 0o644))
		must(t, os.Lchown(filepath.Join(far, "theirs"), 7, 8))
		must(t, os.Lchown(upper, 100000, 200000))
		o := Overlay{Lower: append(all, far), Upper: upper, Work: work, Options: []string{"nodev", "index=off"}, IDMap: mapped(t)}
		must(t, o.Mount(target))
		ownedBy(t, target, 100000, 200000)
		ownedBy(t, filepath.Join(target, "f0"), 100000, 200000)
		ownedBy(t, filepath.Join(target, "theirs"), 100007, 200008)
		ownedBy(t, filepath.Join(far, "theirs"), 7, 8)
		nothingLeft(t, dir, target)
		m, ok, err := Lookup(target)
		must(t, err)
		if u, _ := m.Option("upperdir"); !ok || m.Type != "overlay" || u != upper || !strings.Contains(m.Flags, "nodev") {
			t.Errorf("mounted is %+v", m)
		}
		// What is copied up keeps the owner that it shows.
		must(t, os.Chmod(filepath.Join(target, "theirs"), 0o600))
		ownedBy(t, filepath.Join(upper, "theirs"), 100007, 200008)
		text, err := os.ReadFile(filepath.Join(target, "top"))
		if want := fmt.Sprint(layers - 1); err != nil || string(text) != want {
			t.Errorf("of %d layers the uppermost shows %q (%v), want %q", layers, text, err, want)
		}
		must(t, Detach(target))
		nothingLeft(t, dir)
	}
}

func TestMappedView(t *testing.T) {
	root := memory(t)
	all := snapshots(t, filepath.Join(root, "snapshots"), 2)
	target := filepath.Join(root, "target")
	must(t, os.Mkdir(target, 0o755))
	for _, lower := range [][]string{all[:1], all} {
		must(t, Overlay{Lower: lower, Options: []string{"ro", "noexec", "index=off"}, IDMap: mapped(t)}.Mount(target))
		ownedBy(t, filepath.Join(target, "f1"), 100000, 200000)
		if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("a write to a view ends with %v", err)
		}
		m, _, err := Lookup(target)
		must(t, err)
		if !strings.Contains(m.Flags, "noexec") {
			t.Errorf("mounted is %+v", m)
		}
		must(t, Detach(target))
		nothingLeft(t, root)
	}
}

// TestMappedInPart takes the uppermost layer as it is.
func TestMappedInPart(t *testing.T) {
	root := memory(t)
	all := snapshots(t, filepath.Join(root, "snapshots"), 2)
	target := filepath.Join(root, "target")
	must(t, os.Mkdir(target, 0o755))
	must(t, os.Lchown(filepath.Join(all[0], "f1"), 100000, 200000))
	must(t, Overlay{Lower: all, IDMap: mapped(t), Unmapped: 1}.Mount(target))
	ownedBy(t, filepath.Join(target, "f1"), 100000, 200000)
	ownedBy(t, filepath.Join(target, "f0"), 100000, 200000)
	must(t, Detach(target))
}

// TestMappedFails leaves nothing, wherever it fails.
func TestMappedFails(t *testing.T) {
	root := memory(t)
	all := snapshots(t, filepath.Join(root, "snapshots"), 2)
	upper, work, target := filepath.Join(root, "upper"), filepath.Join(root, "work"), filepath.Join(root, "target")
	for _, dir := range []string{upper, work, target} {
		must(t, os.Mkdir(dir, 0o755))
	}
	overlapping := mapped(t)
	overlapping.UIDs = append(overlapping.UIDs, overlapping.UIDs[0])
	good := Overlay{Lower: all, Upper: upper, Work: work, IDMap: mapped(t)}
	for name, change := range map[string]func(o *Overlay){
		"overlapping mapping": func(o *Overlay) { o.IDMap = overlapping },
		"no lower directory":  func(o *Overlay) { o.Lower = []string{all[0], filepath.Join(root, "none")} },
		// The kernel maps ids of no filesystem of its own.
		"cannot be mapped": func(o *Overlay) { o.Lower = []string{all[0], "/proc"} },
		"unknown option":   func(o *Overlay) { o.Options = []string{"nonsense=1"} },
		"no upper":         func(o *Overlay) { o.Upper = filepath.Join(root, "none") },
		"no target":        nil,
	} {
		o, at := good, target
		if change == nil {
			at = filepath.Join(root, "none")
		} else {
			change(&o)
		}
		if err := o.Mount(at); err == nil {
			t.Errorf("%s: mounted", name)
		} else if name == "cannot be mapped" && !strings.Contains(err.Error(), "/proc") {
			t.Errorf("%s: %v", name, err)
		}
		nothingLeft(t, root)
	}
	must(t, good.Mount(target))
	must(t, Detach(target))
}
