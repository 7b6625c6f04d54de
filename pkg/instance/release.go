package instance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Use runs mount, which makes an overlay on target with the instance as a lower
// directory, and writes down that target uses the instance. upper is the
// overlay's upper directory or empty. Killed in between, it leaves a user that
// is pending: the mount table tells whether the mount was made.
func (i *Instance) Use(ctx context.Context, target, upper string, mount func() error) error {
	u := User{Target: target, Generation: i.rec.Current.Number, Upper: upper}
	if err := i.writeUser(u); err != nil {
		return err
	}
	// The kernel asks each layer's filesystem when it mounts an overlay.
	if err := within(ctx, i.hang, mount); errors.Is(err, errNoAnswer) {
		return fmt.Errorf("mount on %s: %w; it may be made yet", target, err) // so the user stays
	} else if err != nil {
		return errors.Join(err, i.dropUser(target))
	}
	st := new(unix.Stat_t) // its own, should the call be left behind
	if err := within(ctx, i.hang, func() error { return unix.Stat(target, st) }); err != nil {
		err = fmt.Errorf("check the new root filesystem: %w", &os.PathError{Op: "stat", Path: target, Err: err})
		return errors.Join(err, rootfs.Detach(target), i.dropUser(target))
	}
	u.Dev = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	var err error
	if upper == "" {
		var m rootfs.Mount
		m, _, err = rootfs.Lookup(target)
		u.Options = m.Options
	}
	if err == nil {
		err = i.writeUser(u)
	}
	if err != nil {
		return errors.Join(err, rootfs.Detach(target), i.dropUser(target))
	}
	return nil
}

func (i *Instance) writeUser(u User) error {
	text, err := json.Marshal(u)
	if err == nil {
		err = writeFile(i.dir.user(u.Target), text)
	}
	if err != nil {
		return fmt.Errorf("write down who uses the instance: %w", err)
	}
	return nil
}

func (i *Instance) dropUser(target string) error {
	if err := os.Remove(i.dir.user(target)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mountIndex is the mount table with a way to find mounts by device number.
type mountIndex struct {
	rootfs.Table
	byDev map[string]rootfs.Table
}

func readMounts() (*mountIndex, error) {
	table, err := rootfs.ReadTable()
	if err != nil {
		return nil, err
	}
	return indexOf(table), nil
}

func indexOf(table rootfs.Table) *mountIndex {
	x := &mountIndex{Table: table, byDev: map[string]rootfs.Table{}}
	for _, m := range table {
		x.byDev[m.Dev] = append(x.byDev[m.Dev], m)
	}
	return x
}

// users lists the mounts that use a generation, which may be nil for none, by
// their targets, and the files of users that are gone.
func users(d dir, g *Generation, x *mountIndex) (targets, gone []string, err error) {
	if g != nil && g.Dev != "" {
		for _, m := range x.byDev[g.Dev] {
			if !isMountpoint(m.Target, g) {
				targets = append(targets, m.Target)
			}
		}
	}
	entries, err := os.ReadDir(d.users())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list users of instance %s: %w", d, err)
	}
	for _, e := range entries {
		path := filepath.Join(d.users(), e.Name())
		u, err := readUser(path)
		if err != nil {
			return nil, nil, err
		}
		var mounts []string
		if u != nil {
			mounts = u.mounts(x)
		}
		switch {
		case len(mounts) == 0:
			gone = append(gone, path)
		case g != nil && u.Generation == g.Number:
			targets = append(targets, mounts...)
		}
	}
	return targets, gone, nil
}

// isMountpoint tells whether target is the generation's own mountpoint, or that
// in a copy of the run directory: a recursive bind of /run, for a chroot say, uses
// no image.
func isMountpoint(target string, g *Generation) bool {
	instance := filepath.Dir(filepath.Dir(g.Mountpoint))
	return strings.HasSuffix(target, strings.TrimPrefix(g.Mountpoint, filepath.Dir(filepath.Dir(instance))))
}

// usedBy is users for the holder of the lock, who also forgets those that are
// gone. The mount table must have been read under the lock.
func (i *Instance) usedBy(x *mountIndex) ([]string, error) {
	targets, gone, err := users(i.dir, i.rec.Current, x)
	if err != nil {
		return nil, err
	}
	for _, path := range gone {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("forget a user of instance %s: %w", i.rec.Key, err)
		}
	}
	return targets, nil
}

// readUser returns nil for what a killed writer left.
func readUser(path string) (*User, error) {
	if strings.HasPrefix(filepath.Base(path), ".new-") {
		return nil, nil
	}
	text, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return nil, fmt.Errorf("read user of an instance: %w", err)
	}
	var u User
	if err := json.Unmarshal(text, &u); err != nil {
		return nil, fmt.Errorf("read user of an instance: %s: %w", path, err)
	}
	return &u, nil
}

