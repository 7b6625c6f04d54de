package hostile_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestSnapshotterDown stops the snapshotter. What runs goes on, what needs it says
// so, and all works when it is back.
func TestSnapshotterDown(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style})
			good := nydusImage(t, "good")
			img := mustPull(t, n, r.MustPush(t, good, "good:1"), kit.PullOptions{})
			other := r.MustPush(t, nydusImage(t, "other"), "other:1")
			c, err := n.Run(t.Context(), img, "before", kit.RunOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			socket := filepath.Base(n.SnapshotterAddress())
			_, err = n.Pull(t.Context(), other, kit.PullOptions{})
			refused(t, "pull", err, other, socket, "connect")
			_, err = n.Run(t.Context(), img, "during", kit.RunOptions{})
			refused(t, "run", err, "during", socket, "connect")
			tree, err := good.Tree()
			if err != nil {
				t.Fatal(err)
			}
			kit.EqualTrees(t, "container", tree, kit.MustWalk(t, c.Root()))
			if out, code, err := c.Exec(t.Context(), "/usr/bin/busybox", "cat", "/name"); err != nil || code != 0 || out != "good" {
				t.Errorf("exec: %q, %d, %v", out, code, err)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			reach(t, n)
			runs(t, n, img, good, "after")
			if err := c.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRotatedKey loses the run directory, as a reboot does, while a container
// exists. Options from before cannot be opened any more, and say why; the container
// starts again, since the snapshotter seals its mounts anew.
func TestRotatedKey(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style})
			good := nydusImage(t, "good")
			img := mustPull(t, n, r.MustPush(t, good, "good:1"), kit.PullOptions{})
			c, err := n.Run(t.Context(), img, "old", kit.RunOptions{})
			if err != nil {
				t.Fatal(err)
			}
			v, err := newView(t, n, img, "old-view")
			if err != nil {
				t.Fatal(err)
			}
			if err := c.DeleteTask(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.WaitRunEntries(soon); err != nil {
				t.Fatal(err)
			}
			// Keys lost beneath a running snapshotter.
			if err := os.RemoveAll(filepath.Join(n.RunDir(), "keys")); err != nil {
				t.Fatal(err)
			}
			leaks := kit.Leaks(t)
			const foreign = "sealed with a key that this node does not hold"
			refused(t, "start without the key", c.Start(t.Context()), "old", "mount.fuse", "decode mount option extraoption", foreign, "another node", "keys/")
			clean(t, "start without the key", leaks)
			// The whole directory lost, and the snapshotter started anew.
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			if err := unix.Unmount(n.RunDir(), 0); err != nil {
				t.Fatal(err)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			reach(t, n)
			leaks = kit.Leaks(t)
			refused(t, "option of another key", mount.All(v.mounts, v.dir), foreign, "another node")
			clean(t, "option of another key", leaks)
			v.remove()
			if err := c.Start(t.Context()); err != nil {
				t.Fatalf("start after the key was lost: %v", err)
			}
			tree, err := good.Tree()
			if err != nil {
				t.Fatal(err)
			}
			kit.EqualTrees(t, "container", tree, kit.MustWalk(t, c.Root()))
			if err := c.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRunDirIsSymlink puts a symbolic link in the run directory's place, with the
// right keys behind it.
func TestRunDirIsSymlink(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	// The holder's socket would keep the run directory mounted.
	n := newNode(t, kit.NodeConfig{Config: map[string]any{"daemon.recover_policy": "none"}})
	good := nydusImage(t, "good")
	img := mustPull(t, n, r.MustPush(t, good, "good:1"), kit.PullOptions{})
	elsewhere := t.TempDir()
	if err := os.CopyFS(filepath.Join(elsewhere, "keys"), os.DirFS(filepath.Join(n.RunDir(), "keys"))); err != nil {
		t.Fatal(err)
	}
	keys, err := filepath.Glob(filepath.Join(elsewhere, "keys", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range append(keys, elsewhere, filepath.Join(elsewhere, "keys")) {
		mode := os.FileMode(0o600)
		if filepath.Dir(key) != filepath.Join(elsewhere, "keys") {
			mode = 0o700
		}
		if err := os.Chmod(key, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Unmount(n.RunDir(), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(n.RunDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, n.RunDir()); err != nil {
		t.Fatal(err)
	}
	leaks := kit.Leaks(t)
	_, err = n.Run(t.Context(), img, "linked", kit.RunOptions{})
	refused(t, "container", err, "run directory", n.RunDir(), "is a symbolic link")
	clean(t, "container", leaks)
	err = n.RestartSnapshotter(t.Context())
	refused(t, "snapshotter", err, "run directory", n.RunDir(), "is a symbolic link")
	if entries, err := os.ReadDir(elsewhere); err != nil || len(entries) != 1 {
		t.Errorf("something was written behind the link: %v, %v", entries, err)
	}
	if err := os.Remove(n.RunDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach(t, n)
	runs(t, n, img, good, "repaired")
}

// TestImageReference pulls images whose layers carry no image reference, or one
// that is none.
func TestImageReference(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	good := nydusImage(t, "good")
	ref := r.MustPush(t, good, "good:1")
	advice := []string{"nydus layer", imageLabel, "disable_snapshot_annotations = false", "enable_remote_snapshot_annotations", "ctr of containerd 1.6 cannot do it, use crictl or nerdctl"}
	t.Run("missing", func(t *testing.T) {
		n := newNode(t, kit.NodeConfig{})
		leaks := kit.Leaks(t)
		_, err := n.Pull(t.Context(), ref, kit.PullOptions{NoAnnotations: true})
		refused(t, "pull without a reference", err, append(advice, ref, "prepare")...)
		clean(t, "pull without a reference", leaks)
		runs(t, n, mustPull(t, n, ref, kit.PullOptions{}), good, "with")
	})
	t.Run("all labels missing, ctr of containerd 1.6", func(t *testing.T) {
		n := newNode(t, kit.NodeConfig{Containerd: kit.V16})
		leaks := kit.Leaks(t)
		_, err := n.Ctr(t.Context(), "images", "pull", "--plain-http", "--snapshotter", "nydus", ref)
		// It passes no label at all, so that nothing tells the layers from others.
		refused(t, "ctr", err, ref, "no processor for media-type", "application/vnd.oci.image.layer.nydus.blob.v1")
		clean(t, "ctr", leaks)
	})
	// What could not be mounted is not pulled.
	t.Run("unresolvable", func(t *testing.T) {
		n := newNode(t, kit.NodeConfig{})
		const name = "No Such//Reference!"
		leaks := kit.Leaks(t)
		_, err := n.Pull(t.Context(), ref, kit.PullOptions{NoAnnotations: true, Labels: map[string]string{imageLabel: name}})
		refused(t, "pull", err, "prepare nydus layer", "read image reference", name, "invalid reference format")
		clean(t, "pull", leaks)
		runs(t, n, mustPull(t, n, ref, kit.PullOptions{}), good, "named")
	})
}

// TestRegistryGone mounts an image after its registry went away. The mount works:
// all that it needs is on the node. Reads of what was never fetched fail, and what
// nydusd could not fetch is in its log.
func TestRegistryGone(t *testing.T) {
	n := newNode(t, kit.NodeConfig{})
	img := nydusImage(t, "gone")
	var ref string
	t.Run("pull", func(t *testing.T) {
		r := kit.NewRegistry(t, kit.RegistryOptions{})
		ref = r.MustPush(t, img, "gone:1")
		mustPull(t, n, ref, kit.PullOptions{})
	})
	pulled, err := n.Client().GetImage(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	leaks := kit.Leaks(t)
	v, err := mountView(t, n, pulled, "gone")
	if err != nil {
		t.Fatalf("mount without the registry: %v", err)
	}
	if err := readOnce(filepath.Join(v.dir, "name")); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("reading gives %v, want an input/output error", err)
	}
	logs, err := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "instances", "*", "nydusd.log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("nydusd's logs are %q (%v)", logs, err)
	}
	port := ref[strings.Index(ref, ":")+1 : strings.Index(ref, "/")]
	if text, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(text), "Read from backend failed") || !strings.Contains(string(text), port) {
		t.Errorf("nydusd's log does not name the registry (%v):\n%s", err, text)
	}
	v.remove()
	clean(t, "mount without the registry", leaks)
}

// TestLocalFS mounts images whose blobs should lie in a directory that is not
// there, and then is.
func TestLocalFS(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			dir := filepath.Join(t.TempDir(), "blobs")
			n := newNode(t, kit.NodeConfig{Style: style, Config: map[string]any{"backend": []map[string]any{
				{"name": "files", "type": "localfs", "match": map[string]any{"host": "*", "repository": "good"}, "dir": dir},
			}}})
			good := nydusImage(t, "good")
			ref := r.MustPush(t, good, "good:1")
			img := mustPull(t, n, ref, kit.PullOptions{})
			leaks := kit.Leaks(t)
			_, err := n.Run(t.Context(), img, "none", kit.RunOptions{})
			refused(t, "container", err, ref, "find the image's blobs", dir, "no such file or directory", "[[backend]]")
			clean(t, "container", leaks)
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, l := range good.Layers[:good.Bootstrap()] {
				if err := os.Symlink(l.Path, filepath.Join(dir, l.Desc.Digest.Encoded())); err != nil {
					t.Fatal(err)
				}
			}
			runs(t, n, img, good, "there")
		})
	}
}
