package instance

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

const (
	// settle is how long the reconciler waits after a change for further ones:
	// starting a pod changes the mount table dozens of times.
	settle = 100 * time.Millisecond
	// recheck is when an instance is looked at again that could not be handled,
	// because a helper works on it or an operation failed.
	recheck = time.Second
	// pruneEvery is how often the disk is cleaned.
	pruneEvery = time.Hour
	// slowPass is more than any pass takes whose disk answers.
	slowPass = 5 * time.Second
	// lockedLong is more than any helper works on an instance that nothing hinders.
	lockedLong = 10 * time.Second
	// logRetention is how long the log of an instance that is gone is kept.
	logRetention = 24 * time.Hour
)

// ReconcilerConfig is what a Reconciler needs.
type ReconcilerConfig struct {
	// RunDir and Root are as in Spec.
	RunDir, Root string
	// Linger is how long an idle instance stays: containerd mounts an image
	// several times in a row when it creates a container.
	Linger time.Duration
	Log    *slog.Logger
	// Now is the clock; nil for the real one.
	Now func() time.Time
}

// Reconciler releases instances that nothing uses any more and cleans up what
// killed helpers and daemons left. One per run directory is enough, and none is
// needed for mounts to work.
type Reconciler struct {
	cfg ReconcilerConfig
	// idle is since when an instance has been seen unused.
	idle map[string]time.Time
	// foreign are the instances of another mount namespace that were reported.
	foreign map[string]bool
	// failing is what went wrong with an instance when it was last looked at: a disk that
	// cannot be written to is told once, and not in each pass.
	failing map[string]string
	// locked is since when others have had an instance locked; zero once that was told.
	locked map[string]time.Time
	// pruned is when the disk was last cleaned.
	pruned time.Time
	// waiting holds the retired daemons that are being waited for, by PID;
	// ended receives those that have ended.
	waiting map[int]bool
	ended   chan int
}

// NewReconciler returns a Reconciler that does nothing until Run.
func NewReconciler(cfg ReconcilerConfig) *Reconciler {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Reconciler{cfg: cfg, idle: map[string]time.Time{}, foreign: map[string]bool{}, ended: make(chan int), waiting: map[int]bool{}}
}

// Run works until ctx ends, and returns an error only when it cannot follow the
// mount table. At its end it leaves everything as it is.
func (r *Reconciler) Run(ctx context.Context) error {
	changed := make(chan struct{}, 1)
	failed := make(chan error, 1)
	go func() { failed <- rootfs.Follow(ctx, func() { poke(changed) }) }()
	for {
		if r.cfg.Now().Sub(r.pruned) > pruneEvery {
			r.pruneDisk(ctx)
		}
		timer := time.NewTimer(r.timed(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return <-failed
		case err := <-failed:
			timer.Stop()
			return err
		case <-changed:
			// Let a burst of changes end before looking.
			timer.Reset(settle)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
		case pid := <-r.ended:
			delete(r.waiting, pid)
		case <-timer.C:
		}
		timer.Stop()
	}
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // one is on its way already
	}
}

// timed is pass, and tells when it took long: daemons that stay after their last mount
// would otherwise look like a fault of the reconciler.
func (r *Reconciler) timed(ctx context.Context) time.Duration {
	began := r.cfg.Now()
	next := r.pass(ctx)
	if took := r.cfg.Now().Sub(began); took > slowPass {
		r.cfg.Log.Warn("idle instances are released late: it took long to look at all instances; is the disk of run_dir busy?",
			"run_dir", r.cfg.RunDir, "took", took.Round(time.Millisecond))
	}
	return next
}

// pass looks at every instance once and returns when it wants to look again
// even if nothing changes.
func (r *Reconciler) pass(ctx context.Context) time.Duration {
	next := time.Hour
	keys, err := Keys(r.cfg.RunDir)
	if err != nil {
		r.cfg.Log.Error("list instances", "error", err)
		return recheck
	}
	r.finishRemovals()
	if len(keys) == 0 {
		clear(r.idle)
		return next
	}
	x, err := readMounts()
	if err != nil {
		r.cfg.Log.Error("look for idle instances", "error", err)
		return recheck
	}
	seen, failing, locked := map[string]time.Time{}, map[string]string{}, map[string]time.Time{}
	for _, l := range r.poolsLast(keys) {
		key := l.key
		wait, err := r.look(ctx, key, l.rec, x)
		if errors.Is(err, errLocked) {
			if l.rec == nil || l.rec.Current == nil || !l.rec.Current.Held { // a Hold is, for as long as it is wanted
				locked[key] = r.lockedSince(key)
			}
		} else if err != nil && !errors.Is(err, errEnded) {
			failing[key] = err.Error()
			if r.failing[key] != failing[key] {
				r.cfg.Log.Error("reconcile instance", "instance", key, "error", err)
			}
		}
		if err != nil {
			wait = recheck
		}
		if since, ok := r.idle[key]; ok {
			seen[key] = since
		}
		next = min(next, wait)
	}
	r.idle, r.failing, r.locked = seen, failing, locked
	return max(next, settle)
}

