package hostile_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) {
	if os.Getenv(witnessVar) != "" {
		os.Exit(witnessMain())
	}
	kit.Main(m)
}

// soon is how long things may take that have nothing to wait for.
const soon = 15 * time.Second

// styles are the two ways in which a mount is handed over.
var styles = []string{"helper", "managed"}

// newNode starts a node with the snapshotter.
func newNode(t *testing.T, cfg kit.NodeConfig) *kit.Node {
	t.Helper()
	cfg.Snapshotter = true
	n := kit.NewNode(t, cfg)
	// Mounts that the test makes itself find mount.fuse as containerd does.
	t.Setenv("PATH", strings.TrimPrefix(n.Env()[0], "PATH="))
	return n
}

// nydusImage is a small nydus image that differs for each name.
func nydusImage(t *testing.T, name string) *kit.Image {
	t.Helper()
	return kit.SmallImage(t, name).MustNydus(t, kit.NydusOptions{})
}

func mustPull(t *testing.T, n *kit.Node, ref string, opts kit.PullOptions) containerd.Image {
	t.Helper()
	img, err := n.Pull(t.Context(), ref, opts)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// option matches the mount option, which makes messages hard to read.
var option = regexp.MustCompile(`extraoption=[A-Za-z0-9+/=]*`)

// refused fails the test unless err has all of the texts: the operation, the
// object and the cause.
func refused(t *testing.T, what string, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want one with %q", what, texts)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: the error lacks %q:\n  %s", what, text, option.ReplaceAllString(err.Error(), "extraoption=…"))
		}
	}
}

// remembered matches what stays on purpose: what a nydusd executable says of itself
// and the keys, until the next boot; and a note of containerd's mount manager about
// a mount that failed, until its next collection.
var remembered = regexp.MustCompile(`^run-directory entry /run/(nydus-snapshotter/(nydusd-[0-9a-f]{16}|keys/(current-)?[0-9a-f]{16})|` +
	`kit/n[0-9]+/state/io\.containerd\.mount-manager\.v1\.bolt/t/[0-9]+/[0-9]+-type)$`)

// clean fails the test for everything that has come since leaks was made.
func clean(t *testing.T, what string, leaks func(time.Duration) []string) {
	t.Helper()
	var left []string
	for start := time.Now(); time.Since(start) < soon; {
		// Waits for what changes, but does not know what is remembered.
		left = slices.DeleteFunc(leaks(200*time.Millisecond), remembered.MatchString)
		if len(left) == 0 {
			return
		}
	}
	t.Errorf("%s left behind:\n  %s", what, strings.Join(left, "\n  "))
}

