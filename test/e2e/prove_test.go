package e2e_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// proofs runs `cache prove` beside the snapshotter, and returns what it says of each image.
func proofs(t *testing.T, n *kit.Node, args ...string) (list []struct {
	Image       string
	Proven, New bool
	Missing     []struct {
		Blob          string
		Ready, Chunks int
	}
	Reason string
}, failed bool) {
	t.Helper()
	args = append([]string{"cache", "prove", "--format", "json", "--config", n.SnapshotterConfig()}, args...)
	cmd := n.Command(t.Context(), "nydus-snapshotter", args...)
	var text, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &said
	err := cmd.Run()
	if bad := json.Unmarshal(text.Bytes(), &list); bad != nil {
		t.Fatalf("%q: %v, %v\n%s%s", args, err, bad, text.String(), said.String())
	}
	return list, err != nil
}

// awaitComplete waits until all of an image is there and right, also what no file of it
// shows, and proves it. Nobody but the command does under FUSE.
func awaitComplete(t *testing.T, n *kit.Node, ref string) {
	t.Helper()
	eventually(t, ref+" is proven", func() bool {
		list, failed := proofs(t, n, ref)
		return !failed && len(list) == 1 && list[0].Proven
	})
}

// TestProvenWithoutAMount proves an image that nobody has mounted any more when the
// snapshotter comes to it, and forgets that when it is removed, although another image
// shares its blobs.
func TestProvenWithoutAMount(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	base := kit.BusyboxLayer(kit.MustTools(t))
	small := kit.MustBuildImage(t, kit.Pause, base)
	large := kit.MustBuildImage(t, kit.Pause, base, kit.FileLayer(kit.File{Name: "more", Data: strings.Repeat("more", 100_000)}))
	// In one repository, so that they share the first blob.
	first := r.MustPush(t, small.MustNydus(t, kit.NydusOptions{}), "app:small")
	second := r.MustPush(t, large.MustNydus(t, kit.NydusOptions{}), "app:large")
	n := helper24.node(t, kit.NodeConfig{Hook: true, Config: map[string]any{
		"mount.driver": "auto", "daemon.nydusd_path": shares(t), "cache.grace": "0s", "cache.sweep_interval": "1s",
	}})
	img := pull(t, n, first)
	other := pull(t, n, second)
	list, failed := proofs(t, n, first)
	if !failed || len(list) != 1 || list[0].Proven || len(list[0].Missing) != 1 || list[0].Missing[0].Ready > 0 || list[0].Missing[0].Chunks == 0 {
		t.Errorf("before the image is read: %+v", list)
	}
	c := run(t, n, other, "large", kit.RunOptions{})
	kit.MustWalk(t, c.Root()) // which reads every file
	if err := n.KillSnapshotter(); err != nil {
		t.Fatal(err)
	}
	if err := c.DeleteTask(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantDaemons(t, n, 0, soon)
	imageMounts(t, 0)
	// What both have is complete now; one is proven here, and the snapshotter does both.
	list, failed = proofs(t, n, second)
	if failed || len(list) != 1 || !list[0].Proven || !list[0].New || list[0].Image != second {
		t.Errorf("after it was read: %+v", list)
	}
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitProof(t, n, 2)
	if list, failed = proofs(t, n); failed || len(list) != 2 || !list[0].Proven || list[0].New {
		t.Errorf("of all: %+v", list)
	}
	remove(t, c)
	r.ResetRequests()
	c = run(t, n, img, "small", kit.RunOptions{})
	daemonsNow(t, n, 0)
	exec(t, c, "/bin/busybox", "true")
	if got := r.BlobTotal(); got > 0 {
		t.Errorf("%d bytes were fetched of an image that is complete", got)
	}
	remove(t, c)

	if err := n.RemoveImage(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	awaitProof(t, n, 1)
	if ids := blobsIn(n); len(ids) != 2 {
		t.Errorf("cached are %q, want both blobs of the other image", ids)
	}
	c = run(t, n, other, "again", kit.RunOptions{})
	daemonsNow(t, n, 0)
	remove(t, c)
	if err := n.RemoveImage(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	awaitProof(t, n, 0)
	if err := n.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
}
