package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/health"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
)

// follower follows one generation through its daemons.
type follower struct {
	r    *Recovery
	name string
	rec  *instance.Record
	log  *slog.Logger

	// g is the generation as it was last read; only run changes it.
	g instance.Generation
	// failures counts successors that failed in a row, cut those that somebody has
	// killed, short those daemons that have lived for a short time only; since is when
	// the present one was met.
	failures, cut, short int
	since                time.Time
	met                  int // its PID
	// health tells whether the present one is broken, which broken says was
	// reported; left that nothing more can be done about it.
	health       *health.Log
	broken, left bool
	away         string // why it stays broken, once that was said
	// wake says that what a successor needs may have changed, stale that there is
	// something to look at, and pending that there will be.
	wake, stale chan struct{}
	pending     atomic.Bool
	// What is looked at from outside: see glance, which has viewed for itself.
	first   instance.Generation
	logPath string
	viewed  view
	// latest is the revision of what the daemon serves, revision that of what is
	// kept.
	latest   atomic.Int64
	revision int64
	// begun is how many successors had been begun when none was left half way.
	begun int64
	// ooms is how many were killed at their memory limit before the present one,
	// starved how many of the last ones in a row, none of which has lived for long.
	ooms, starved int

	mu      sync.Mutex
	custody *custody.Custody
	// server is whose filesystem custody is, for the spare.
	server struct {
		pid   int
		start uint64
	}
}

// run returns when the generation has ended or was given up, or at the end of ctx.
func (f *follower) run(ctx context.Context) {
	defer f.drop()
	f.reportUnmet()
	// What has died before the end is brought back all the same: nobody else may
	// have what it takes.
	work, cancel := outlast(ctx, f.r.cfg.StartTimeout)
	defer cancel()
	for ctx.Err() == nil {
		var how string
		p, err := nydusd.Find(f.g.PID, f.g.StartTime)
		if err != nil {
			f.log.Error("follow nydusd", "pid", f.g.PID, "error", err)
			wait(ctx, again)
			continue
		}
		if p == nil {
			how = nydusd.Reap(f.g.PID, f.g.StartTime)
		} else {
			f.met, f.since, f.ooms = f.g.PID, time.Now(), f.oomKills()
			ended := f.attend(ctx, p) || p.Wait(time.Now())
			how = p.Exit()
			_ = p.Close()
			if !ended {
				wait(ctx, again) // out of descriptors, or the end
				continue
			}
		}
		if !f.ended(work, how) {
			return
		}
	}
}

// outlast returns a context that ends some time after another.
func outlast(ctx context.Context, more time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(more, func() { cancel(context.Cause(ctx)) })
	})
	return out, func() { stop(); cancel(nil) }
}

// reportUnmet says which limits the daemon runs without.
func (f *follower) reportUnmet() {
	for _, what := range f.g.Unmet {
		f.log.Warn("a limit of nydusd is not in force", "event", "limit", "pid", f.g.PID, "reason", what)
	}
}

// oomKills counts the daemons of the generation that were killed at their memory
// limit.
func (f *follower) oomKills() int {
	n, err := instance.OOMKills(f.rec.Key, f.g)
	if err != nil {
		f.log.Warn("look whether nydusd was killed for memory", "error", err)
	}
	return n
}

// attend waits for the daemon's end, and meanwhile sees to it that what a successor
// needs is kept. It tells whether the daemon has ended.
func (f *follower) attend(ctx context.Context, p *nydusd.Process) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan bool, 1)
	go func() {
		ended <- p.WaitContext(ctx)
		cancel() // whatever is being asked of it
	}()
	f.health, f.broken, f.away = health.Follow(f.logPath, f.g.Number, 0), false, ""
	f.pending.Store(true)
	for pause := again; ; pause = min(2*pause, lastAgain) {
		timer := time.NewTimer(pause)
		if f.keep(ctx, p) {
			timer.Stop() // nothing is left to try
		}
	waiting:
		for {
			select {
			case ok := <-ended:
				timer.Stop()
				return ok
			case <-timer.C:
				break waiting
			case <-f.wake:
				timer.Stop()
				pause = again
				break waiting
			case <-f.stale:
				f.look(ctx)
			}
		}
	}
}