// runs starts a container of an image, compares all that it sees with what the
// image was made of, and removes it.
func runs(t *testing.T, n *kit.Node, img containerd.Image, want *kit.Image, id string) {
	t.Helper()
	c, err := n.Run(t.Context(), img, id, kit.RunOptions{})
	if err != nil {
		t.Errorf("%s does not start: %v", id, err)
		return
	}
	tree, err := want.Tree()
	if err != nil {
		t.Fatal(err)
	}
	kit.EqualTrees(t, id, tree, kit.MustWalk(t, c.Root()))
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// chain is the name of an image's uppermost layer.
func chain(t *testing.T, img containerd.Image) string {
	t.Helper()
	ids, err := img.RootFS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return identity.ChainID(ids).String()
}

// view is a read-only mount of an image that the test itself makes, the way
// containerd makes its temporary ones.
type view struct {
	dir    string
	mounts []mount.Mount
	remove func()
}

// newView prepares a view. Mounting it is up to the test.
func newView(t *testing.T, n *kit.Node, img containerd.Image, key string) (view, error) {
	t.Helper()
	service := n.Client().SnapshotService("nydus")
	mounts, err := service.View(t.Context(), key, chain(t, img), snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
	if err != nil {
		return view{}, err
	}
	v := view{dir: t.TempDir(), mounts: mounts}
	v.remove = func() {
		if err := errors.Join(mount.UnmountAll(v.dir, unix.MNT_DETACH), service.Remove(t.Context(), key)); err != nil {
			t.Error(err)
		}
	}
	return v, nil
}

// mountView makes a view and mounts it.
func mountView(t *testing.T, n *kit.Node, img containerd.Image, key string) (view, error) {
	t.Helper()
	v, err := newView(t, n, img, key)
	if err != nil {
		return v, err
	}
	if err := mount.All(v.mounts, v.dir); err != nil {
		v.remove()
		return view{}, err
	}
	return v, nil
}

// ours matches what the snapshotter and nydusd write below the root.
var ours = regexp.MustCompile(`^(\.|lock|metadata\.db|snapshots|snapshots/(new-)?[0-9]+(/.*)?|instances|instances/[0-9a-f]{32}(/.*)?|` +
	`cache|cache/[0-9a-f]{32}|cache/[0-9a-f]{32}/(private/[0-9a-f]{32}\.[0-9]+/)?[0-9a-f]{64}\.[a-z_.]+|` +
	`cache/[0-9a-f]{32}/(origin\.json|private|private/[0-9a-f]{32}\.[0-9]+(\.lock)?))$`)

// outside describes every path that nothing of ours may touch while images are
// pulled and mounted: those beside the roots of containerd and the snapshotter,
// all changes to /etc and /sbin, and what else lies below the root.
func outside(t *testing.T, n *kit.Node) []string {
	t.Helper()
	skip := map[string]bool{
		filepath.Join(n.Data(), "containerd"): true, filepath.Join(n.Dir(), "state"): true, filepath.Join(n.Dir(), "fifo"): true,
		filepath.Join(kit.Scratch(), "tmp"): true, n.RunDir(): true, n.ContainerdLog(): true, n.SnapshotterLog(): true,
	}
	registries, _ := filepath.Glob(filepath.Join(kit.Scratch(), "registry-*"))
	for _, r := range registries {
		skip[r] = true
	}
	var list []string
	walk := func(root string, keep func(string) bool) {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if skip[path] {
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			if !keep(path) {
				return nil
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			line := fmt.Sprintf("%s %s", path, info.Mode())
			if !d.IsDir() {
				line += fmt.Sprintf(" %d %s", info.Size(), info.ModTime())
			}
			list = append(list, line)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	all := func(string) bool { return true }
	root := n.SnapshotterRoot()
	skip[root] = true
	walk(kit.Scratch(), all)
	walk("/run", all)
	delete(skip, root)
	walk(root, func(path string) bool {
		rel, err := filepath.Rel(root, path)
		return err != nil || !ours.MatchString(rel)
	})
	slices.Sort(list)
	return list
}

// untouched fails the test when outside has changed.
func untouched(t *testing.T, n *kit.Node, what string, before []string) {
	t.Helper()
	after := outside(t, n)
	for _, line := range after {
		if !slices.Contains(before, line) {
			t.Errorf("%s: written outside: %s", what, line)
		}
	}
	for _, line := range before {
		if !slices.Contains(after, line) {
			t.Errorf("%s: removed or changed outside: %s", what, line)
		}
	}
}

func writeFile(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// asNobody runs a command as another user than root.
func asNobody() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

// restart restarts the snapshotter.
func restart(t *testing.T, n *kit.Node) {
	t.Helper()
	if err := n.RestartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach(t, n)
}

// reach waits until containerd has noticed that the snapshotter is there again: it
// waits a moment before it connects anew, and no event tells.
func reach(t *testing.T, n *kit.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	service := n.Client().SnapshotService("nydus")
	for {
		_, err := service.Prepare(ctx, "reach", "", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
		if err == nil {
			err = service.Remove(ctx, "reach")
			if err != nil {
				t.Fatal(err)
			}
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("containerd does not reach the snapshotter: %v", err)
		}
	}
}