// lockedSince returns since when others have had the instance locked, and tells when that
// is for long: until then nobody else can mount the image, and nothing releases it.
func (r *Reconciler) lockedSince(key string) time.Time {
	since, known := r.locked[key]
	now := r.cfg.Now()
	switch {
	case !known:
		return now
	case since.IsZero() || now.Sub(since) < lockedLong:
		return since
	}
	r.cfg.Log.Warn("an instance has been locked for long: its image can be neither mounted nor released meanwhile",
		"instance", key, "pids", lockHolders(dirOf(r.cfg.RunDir, key).lock()), "for", now.Sub(since).Round(time.Second))
	return time.Time{}
}

// listed is an instance, and its record as of the pass; nil when it could not be
// read.
type listed struct {
	key string
	rec *Record
}

// poolsLast reads the records and sorts pools behind the instances that have berths
// in them: what these give up, a pool is free of in the same pass.
func (r *Reconciler) poolsLast(keys []string) []listed {
	var images, pools []listed
	for _, key := range keys {
		rec, err := ReadRecord(r.cfg.RunDir, key)
		switch {
		case err != nil:
			images = append(images, listed{key, nil}) // whoever locks it says why
		case rec.shared():
			pools = append(pools, listed{key, rec})
		default:
			images = append(images, listed{key, rec})
		}
	}
	return append(images, pools...)
}

// look handles one instance and returns when it is to be looked at again.
func (r *Reconciler) look(ctx context.Context, key string, rec *Record, x *mountIndex) (time.Duration, error) {
	if wait, ok := r.leave(key, rec, x); ok {
		return wait, nil
	}
	i, err := open(ctx, dirOf(r.cfg.RunDir, key), openTry, 0)
	if errors.Is(err, errGone) {
		return time.Hour, nil
	}
	if err != nil {
		return 0, err
	}
	defer i.Close()
	if g := i.rec.Current; g != nil && !g.Ready {
		// Its helper was killed: a living one would hold the lock.
		r.cfg.Log.Warn("clean up a start that was interrupted", "instance", key, "image", i.rec.Image)
		if err := i.retire(); err != nil {
			return 0, err
		}
	}
	wait, err := r.linger(i)
	if err != nil {
		return 0, err
	}
	if err := i.sweep(); err != nil {
		return 0, err
	}
	if err := r.await(ctx, i.rec.Retired); err != nil {
		return 0, err
	}
	if i.rec.Root == "" {
		i.rec.Root = r.cfg.Root // its helper was killed before it wrote that down
	}
	removed, err := i.removeIfEmpty(i.removeDisk)
	if removed {
		r.cfg.Log.Info("instance ended", "event", "ended", "instance", key, "image", i.rec.Image)
	}
	return wait, err
}

// leave tells whether there is nothing to do for the instance, and until when.
// It takes no lock, so that it keeps no mount waiting.
func (r *Reconciler) leave(key string, rec *Record, x *mountIndex) (time.Duration, bool) {
	if rec == nil || rec.Current == nil || !rec.Current.Ready || len(rec.Retired) > 0 {
		return 0, false
	}
	targets, gone, err := users(dirOf(r.cfg.RunDir, key), rec.Current, x)
	if len(gone) > 0 {
		// It was used since the last pass, too shortly to be seen.
		delete(r.idle, key)
	}
	if err != nil || len(gone) > 0 {
		return 0, false
	}
	left := r.left(key, len(targets) > 0, rec.Current)
	return left, left > 0
}

// left returns how long the instance may stay, 0 when its time is over. A pool has
// no linger of its own: its images have lingered.
func (r *Reconciler) left(key string, used bool, g *Generation) time.Duration {
	if used {
		delete(r.idle, key)
		return time.Hour
	}
	if g.Shared {
		return 0
	}
	now := r.cfg.Now()
	if _, ok := r.idle[key]; !ok {
		r.idle[key] = now
	}
	return max(0, r.cfg.Linger-now.Sub(r.idle[key]))
}

