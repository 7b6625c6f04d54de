package e2e_test

import (
	_ "embed"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// writesScript changes the main image's /odd in every way that an overlay knows
// and prints what each change answered.
//
//go:embed testdata/writes.sh
var writesScript string

// mainJob is what the subtests of TestMainImage share.
type mainJob struct {
	registry      *kit.Registry
	plain, nydus  *kit.Image
	plainRef, ref string
	pause         string   // a plain sandbox image
	want          kit.Tree // the image's content
	writes        string   // what writesScript printed on overlayfs
	written       kit.Tree // and what it made of /odd
	committed     kit.Tree // /odd after a commit of that
	mountFlags    string   // of the root filesystem on overlayfs
}

// TestMainImage is the main job on the main fixture: pulled without its data, a
// container sees every file as the image's maker meant it and changes them as
// on overlayfs.
func TestMainImage(t *testing.T) {
	j := &mainJob{registry: kit.NewRegistry(t, kit.RegistryOptions{})}
	j.plain, j.nydus = kit.MainImage(t, kit.NydusOptions{})
	j.plainRef, j.ref = j.registry.MustPush(t, j.plain, "main:plain"), j.registry.MustPush(t, j.nydus, "main:nydus")
	j.want = tree(t, j.plain)
	j.pause = j.registry.MustPush(t, kit.SmallImage(t, "pause"), "pause:plain")
	t.Run("overlayfs", j.measureOverlayfs)
	eachStyle(t, j.run)
	t.Run("pods", func(t *testing.T) { eachStyle(t, j.pod) })
}

// measureOverlayfs runs the plain image on overlayfs: what the rest is compared with.
func (j *mainJob) measureOverlayfs(t *testing.T) {
	n := kit.NewNode(t, kit.NodeConfig{})
	img := pull(t, n, j.plainRef)
	c := run(t, n, img, "reference", kit.RunOptions{})
	j.writes = exec(t, c, "/usr/bin/bash", "-c", writesScript)
	j.written = kit.MustWalk(t, c.Root()+"/odd")
	var err error
	if j.mountFlags, _, err = kit.MountFlags(c.Rootfs()); err != nil {
		t.Fatal(err)
	}
	// containerd's differ compares times and sizes: it does not see every change.
	ref := commit(t, n, c, img, j.registry.Ref("main:plain-committed"))
	remove(t, c)
	c = run(t, n, pull(t, n, ref), "committed", kit.RunOptions{})
	j.committed = kit.MustWalk(t, c.Root()+"/odd")
	remove(t, c)
}

func (j *mainJob) run(t *testing.T, s style) {
	if j.committed == nil {
		t.Fatal("nothing to compare with: overlayfs failed")
	}
	n := s.node(t, kit.NodeConfig{})
	j.registry.ResetRequests()
	img := pull(t, n, j.ref)
	pulledWithoutData(t, j.registry, j.nydus)
	daemonsNow(t, n, 0)
	imageMounts(t, 0)

	c := run(t, n, img, "view", kit.RunOptions{})
	daemonsNow(t, n, 1)
	imageMounts(t, 1)
	if out := exec(t, c, append([]string{"/usr/bin/env", "PYTHONDONTWRITEBYTECODE=1"}, kit.MainCommand...)...); out != "ready\n" {
		t.Errorf("the image's program printed %q", out)
	}
	if got, whole := j.registry.BlobTotal(), j.nydus.Size(); got > whole/2 {
		t.Errorf("starting the program fetched %d of %d bytes: that is no loading on demand", got, whole)
	}
	kit.EqualTrees(t, "the container's view", j.want, kit.MustWalk(t, c.Root()))
	j.checkFlags(t, c.Rootfs(), c.Root())

	if out := exec(t, c, "/usr/bin/bash", "-c", writesScript); out != j.writes {
		t.Errorf("changing files answered otherwise than on overlayfs:\n%s", firstDifference(j.writes, out))
	}
	kit.EqualTrees(t, "/odd after changing it", j.written, kit.MustWalk(t, c.Root()+"/odd"))
	if s.mount == "helper" {
		j.commit(t, n, c, img)
	} else {
		j.commitFails(t, n, c)
		remove(t, c)
	}
	wantDaemons(t, n, 0, soon)
}

// pod is run as kubelet does it.
func (j *mainJob) pod(t *testing.T, s style) {
	if j.committed == nil {
		t.Fatal("nothing to compare with: overlayfs failed")
	}
	n := s.node(t, kit.NodeConfig{CRI: true, SandboxImage: j.pause})
	j.registry.ResetRequests()
	if err := n.CRIPull(t.Context(), j.ref, "", ""); err != nil {
		t.Fatal(err)
	}
	pulledWithoutData(t, j.registry, j.nydus)
	pod := runPod(t, n, "main")
	p := &pods{registry: j.registry, app: j.nydus, ref: j.ref}
	c := p.create(t, n, pod, "main", "")
	p.start(t, n, pod, &c)
	pid, err := pod.PID(t.Context(), c.id)
	if err != nil {
		t.Fatal(err)
	}
	root := fmt.Sprintf("/proc/%d/root", pid)
	got := kit.MustWalk(t, root)
	leaveOutCRI(t, j.want, got)
	kit.EqualTrees(t, "the container's view", j.want, got)
	j.checkFlags(t, filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io", c.id, "rootfs"), root)

	podExec(t, pod, c.id, "ready\n", append([]string{"/usr/bin/env", "PYTHONDONTWRITEBYTECODE=1"}, kit.MainCommand...)...)
	// CRI tells the two outputs apart.
	out, code, err := pod.Exec(t.Context(), c.id, "/usr/bin/bash", "-c", `exec /usr/bin/bash -c "$0" 2>&1`, writesScript)
	if err != nil || code != 0 || out != j.writes {
		t.Errorf("changing files answered otherwise than on overlayfs (code %d, %v):\n%s", code, err, firstDifference(j.writes, out))
	}
	kit.EqualTrees(t, "/odd after changing it", j.written, kit.MustWalk(t, root+"/odd"))
	if err := pod.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	wantDaemons(t, n, 0, soon)
}

// criMounts are the places where CRI mounts something of its own in a container.
var criMounts = []string{"dev", "etc/hostname", "etc/hosts", "etc/resolv.conf", "proc", "sys"}

// leaveOutCRI checks that CRI put into a container what it always does and nothing
// else, and takes it out of got: the mounts, which hide what the image has there, and
// the time of /etc, where runc makes mountpoints.
func leaveOutCRI(t *testing.T, want, got kit.Tree) {
	t.Helper()
	var mounts []string
	for path, e := range got {
		if e.Type == "mount" {
			mounts = append(mounts, path)
		}
	}
	slices.Sort(mounts)
	if !slices.Equal(mounts, criMounts) {
		t.Errorf("in the container %q are mounted, want %q", mounts, criMounts)
	}
	etc := got["etc"]
	etc.Mtime = want["etc"].Mtime
	got["etc"] = etc
}

// checkFlags compares the mount flags of a container's root filesystem, in its bundle
// and as its processes see it, with those on overlayfs.
func (j *mainJob) checkFlags(t *testing.T, rootfs, root string) {
	t.Helper()
	for _, path := range []string{rootfs, root} {
		flags, super, err := kit.MountFlags(path)
		if err != nil {
			t.Fatal(err)
		}
		if path == rootfs && flags != j.mountFlags {
			t.Errorf("the root filesystem is mounted %s, on overlayfs %s", flags, j.mountFlags)
		}
		for _, f := range strings.Split(flags+","+super, ",") {
			switch f {
			case "nosuid", "nodev", "noexec", "ro":
				t.Errorf("%s is mounted %s (%s, %s)", path, f, flags, super)
			}
		}
	}
}

// pulledWithoutData checks that a pull fetched the config and the bootstrap,
// each once, and no data.
func pulledWithoutData(t *testing.T, r *kit.Registry, img *kit.Image) {
	t.Helper()
	wanted := map[string]int64{}
	for _, b := range []kit.Blob{img.Config, img.Layers[img.Bootstrap()]} {
		wanted[b.Desc.Digest.String()] = b.Desc.Size
	}
	got := r.BlobBytes()
	for digest, size := range wanted {
		if got[digest] != size {
			t.Errorf("the pull fetched %d bytes of blob %s, want its %d", got[digest], digest, size)
		}
	}
	for digest, size := range got {
		if wanted[digest] == 0 {
			t.Errorf("the pull fetched %d bytes of the data layer %s", size, digest)
		}
	}
}

// firstDifference shows where two texts part.
func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(w), len(g)) {
		if w[i] != g[i] {
			return fmt.Sprintf("line %d: %s\n   want: %s", i+1, g[i], w[i])
		}
	}
	return fmt.Sprintf("%d lines, want %d", len(g), len(w))
}

