package mount_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// withHelper puts mount.nydus where mount(8) looks for it, and nydusd where the
// helper does, for the time of the test.
func (e *env) withHelper() {
	e.t.Helper()
	for link, to := range map[string]string{"/sbin/mount.nydus": filepath.Join(e.bin, "mount.nydus"), "/sbin/nydusd": e.tools.Nydusd} {
		must(e.t, os.Symlink(to, link))
		e.t.Cleanup(func() { must(e.t, os.Remove(link)) })
	}
}

// direct writes the files of a mount without a snapshotter and returns its
// options: the image's blobs come from a directory.
func (e *env) direct(f *fixture) string {
	e.t.Helper()
	dir := e.t.TempDir()
	boot, config := filepath.Join(dir, "image.boot"), filepath.Join(dir, "nydusd.json")
	must(e.t, os.WriteFile(boot, f.boot, 0o644))
	text, err := nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: f.blobs}}.FuseDev()
	must(e.t, err)
	must(e.t, os.WriteFile(config, []byte(text), 0o600))
	return "bootstrap=" + boot + ",config=" + config + ",root=" + e.root
}

func TestMount8WithOption(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	s := e.spec(img)
	target := e.target()
	e.ok(e.run("mount", "-t", "nydus", "-o", e.option(s), s.SnapshotDir, target))
	e.holds(img, target)
	must(t, os.WriteFile(filepath.Join(target, "new"), nil, 0o600))
	pid := e.daemons(1)[0].PID
	if !strings.Contains(proc(pid, "cmdline"), s.Instance) {
		t.Errorf("nydusd %d serves another instance than %s", pid, s.Instance)
	}
	e.ok(e.run("umount", target))
	e.daemons(0) // no reconciler has run
}

func TestMount8LivesWithItsTargets(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	options := e.direct(img)
	first, second := e.target(), e.target()
	e.ok(e.run("mount", "-t", "nydus", "-o", options, "none", first))
	pid := e.daemons(1)[0].PID
	e.holds(img, first)
	e.readOnly(first)
	e.ok(e.run("mount", "-t", "nydus", "-o", options+",noexec", "none", second))
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("the second mount uses nydusd %d, want %d", now, pid)
	}
	e.ok(e.run("umount", first))
	e.holds(img, second)
	e.ok(e.run("umount", second))
	e.daemons(0) // no reconciler has run

	// And again, after what the first daemon left.
	e.ok(e.run("mount", "-t", "nydus", "-o", options, "none", first))
	e.holds(img, first)
	e.ok(e.run("umount", first))
	e.daemons(0)
}

// An instance that containers use is theirs: mount(8) neither lets it go nor
// keeps it.
func TestMount8BesideContainers(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	s := e.spec(img)
	container := e.mustMount(s)
	target := e.target()
	e.ok(e.run("mount", "-t", "nydus", "-o", e.option(e.another(s)), s.SnapshotDir, target))
	e.daemons(1)
	e.ok(e.run("umount", target))
	e.daemons(1)
	again := e.mustMount(e.another(s))
	e.daemons(1)
	e.holds(img, container)
	e.unmount(again)
	e.unmount(container)
}

func TestMount8Fstab(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	target := e.target()
	fstab(t, strings.Join([]string{"none", target, "nydus", e.direct(img) +
		",ro,nofail,_netdev,noauto,noatime,x-systemd.automount,x-systemd.requires=network-online.target,comment=image,X-mount.mkdir", "0", "0"}, " "))
	e.ok(e.run("mount", target))
	e.holds(img, target)
	mount, _, err := kit.MountFlags(target)
	must(t, err)
	if !strings.Contains(mount, "noatime") {
		t.Errorf("mounted %s, want noatime", mount)
	}
	e.ok(e.run("umount", target))
	e.daemons(0)
}

// The sample as it is, with the files of this node: mounted by mount -a, which
// finds nothing to do the next time.
func TestMount8FstabSample(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	target := e.target()
	sample, err := os.ReadFile("../../contrib/fstab/fstab")
	must(t, err)
	line := string(sample)
	for _, r := range [][2]string{{"/srv/app", target}, {"bootstrap=/var/lib/images/app.boot,config=/etc/nydus/app.json", e.direct(img)}} {
		if strings.Count(line, r[0]) != 1 {
			t.Fatalf("the sample does not have %s once:\n%s", r[0], sample)
		}
		line = strings.Replace(line, r[0], r[1], 1)
	}
	fstab(t, line)
	t.Cleanup(func() { _ = rootfs.Detach(target) })
	e.ok(e.run("mount", "-a"))
	e.holds(img, target)
	pid := e.daemons(1)[0].PID
	before := mounted(t, target)
	e.ok(e.run("mount", "-a"))
	if after := mounted(t, target); !slices.Equal(after, before) {
		t.Errorf("after mount -a again %v are mounted, before %v", after, before)
	}
	if now := e.daemons(1)[0].PID; now != pid {
		t.Errorf("nydusd %d serves, want %d", now, pid)
	}
	e.ok(e.run("umount", target))
	e.daemons(0)
}

