package instance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// A pool is an instance whose daemon serves the images of others, each in a
// directory of its filesystem. An image's own generation has no daemon then: its
// mountpoint is a bind of that directory. Whoever holds the locks of both has taken
// the image's first.

// Berth is where an image is in a pool.
type Berth struct {
	// Pool is the pool's key, Generation that of its generations which has it.
	Pool       string `json:"pool"`
	Generation int    `json:"generation"`
	// Name is the directory within the pool's filesystem. It is never used again:
	// nydusd 2.2 does not find a name again that it once knew.
	Name string `json:"name"`
}

// Passenger is an image that a pool's daemon was asked to serve. It stays for as
// long as the daemon does: an image that is taken from a daemon is taken from its
// users.
type Passenger struct {
	Name string `json:"name"`
	// Key is the image's instance.
	Key string `json:"key"`
	// Ready is set once it has answered. Any other must not be used.
	Ready bool `json:"ready,omitempty"`
	// Size is what it takes in the state that a successor gets, in bytes.
	Size int `json:"size"`
}

const (
	// maxPassengers is how many images one daemon is given. nydusd counts them in
	// a byte, and has been seen to mix images up beyond.
	maxPassengers = 64
	// maxPoolState bounds the state, of which a successor reads 32 KiB. stateSize
	// is some bytes more than what nydusd 2.4 was seen to take.
	maxPoolState = 30 << 10
	// poolName is what people see instead of an image.
	poolName = "(shared nydusd)"
	// successorWait is how long a daemon that has died is waited for that
	// somebody is about to bring back. It takes some ten milliseconds.
	successorWait = 5 * time.Second
)

// shared tells whether the image is to share its daemon. Without a snapshotter
// nobody would end that.
func (s *Spec) shared() bool { return s.Daemon.Mode == mountspec.ModeShared && !s.Alone }

// poolKey names the pool for what is to be served like s: whatever a daemon is
// started with is the same for all its images.
func poolKey(s *Spec) (string, error) {
	daemon := s.Daemon
	daemon.StartTimeout, daemon.HangTimeout = 0, 0
	text, err := json.Marshal([]any{"pool", s.Root, s.RunDir, daemon})
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:16]), err
}

// stateSize is what a passenger takes in a successor's state: its name several
// times, the rest once.
func stateSize(name, bootstrap, config string) int {
	return 3*len(name) + len(bootstrap) + len(config) + 80
}

// room tells whether a pool's generation may be given one more image.
func (g *Generation) room(size int) bool {
	for _, p := range g.Passengers {
		size += p.Size
	}
	return len(g.Passengers) == 0 || len(g.Passengers) < maxPassengers && size <= maxPoolState
}

// root is the directory of the filesystem that is mounted at the generation's
// mountpoint.
func (g *Generation) root() string {
	if g.Berth == nil {
		return "/"
	}
	return "/" + g.Berth.Name
}

// holds tells whether a mount of the generation's device is one of the image's.
func (g *Generation) holds(m rootfs.Mount) bool {
	if g.Daemonless() && (m.Type != rootfs.TypeEROFS || m.Source != g.Source) {
		return false // the number has become that of another one
	}
	return m.Dev == g.Dev && (g.Berth == nil || m.Root == g.root() || strings.HasPrefix(m.Root, g.root()+"/"))
}

func (d dir) runDir() string { return filepath.Dir(filepath.Dir(string(d))) }

// daemon opens the process that serves a generation, nil for one that has ended.
func (d dir) daemon(g *Generation) (*nydusd.Process, error) {
	g, err := d.carrier(g)
	if g == nil || err != nil {
		return nil, err
	}
	return nydusd.Find(g.PID, g.StartTime)
}

// carrier is the generation that has the daemon: g itself, or its pool's; nil for
// one that is gone.
func (d dir) carrier(g *Generation) (*Generation, error) {
	if g.Berth == nil {
		return g, nil
	}
	rec, err := ReadRecord(d.runDir(), g.Berth.Pool)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return rec.find(g.Berth.Generation), nil
}

