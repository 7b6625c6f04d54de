package recovery

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// ended sees to what has lost its daemon, and tells whether it is to be followed
// further.
func (f *follower) ended(ctx context.Context, how string) (further bool) {
	started := time.Now()
	s, err := f.succession(ctx)
	if errors.Is(err, instance.ErrGone) {
		f.forgo(ctx) // nobody will bring it back, so nobody is to wait for it
		return false
	}
	if err != nil {
		wait(ctx, again)
		return true
	}
	defer s.Close()
	if s.Generation.PID != f.g.PID || s.Generation.StartTime != f.g.StartTime {
		f.g = s.Generation // somebody has replaced it
		f.served()
		return true
	}
	f.adopt()
	if f.finished(ctx) {
		return false
	}
	cause := "unknown"
	if f.oomKills() > f.ooms {
		cause = "killed at its memory limit"
	}
	oom := cause != "unknown"
	f.starve(oom, started)
	f.log.Warn("nydusd has died", "event", "death", "pid", f.g.PID, "exit", how, "cause", cause, "kept", f.kept() != nil, "lived", f.lived(started))
	if f.r.cfg.Policy == PolicyNone {
		return false
	}
	if f.kept() != nil {
		if err := f.endOthers(s); err != nil {
			f.log.Error("end a successor that was left half way", "error", err)
			wait(ctx, again)
			return true
		}
	}
	return f.recover(ctx, s, started, !oom && (how == "" || how == sigkill))
}

// sigkill is how a process ends that somebody kills: no crash of its own.
var sigkill = "killed by " + unix.SignalName(unix.SIGKILL)

// lived is how long the dead daemon was followed; zero for one that was dead when it
// was looked for.
func (f *follower) lived(now time.Time) time.Duration {
	if f.met != f.g.PID {
		return 0
	}
	return now.Sub(f.since).Round(time.Millisecond)
}

// starve counts daemons that cannot live with their memory limit. What they were
// asked is asked of each successor again, which may take its time to die of it.
func (f *follower) starve(oom bool, now time.Time) {
	switch {
	case !oom:
		f.starved = 0
	case now.Sub(f.since) >= fedLife:
		f.starved = 1
	default:
		f.starved++
	}
}

// endOthers ends successors whose starter was killed before it wrote them down.
// Whether one serves cannot be told. Two must not, and with what is kept nothing is
// lost: the next one goes on where it stopped.
func (f *follower) endOthers(s *instance.Succession) error {
	n, err := s.EndOthers()
	if n > 0 {
		f.log.Warn("ended a successor that was left half way", "successors", n)
	}
	return err
}

// finished tells whether the generation's filesystem is gone, as after its last
// unmount, and forgets it then.
func (f *follower) finished(ctx context.Context) bool {
	if c := f.kept(); c != nil {
		if c.Alive() {
			return false
		}
	} else if f.mounted() {
		return false
	}
	if f.g.Kept {
		f.change(ctx, func(g *instance.Generation) { g.Kept = false })
	}
	return true
}

// mounted is for a generation of which nothing is kept: then the mount table tells.
func (f *follower) mounted() bool {
	m, ok, err := rootfs.Lookup(f.g.Mountpoint)
	return err == nil && ok && m.Dev == f.g.Dev || instance.InUse(f.r.cfg.RunDir, f.rec, f.g)
}

// recover brings the generation back, and tells whether it is to be followed
// further. killed says that the daemon's death was somebody else's doing.
func (f *follower) recover(ctx context.Context, s *instance.Succession, started time.Time, killed bool) (further bool) {
	short, deaths := shortLife, 0
	if killed {
		short = killedLife
	} else {
		deaths = f.r.died(f.rec.Key, started)
	}
	if f.lived(started) >= short {
		f.short = 0
	} else if f.failures+f.cut == 0 {
		f.short++
	}
	if deaths > maxDeaths || f.short > maxDeaths || f.starved > maxDeaths || f.failures >= maxDeaths || f.cut >= maxCut {
		f.giveUp(ctx, deaths)
		return false
	}
	if n := f.short + f.failures + min(f.cut, 1); n > 0 {
		wait(ctx, firstBackoff<<(n-1))
	}
	select {
	case f.r.starts <- struct{}{}:
		defer func() { <-f.r.starts }()
	case <-ctx.Done():
		return false
	}
	c := f.kept()
	if c == nil {
		f.restart(ctx, started)
		return false
	}
	err := f.succeed(ctx, s, c)
	if errors.Is(err, errLost) {
		f.log.Error("what was asked of the dead nydusd is lost: its containers fail, new ones get another", "event", "takeover failed", "error", err)
		f.restart(ctx, started)
		return false
	}
	if err != nil {
		if ctx.Err() == nil {
			if errors.Is(err, errKilled) {
				f.cut++
			} else {
				f.failures++
			}
			f.log.Error("successor of nydusd failed", "event", "takeover failed", "error", err)
		}
		return true
	}
	f.failures, f.cut = 0, 0
	f.served()
	f.reportUnmet()
	f.log.Info("nydusd was succeeded", "event", "takeover", "pid", f.g.PID, "restarts", f.g.Restarts, "took", time.Since(started))
	return true
}

// succeed starts a daemon and hands it what is kept.
func (f *follower) succeed(ctx context.Context, s *instance.Succession, c *custody.Custody) error {
	n, err := begin(ctx, s, f.g.Nydusd, f.r.cfg.StartTimeout)
	if err != nil {
		return err
	}
	record, err := n.take(ctx, c)
	if err != nil {
		return err
	}
	// It serves, also when that cannot be written down.
	f.change(ctx, func(g *instance.Generation) {
		record(g)
		g.Kept = true
		if g.Revision > g.KeptRevision {
			// It does not know the last images, and would give their place to others,
			// whose files their users would read then.
			g.Failed = true
		}
	})
	if f.g.Failed && f.g.Shared {
		f.log.Error("images that were given to a shared nydusd just before it died are lost: their containers fail", "event", "left", "pid", f.g.PID)
	}
	return nil
}

// giveUp ends a crash loop.
func (f *follower) giveUp(ctx context.Context, deaths int) {
	f.log.Error("nydusd keeps dying and is given up; its containers fail, new ones get a new nydusd",
		"event", "given up", "deaths", deaths, "within", deathWindow, "short lives", f.short, "failed successors", f.failures+f.cut)
	f.forgo(ctx)
	if err := instance.Retire(context.WithoutCancel(ctx), f.r.cfg.RunDir, f.rec.Key, f.g.Number); err != nil {
		f.log.Error("take a daemon that is given up out of use", "error", err)
	}
}

// restart replaces a daemon that cannot be succeeded.
func (f *follower) restart(ctx context.Context, started time.Time) {
	f.forgo(ctx)
	err := instance.Restart(ctx, f.r.cfg.RunDir, f.rec.Key, f.g.Number, f.r.cfg.StartTimeout)
	if err != nil {
		if ctx.Err() == nil {
			f.log.Error("restart of nydusd failed; the next mount tries again", "event", "restart failed", "error", err)
		}
		return
	}
	f.log.Info("nydusd was restarted: what was mounted fails, new containers work", "event", "restart", "took", time.Since(started))
}