// linger releases the instance when it has been idle for long enough, and
// otherwise returns how long it may stay.
func (r *Reconciler) linger(i *Instance) (time.Duration, error) {
	key := i.rec.Key
	if i.rec.Current == nil {
		delete(r.idle, key)
		return time.Hour, nil
	}
	// Read under the lock: a mount may have been made since the pass began.
	x, err := readMounts()
	if err != nil {
		return 0, err
	}
	targets, err := i.usedBy(x)
	if err != nil {
		return 0, err
	}
	if left := r.left(key, len(targets) > 0, i.rec.Current); left > 0 {
		return left, nil
	}
	delete(r.idle, key)
	if foreign, err := i.elsewhere(x); err != nil || foreign {
		if foreign && !r.foreign[key] {
			r.foreign[key] = true
			r.cfg.Log.Warn("an instance is mounted in another mount namespace, where its users cannot be seen from here: it is left alone; "+
				"run containerd and the snapshotter in the host's mount namespace", "instance", key, "image", i.rec.Image, "pid", i.rec.Current.PID)
		}
		return time.Hour, err
	}
	delete(r.foreign, key)
	r.cfg.Log.Info("release idle instance", "event", "release", "instance", key, "image", i.rec.Image, "pid", i.rec.Current.PID,
		"after", r.cfg.Now().Sub(i.rec.Current.Started).Round(time.Millisecond))
	return time.Hour, i.retire()
}

// elsewhere tells whether the instance serves, but not where x was read. For an
// image in a pool that is for the pool's own mountpoint to say, for as long as it has
// one.
func (i *Instance) elsewhere(x *mountIndex) (bool, error) {
	g := i.rec.Current
	if g.Berth != nil {
		pool, err := ReadRecord(i.dir.runDir(), g.Berth.Pool)
		if errors.Is(err, fs.ErrNotExist) || err == nil && (pool.Current == nil || pool.Current.Number != g.Berth.Generation) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		g = pool.Current
	}
	if m, ok := x.At(g.Mountpoint); ok && m.Dev == g.Dev {
		return false, nil
	}
	p, err := nydusd.Find(g.PID, g.StartTime)
	if err != nil || p == nil {
		return false, err
	}
	defer p.Close()
	return p.Connected()
}

// await makes Run look again once a retired daemon has ended. Nothing else
// tells: its last mount may have gone long before, or in another namespace.
func (r *Reconciler) await(ctx context.Context, retired []Generation) (ended error) {
	for _, g := range retired {
		if r.waiting[g.PID] || g.Berth != nil || g.Daemonless() {
			continue
		}
		p, err := nydusd.Find(g.PID, g.StartTime)
		if err != nil {
			return err
		}
		if p == nil {
			// It has just ended, or is being replaced.
			ended = errEnded
			continue
		}
		r.waiting[g.PID] = true
		go func() {
			defer p.Close()
			if !p.WaitContext(ctx) {
				again := time.NewTimer(recheck)
				defer again.Stop()
				select {
				case <-again.C:
				case <-ctx.Done():
				}
			}
			select {
			case r.ended <- g.PID:
			case <-ctx.Done():
			}
		}()
	}
	return ended
}

// errEnded says that a retired daemon is not there, and its generation still is:
// nothing tells when that changes.
var errEnded = errors.New("daemon has just ended, or is being replaced")

// finishRemovals finishes those that were interrupted.
func (r *Reconciler) finishRemovals() {
	gone, _ := filepath.Glob(filepath.Join(instancesDir(r.cfg.RunDir), ".gone-*"))
	for _, path := range gone {
		if err := removeGone(path); err != nil {
			r.cfg.Log.Error("remove what is left of an instance", "path", path, "error", err)
		}
	}
}

// pruneDisk removes what instances left on disk that are not there any more,
// as after a reboot: the bootstrap at once, the log when it is old.
func (r *Reconciler) pruneDisk(ctx context.Context) {
	r.pruned = r.cfg.Now()
	if err := pruneNotes(r.cfg.RunDir); err != nil {
		r.cfg.Log.Error("remove notes about cache directories that are gone", "error", err)
	}
	entries, err := os.ReadDir(DiskDir(r.cfg.Root))
	if err != nil {
		return // there never was an instance
	}
	for _, e := range entries {
		if _, err := os.Stat(string(dirOf(r.cfg.RunDir, e.Name()))); err == nil || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if err := r.prune(ctx, e.Name()); err != nil {
			r.cfg.Log.Error("remove what is left of an instance", "instance", e.Name(), "error", err)
		}
	}
}

// prune removes an instance that is only on disk. It takes the lock for it: a
// mount of the same image may begin at this moment.
func (r *Reconciler) prune(ctx context.Context, key string) error {
	i, err := open(ctx, dirOf(r.cfg.RunDir, key), openCreate, time.Second)
	if errors.Is(err, errLocked) {
		return nil // it is no longer only on disk
	}
	if err != nil {
		return err
	}
	i.rec.Root = r.cfg.Root
	onDisk := i.removeBootstrap
	if info, err := os.Stat(diskDirOf(r.cfg.Root, key).log()); err != nil || r.cfg.Now().Sub(info.ModTime()) > logRetention {
		onDisk = i.removeDisk
	}
	_, err = i.removeIfEmpty(onDisk)
	return errors.Join(err, i.Close())
}
