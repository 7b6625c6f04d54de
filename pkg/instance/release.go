package instance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/logs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Detach lets the instance go: it ends with the mounts that use it.
func (i *Instance) Detach() error { return i.retire() }

// Undo is Detach for who has just brought the instance up and mounted nothing
// on it: it waits, briefly, until nothing is left of it.
func (i *Instance) Undo(ctx context.Context) error {
	g := i.rec.Current
	if err := i.retire(); err != nil {
		return err
	}
	i.awaitRetired(ctx)
	err := i.sweep()
	_, cleanup := i.removeIfEmpty(i.removeBootstrap)
	return errors.Join(err, cleanup, i.vacatePool(ctx, g))
}

// retire takes the current generation out of use. Its daemon ends with the last
// mount that can reach it.
func (i *Instance) retire() error {
	g := i.rec.Current
	if g == nil {
		return nil
	}
	if !g.Ready {
		// Somebody was killed while starting it. Nobody ever used it.
		err := removeGeneration(i.rec.Key, *g)
		if errors.Is(err, errCgroup) {
			// Not worth a mount: sweep tries again.
			i.note("clean up: %v", err)
			i.rec.Retired = append(i.rec.Retired, *g)
		} else if err != nil {
			return err
		}
	} else {
		if err := i.settled(g); err != nil {
			return err
		}
		if err := unmount(g.Mountpoint); err != nil {
			return err
		}
		i.rec.Retired = append(i.rec.Retired, *g)
	}
	i.rec.Current = nil
	return i.write()
}

// sweep removes retired generations whose daemon has ended.
func (i *Instance) sweep() error {
	var left []Generation
	var errs []error
	for _, g := range i.rec.Retired {
		if g.Kept && !i.wanted(&g) {
			g.Kept = false
		}
		ended, err := i.finish(&g)
		if !ended {
			left = append(left, g)
		}
		errs = append(errs, err)
	}
	if len(left) < len(i.rec.Retired) {
		i.rec.Retired = left
		errs = append(errs, i.write())
	}
	return errors.Join(errs...)
}

// settleWait is how long a daemon that serves may take to be done with its start.
// It takes milliseconds.
const settleWait = 2 * time.Second

// settled waits until a generation's daemon is done with its start: after it has
// mounted it looks at its mountpoint once more (2.3 and newer end when that is
// gone), and only then listens.
func (i *Instance) settled(g *Generation) error {
	if g.Socket == "" || time.Since(g.Started) > settleWait+defaultStartTimeout {
		return nil
	}
	p, err := i.dir.daemon(g)
	if err != nil || p == nil {
		return err
	}
	defer p.Close()
	return p.WaitFile(g.Socket, time.Now().Add(settleWait))
}

// unmount takes the image off its mountpoint everywhere. A detach reaches all
// mount namespaces that share the run directory; what others have copied, the
// kernel detaches when the mountpoint itself is removed. Otherwise whoever
// unshares a mount namespace, which takes no privilege, would keep the daemon.
func unmount(mountpoint string) error {
	if err := rootfs.DetachAll(mountpoint); err != nil {
		return err
	}
	return remove(mountpoint)
}

// InUse is wanted for a generation of a record that was read without the lock.
func InUse(runDir string, rec *Record, g Generation) bool {
	i := Instance{dir: dirOf(runDir, rec.Key), rec: *rec}
	return i.wanted(&g)
}

// wanted tells whether somebody uses a generation. A daemon that has ended without
// users needs no successor, and whoever could tell may be away.
func (i *Instance) wanted(g *Generation) bool {
	x, err := readMounts()
	if err != nil {
		return true
	}
	targets, _, err := users(i.dir, g, x)
	if err != nil || len(targets) > 0 {
		return true
	}
	if len(x.byDev[g.Dev]) > 0 {
		return false // the number has become that of another one
	}
	// Users in other mount namespaces cannot be seen, their filesystem can.
	connected, err := rootfs.Connected(g.Dev)
	return err != nil || connected
}

// endWait is how long a daemon whose filesystem is gone may take to end. It
// takes some milliseconds; one that hangs would take for ever.
const endWait = time.Second

