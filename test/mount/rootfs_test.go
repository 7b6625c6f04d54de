package mount_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestRootfsShowsTheImage(t *testing.T) {
	e := newEnv(t)
	img := odd(t)
	target := e.mustMount(e.spec(img))
	e.holds(img, target)
	e.unmount(target)
}

func TestRootfsOfRAFSVersion5(t *testing.T) {
	e := newEnv(t)
	img := oddV5(t)
	if magic := binary.LittleEndian.Uint32(img.boot); magic != 0x52414653 {
		t.Fatalf("the bootstrap begins with %#x: it is none of version 5", magic)
	}
	s := e.spec(img)
	target := e.mustMount(s)
	e.holds(img, target)
	must(t, os.WriteFile(filepath.Join(target, "new"), nil, 0o600))
	must(t, os.RemoveAll(filepath.Join(target, "odd", "names")))
	e.unmount(target)
	e.holds(img, e.mustMount(e.another(s)))
}

func TestRootfsIsWritable(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)

	mount, _, err := kit.MountFlags(target)
	must(t, err)
	for _, flag := range []string{"nosuid", "nodev", "noexec", "ro"} {
		if slices.Contains(strings.Split(mount, ","), flag) {
			t.Errorf("the root filesystem is mounted %s, want no %s", mount, flag)
		}
	}
	must(t, os.WriteFile(filepath.Join(target, "new"), []byte("new"), 0o600))
	must(t, os.Remove(filepath.Join(target, "name")))
	must(t, os.RemoveAll(filepath.Join(target, "etc")))
	if exists(filepath.Join(target, "etc")) || exists(filepath.Join(target, "name")) {
		t.Error("deleted files are still seen")
	}
	upper, err := kit.Walk(s.Upper())
	must(t, err)
	if upper["new"].Type != "file" || upper["name"].Type != "char" || upper["etc"].Type != "char" {
		t.Errorf("the upper directory is %v; want the file new, whiteouts for name and etc", upper)
	}

	// The image itself did not change.
	other := e.mustMount(e.another(s))
	e.holds(img, other)
	e.unmount(target)
	e.unmount(other)
}

func TestMountFlagsAreKept(t *testing.T) {
	e := newEnv(t)
	target := e.mustMount(e.spec(small(t, "one")), "nodev", "noexec", "noatime")
	mount, _, err := kit.MountFlags(target)
	must(t, err)
	for _, flag := range []string{"nodev", "noexec", "noatime", "rw"} {
		if !slices.Contains(strings.Split(mount, ","), flag) {
			t.Errorf("the root filesystem is mounted %s, want %s", mount, flag)
		}
	}
	e.unmount(target)
}

func TestViewIsReadOnly(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	for _, layers := range []int{0, 1, 3} {
		t.Run(fmt.Sprintf("%d layers above", layers), func(t *testing.T) {
			e := e.in(t)
			s := e.spec(img)
			s.ReadOnly = true
			s.Lower = e.layers(layers)
			target := e.mustMount(s, "rw")
			e.readOnly(target)
			e.answers(target, "one")
			for n := range layers {
				if !exists(filepath.Join(target, fmt.Sprintf("layer-%d", n))) {
					t.Errorf("layer %d is missing", n)
				}
			}
			e.unmount(target)
		})
	}
}

func TestImageKindIsTheImageAlone(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	s.Kind = mountspec.KindImage
	target := e.mustMount(s, "rw")
	table, err := rootfs.ReadTable()
	must(t, err)
	if m, ok := table.At(target); !ok || !strings.HasPrefix(m.Type, "fuse") {
		t.Errorf("mounted is %+v, want nydusd's filesystem", m)
	}
	e.readOnly(target)
	e.holds(img, target)

	// As containerd's mount manager uses it in the managed style.
	merged := e.target()
	must(t, rootfs.Overlay{Lower: []string{target}, Upper: s.Upper(), Work: s.Work()}.Mount(merged))
	must(t, os.WriteFile(filepath.Join(merged, "new"), nil, 0o600))
	e.answers(merged, "one")
	e.unmount(merged)
	e.unmount(target)
}

