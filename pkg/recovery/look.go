package recovery

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/health"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
)

// lookEvery is how often it is looked whether there is something to look at: neither
// what a daemon writes nor what others leave makes an event that would be cheaper.
const lookEvery = 5 * time.Second

// glance wakes those followers now and then that have something to look at. There may
// be many, and a goroutine that wakes costs more than what it looks at.
func (r *Recovery) glance(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		r.mu.Lock()
		all := slices.Collect(maps.Values(r.followed))
		r.mu.Unlock()
		for _, f := range all {
			if f.changed() || f.pending.Load() {
				poke(f.stale)
			}
		}
	}
}

// view is what is seen of a daemon from outside.
type view struct {
	log   struct{ inode, size, changed int64 }
	begun int64
}

// changed tells whether something is to be seen that was not there the last time.
func (f *follower) changed() bool {
	now := view{begun: instance.Begun(f.first)}
	var st unix.Stat_t
	if unix.Stat(f.logPath, &st) == nil {
		now.log.inode, now.log.size, now.log.changed = int64(st.Ino), st.Size, st.Ctim.Nano()
	}
	same := now == f.viewed
	f.viewed = now
	return !same
}

// look tidies up, and looks whether the daemon serves errors although it says that it
// runs: one that does is replaced once another would do better.
func (f *follower) look(ctx context.Context) {
	f.pending.Store(false)
	f.tidy(ctx)
	fault, err := f.health.Broken()
	if err != nil {
		f.pending.Store(true)
		f.log.Warn("look whether nydusd is broken", "error", err)
	}
	if fault == nil || f.left {
		return
	}
	if !f.broken {
		f.broken = true
		f.log.Error("nydusd serves errors; unless recover_policy is none it is replaced once its registry answers", "event", "broken", "pid", f.g.PID, "error", fault)
	}
	if f.r.cfg.Policy == PolicyNone {
		return
	}
	if f.kept() == nil || !custody.Resends() {
		f.leave(ctx)
		return
	}
	if err := f.answered(ctx, fault); err != nil {
		if f.away == "" {
			f.away = err.Error()
			f.log.Warn("nydusd stays broken for now", "event", "broken", "pid", f.g.PID, "error", err)
		}
		f.pending.Store(true)
		return
	}
	// Many may be broken by one registry, and all see at once that it is back.
	select {
	case f.r.starts <- struct{}{}:
		defer func() { <-f.r.starts }()
	case <-ctx.Done():
		return
	}
	done, err := Upgrade{RunDir: f.r.cfg.RunDir, StartTimeout: f.r.cfg.StartTimeout}.Run(ctx, f.rec.Key, f.g.Number)
	if err != nil {
		f.pending.Store(true)
		f.log.Error("replace a nydusd that is broken", "event", "takeover failed", "error", err)
		return
	}
	f.log.Info("nydusd was broken and is succeeded: its registry answers again", "event", "takeover", "pid", done.After, "took", done.Stall)
}

// answered returns nil when each of the blobs is given out by one of the backends that
// may have it.
func (f *follower) answered(ctx context.Context, fault *health.Fault) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerWait, fmt.Errorf("not within %s", answerWait))
	defer cancel()
	env, err := instance.Environment(f.g)
	if err != nil {
		return err
	}
	configs := instance.ConfigPaths(f.r.cfg.RunDir, f.rec.Key, f.g)
	one := func(blobs []string) error {
		err := errors.New("nobody uses it any more")
		for _, config := range configs {
			if err = health.Answers(ctx, config, env, blobs); err == nil || ctx.Err() != nil {
				return err
			}
		}
		return err
	}
	if len(fault.Blobs) == 0 {
		return one(nil)
	}
	for _, blob := range fault.Blobs {
		if err := one([]string{blob}); err != nil {
			return err
		}
	}
	return nil
}

// answerWait bounds how long the backends of a broken daemon are asked.
const answerWait = 10 * time.Second

// leave takes a broken daemon that cannot be succeeded out of use for what comes.
func (f *follower) leave(ctx context.Context) {
	f.left = true
	f.change(ctx, func(g *instance.Generation) { g.Failed = true })
	f.log.Error("nydusd is broken and cannot be succeeded: its containers fail until they are started anew, which get another", "event", "left", "pid", f.g.PID)
}

// tidy ends successors that were begun and came to nothing, while the daemon serves.
func (f *follower) tidy(ctx context.Context) {
	begun := instance.Begun(f.g)
	if begun == f.begun {
		return
	}
	s, err := instance.TrySuccession(ctx, f.r.cfg.RunDir, f.rec.Key, f.g.Number)
	if err != nil {
		f.pending.Store(true) // as when somebody is at it
		return
	}
	defer s.Close()
	if s.Generation.PID != f.g.PID {
		f.pending.Store(true)
		return // its end is noticed next, or its record was not written
	}
	if err := f.endOthers(s); err != nil {
		f.pending.Store(true)
		f.log.Error("end a successor that was left half way", "error", err)
		return
	}
	f.begun = begun
}
