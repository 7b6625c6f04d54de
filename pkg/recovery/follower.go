package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/health"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
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
	// wake says that what a successor needs may have changed.
	wake chan struct{}
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
	f.health, f.broken, f.away = health.Follow(instance.LogPath(f.rec), 0), false, ""
	look := time.NewTicker(lookEvery)
	defer look.Stop()
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
			case <-look.C:
				f.look(ctx)
			}
		}
	}
}

// lookEvery is how often a daemon is looked at: neither what it writes nor what others
// leave makes an event that would be cheaper.
const lookEvery = 5 * time.Second

// look tidies up, and looks whether the daemon serves errors although it says that it
// runs: one that does is replaced once another would do better.
func (f *follower) look(ctx context.Context) {
	f.tidy(ctx)
	fault, err := f.health.Broken()
	if err != nil {
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
		return // asked again at the next look
	}
	done, err := Upgrade{RunDir: f.r.cfg.RunDir, StartTimeout: f.r.cfg.StartTimeout}.Run(ctx, f.rec.Key, f.g.Number)
	if err != nil {
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

// tidy ends successors that were begun and came to nothing, while the daemon serves.
func (f *follower) tidy(ctx context.Context) {
	begun := instance.Begun(f.g)
	if begun == f.begun {
		return
	}
	s, err := instance.TrySuccession(ctx, f.r.cfg.RunDir, f.rec.Key, f.g.Number)
	if err != nil {
		return // at the next look: somebody is at it
	}
	defer s.Close()
	if s.Generation.PID != f.g.PID {
		return // its end is noticed next
	}
	if err := f.endOthers(s); err != nil {
		f.log.Error("end a successor that was left half way", "error", err)
		return
	}
	f.begun = begun
}

func (f *follower) kept() *custody.Custody {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.custody
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
