package instance

import (
	"context"
	"errors"
	"fmt"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Abort ends a generation whose daemon hangs, so that nobody waits for it any
// more: all requests to its filesystem fail for good, it is taken off its
// mountpoint, and the daemon is killed. Its users get errors; the next mount of the
// image starts another daemon. cause is written into the daemon's log.
//
// It touches no mount, and whoever holds the instance's lock cannot keep the users
// waiting. The error wraps ErrGone when there is no such generation.
func Abort(ctx context.Context, runDir, key string, generation int, cause string) error {
	rec, err := ReadRecord(runDir, key)
	if err != nil {
		return fmt.Errorf("abort instance %s: %w", key, err)
	}
	g := rec.find(generation)
	if g == nil || !g.Ready {
		return fmt.Errorf("abort instance %s: generation %d: %w", key, generation, ErrGone)
	}
	if err := abortDaemon(g); err != nil {
		// Written down all the same: nothing new must come upon it.
		return errors.Join(err, abandon(ctx, runDir, key, generation, cause))
	}
	return abandon(ctx, runDir, key, generation, cause)
}

// abortDaemon aborts a generation's filesystem and kills its daemon.
func abortDaemon(g *Generation) error {
	p, err := nydusd.Find(g.PID, g.StartTime)
	if err != nil || p == nil {
		// The filesystem of a daemon that has ended fails by itself, unless somebody
		// keeps its descriptor; by its mountpoint it is still known.
		return errors.Join(err, rootfs.Abort(g.Mountpoint))
	}
	defer p.Close()
	// The number is its filesystem's as long as the daemon is connected.
	connected, err := p.Connected()
	if connected {
		err = errors.Join(err, rootfs.AbortConnection(g.Dev))
	}
	return errors.Join(err, p.Kill(g.Mountpoint))
}

// abandon writes down that a generation is of no use any more.
func abandon(ctx context.Context, runDir, key string, generation int, cause string) error {
	return unlessGone(locked(ctx, runDir, key, func(i *Instance) error {
		g := i.rec.find(generation)
		if g == nil {
			return nil // whoever held the lock has seen it end
		}
		g.Failed, g.Kept = true, false
		i.note("nydusd %d was aborted: %s", g.PID, cause)
		if i.rec.Current == g {
			return i.retire()
		}
		return i.write()
	}))
}