// keep takes what a successor needs from the living daemon, and tells whether that
// is done, or of no use to try again.
func (f *follower) keep(ctx context.Context, p *nydusd.Process) (done bool) {
	if f.r.cfg.Policy != PolicyFailover || f.g.Supervisor == "" {
		return true
	}
	if f.kept() != nil && f.revision == f.latest.Load() {
		f.served()
		return true
	}
	s, err := f.succession(ctx)
	if err != nil {
		return ctx.Err() != nil || errors.Is(err, instance.ErrGone)
	}
	defer s.Close()
	if s.Generation.PID != f.g.PID {
		return true // it has been replaced: its end is noticed next
	}
	bounded, cancel := context.WithTimeoutCause(ctx, client.Timeout, fmt.Errorf("not within %s", client.Timeout))
	defer cancel()
	// It is mounted before it listens.
	err = awaitSocket(bounded, p, f.g.Socket)
	var c *custody.Custody
	if err == nil {
		c, err = receive(bounded, f.g)
	}
	switch {
	case err == nil && len(c.State) > custody.MaxState:
		f.log.Warn("what a successor of nydusd needs is too long to hand over: when it dies its containers fail", "pid", f.g.PID, "bytes", len(c.State), "most", custody.MaxState)
		_ = c.Close()
	case err == nil:
		f.revision = int64(s.Generation.Revision)
		f.set(c)
		f.change(ctx, func(g *instance.Generation) { g.Kept, g.KeptRevision = true, int(f.revision) })
	case errors.Is(err, custody.ErrUnable):
		f.r.reportUnable(f.g.Nydusd, err)
	case ctx.Err() == nil:
		f.log.Warn("cannot keep what a successor of nydusd needs; trying again", "pid", f.g.PID, "error", err)
		return false
	}
	return true
}

// succession locks out whoever else might replace the daemon. An error other than
// that of ctx or instance.ErrGone is in the log.
func (f *follower) succession(ctx context.Context) (*instance.Succession, error) {
	s, err := instance.LockSuccession(ctx, f.r.cfg.RunDir, f.rec.Key, f.g.Number)
	if err != nil && ctx.Err() == nil && !errors.Is(err, instance.ErrGone) {
		f.log.Error("lock out others from replacing nydusd", "error", err)
	}
	return s, err
}

func (f *follower) kept() *custody.Custody {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.custody
}

func (f *follower) change(ctx context.Context, change func(*instance.Generation)) {
	err := instance.Change(context.WithoutCancel(ctx), f.r.cfg.RunDir, f.rec.Key, f.g.Number, func(g *instance.Generation) {
		if !g.Started.Equal(f.g.Started) {
			return // another one of the same number
		}
		change(g)
		f.g = *g
	})
	if err != nil && !errors.Is(err, instance.ErrGone) {
		f.log.Error("write instance record", "error", err)
	}
}

// adopt fetches what the spare keeps of a daemon that has died.
func (f *follower) adopt() {
	spare := f.r.currentSpare()
	if spare == nil || f.kept() != nil {
		return
	}
	// Also when the record does not say so: it is given before that is written down.
	c, err := spare.Get(f.name)
	if err != nil {
		if f.g.Kept {
			f.log.Error("fetch what a successor of nydusd needs", "error", err)
		}
		return
	}
	f.set(c)
}

func (f *follower) set(c *custody.Custody) {
	f.mu.Lock()
	if f.custody != nil {
		_ = f.custody.Close()
	}
	f.custody = c
	f.server.pid, f.server.start = f.g.PID, f.g.StartTime
	f.mu.Unlock()
	f.share()
}

// served tells the spare that another daemon serves what is kept.
func (f *follower) served() {
	f.mu.Lock()
	same := f.server.pid == f.g.PID && f.server.start == f.g.StartTime
	f.server.pid, f.server.start = f.g.PID, f.g.StartTime
	f.mu.Unlock()
	if !same {
		f.share()
	}
}

// share gives the spare its copy.
func (f *follower) share() {
	spare := f.r.currentSpare()
	f.mu.Lock()
	defer f.mu.Unlock()
	if spare == nil || f.custody == nil {
		return
	}
	if err := spare.Put(f.name, f.custody, f.server.pid, f.server.start); err != nil {
		f.log.Warn("give the second keeper its copy", "error", err)
	}
}

// drop closes what is kept. The spare's copy stays when the snapshotter ends, and
// goes by itself with the filesystem.
func (f *follower) drop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.custody != nil {
		_ = f.custody.Close()
		f.custody = nil
	}
}

// forgo lets everything go that makes users wait for a successor: there will be
// none, so they get errors.
func (f *follower) forgo(ctx context.Context) {
	f.drop()
	if spare := f.r.currentSpare(); spare != nil {
		if err := spare.Drop(f.name); err != nil {
			f.log.Warn("make the second keeper let go", "error", err)
		}
	}
	if f.g.Kept {
		f.change(ctx, func(g *instance.Generation) { g.Kept = false })
	}
}
