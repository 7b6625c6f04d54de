package mount_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// mappedOptions are containerd's for a user namespace in which 0 and 1 have other ids of the
// host, in two entries.
var mappedOptions = []string{`uidmap="0:100000:1,1:300000:65535"`, "gidmap=0:200000:65536"}

// owned checks who a file belongs to on the host.
func owned(t *testing.T, path string, uid, gid uint32) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	if st.Uid != uid || st.Gid != gid {
		t.Errorf("%s belongs to %d:%d, want %d:%d", path, st.Uid, st.Gid, uid, gid)
	}
}

// mapped is the spec of another container, in a user namespace: its upper directory has the
// right owner.
func (e *env) mapped(s *mountspec.Spec, driver mountspec.Driver) *mountspec.Spec {
	e.t.Helper()
	c := e.by(driver, s)
	must(e.t, os.Chown(c.Upper(), 100000, 200000))
	return c
}

// now is the status of an image's current generation, which must be served by a driver.
func (e *env) now(s *mountspec.Spec, by mountspec.Driver) (now instance.Status) {
	e.t.Helper()
	list, err := instance.List(runDir)
	must(e.t, err)
	for _, st := range list {
		if st.Instance == s.Instance && st.State == instance.StateServing {
			now = st
		}
	}
	if now.Driver != by {
		e.t.Fatalf("instances %+v, want the image served by %s", list, by)
	}
	return now
}

// TestMapped shifts the owners of an image, which takes the kernel's filesystem: that is made
// beside a nydusd, alone or shared, that serves the image to others.
func TestMapped(t *testing.T) {
	for _, mode := range []mountspec.Mode{mountspec.ModeDedicated, mountspec.ModeShared} {
		t.Run("mode="+string(mode), func(t *testing.T) {
			e := newEnv(t)
			e.mode = mode
			img := small(t, "one")
			s := e.provable(img)
			target := e.target()
			for _, driver := range []mountspec.Driver{mountspec.DriverAuto, mountspec.DriverEROFS, mountspec.DriverFUSE} {
				if r := e.mount(e.mapped(s, driver), target, mappedOptions...); r.code == 0 || !strings.Contains(r.out, "which FUSE cannot do") {
					t.Errorf("%s, not complete: %+v", driver, r)
				}
				if list, err := instance.List(runDir); err != nil || len(list) > 0 || len(mounted(t, target)) > 0 {
					t.Errorf("%s: after a refusal there are %+v and %q (%v)", driver, list, mounted(t, target), err)
				}
			}
			others := e.mustMount(e.by(mountspec.DriverFUSE, s))
			if r := e.mount(e.mapped(s, mountspec.DriverAuto), target, mappedOptions...); r.code == 0 || !strings.Contains(r.out, "nobody has compared") {
				t.Errorf("served by nydusd, not proven: %+v", r)
			}
			e.now(s, mountspec.DriverFUSE)
			e.holds(img, others)
			e.prove(s)

			first := e.mustMount(e.mapped(s, mountspec.DriverAuto), mappedOptions...)
			e.now(s, mountspec.DriverEROFS)
			e.daemons(1)
			e.holds(img, others)
			owned(t, first, 100000, 200000)
			owned(t, filepath.Join(first, "name"), 100000, 200000)
			must(t, os.Lchown(filepath.Join(first, "name"), 300001, 200002)) // the container's 2:2
			e.answers(first, "one")
			e.answers(others, "one")
			owned(t, filepath.Join(others, "name"), 0, 0)

			// Another one has layers above the image, and one is a view.
			above := e.mapped(s, mountspec.DriverEROFS)
			above.Lower = []string{filepath.Join(e.snapshot(), "fs")}
			must(t, os.WriteFile(filepath.Join(above.Lower[0], "above"), nil, 0o644))
			must(t, os.Chown(filepath.Join(above.Lower[0], "above"), 1, 1))
			second := e.mustMount(above, mappedOptions...)
			owned(t, filepath.Join(second, "above"), 300000, 200001)
			owned(t, filepath.Join(second, "name"), 100000, 200000)
			view := e.by(mountspec.DriverAuto, s)
			view.ReadOnly = true
			third := e.mustMount(view, mappedOptions...)
			owned(t, filepath.Join(third, "name"), 100000, 200000)
			if err := os.WriteFile(filepath.Join(third, "new"), nil, 0o644); err == nil {
				t.Error("a view can be written")
			}
			if got := e.now(s, mountspec.DriverEROFS); got.Mounts != 3 {
				t.Errorf("%+v, want 3 mounts", got)
			}
			for _, dir := range []string{first, second, third, others} {
				e.unmount(dir)
			}
			must(t, e.tidy(soon))
			e.daemons(0)
		})
	}
}

// TestMappedImageAlone is refused, and so is a mapping that is none.
func TestMappedImageAlone(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	s.Kind = mountspec.KindImage
	target := e.target()
	if r := e.mount(s, target, mappedOptions...); r.code == 0 || !strings.Contains(r.out, "an image alone is not id-mapped") {
		t.Errorf("an image alone: %+v", r)
	}
	s = e.another(s)
	s.Kind = mountspec.KindRootfs
	if r := e.mount(s, target, "uidmap=0:1:1"); r.code == 0 || !strings.Contains(r.out, "gid mapping") {
		t.Errorf("half a mapping: %+v", r)
	}
	if m := mounted(t, target); len(m) > 0 {
		t.Errorf("mounted: %q", m)
	}
}

// TestHelperKilledAtEveryStepMapped leaves neither mounts nor a user namespace.
func TestHelperKilledAtEveryStepMapped(t *testing.T) {
	k := newKiller(t, mountspec.ModeDedicated)
	k.spec = k.provable(k.img)
	k.complete(k.img, k.spec)
	k.spec = k.mapped(k.spec, mountspec.DriverEROFS)
	k.option = k.env.option(k.spec) + "," + strings.Join(mappedOptions, ",")
	k.cold()
	left := kit.Leaks(t)
	killAtEveryStep(t, k, 45)
	k.cold()
	// The namespace's process ends with the helper that made it.
	if found := left(soon); len(found) > 0 {
		t.Errorf("left are %q", found)
	}
}
