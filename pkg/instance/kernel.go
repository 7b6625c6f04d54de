package instance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// An image whose blobs are proven to be complete needs no daemon: the kernel's EROFS reads
// them. Such a generation has a mountpoint and users as any other; what it lacks is a
// process, a socket and a log of one.

// Daemonless tells whether the kernel serves the generation by itself: there is no process
// to look for, and none that could end, hang or be succeeded.
func (g *Generation) Daemonless() bool { return g.Driver == mountspec.DriverEROFS }

// driver is how the generation is served.
func (g *Generation) driver() mountspec.Driver {
	if g.Driver == "" {
		return mountspec.DriverFUSE
	}
	return g.Driver
}

// daemonless is mountProven, and leaves a verdict when it fails for a reason that stays.
func (i *Instance) daemonless(ctx context.Context, s Spec, boot *bootstrap) error {
	err := i.mountProven(ctx, s, boot)
	if err == nil {
		return nil
	}
	if noted := condemn(s, err); noted != nil {
		i.note("the next mount will try EROFS again: %v", noted)
	}
	return err
}

// mountProven brings up the next generation without a daemon, or leaves nothing. The error
// wraps proof.ErrNotProven when the cache is the reason.
func (i *Instance) mountProven(ctx context.Context, s Spec, boot *bootstrap) error {
	l := &launch{spec: s, inst: i, boot: boot}
	defer l.release()
	if err := l.makeDisk(); err != nil {
		return err
	}
	// Who wants nothing else wants it tried.
	if s.Driver == mountspec.DriverAuto {
		if err := condemned(s); err != nil {
			return err
		}
	}
	// Most images that are not proven have no proof at all.
	rec, err := proof.Read(s.CacheDir, s.BootstrapDigest)
	if err != nil {
		return err
	}
	n := i.rec.Last + 1
	dir := i.dir.gen(n)
	l.gen = Generation{Number: n, Mountpoint: dir.mountpoint(), Driver: mountspec.DriverEROFS, Source: l.disk.bootstrap(), Started: time.Now().UTC(), Alone: s.Alone}
	if err := l.withoutDaemon(ctx, rec); err != nil {
		return errors.Join(err, l.undo())
	}
	return nil
}

// mappable tells why an image that a nydusd serves cannot be had without one. Only then it
// is worth a second filesystem.
func (i *Instance) mappable(s Spec) error {
	if s.Driver != mountspec.DriverAuto && s.Driver != mountspec.DriverEROFS {
		return unmappable(fmt.Errorf("driver %q wants a nydusd", s.Driver))
	}
	head, err := rafs.ReadFile(BootstrapPath(&i.rec))
	if err != nil {
		return unmappable(err)
	}
	proven, err := proof.Open(s.CacheDir, s.BootstrapDigest, head)
	if err != nil {
		return unmappable(err)
	}
	i.note("a container in a user namespace wants the image without nydusd, which serves it to those that have it")
	return proven.Close()
}

// unmappable says why an image cannot be id-mapped, and what helps.
func unmappable(err error) error {
	return fmt.Errorf("for a container in a user namespace the image's owners are to be shifted, which FUSE cannot do, and it cannot be served without nydusd: %w; "+
		"run it once the snapshotter has said that all of the image is in the cache, or without a user namespace", err)
}

// withoutDaemon mounts the image through the kernel.
func (l *launch) withoutDaemon(ctx context.Context, rec *proof.Record) error {
	s := l.spec
	if err := l.boot.link(s, l.disk.bootstrap()); err != nil {
		return err
	}
	if err := l.begin(""); err != nil {
		return err
	}
	if err := l.passCache(ctx); err != nil {
		return err
	}
	proven, err := rec.Open(s.CacheDir, l.boot.head)
	if err != nil {
		return err
	}
	defer proven.Close()
	// The kernel is given no metadata that is not the image's.
	if err := l.boot.check(ctx); err != nil {
		return err
	}
	if err := rootfs.EROFS(l.gen.Mountpoint, l.disk.bootstrap(), proven.Files); err != nil {
		return err
	}
	if err := ask(l.gen.Mountpoint); err != nil {
		return fmt.Errorf("look into the image: %w", err)
	}
	if err := rootfs.ReadAhead(l.gen.Mountpoint); err != nil {
		l.inst.note("programs may start more slowly from a cold page cache: %v", err)
	}
	// Whoever has written meanwhile may not have been right.
	if err := proven.Check(); err != nil {
		return err
	}
	m, ok, err := rootfs.Lookup(l.gen.Mountpoint)
	if err == nil && (!ok || m.Type != rootfs.TypeEROFS) {
		err = fmt.Errorf("%s is not what was just mounted there", l.gen.Mountpoint)
	}
	if err != nil {
		return err
	}
	l.gen.Dev, l.gen.Ready = m.Dev, true
	l.inst.rec.Driver = mountspec.DriverEROFS
	return l.inst.write()
}

// metadataAhead bounds how much of a bootstrap is read ahead, in bytes: 100,000 files have
// less.
const metadataAhead = 32 << 20

// readMetadataAhead has the kernel fetch the metadata of a generation that it serves by
// itself, if it does not have it in memory (any more). It would otherwise read a page at a
// time, and wait for each: 300 times to look at 10,000 files. A first mount needs no such
// thing, it has just read all of it to check its digest. This does not wait for the disk: to
// find all in memory takes 20 µs for each megabyte, to ask for all of it 0.4 ms. It is not
// worth failing for.
func readMetadataAhead(g *Generation) {
	if !g.Daemonless() {
		return
	}
	if f, err := openFile(g.Source, unix.O_RDONLY|unix.O_NOFOLLOW); err == nil {
		_ = unix.Fadvise(int(f.Fd()), 0, metadataAhead, unix.FADV_WILLNEED)
		f.Close()
	}
}

// outlived tells whether a generation's filesystem is gone although its device number is in
// use: a newer generation has got it.
func (i *Instance) outlived(g *Generation) bool {
	for _, other := range i.rec.Generations() {
		if other.Number > g.Number && other.Dev == g.Dev {
			return true
		}
	}
	return false
}
