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
)

// ErrGone says that there is no such instance or generation any more.
var ErrGone = errGone

// lockWait is how long Change waits for a mount that is being made.
const lockWait = time.Minute

// Change runs change on a generation's record under the instance's lock and writes
// what it made of it. The error wraps ErrGone when there is none.
func Change(ctx context.Context, runDir, key string, generation int, change func(*Generation)) (err error) {
	i, err := open(ctx, dirOf(runDir, key), openExisting, lockWait)
	if err != nil {
		return fmt.Errorf("instance %s: %w", key, err)
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	g := i.rec.find(generation)
	if g == nil {
		return fmt.Errorf("instance %s: generation %d: %w", key, generation, ErrGone)
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
}

// LockSuccession waits for the right to replace a generation's daemon. The error
// wraps ErrGone when there is no such generation any more.
func LockSuccession(ctx context.Context, runDir, key string, generation int) (*Succession, error) {
	path := dirOf(runDir, key).gen(generation).succession()
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("instance %s: generation %d: %w", key, generation, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("replace nydusd: %w", err)
	}
	if err := acquire(ctx, f, openExisting, 0); err != nil {
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

// Close gives the right back.
func (s *Succession) Close() error { return s.lock.Close() }

// Note writes a line into the daemon's log.
func (s *Succession) Note(format string, args ...any) {
	i := Instance{rec: *s.Record}
	i.note(format, args...)
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
	log, err := openLog(diskDirOf(s.Record.Root, key).log())
	if err != nil {
		return nil, "", err
	}
	defer log.Close()
	socket, err = dir.freshSocket(g.Socket)
	if err != nil {
		return nil, "", err
	}
	p, err = nydusd.Start(nydusd.Command{
		Path: path, Successor: true, Supervisor: g.Supervisor, ID: cgroupOf(key, g).Name, Mountpoint: g.Mountpoint, Socket: socket,
		Log: log, LogLevel: g.LogLevel, Threads: g.Threads, OOMScoreAdj: g.OOMScoreAdj, Cgroup: cgroupOf(key, g),
	})
	if err == nil {
		warn(log, p)
	}
	return p, socket, err
}

// freshSocket returns a path where there is nothing: a daemon that has died leaves
// its socket, and nydusd listens on none that is there. The present one's is kept:
// it may still serve.
func (d genDir) freshSocket(present string) (string, error) {
	socket := filepath.Join(string(d), "s0.sock")
	if socket == present {
		socket = filepath.Join(string(d), "s1.sock")
	}
	return socket, remove(socket)
}

// Orphans lists the processes that serve a generation's mountpoint, or are about
// to: a successor whose starter was killed before it wrote that down among them.
func Orphans(g Generation) ([]*nydusd.Process, error) {
	return nydusd.Orphans(filepath.Dir(g.Mountpoint))
}

// Retire takes a generation out of use: it ends with what is mounted on it, and the
// next mount starts a new daemon. One that is not the current one is left alone.
func Retire(ctx context.Context, runDir, key string, generation int) (err error) {
	i, err := open(ctx, dirOf(runDir, key), openExisting, lockWait)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("instance %s: %w", key, err)
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	if g := i.rec.Current; g == nil || g.Number != generation {
		return nil
	}
	return i.retire()
}

// ConfigPaths lists the configurations, secrets, of what a generation's daemon
// serves.
func ConfigPaths(runDir string, g Generation) []string {
	return []string{ConfigPath(g)}
}

// Restart replaces an instance whose daemon has ended and cannot be succeeded: the
// dead mount is taken off, and a new daemon started so that the next mount finds
// it. What lies on the dead one keeps failing. It does nothing when the generation
// is not the current one, or serves.
func Restart(ctx context.Context, runDir, key string, generation int, timeout time.Duration) (err error) {
	i, err := open(ctx, dirOf(runDir, key), openExisting, lockWait)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("instance %s: %w", key, err)
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	g := i.rec.Current
	if g == nil || g.Number != generation || !g.Ready {
		return nil
	}
	if p, err := nydusd.Find(g.PID, g.StartTime); err != nil || p != nil {
		return errors.Join(err, closeIf(p))
	}
	config, err := os.ReadFile(genDir(filepath.Dir(g.Mountpoint)).config())
	if err != nil {
		return fmt.Errorf("read nydusd's configuration: %w", err)
	}
	s := i.rec.spec(*g, runDir, string(config), timeout)
	if err := i.retire(); err != nil {
		return err
	}
	if err := i.sweep(); err != nil {
		i.note("clean up: %v", err)
	}
	if err := i.start(ctx, s); err != nil {
		return fmt.Errorf("image %s (instance %s): %w", s.Image, key, err)
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
	s.Daemon.Path, s.Daemon.Threads, s.Daemon.LogLevel = g.Nydusd, g.Threads, g.LogLevel
	s.Daemon.OOMScoreAdj, s.Daemon.CgroupParent, s.Daemon.StartTimeout = g.OOMScoreAdj, g.Cgroup, timeout
	s.Daemon.MemoryLimit, s.Daemon.CPULimit = g.MemoryLimit, g.CPULimit
	return s
}
