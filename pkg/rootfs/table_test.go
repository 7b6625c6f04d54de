package rootfs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
)

const sample = `22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / /run rw,nosuid shared:2 - tmpfs tmpfs rw,mode=755
31 30 0:31 / /run/a\040b rw - tmpfs tmpfs rw
32 30 0:32 / /run/x rw - fuse.rafs rafs rw,user_id=0
33 30 0:33 /sub /run/x ro,nodev - tmpfs tmpfs rw
34 22 0:40 / /merged rw - overlay overlay rw,lowerdir=/l1:/l\0402,upperdir=/u\134v\0401,workdir=/w
35 22 0:41 / /runaway rw - tmpfs tmpfs rw
`

func sampleTable(t *testing.T) Table {
	t.Helper()
	infos, err := mountinfo.GetMountsFromReader(strings.NewReader(sample), nil)
	must(t, err)
	return toTable(infos)
}

func TestTable(t *testing.T) {
	table := sampleTable(t)
	m, ok := table.At("/run/x")
	if !ok || m.Dev != "0:33" || m.Root != "/sub" || m.Flags != "ro,nodev" {
		t.Errorf("At: %+v, %v; want the uppermost mount", m, ok)
	}
	if m, ok := table.At("/run/a b"); !ok || m.Dev != "0:31" {
		t.Errorf("At: %+v, %v; want the mount with a space in its path", m, ok)
	}
	if m, ok := table.At("/run/"); ok {
		t.Errorf("At: %+v for a path that is none", m)
	}
	m, _ = table.At("/merged")
	for name, want := range map[string]string{"lowerdir": "/l1:/l 2", "upperdir": `/u\v 1`, "workdir": "/w"} {
		if got, ok := m.Option(name); !ok || got != want {
			t.Errorf("Option(%s) = %q, %v; want %q", name, got, ok, want)
		}
	}
	if v, ok := m.Option("upper"); ok {
		t.Errorf("Option(upper) = %q: half a name is none", v)
	}
}

func TestTableUnder(t *testing.T) {
	table := sampleTable(t)
	for path, dev := range map[string]string{
		"/": "0:21", "/etc/passwd": "0:21", "/run": "0:30", "/run/y": "0:30", "/run/x": "0:33", "/run/x/y/z": "0:33",
		"/run/xy": "0:30", "/runaway/f": "0:41", "/run/a b/c": "0:31",
	} {
		if m, ok := table.Under(path); !ok || m.Dev != dev {
			t.Errorf("Under(%s) = %+v, %v; want device %s", path, m, ok, dev)
		}
	}
	if m, ok := (Table{}).Under("/x"); ok {
		t.Errorf("Under in an empty table: %+v", m)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`a`: "a", `a\040b`: "a b", `a\134040b`: `a\040b`, `\011\012\043`: "\t\n#", `a\`: `a\`,
	} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

// The kernel's own text of a mount with odd names.
func TestTableOfRealMounts(t *testing.T) {
	root := memory(t)
	lower := snapshots(t, root, 2)
	upper, work, target := filepath.Join(root, `up per\x`), filepath.Join(root, "work"), filepath.Join(root, "tar get\n#")
	for _, dir := range []string{upper, work, target} {
		must(t, os.Mkdir(dir, 0o755))
	}
	// overlay takes a backslash as its own escape.
	must(t, Overlay{Lower: lower, Upper: strings.ReplaceAll(upper, `\`, `\\`), Work: work}.Mount(target))
	table, err := ReadTable()
	must(t, err)
	m, ok := table.At(target)
	if !ok || m.Type != "overlay" {
		t.Fatalf("mounted is %+v, %v", m, ok)
	}
	if got, _ := m.Option("workdir"); got != work {
		t.Errorf("workdir is %q, want %q", got, work)
	}
	if one, ok, err := Lookup(target); err != nil || !ok || one != m {
		t.Errorf("Lookup says %+v, %v, %v; the table %+v", one, ok, err, m)
	}
	must(t, Detach(target))
}

func TestFollow(t *testing.T) {
	root := memory(t)
	dir := filepath.Join(root, "dir")
	must(t, os.Mkdir(dir, 0o755))
	ctx, cancel := context.WithCancel(t.Context())
	calls := make(chan struct{}, 100)
	done := make(chan error, 1)
	go func() { done <- Follow(ctx, func() { calls <- struct{}{} }) }()
	wait := func(what string) {
		t.Helper()
		select {
		case <-calls:
		case <-time.After(10 * time.Second):
			t.Fatalf("no call after %s", what)
		}
	}
	wait("the start")
	must(t, Bind(root, dir, nil))
	wait("a mount")
	must(t, Detach(dir))
	wait("an unmount")
	cancel()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(10 * time.Second):
		t.Fatal("Follow did not end with its context")
	}
}
