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

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// ErrGone says that there is no such instance or generation any more, ErrLocked that
// somebody else holds a lock.
var (
	ErrGone   = errGone
	ErrLocked = errLocked
)

// lockWait is how long Change waits for a mount that is being made.
const lockWait = time.Minute

// locked does something with an instance that exists, under its lock. The error wraps
// ErrGone when there is none.
func locked(ctx context.Context, runDir, key string, do func(*Instance) error) (err error) {
	i, err := open(ctx, dirOf(runDir, key), openExisting, lockWait)
	if err != nil {
		return fmt.Errorf("instance %s: %w", key, err)
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	return do(i)
}

// unlessGone is nil for what is gone.
func unlessGone(err error) error {
	if errors.Is(err, ErrGone) {
		return nil
	}
	return err
}

// Change runs change on a generation's record under the instance's lock and writes
// what it made of it. The error wraps ErrGone when there is none.
func Change(ctx context.Context, runDir, key string, generation int, change func(*Generation)) error {
	return locked(ctx, runDir, key, func(i *Instance) error { return i.change(generation, change) })
}

func (i *Instance) change(generation int, change func(*Generation)) error {
	g := i.rec.find(generation)
	if g == nil {
		return fmt.Errorf("instance %s: generation %d: %w", i.rec.Key, generation, ErrGone)
	}
	change(g)
	return i.write()
}

// Generations lists what may have a daemon, the current one first.
func (r *Record) Generations() []Generation {
	var all []Generation
	if r.Current != nil {
		all = append(all, *r.Current)
	}
	return append(all, r.Retired...)
}

func (r *Record) find(generation int) *Generation {
	if g := r.Current; g != nil && g.Number == generation {
		return g
	}
	for n := range r.Retired {
		if r.Retired[n].Number == generation {
			return &r.Retired[n]
		}
	}
	return nil
}

// Succession is the right to replace a generation's daemon. One has it at a time, and
// as long as somebody has it the generation is not taken for ended.
type Succession struct {
	// Record and Generation are as of when the right was given.
	Record     *Record
	Generation Generation
	lock       *os.File
	held       *Instance
}

// LockSuccession waits for the right to replace a generation's daemon. The error
// wraps ErrGone when there is no such generation any more.
func LockSuccession(ctx context.Context, runDir, key string, generation int) (*Succession, error) {
	return lockSuccession(ctx, runDir, key, generation, openExisting)
}

// TrySuccession is LockSuccession that does not wait: the error wraps ErrLocked when
// somebody else has the right.
func TrySuccession(ctx context.Context, runDir, key string, generation int) (*Succession, error) {
	return lockSuccession(ctx, runDir, key, generation, openTry)
}

func lockSuccession(ctx context.Context, runDir, key string, generation int, mode openMode) (*Succession, error) {
	path := dirOf(runDir, key).gen(generation).succession()
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("instance %s: generation %d: %w", key, generation, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("replace nydusd: %w", err)
	}
	if err := acquire(ctx, f, mode, 0); err != nil {
		return nil, fmt.Errorf("replace nydusd of instance %s: %w", key, err)
	}
	s := &Succession{lock: f}
	if err := s.read(runDir, key, generation); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

func (s *Succession) read(runDir, key string, generation int) error {
	rec, err := ReadRecord(runDir, key)
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrGone
	}
	if err != nil {
		return fmt.Errorf("instance %s: %w", key, err)
	}
	g := rec.find(generation)
	// Whoever removed it had the lock before.
	if g == nil || !sameFile(s.lock, s.lock.Name()) {
		return fmt.Errorf("instance %s: generation %d: %w", key, generation, ErrGone)
	}
	s.Record, s.Generation = rec, *g
	return nil
}

// Hold keeps images from being given to a shared daemon until Close: a successor
// would not know them. Of other daemons it holds nothing.
func (s *Succession) Hold(ctx context.Context, runDir string) error {
	if !s.Generation.Shared || s.held != nil {
		return nil
	}
	i, err := open(ctx, dirOf(runDir, s.Record.Key), openExisting, lockWait)
	if err != nil {
		return fmt.Errorf("instance %s: %w", s.Record.Key, err)
	}
	g := i.rec.find(s.Generation.Number)
	if g == nil {
		return errors.Join(fmt.Errorf("instance %s: generation %d: %w", s.Record.Key, s.Generation.Number, ErrGone), i.Close())
	}
	s.held, s.Generation = i, *g
	return nil
}

// Change is the function of that name for the generation.
func (s *Succession) Change(ctx context.Context, runDir string, change func(*Generation)) error {
	if s.held != nil {
		return s.held.change(s.Generation.Number, change)
	}
	return Change(ctx, runDir, s.Record.Key, s.Generation.Number, change)
}

// Close gives the right back.
func (s *Succession) Close() error {
	var err error
	if s.held != nil {
		err = s.held.Close()
	}
	return errors.Join(err, s.lock.Close())
}

// Start starts a daemon, of the executable at path, that is going to take the
// generation over, and returns where its API will be. It changes no record: write
// down what came of it with Change. Until then Orphans finds it.
func (s *Succession) Start(path string) (p *nydusd.Process, socket string, err error) {
	g, key := s.Generation, s.Record.Key
	dir := genDir(filepath.Dir(g.Mountpoint))
	// nydusd wants a directory there, which goes with the detach of a mount that
	// was released.
	if err := os.MkdirAll(g.Mountpoint, 0o700); err != nil {
		return nil, "", fmt.Errorf("make the mountpoint's directory: %w", err)
	}
	log, err := openLog(diskDirOf(s.Record.Root, key).log(), g.LogMaxSize)
	if err != nil {
		return nil, "", err
	}
	defer log.Close()
	// Before it is there: whoever finds it left half way looks for it then.
	number, err := count(s.lock)
	if err != nil {
		return nil, "", err
	}
	socket, err = dir.freshSocket(g.Socket, number)
	if err != nil {
		return nil, "", err
	}
	env, err := Environment(g)
	if err != nil {
		return nil, "", err
	}
	announce(log, g.Number, path)
	p, err = nydusd.Start(nydusd.Command{
		Path: path, Env: env, Successor: true, Supervisor: g.Supervisor, ID: cgroupOf(key, g).Name, Mountpoint: g.Mountpoint, Socket: socket,
		Log: log, LogLevel: g.LogLevel, Threads: g.Threads, OOMScoreAdj: g.OOMScoreAdj, Cgroup: cgroupOf(key, g),
	})
	if err == nil {
		warn(log, p)
	}
	return p, socket, err
}

// count makes the size of the lock's file one more, and returns it: it counts the
// successors that were begun. That takes no space, which may be used up.
func count(lock *os.File) (int64, error) {
	info, err := lock.Stat()
	if err != nil {
		return 0, fmt.Errorf("count the successors of nydusd: %w", err)
	}
	if err := lock.Truncate(info.Size() + 1); err != nil {
		return 0, fmt.Errorf("count the successors of nydusd: %w", err)
	}
	return info.Size() + 1, nil
}

// Begun counts the successors of a generation's daemon that were begun, those that
// came to nothing included.
func Begun(g Generation) int64 { return sizeOf(genDir(filepath.Dir(g.Mountpoint)).succession()) }

// EndOthers ends what serves a generation's mountpoint, or is about to, beside the
// daemon that the record names: successors that were left half way by somebody who
// was killed. It returns how many there were.
func (s *Succession) EndOthers() (ended int, err error) {
	if Begun(s.Generation) == 0 {
		return 0, nil
	}
	all, err := nydusd.Orphans(filepath.Dir(s.Generation.Mountpoint))
	errs := []error{err}
	for _, p := range all {
		if p.PID != s.Generation.PID || p.StartTime != s.Generation.StartTime {
			ended++
			errs = append(errs, p.End())
		}
		errs = append(errs, p.Close())
	}
	return ended, errors.Join(errs...)
}

// freshSocket returns where a successor is to listen, and removes what others have
// left, except the present daemon's: it may still serve. Each has a path of its own:
// one that was left half way may come to listen only now, since its starter was
// killed before it ran, and would answer in place of the one that is meant.
func (d genDir) freshSocket(present string, number int64) (string, error) {
	left, _ := filepath.Glob(filepath.Join(string(d), "s*.sock"))
	for _, path := range left {
		if path == present || path == d.supervisor() {
			continue
		}
		if err := remove(path); err != nil {
			return "", err
		}
	}
	return filepath.Join(string(d), fmt.Sprintf("s%d.sock", number%1000)), nil
}

// Retire takes a generation out of use: it ends with what is mounted on it, and the
// next mount starts a new daemon. One that is not the current one is left alone.
func Retire(ctx context.Context, runDir, key string, generation int) error {
	return unlessGone(locked(ctx, runDir, key, func(i *Instance) error {
		if g := i.rec.Current; g == nil || g.Number != generation {
			return nil
		}
		return i.retire()
	}))
}

// ConfigPaths lists the configurations, secrets, of what a generation's daemon
// serves.
func ConfigPaths(runDir, key string, g Generation) []string {
	if !g.Shared {
		return []string{ConfigPath(g)}
	}
	var paths []string
	for _, p := range g.Passengers {
		rec, err := ReadRecord(runDir, p.Key)
		if err != nil {
			continue // it has been released, or tells others what is wrong
		}
		for _, of := range rec.Generations() {
			if of.in(dirOf(runDir, key), &g) {
				paths = append(paths, ConfigPath(of))
			}
		}
	}
	return paths
}

// Restart replaces an instance whose daemon has ended and cannot be succeeded: the
// dead mount is taken off, and a new daemon started so that the next mount finds
// it. What lies on the dead one keeps failing. It does nothing when the generation
// is not the current one, or serves. Of a pool it restarts the images.
func Restart(ctx context.Context, runDir, key string, generation int, timeout time.Duration) error {
	passengers, err := restart(ctx, runDir, key, generation, timeout)
	errs := []error{err}
	for _, p := range passengers {
		_, err := restart(ctx, runDir, p.key, p.generation, timeout)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// restart returns, for a pool that it took out of use, what was on it.
func restart(ctx context.Context, runDir, key string, generation int, timeout time.Duration) (passengers []place, err error) {
	err = locked(ctx, runDir, key, func(i *Instance) error {
		g := i.rec.Current
		if g == nil || g.Number != generation || !g.Ready {
			return nil
		}
		if p, err := i.dir.daemon(g); err != nil || p != nil {
			return errors.Join(err, closeIf(p))
		}
		if g.Shared {
			passengers, err = i.evacuate()
			return err
		}
		return i.renew(ctx, timeout)
	})
	return passengers, unlessGone(err)
}

// renew starts the image's next generation in place of the current one.
func (i *Instance) renew(ctx context.Context, timeout time.Duration) error {
	g := *i.rec.Current
	config, err := os.ReadFile(ConfigPath(g))
	if err != nil {
		return fmt.Errorf("read nydusd's configuration: %w", err)
	}
	s := i.rec.spec(g, i.dir.runDir(), string(config), timeout)
	of, err := i.dir.carrier(&g)
	if err == nil && of != nil {
		s.env, err = Environment(*of)
	}
	if err != nil {
		return err
	}
	if err := i.retire(); err != nil {
		return err
	}
	if err := i.sweep(); err != nil {
		i.note("clean up: %v", err)
	}
	if err := i.start(ctx, s); err != nil {
		return fmt.Errorf("image %s (instance %s): %w", s.Image, i.rec.Key, err)
	}
	return nil
}

func closeIf(p *nydusd.Process) error {
	if p == nil {
		return nil
	}
	return p.Close()
}

// spec is what the record knows of the mount that made a generation.
func (r *Record) spec(g Generation, runDir, config string, timeout time.Duration) Spec {
	s := Spec{
		Key: r.Key, BootstrapDigest: r.BootstrapDigest, Host: r.Host, Repository: r.Repository, CacheDir: r.CacheDir,
		Image: r.Image, Bootstrap: diskDirOf(r.Root, r.Key).bootstrap(), Config: config, Root: r.Root, RunDir: runDir,
		Driver: r.Driver,
	}
	s.Daemon.Path, s.Daemon.Threads, s.Daemon.LogLevel, s.Daemon.LogMaxSize = g.Nydusd, g.Threads, g.LogLevel, g.LogMaxSize
	s.Daemon.OOMScoreAdj, s.Daemon.CgroupParent, s.Daemon.StartTimeout = g.OOMScoreAdj, g.Cgroup, timeout
	s.Daemon.MemoryLimit, s.Daemon.CPULimit = g.MemoryLimit, g.CPULimit
	if g.Berth != nil {
		s.Daemon.Mode = mountspec.ModeShared
	}
	s.restarts = g.Restarts + 1
	return s
}
