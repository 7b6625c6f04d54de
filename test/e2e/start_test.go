package e2e_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestStartWithoutRegistry starts the snapshotter of a full node while the registry
// takes requests and answers none.
func TestStartWithoutRegistry(t *testing.T) {
	const live, all = 20, 200
	// Less than anything that waits for a registry takes.
	const bound = 4 * time.Second
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	n := managed24.node(t, kit.NodeConfig{})
	var img containerd.Image
	list, trees := make([]*kit.Container, live), make([]kit.Tree, live)
	for i := range list {
		ref, want := smallNydus(t, r, fmt.Sprintf("start-%d", i))
		img, trees[i] = pull(t, n, ref), want
		list[i] = run(t, n, img, fmt.Sprintf("c%d", i), kit.RunOptions{})
		kit.EqualTrees(t, "the view of "+list[i].ID(), want, kit.MustWalk(t, list[i].Root()))
	}
	daemonsNow(t, n, live)
	prepare(t, n, img, all)
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Resume() }()
	for _, end := range []func() error{n.KillSnapshotter, n.StopSnapshotter} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		// What dies meanwhile is brought back without the registry, too.
		if err := unix.Kill(n.Daemons()[0].PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), bound)
		err := n.StartSnapshotter(ctx)
		cancel()
		if err != nil {
			t.Fatalf("not within %v: %v", bound, err)
		}
		wantDaemons(t, n, live, soon)
	}
	if err := again(t, n, func() error {
		_, err := n.Client().SnapshotService("nydus").Stat(t.Context(), "start-0")
		return err
	}); err != nil {
		t.Error(err)
	}
	c := run(t, n, img, "new", kit.RunOptions{})
	for i, c := range append(list, c) {
		kit.EqualTrees(t, "the view of "+c.ID(), trees[min(i, live-1)], kit.MustWalk(t, c.Root()))
		remove(t, c)
	}
	wantDaemons(t, n, 0, soon)
}

// prepare prepares snapshots until there are so many.
func prepare(t *testing.T, n *kit.Node, img containerd.Image, want int) {
	t.Helper()
	ids, err := img.RootFS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	service := n.Client().SnapshotService("nydus")
	have := 0
	if err := service.Walk(t.Context(), func(context.Context, snapshots.Info) error { have++; return nil }); err != nil {
		t.Fatal(err)
	}
	keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})
	for i := range want - have {
		if _, err := service.Prepare(t.Context(), fmt.Sprintf("start-%d", i), identity.ChainID(ids).String(), keep); err != nil {
			t.Fatal(err)
		}
	}
}
