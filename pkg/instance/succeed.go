package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

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

// StartSuccessor starts a daemon that is going to take a generation over whose own
// has ended, and returns where its API will be. It changes no record: write down
// what came of it with Change. Until then Successors finds it.
func StartSuccessor(rec *Record, g Generation) (p *nydusd.Process, socket string, err error) {
	dir := genDir(filepath.Dir(g.Mountpoint))
	log, err := openLog(diskDirOf(rec.Root, rec.Key).log())
	if err != nil {
		return nil, "", err
	}
	defer log.Close()
	// A fresh one each time: the dead daemon's is still there.
	socket = filepath.Join(string(dir), fmt.Sprintf("s%d.sock", (g.Restarts+1)%1000))
	if err := remove(socket); err != nil {
		return nil, "", err
	}
	p, err = nydusd.Start(nydusd.Command{
		Path: g.Nydusd, Successor: true, Supervisor: g.Supervisor, ID: cgroupOf(rec.Key, g).Name, Mountpoint: g.Mountpoint, Socket: socket,
		Log: log, LogLevel: g.LogLevel, Threads: g.Threads, OOMScoreAdj: g.OOMScoreAdj, Cgroup: cgroupOf(rec.Key, g),
	})
	if err == nil {
		warn(log, p)
	}
	return p, socket, err
}

// Orphans lists the processes that serve a generation's mountpoint, or are about
// to: a successor whose starter was killed before it wrote that down among them.
func Orphans(g Generation) ([]*nydusd.Process, error) {
	return nydusd.Orphans(filepath.Dir(g.Mountpoint))
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