// mounts lists where the user's overlay is mounted now. That need not be its
// target: containerd mounts a snapshot briefly elsewhere just before the
// container's own mount of it, which gets the same device number again.
func (u *User) mounts(x *mountIndex) []string {
	candidates := x.byDev[u.Dev]
	if u.Dev == "" { // pending
		candidates = x.Table
	}
	var targets []string
	for _, m := range candidates {
		if m.Type == "overlay" && u.made(m) {
			targets = append(targets, m.Target)
		}
	}
	return targets
}

// made tells whether an overlay of the right device number is the user's.
func (u *User) made(m rootfs.Mount) bool {
	if u.Dev == "" && m.Target != u.Target {
		return false
	}
	if upper, _ := m.Option("upperdir"); upper != u.Upper {
		return false
	}
	return u.Options == "" || u.Options == m.Options
}

// Detach lets the instance go: it ends with the mounts that use it.
func (i *Instance) Detach() error { return i.retire() }

// Undo is Detach for who has just brought the instance up and mounted nothing
// on it: it waits, briefly, until nothing is left of it.
func (i *Instance) Undo(ctx context.Context) error {
	if err := i.retire(); err != nil {
		return err
	}
	i.awaitRetired(ctx)
	err := i.sweep()
	_, cleanup := i.removeIfEmpty(i.removeBootstrap)
	return errors.Join(err, cleanup)
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
		ended, err := finish(i.rec.Key, g)
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
	if g.Socket == "" || time.Since(g.Started) > settleWait+DefaultStartTimeout {
		return nil
	}
	p, err := nydusd.Find(g.PID, g.StartTime)
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
	// Users in other mount namespaces cannot be seen. The kernel's list of FUSE
	// filesystems tells, unless the number has become that of another one here.
	return len(x.byDev[g.Dev]) == 0 && rootfs.Connected(g.Dev)
}

// endWait is how long a daemon whose filesystem is gone may take to end. It
// takes some milliseconds; one that hangs would take for ever.
const endWait = time.Second

// finish removes a retired generation if its daemon has ended. One whose
// filesystem is gone serves nobody and is made to end. While somebody replaces the
// daemon it has not ended, whatever it looks like.
func finish(key string, g Generation) (ended bool, err error) {
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
	if p == nil && g.Kept {
		return false, nil // its successor is on its way
	}
	if err := removeGeneration(key, g); err != nil {
		return false, err
	}
	return true, nil
}

// removeGeneration removes what a generation left: its mount, its files, its
// cgroup, and a daemon that never came to serve. It may be called again after
// an error. Mountpoints are removed with Remove: a file system that is still
// mounted there cannot lose a file.
func removeGeneration(key string, g Generation) error {
	d := genDir(filepath.Dir(g.Mountpoint))
	if !g.Ready {
		if err := killOrphans(g); err != nil {
			return err
		}
	}
	if err := unmount(g.Mountpoint); err != nil {
		return err
	}
	var errs []error
	errs = append(errs, remove(d.config()), remove(d.succession()))
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
	if err := os.RemoveAll(gone); err != nil {
		return true, fmt.Errorf("remove instance: %w", err)
	}
	return true, nil
}