// finish removes a retired generation if its daemon has ended. One whose
// filesystem is gone serves nobody and is made to end. While somebody replaces the
// daemon it has not ended, whatever it looks like.
func (i *Instance) finish(g *Generation) (ended bool, err error) {
	if g.Berth != nil || g.Daemonless() {
		return i.leave(g)
	}
	lock, err := openFile(genDir(filepath.Dir(g.Mountpoint)).succession(), unix.O_RDWR|unix.O_CREAT)
	if err == nil {
		defer lock.Close()
		err = flock(lock, unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // its directory may be gone
		return false, fmt.Errorf("clean up after nydusd %d: %w", g.PID, err)
	}
	// Somebody may have been killed while bringing it back.
	if err := unmount(g.Mountpoint); err != nil {
		return false, err
	}
	p, err := nydusd.Find(g.PID, g.StartTime)
	if err != nil {
		return false, err
	}
	if p != nil {
		defer p.Close()
		if connected, err := p.Connected(); err != nil || connected {
			return false, err
		}
		if !p.Wait(time.Now().Add(endWait)) {
			return false, p.Abandon()
		}
	}
	if g.Kept {
		return false, nil // its successor is on its way: it may just have died
	}
	if lock != nil && Begun(*g) > 0 {
		// One may have been left half way.
		if err := killOrphans(*g); err != nil {
			return false, err
		}
	}
	if g.Shared {
		if err := os.RemoveAll(i.berths(g)); err != nil {
			return false, fmt.Errorf("remove bootstraps: %w", err)
		}
	}
	if err := removeGeneration(i.rec.Key, *g); err != nil {
		return false, err
	}
	return true, nil
}

// leave removes what a retired generation without a daemon of its own left, once it has
// no users. An open file that the mount table does not show keeps the pool's daemon, or
// the kernel's filesystem.
func (i *Instance) leave(g *Generation) (ended bool, err error) {
	if err := unmount(g.Mountpoint); err != nil {
		return false, err
	}
	x, err := readMounts()
	if err != nil {
		return false, err
	}
	left := *g
	if g.Daemonless() && i.outlived(g) {
		left.Dev = ""
	}
	targets, _, err := users(i.dir, &left, x)
	if err != nil || len(targets) > 0 {
		return false, err
	}
	return true, removeGeneration(i.rec.Key, *g)
}

// removeGeneration removes what a generation left: its mount, its files, its
// cgroup, and a daemon that never came to serve. It may be called again after
// an error. Mountpoints are removed with Remove: a file system that is still
// mounted there cannot lose a file.
func removeGeneration(key string, g Generation) error {
	d := genDir(filepath.Dir(g.Mountpoint))
	if !g.Ready && g.Berth == nil && !g.Daemonless() {
		if err := killOrphans(g); err != nil {
			return err
		}
	}
	if err := unmount(g.Mountpoint); err != nil {
		return err
	}
	var errs []error
	errs = append(errs, remove(d.config()), remove(d.env()), remove(d.succession()))
	for _, pattern := range []string{"*.sock", ".new-*"} {
		leftovers, _ := filepath.Glob(filepath.Join(string(d), pattern))
		for _, path := range leftovers {
			errs = append(errs, remove(path))
		}
	}
	if err := errors.Join(append(errs, remove(string(d)))...); err != nil {
		return err
	}
	if err := cgroupOf(key, g).Remove(); err != nil {
		return fmt.Errorf("%w: %w", errCgroup, err)
	}
	return nil
}

// errCgroup says that all but a generation's cgroup could be removed.
var errCgroup = errors.New("everything else is gone")

func killOrphans(g Generation) error {
	procs, err := nydusd.Orphans(filepath.Dir(g.Mountpoint))
	errs := []error{err}
	for _, p := range procs {
		errs = append(errs, p.Kill(g.Mountpoint), p.Close())
	}
	return errors.Join(errs...)
}

func remove(path string) error {
	err := os.Remove(path)
	// ENOTDIR: not even its directory is there.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	return nil
}

// removeIfEmpty removes an instance that has no generation left; onDisk removes
// what it has there. The lock stays held until Close, but once the directory is
// renamed it keeps nobody out any more: the disk comes first, or it would be a
// successor's files that are removed.
func (i *Instance) removeIfEmpty(onDisk func() error) (bool, error) {
	if i.rec.Current != nil || len(i.rec.Retired) > 0 {
		return false, nil
	}
	if err := onDisk(); err != nil {
		return false, err
	}
	// Renamed first, so that nobody finds half of it. To a name that nobody
	// else has: a successor may be removed while this one still is.
	gone := filepath.Join(filepath.Dir(string(i.dir)), fmt.Sprintf(".gone-%s.%d.%d", filepath.Base(string(i.dir)), os.Getpid(), time.Now().UnixNano()))
	if err := os.Rename(string(i.dir), gone); err != nil {
		return false, fmt.Errorf("remove instance: %w", err)
	}
	if err := removeGone(gone); err != nil {
		return true, fmt.Errorf("remove instance: %w", err)
	}
	return true, nil
}

// removeGone removes a directory that was renamed. Whoever had resolved its name
// before, to open the instance, makes one more file in it, and then sees that it is
// gone: each can get in the way once.
func removeGone(path string) error {
	const openers = 100 // more at one moment is something else
	for range openers {
		if err := os.RemoveAll(path); !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return os.RemoveAll(path)
}

// removeBootstrap removes the link to the bootstrap; the log stays for whoever
// looks into a failure.
func (i *Instance) removeBootstrap() error {
	if i.rec.Root == "" {
		return nil // killed before it had one, or there never was
	}
	disk := diskDirOf(i.rec.Root, i.rec.Key)
	if err := errors.Join(remove(disk.bootstrap()), remove(disk.bootstrap()+".new"), i.removeBerths(disk)); err != nil {
		return fmt.Errorf("remove instance from disk: %w", err)
	}
	return nil
}

// removeBerths removes what a pool has on disk beside its log, once it has no
// daemon, nor anybody else of its name.
func (i *Instance) removeBerths(disk diskDir) error {
	if i.rec.Current != nil || len(i.rec.Retired) > 0 {
		return nil
	}
	var errs []error
	for _, pattern := range []string{"g[0-9]*", "slot*.lock"} {
		left, _ := filepath.Glob(filepath.Join(string(disk), pattern))
		for _, path := range left {
			errs = append(errs, os.RemoveAll(path))
		}
	}
	return errors.Join(errs...)
}

// awaitRetired waits for a retired daemon to end, briefly, and tells whether
// one has.
func (i *Instance) awaitRetired(ctx context.Context) bool {
	deadline := time.Now().Add(retireWait)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	for _, g := range i.rec.Retired {
		if g.Berth != nil || g.Daemonless() {
			continue // no daemon ends with it
		}
		p, err := nydusd.Find(g.PID, g.StartTime)
		if err != nil {
			continue
		}
		if p == nil {
			return true
		}
		ended := p.Wait(deadline)
		p.Close()
		if ended {
			return true
		}
	}
	return false
}

// Sweep removes the instances of a run directory whose daemons have ended. It
// is for whoever mounts where no Reconciler runs; what it cannot remove now is
// left for the next time.
func Sweep(ctx context.Context, runDir string) {
	keys, err := Keys(runDir)
	if err != nil {
		return
	}
	for _, key := range keys {
		i, err := open(ctx, dirOf(runDir, key), openTry, 0)
		if err != nil {
			continue
		}
		if g := i.rec.Current; g != nil && g.Shared && g.Ready {
			err = i.retireIdle()
		}
		if i.rec.Current == nil && i.sweep() == nil {
			_, err = i.removeIfEmpty(i.removeDisk)
		}
		if err != nil {
			i.note("clean up: %v", err)
		}
		i.Close()
	}
}

// removeDisk removes the instance's directory on disk.
func (i *Instance) removeDisk() error {
	if i.rec.Root == "" {
		return nil // killed before it had one, or there never was
	}
	d := diskDirOf(i.rec.Root, i.rec.Key)
	if err := i.removeBerths(d); err != nil {
		return fmt.Errorf("remove instance from disk: %w", err)
	}
	files := append([]string{d.bootstrap(), d.bootstrap() + ".new"}, logs.Files(d.log())...)
	for _, path := range append(files, string(d)) {
		if err := remove(path); err != nil {
			return fmt.Errorf("remove instance from disk: %w", err)
		}
	}
	return nil
}