// aboard lists the instances that have a berth in a pool's generation. They may
// have users that the mount table shows without the pool's device.
func aboard(d dir, g *Generation) ([]string, error) {
	var keys []string
	for _, p := range g.Passengers {
		if slices.Contains(keys, p.Key) {
			continue
		}
		rec, err := ReadRecord(d.runDir(), p.Key)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(rec.Generations(), func(of Generation) bool { return of.in(d, g) }) {
			keys = append(keys, p.Key)
		}
	}
	return keys, nil
}

// in tells whether the generation has a berth in one of a pool's.
func (g *Generation) in(pool dir, of *Generation) bool {
	return g.Berth != nil && g.Berth.Pool == filepath.Base(string(pool)) && g.Berth.Generation == of.Number
}

// openPool returns the pool of s, locked, with a daemon that serves.
func openPool(ctx context.Context, s Spec) (*Instance, error) {
	key, err := poolKey(&s)
	if err != nil {
		return nil, err
	}
	var tick *time.Ticker
	for until := time.Now().Add(successorWait); ; {
		// Others hold it for as long as their image takes to be mounted.
		i, err := open(ctx, dirOf(s.RunDir, key), openCreate, 0)
		if err != nil {
			return nil, err
		}
		i.hang = s.Daemon.HangTimeout
		if i.awaited() && time.Now().Before(until) {
			// Whoever brings the daemon back needs the lock for it.
			if err := i.Close(); err != nil {
				return nil, err
			}
			if tick == nil {
				tick = time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
			}
			select {
			case <-tick.C:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		if err := i.ensurePool(ctx, s); err != nil {
			_, cleanup := i.removeIfEmpty(i.removeBootstrap)
			return nil, errors.Join(err, cleanup, i.Close())
		}
		return i, nil
	}
}

// awaited tells whether the pool's daemon has died and a successor is on its way.
func (i *Instance) awaited() bool {
	g := i.rec.Current
	if g == nil || !g.Ready || !g.Kept || g.Failed {
		return false
	}
	p, err := nydusd.Find(g.PID, g.StartTime)
	if p != nil {
		p.Close()
	}
	return err == nil && p == nil
}

// ensurePool makes the pool have a daemon that serves and has room. Its lock is
// held.
func (i *Instance) ensurePool(ctx context.Context, s Spec) error {
	i.rec.Image, i.rec.Root, i.rec.Driver = poolName, s.Root, mountspec.DriverFUSE
	if ok, err := i.carries(ctx, s); err != nil || ok {
		return err
	}
	if err := i.retire(); err != nil {
		return err
	}
	if err := i.sweep(); err != nil {
		i.note("clean up: %v", err)
	}
	s.Key, s.Image = i.rec.Key, poolName
	l := &launch{spec: s, inst: i, shared: true}
	return l.bringUp(ctx)
}

// carries tells whether the pool's current daemon can take the image of s.
func (i *Instance) carries(ctx context.Context, s Spec) (bool, error) {
	g := i.rec.Current
	if g == nil || !g.Ready || g.Failed {
		return false, nil
	}
	name := g.berthName(s.Key)
	if !g.room(stateSize(name, filepath.Join(i.berths(g), name), s.Config)) && len(g.known(s.Key)) == 0 {
		return false, nil
	}
	p, err := nydusd.Find(g.PID, g.StartTime)
	if err != nil || p == nil {
		return false, err
	}
	defer p.Close()
	if p.Stopped() {
		g.Failed = true // and is not waited for
		i.note("nydusd %d is stopped and is replaced", g.PID)
		return false, nil
	}
	return i.serves(ctx)
}

// known lists the names under which the pool serves an instance already.
func (g *Generation) known(key string) []string {
	var names []string
	for _, p := range g.Passengers {
		if p.Key == key && p.Ready {
			names = append(names, p.Name)
		}
	}
	return names
}

// berthName is the name of the next passenger.
func (g *Generation) berthName(key string) string {
	return fmt.Sprintf("%s.%d", key[:min(12, len(key))], len(g.Passengers)+1)
}

// berths is where a pool's generation keeps the bootstraps of its images, for as
// long as it may need a successor: that opens all of them again.
func (i *Instance) berths(g *Generation) string {
	return filepath.Join(string(diskDirOf(i.rec.Root, i.rec.Key)), fmt.Sprintf("g%d", g.Number))
}

// vacate ends the pool if nothing is on it. Its lock is held.
func (i *Instance) vacate(ctx context.Context) error {
	g := i.rec.Current
	if g == nil {
		return nil
	}
	x, err := readMounts()
	if err != nil {
		return err
	}
	used, _, err := users(i.dir, g, x)
	if err != nil || len(used) > 0 {
		return err
	}
	return i.Undo(ctx)
}

// vacatePool ends the pool that a generation of the image has left, if nothing is on
// it. Whoever works on it meanwhile sees to it otherwise.
func (i *Instance) vacatePool(ctx context.Context, g *Generation) (err error) {
	if g == nil || g.Berth == nil {
		return nil
	}
	pool, err := open(ctx, dirOf(i.dir.runDir(), g.Berth.Pool), openTry, 0)
	if errors.Is(err, errGone) || errors.Is(err, errLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	return pool.vacate(ctx)
}

// place is a generation of an instance.
type place struct {
	key        string
	generation int
}

// evacuate takes a pool out of use whose daemon has died, and lists what was on it.
func (i *Instance) evacuate() ([]place, error) {
	g := i.rec.Current
	keys, err := aboard(i.dir, g)
	if err != nil {
		return nil, err
	}
	var places []place
	for _, key := range keys {
		if rec, err := ReadRecord(i.dir.runDir(), key); err == nil && rec.Current != nil && rec.Current.in(i.dir, g) {
			places = append(places, place{key, rec.Current.Number})
		}
	}
	err = i.retire()
	if err == nil {
		err = i.sweep()
	}
	return places, err
}

// releasePool lets the pool go that an image was released from, if nothing is on it
// but own, which is about to be unmounted. Whoever works on it sees to it otherwise.
func (i *Instance) releasePool(ctx context.Context, g *Generation, own []string) error {
	if g == nil || g.Berth == nil {
		return nil
	}
	pool, err := open(ctx, dirOf(i.dir.runDir(), g.Berth.Pool), openTry, 0)
	if errors.Is(err, errGone) || errors.Is(err, errLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pool.Close()
	on := pool.rec.Current
	if on == nil || on.Number != g.Berth.Generation {
		return nil
	}
	x, err := readMounts()
	if err != nil {
		return err
	}
	used, _, err := users(pool.dir, on, x)
	if err != nil || slices.ContainsFunc(used, func(u string) bool { return u != i.rec.Key && !slices.Contains(own, u) }) {
		return err
	}
	return pool.retire()
}

// EndShared ends the shared daemons that serve no container, with the images on
// them that only linger. The snapshotter calls it at its end: what nobody uses
// would stay for as long as it is away.
func EndShared(ctx context.Context, runDir string) error {
	keys, err := Keys(runDir)
	if err != nil {
		return err
	}
	var pools []string
	var errs []error
	for _, key := range keys {
		rec, err := ReadRecord(runDir, key)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		case rec.shared():
			pools = append(pools, key)
		case rec.Current != nil && rec.Current.Berth != nil:
			errs = append(errs, endIdle(ctx, runDir, key))
		}
	}
	for _, key := range pools {
		errs = append(errs, endIdle(ctx, runDir, key))
	}
	return errors.Join(errs...)
}

// retireIdle retires the instance if nobody uses it.
func (i *Instance) retireIdle() error {
	x, err := readMounts()
	if err != nil || i.rec.Current == nil {
		return err
	}
	used, err := i.usedBy(x)
	if err != nil || len(used) > 0 {
		return err
	}
	if foreign, err := i.elsewhere(x); err != nil || foreign {
		return err
	}
	return i.retire()
}

// endIdle ends an instance that nobody uses and nobody works on.
func endIdle(ctx context.Context, runDir, key string) (err error) {
	i, err := open(ctx, dirOf(runDir, key), openTry, 0)
	if errors.Is(err, errGone) || errors.Is(err, errLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	if err := i.retireIdle(); err != nil || i.rec.Current != nil {
		return err
	}
	i.awaitRetired(ctx)
	err = i.sweep()
	_, cleanup := i.removeIfEmpty(i.removeDisk)
	return errors.Join(err, cleanup)
}

// shared tells whether the instance is a pool.
func (r *Record) shared() bool {
	return slices.ContainsFunc(r.Generations(), func(g Generation) bool { return g.Shared })
}