// readOnly checks that nothing can be written, and that the mount says so.
func (e *env) readOnly(target string) {
	e.t.Helper()
	if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); err == nil {
		e.t.Error("a file could be written")
	}
	mount, _, err := kit.MountFlags(target)
	must(e.t, err)
	if !slices.Contains(strings.Split(mount, ","), "ro") {
		e.t.Errorf("mounted %s, want ro", mount)
	}
}

// layers makes n layers, each with a file of its own; uppermost first.
func (e *env) layers(n int) []string {
	e.t.Helper()
	var dirs []string
	for i := range n {
		dir := filepath.Join(e.snapshot(), "fs")
		must(e.t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("layer-%d", i)), nil, 0o644))
		must(e.t, os.WriteFile(filepath.Join(dir, "top"), []byte(fmt.Sprint(i)), 0o644))
		dirs = append([]string{dir}, dirs...)
	}
	return dirs
}

func TestManyLayersAboveTheImage(t *testing.T) {
	const n = 120
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	s.Lower = e.layers(n)
	target := e.mustMount(s)
	for i := range n {
		if !exists(filepath.Join(target, fmt.Sprintf("layer-%d", i))) {
			t.Errorf("layer %d is missing", i)
		}
	}
	if top, err := os.ReadFile(filepath.Join(target, "top")); err != nil || string(top) != fmt.Sprint(n-1) {
		t.Errorf("top is %q (%v), want that of the uppermost layer", top, err)
	}
	e.answers(target, "one")
	e.unmount(target)
	must(t, e.tidy(soon))
	e.daemons(0)
}

func TestOneImageOneDaemon(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	first := e.mustMount(s)
	pid := e.daemons(1)[0].PID
	second := e.mustMount(e.another(s))
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("the second mount uses nydusd %d, want %d of the first", now, pid)
	}

	// Another image has its own.
	other := e.mustMount(e.spec(small(t, "two")))
	e.daemons(2)
	e.answers(first, "one")
	e.answers(second, "one")
	e.answers(other, "two")
	for _, target := range []string{first, second, other} {
		e.unmount(target)
	}
}

func TestSimultaneousMountsShareOneDaemon(t *testing.T) {
	const n = 64
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	counter := filepath.Join(t.TempDir(), "starts")
	s.Daemon.Path = e.wrapper(`echo x >> ` + counter + `; exec "$REAL" "$@"`)
	targets := make([]string, n)
	results := make([]result, n)
	var wg sync.WaitGroup
	for i := range n {
		targets[i] = e.target()
		c := e.another(s)
		wg.Go(func() { results[i] = e.mount(c, targets[i]) })
	}
	wg.Wait()
	for i, r := range results {
		if r.code != 0 {
			t.Errorf("mount %d: %s", i, r.out)
			continue
		}
		e.answers(targets[i], "one")
	}
	e.daemons(1)
	if starts, err := os.ReadFile(counter); err != nil || string(starts) != "x\n" {
		t.Errorf("nydusd was started %d times (%v), want once", len(starts)/2, err)
	}
	for _, target := range targets {
		e.unmount(target)
	}
}

func TestCredentialsDoNotCount(t *testing.T) {
	const user, password = "tester", "canary-7f3a"
	reg := kit.NewRegistry(t, kit.RegistryOptions{User: user, Password: password})
	e := newEnv(t)
	img := small(t, "one")
	reg.MustPush(t, img.Image, "team/app:1")
	s := e.registrySpec(img, reg, "team/app")
	s.Credentials = &mountspec.Credentials{Auth: basic(user, password)}
	first := e.mustMount(s)
	e.holds(img, first)

	other := e.another(s)
	other.Credentials = &mountspec.Credentials{Auth: basic("somebody", "else")}
	second := e.mustMount(other)
	e.daemons(1)
	e.holds(img, second)
	e.unmount(first)
	e.unmount(second)
}