// commit saves the changed container as an image, twice on top of each other,
// and runs that from the registry.
func (j *mainJob) commit(t *testing.T, n *kit.Node, c *kit.Container, base containerd.Image) {
	t.Helper()
	first := commit(t, n, c, base, j.registry.Ref("main:committed"))
	remove(t, c)
	forget(t, n, base.Name())
	j.registry.ResetRequests()
	img := pull(t, n, first)
	for digest, size := range j.registry.BlobBytes() {
		for _, l := range j.nydus.Layers[:j.nydus.Bootstrap()] {
			if l.Desc.Digest.String() == digest {
				t.Errorf("pulling the committed image fetched %d bytes of the data layer %s", size, digest)
			}
		}
	}
	c = run(t, n, img, "committed", kit.RunOptions{})
	imageMounts(t, 1)
	kit.EqualTrees(t, "/odd in the committed image", j.committed, kit.MustWalk(t, c.Root()+"/odd"))

	exec(t, c, "/usr/bin/bash", "-c", "cd /odd && rm -r many/5? && echo again > lower/kept && touch -d @1700000000 many lower lower/kept")
	written := kit.MustWalk(t, c.Root()+"/odd")
	second := commit(t, n, c, img, j.registry.Ref("main:committed-again"))
	remove(t, c)
	forget(t, n, first)
	c = run(t, n, pull(t, n, second), "committed-again", kit.RunOptions{})
	kit.EqualTrees(t, "/odd in the image committed on top of it", written, kit.MustWalk(t, c.Root()+"/odd"))
	j.checkFlags(t, c.Rootfs(), c.Root())
	remove(t, c)
}

