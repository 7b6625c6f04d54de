package e2e_test

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/image-spec/identity"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestPlainImage uses an ordinary OCI image through the snapshotter: everything
// is as with overlayfs.
func TestPlainImage(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := kit.SmallImage(t, "plain")
	ref := r.MustPush(t, plain, "plain:v1")
	want := tree(t, plain)
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		if _, err := n.Pull(t.Context(), ref, kit.PullOptions{Snapshotter: "overlayfs"}); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"active", "view", "active-empty", "view-lowest"} {
			ours, theirs := snapshotMounts(t, n, img, "nydus", name), snapshotMounts(t, n, img, "overlayfs", name)
			if ours != theirs {
				t.Errorf("mounts of snapshot %s:\n ours       %s\n overlayfs  %s", name, ours, theirs)
			}
		}
		c := run(t, n, img, "plain", kit.RunOptions{})
		kit.EqualTrees(t, "the container's view", want, kit.MustWalk(t, c.Root()))
		daemonsNow(t, n, 0)
		imageMounts(t, 0)
		remove(t, c)
	})
}

// snapshotMounts makes a snapshot and describes its mounts, the snapshotter's own
// directory and numbers replaced.
func snapshotMounts(t *testing.T, n *kit.Node, img containerd.Image, snapshotter, name string) string {
	t.Helper()
	diffs, err := img.RootFS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, done, err := n.Client().WithLease(t.Context()) // nothing else keeps it from collection
	if err != nil {
		t.Fatal(err)
	}
	defer done(ctx)
	sn := n.Client().SnapshotService(snapshotter)
	var mounts []mount.Mount
	switch name {
	case "active":
		mounts, err = sn.Prepare(ctx, name, identity.ChainID(diffs).String())
	case "view":
		mounts, err = sn.View(ctx, name, identity.ChainID(diffs).String())
	case "active-empty":
		mounts, err = sn.Prepare(ctx, name, "")
	case "view-lowest":
		mounts, err = sn.View(ctx, name, identity.ChainID(diffs[:1]).String())
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := sn.Remove(ctx, name); err != nil {
		t.Error(err)
	}
	for _, m := range mounts {
		slices.Sort(m.Options) // their order is containerd's version's
	}
	text := fmt.Sprintf("%+v", mounts)
	for _, root := range []string{n.SnapshotterRoot(), filepath.Join(n.Data(), "containerd", "io.containerd.snapshotter.v1.overlayfs")} {
		text = strings.ReplaceAll(text, root, "ROOT")
	}
	numbers := map[string]string{}
	return regexp.MustCompile(`snapshots/[0-9]+`).ReplaceAllStringFunc(text, func(id string) string {
		if numbers[id] == "" {
			numbers[id] = fmt.Sprintf("snapshots/#%d", len(numbers)+1)
		}
		return numbers[id]
	})
}
