package instance

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// reattach brings a retired generation back that some plain mount of it still
// keeps alive: a second daemon for the image would be a waste.
func (i *Instance) reattach(ctx context.Context) (bool, error) {
	if len(i.rec.Retired) == 0 {
		return false, nil
	}
	x, err := readMounts()
	if err != nil {
		return false, err
	}
	for n, g := range i.rec.Retired {
		if g.Failed || g.Daemonless() {
			continue // to mount it anew costs nothing, and nothing could prove whose a number is
		}
		ok, err := i.rebind(ctx, x, g)
		if err != nil {
			// It would not answer the next mount either.
			i.rec.Retired[n].Failed = true
			i.note("nydusd does not answer and is replaced: %v", err)
			if err := i.write(); err != nil {
				return false, err
			}
		}
		if !ok {
			continue
		}
		i.rec.Retired = slices.Delete(i.rec.Retired, n, n+1)
		i.rec.Current = &g
		return true, i.write()
	}
	return false, nil
}

// rebind mounts g's filesystem at its mountpoint again, from wherever else it
// is mounted. Not succeeding is normal: that mount, and the daemon, may go away at
// any moment. An error says that the filesystem does not answer.
func (i *Instance) rebind(ctx context.Context, x *mountIndex, g Generation) (bool, error) {
	p, err := i.dir.daemon(&g)
	if err != nil || p == nil {
		return false, nil
	}
	defer p.Close()
	if os.MkdirAll(g.Mountpoint, 0o700) != nil {
		return false, nil
	}
	for _, m := range x.byDev[g.Dev] {
		if m.Root != g.root() || m.Target == g.Mountpoint || !strings.HasPrefix(m.Type, "fuse") {
			continue
		}
		if rootfs.Bind(m.Target, g.Mountpoint, nil) != nil {
			continue
		}
		ok, err := i.proven(ctx, p, g)
		if ok {
			return true, nil
		}
		if rootfs.DetachAll(g.Mountpoint) != nil || err != nil {
			return false, err
		}
	}
	return false, nil
}

// proven tells whether what was mounted again is g's filesystem, and answers. A
// path may lead elsewhere by now, and a device number is used again as soon as
// its filesystem is gone: the daemon's connection is looked at last, because
// while that exists the number is still its. An error says that it is there and
// does not answer.
func (i *Instance) proven(ctx context.Context, p *nydusd.Process, g Generation) (bool, error) {
	m, ok, err := rootfs.Lookup(g.Mountpoint)
	if err != nil || !ok || !g.holds(m) {
		return false, nil
	}
	if err := askWithin(ctx, g.Mountpoint, i.hang); errors.Is(err, errNoAnswer) {
		return false, err
	} else if err != nil {
		return false, nil
	}
	connected, err := p.Connected()
	return err == nil && connected, nil
}