// commitFails checks that a commit that cannot be made says so and leaves nothing.
func (j *mainJob) commitFails(t *testing.T, n *kit.Node, c *kit.Container) {
	t.Helper()
	left := kit.Leaks(t)
	_, err := diff(t.Context(), n, c)
	if err == nil || !strings.Contains(err.Error(), "format/overlay") && !strings.Contains(err.Error(), "no such device") {
		t.Errorf("commit in the managed style: %v", err)
	}
	if lines := left(soon); len(lines) > 0 {
		t.Errorf("left behind by the failed commit: %s", strings.Join(lines, "\n"))
	}
}

// TestTemporaryMount mounts an image without a container, as ctr and the like do.
func TestTemporaryMount(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := kit.SmallImage(t, "temporary")
	ref := r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "temporary:nydus")
	want := tree(t, plain)
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		target := t.TempDir()
		unmount := mountImage(t, n, s, img, target)
		kit.EqualTrees(t, "the mounted image", want, kit.MustWalk(t, target))
		flags, super, err := kit.MountFlags(target)
		if err != nil || !strings.Contains(","+flags+","+super+",", ",ro,") {
			t.Errorf("the image is mounted %s, %s: want it read-only (%v)", flags, super, err)
		}
		daemonsNow(t, n, 1)
		unmount()
		wantDaemons(t, n, 0, soon)
	})
}