// fstab writes /etc/fstab for the time of the test.
func fstab(t *testing.T, text string) {
	t.Helper()
	before, err := os.ReadFile("/etc/fstab")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	must(t, os.WriteFile("/etc/fstab", []byte(text+"\n"), 0o644))
	t.Cleanup(func() {
		must(t, os.WriteFile("/etc/fstab", before, 0o644))
		must(t, os.RemoveAll("/run/mount")) // mount(8)'s own notes on x-systemd options
	})
}

func TestMount8Flags(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	options := e.direct(small(t, "one"))
	target := e.target()

	// -f checks everything and mounts nothing.
	e.ok(e.run("mount", "-f", "-t", "nydus", "-o", options, "none", target))
	if left := mounted(t, target); len(left) > 0 {
		t.Errorf("a fake mount mounted %v", left)
	}
	e.daemons(0)
	// -s takes options of other systems.
	e.ok(e.run("mount", "-s", "-t", "nydus", "-o", options+",of_another_system", "none", target))
	e.ok(e.run("umount", target))
	e.daemons(0)
	// -v tells.
	r := e.run("/sbin/mount.nydus", "none", target, "-v", "-n", "-o", options)
	if r.code != 0 || r.out != "none mounted on "+target+"\n" {
		t.Errorf("exit status %d: %q", r.code, r.out)
	}
	e.ok(e.run("umount", target))
	e.daemons(0)
	for _, arg := range []string{"--help", "-h"} {
		if r := e.run("/sbin/mount.nydus", arg); r.code != 0 || !strings.Contains(r.out, "Usage: mount.nydus SOURCE TARGET") {
			t.Errorf("%s: exit status %d: %s", arg, r.code, r.out)
		}
	}
	if r := e.run("nydus-overlayfs", "--version"); r.code != 0 || !strings.HasPrefix(r.out, "nydus-overlayfs ") {
		t.Errorf("--version: exit status %d: %s", r.code, r.out)
	}
}

// Both ways in, side by side, from a registry that asks for a password.
func TestMount8FromARegistry(t *testing.T) {
	const user, password = "tester", "canary-91c4"
	reg := kit.NewRegistry(t, kit.RegistryOptions{User: user, Password: password})
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	reg.MustPush(t, img.Image, "team/app:1")
	dir := t.TempDir()
	boot, file := filepath.Join(dir, "image.boot"), filepath.Join(dir, "nydusd.json")
	must(t, os.WriteFile(boot, img.boot, 0o644))
	config, err := nydusd.AddCredentials(e.registrySpec(img, reg, "team/app").Config, mountspec.Credentials{Auth: basic(user, password)})
	must(t, err)
	must(t, os.WriteFile(file, []byte(config), 0o600))
	target := e.target()
	e.ok(e.run("mount", "-t", "nydus", "-o", "bootstrap="+boot+",config="+file+",root="+e.root, "none", target))
	e.holds(img, target)
	if reg.BlobTotal() == 0 {
		t.Error("no byte came from the registry")
	}
	pid := e.daemons(1)[0].PID
	for _, name := range []string{"cmdline", "environ", "mountinfo"} {
		if text := proc(pid, name); strings.Contains(text, password) || strings.Contains(text, basic(user, password)) {
			t.Errorf("the password is in /proc/%d/%s", pid, name)
		}
	}
	var secretFiles []string
	_ = filepath.WalkDir(runDir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if text, _ := os.ReadFile(path); strings.Contains(string(text), basic(user, password)) {
			secretFiles = append(secretFiles, path)
			if info, err := d.Info(); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s holds the password and has mode %v", path, info.Mode())
			}
		}
		return nil
	})
	if len(secretFiles) != 1 || filepath.Base(secretFiles[0]) != "config.json" {
		t.Errorf("the password is in %v, want nydusd's configuration alone", secretFiles)
	}
	e.ok(e.run("umount", target))
	e.daemons(0)
}

// A mount that was made by mount(8) is found by its instance's record.
func TestMount8IsCountedAsUser(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	s := e.spec(img)
	s.Kind = mountspec.KindImage
	container := e.mustMount(s)
	r := e.reconcile(0)
	defer func() { must(t, r.stop()) }()
	target := e.target()
	e.ok(e.run("mount", "-t", "nydus", "-o", e.option(e.another(s)), s.SnapshotDir, target))
	e.unmount(container)
	e.holds(img, target)
	if keys, err := instance.Keys(runDir); err != nil || len(keys) != 1 {
		t.Errorf("instances %v, %v; want one", keys, err)
	}
	must(t, rootfs.Detach(target))
	must(t, r.idle(soon))
	e.daemons(0)
}
