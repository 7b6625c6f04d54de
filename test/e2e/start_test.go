package e2e_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestStartWithoutRegistry starts the snapshotter of a full node while the registry
// takes requests and answers none.
func TestStartWithoutRegistry(t *testing.T) {
	const live, all = 20, 200
	able := succeeds(t)
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
		if able {
			// What dies meanwhile is brought back without the registry, too.
			if err := unix.Kill(n.Daemons()[0].PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if err := served(t, n, bound); err != nil {
			t.Fatalf("not within %v: %v", bound, err)
		}
		wantDaemons(t, n, live, soon)
	}
	c := run(t, n, img, "new", kit.RunOptions{})
	for i, c := range append(list, c) {
		kit.EqualTrees(t, "the view of "+c.ID(), trees[min(i, live-1)], kit.MustWalk(t, c.Root()))
		remove(t, c)
	}
	wantDaemons(t, n, 0, soon)
}

// served starts the snapshotter, and asks it something by itself: containerd backs off
// from one that has gone.
func served(t *testing.T, n *kit.Node, within time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	if err := n.StartSnapshotter(ctx); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+n.SnapshotterAddress(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: "nydus", Key: "no such one"})
	if status.Code(err) != codes.NotFound {
		return fmt.Errorf("it answers %w", err)
	}
	return nil
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