// removeBootstrap removes the link to the bootstrap; the log stays for whoever
// looks into a failure.
func (i *Instance) removeBootstrap() error {
	if i.rec.Root == "" {
		return nil // killed before it had one, or there never was
	}
	disk := diskDirOf(i.rec.Root, i.rec.Key)
	if err := errors.Join(remove(disk.bootstrap()), remove(disk.bootstrap()+".new")); err != nil {
		return fmt.Errorf("remove instance from disk: %w", err)
	}
	return nil
}

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
		if g.Failed {
			continue
		}
		ok, err := i.rebind(ctx, x, g)
		if err != nil {
			// It would not answer the next mount either.
			i.rec.Retired[n].Failed = true
			i.note("nydusd %d does not answer and is replaced: %v", g.PID, err)
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
	p, err := nydusd.Find(g.PID, g.StartTime)
	if err != nil || p == nil {
		return false, nil
	}
	defer p.Close()
	if os.MkdirAll(g.Mountpoint, 0o700) != nil {
		return false, nil
	}
	for _, m := range x.byDev[g.Dev] {
		if m.Root != "/" || m.Target == g.Mountpoint || !strings.HasPrefix(m.Type, "fuse") {
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
	if err != nil || !ok || m.Dev != g.Dev {
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

// awaitRetired waits for a retired daemon to end, briefly, and tells whether
// one has.
func (i *Instance) awaitRetired(ctx context.Context) bool {
	deadline := time.Now().Add(retireWait)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	for _, g := range i.rec.Retired {
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

// ErrNotNydus says that a path is no root filesystem on an instance.
var ErrNotNydus = errors.New("not a nydus root filesystem")

// FindByTarget returns the key of the instance beneath the root filesystem at
// target, an overlay on it or the image itself, or ErrNotNydus. It reads records and the mount table only.
func FindByTarget(runDir, target string) (key string, err error) {
	x, err := readMounts()
	if err != nil {
		return "", err
	}
	if m, ok := x.At(target); !ok || m.Type != "overlay" && !strings.HasPrefix(m.Type, "fuse") {
		return "", ErrNotNydus
	}
	keys, err := Keys(runDir)
	if err != nil {
		return "", err
	}
	for _, key := range keys {
		if rec, err := ReadRecord(runDir, key); err == nil && generationBeneath(dirOf(runDir, key), rec, x, target) != nil {
			return key, nil
		}
	}
	return "", ErrNotNydus
}

// generationBeneath returns the generation that the overlay on target was
// mounted on, or that is mounted on it; nil for none of this instance's.
func generationBeneath(d dir, rec *Record, x *mountIndex, target string) *Generation {
	all := rec.Retired
	if rec.Current != nil {
		all = append([]Generation{*rec.Current}, all...)
	}
	u, err := readUser(d.user(target))
	made := err == nil && u != nil && slices.Contains(u.mounts(x), target)
	m, _ := x.At(target)
	dev := m.Dev
	if m.Type == "overlay" {
		dev = lowerDev(x.Table, m)
	}
	for _, g := range all {
		if made && u.Generation == g.Number || dev != "" && g.Dev == dev {
			return &g
		}
	}
	return nil
}

// lowerDev is the device of the lowest layer of an overlay that containerd made
// on a mount of the image; empty when its text does not tell.
func lowerDev(table rootfs.Table, overlay rootfs.Mount) string {
	text, _ := overlay.Option("lowerdir")
	lowers := strings.Split(text, ":")
	m, ok := table.At(lowers[len(lowers)-1])
	if !ok {
		return ""
	}
	return m.Dev
}

// Keys lists the instances of a run directory. One that does not exist has none.
func Keys(runDir string) ([]string, error) {
	entries, err := os.ReadDir(instancesDir(runDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var keys []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			keys = append(keys, e.Name())
		}
	}
	return keys, nil
}

// RecordPath is where an instance's record is. Each version of it is another file.
func RecordPath(runDir, key string) string { return dirOf(runDir, key).record() }

// ReadRecord reads an instance's record without its lock: it is as of some
// moment. The error wraps fs.ErrNotExist when there is none.
func ReadRecord(runDir, key string) (*Record, error) {
	i := Instance{dir: dirOf(runDir, key)}
	if _, err := os.Stat(i.dir.record()); err != nil {
		return nil, fmt.Errorf("read instance record: %w", err)
	}
	if err := i.read(); err != nil {
		return nil, err
	}
	return &i.rec, nil
}

// Release lets the instance beneath target go if nothing but target uses it,
// although target is still mounted. The hook calls it before the runtime
// unmounts a container's root filesystem.
func Release(ctx context.Context, runDir, key, target string) error {
	i, err := open(ctx, dirOf(runDir, key), openExisting, 0)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer i.Close()
	x, err := readMounts()
	if err != nil {
		return err
	}
	users, err := i.usedBy(x)
	if err != nil {
		return err
	}
	own := []string{target}
	if m, ok := x.At(target); ok {
		text, _ := m.Option("lowerdir")
		own = append(own, strings.Split(text, ":")...)
	}
	for _, u := range users {
		if !slices.Contains(own, u) {
			return nil
		}
	}
	return i.retire()
}

// Replace takes the generation out of use that the root filesystem on target
// lies on, because it does not answer: the next mount starts a new daemon. One
// that has been replaced since is left alone.
func Replace(ctx context.Context, runDir, key, target string) error {
	i, err := open(ctx, dirOf(runDir, key), openExisting, 0)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer i.Close()
	x, err := readMounts()
	if err != nil {
		return err
	}
	current := i.rec.Current
	if g := generationBeneath(i.dir, &i.rec, x, target); g == nil || current == nil || g.Number != current.Number {
		return nil
	}
	current.Failed = true
	i.note("nydusd %d does not answer the hook and is replaced", current.PID)
	return i.retire()
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
	for _, path := range []string{d.bootstrap(), d.bootstrap() + ".new", d.log(), d.log() + ".1", string(d)} {
		if err := remove(path); err != nil {
			return fmt.Errorf("remove instance from disk: %w", err)
		}
	}
	return nil
}
