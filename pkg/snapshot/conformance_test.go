package snapshot

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

// Without a nydus layer the snapshotter is overlayfs's: containerd's own suite,
// with real mounts, directly and as containerd talks to it.
func TestConformance(t *testing.T) {
	needRoot(t)
	for _, managed := range []bool{false, true} {
		t.Run(style(managed), func(t *testing.T) {
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				o := newFixture(t).options(root)
				o.Managed = managed
				sn, err := New(ctx, o)
				if err != nil {
					return nil, nil, err
				}
				return sn, sn.Close, nil
			})
		})
	}
	t.Run("proxy", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			sn, err := New(ctx, newFixture(t).options(root))
			if err != nil {
				return nil, nil, err
			}
			return proxied(t, sn), sn.Close, nil
		})
	})
}

func style(managed bool) string {
	if managed {
		return "managed"
	}
	return "helper"
}