// mountImage mounts an image with the node's ctr.
func mountImage(t *testing.T, n *kit.Node, s style, img containerd.Image, target string) (unmount func()) {
	t.Helper()
	ctr := func(args ...string) string {
		t.Helper()
		out, err := n.Ctr(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if s.version != kit.V16 {
		ctr("images", "mount", "--snapshotter", "nydus", img.Name(), target)
		return func() { ctr("images", "unmount", "--rm", "--snapshotter", "nydus", target) }
	}
	// ctr images mount of 1.6 knows no other snapshotter than overlayfs. This one
	// prints what mount(8) is to do.
	diffs, err := img.RootFS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})
	if _, err := n.Client().SnapshotService("nydus").View(t.Context(), "temporary", identity.ChainID(diffs).String(), keep); err != nil {
		t.Fatal(err)
	}
	helper := "/sbin/nydus-overlayfs" // mount(8) has a PATH of its own
	if err := os.Symlink(filepath.Join(kit.Binaries(t, "nydus-overlayfs"), "nydus-overlayfs"), helper); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(helper) })
	command := ctr("snapshots", "--snapshotter", "nydus", "mounts", target, "temporary")
	if out, err := n.Command(t.Context(), "sh", "-c", command).CombinedOutput(); err != nil {
		t.Fatalf("mount(8): %v: %s", err, out)
	}
	return func() {
		if out, err := n.Command(t.Context(), "umount", target).CombinedOutput(); err != nil {
			t.Errorf("umount(8): %v: %s", err, out)
		}
		ctr("snapshots", "--snapshotter", "nydus", "rm", "temporary")
	}
}

// TestVersion5 runs an image of RAFS version 5, which registries still hold.
func TestVersion5(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := kit.SmallImage(t, "old")
	nydus := plain.MustNydus(t, kit.NydusOptions{Version: "5"})
	if boot, err := nydus.BootstrapBytes(); err != nil || binary.LittleEndian.Uint32(boot) != 0x52414653 {
		t.Fatalf("the converter made no bootstrap of version 5 (%v)", err)
	}
	ref := r.MustPush(t, nydus, "old:v5")
	want := tree(t, plain)
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		r.ResetRequests()
		img := pull(t, n, ref)
		pulledWithoutData(t, r, nydus)
		c := run(t, n, img, "old", kit.RunOptions{})
		imageMounts(t, 1)
		kit.EqualTrees(t, "the container's view", want, kit.MustWalk(t, c.Root()))
		if out := exec(t, c, "busybox", "sh", "-c", "rm /data && echo new > /name && cat /name"); out != "new\n" {
			t.Errorf("writing to it answered %q", out)
		}
		remove(t, c)
		wantDaemons(t, n, 0, soon)
	})
}

// TestProbeImage runs what only a correctly mounted root filesystem lets run.
func TestProbeImage(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := probeImage(t)
	ref := r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "probe:nydus")
	want := tree(t, plain)
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		before := time.Now().Truncate(time.Second)
		c := run(t, n, img, "probe", kit.RunOptions{Spec: asUser(1000)})
		if out := exec(t, c, "/probe/id"); !strings.Contains(out, "uid=1000") || !strings.Contains(out, "euid=0(root)") {
			t.Errorf("the setuid program did not become root: %s", out)
		}
		if out := exec(t, c, "/usr/bin/sh", "-c", "echo gone > /probe/null && busybox wc -c < /probe/null"); out != "0\n" {
			t.Errorf("the device node answered %q", out)
		}
		got := kit.MustWalk(t, c.Root())
		epochAsMountTime(t, got, "probe/epoch", before)
		kit.EqualTrees(t, "the container's view", want, got)
		remove(t, c)
	})
}

// epochAsMountTime is the one known difference: FUSE shows a file that was
// changed at the epoch as changed when the image was mounted.
func epochAsMountTime(t *testing.T, got kit.Tree, path string, before time.Time) {
	t.Helper()
	e := got[path]
	if e.Mtime.Before(before) || e.Mtime.After(time.Now()) {
		t.Errorf("%s was changed %v, want the time of the mount, after %v", path, e.Mtime, before)
	}
	e.Mtime = time.Unix(0, 0)
	got[path] = e
}
