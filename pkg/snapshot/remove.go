package snapshot

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
)

// Remove implements snapshots.Snapshotter. The directory goes after the row: a crash
// between the two leaves it to Cleanup, which containerd calls after it has removed
// something.
//
// Overlayfs's own looks for such directories each time, among those of all snapshots, while
// nobody else can write to the database.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	s.told.forget(id)
	if err := os.RemoveAll(s.dir(id)); err != nil {
		// The snapshot is gone all the same.
		log.G(ctx).WithError(err).WithField("key", key).Warn("cannot remove the directory of a snapshot that was removed")
	}
	return nil
}
