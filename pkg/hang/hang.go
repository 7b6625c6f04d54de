package hang

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/probe"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Asker asks filesystems whether they answer. probe.Prober is one.
type Asker interface {
	Ask(ctx context.Context, mountpoints []string, bound time.Duration) map[string]error
}

// Config is what a Watch needs.
type Config struct {
	RunDir string
	// Timeout is how long a daemon may hang while somebody waits for it.
	Timeout time.Duration
	// Asker asks all daemons every AskEvery; zero for the default, a minute.
	Asker    Asker
	AskEvery time.Duration
	// StuckAfter is how long a daemon may stand still that was not stopped; zero for
	// the default. One that waits for a registry runs again when a request has timed
	// out.
	StuckAfter time.Duration
	Log        *slog.Logger
}

const (
	askEvery = time.Minute
	// stuckAfter is more than the 35 seconds after which a request times out by the
	// configuration that package nydusd writes.
	stuckAfter = 45 * time.Second
	// looks is how often a daemon is looked at within Timeout, maxLook bounds the
	// time between. One that hangs is looked at again when its time is over.
	looks   = 5
	maxLook = 2 * time.Second
)

// Watch looks after the daemons of a run directory. Use New.
type Watch struct {
	cfg     Config
	conns   *rootfs.Connections
	records *records
	seen    map[name]*daemon
	looked  time.Time
	// due is when the first of those that hang is to be dealt with, zero when none
	// hangs.
	due time.Time
	// asking counts our own questions that are not answered, by device number.
	asking map[string]int
	// asked receives the answers to a question, acted what could be done about a
	// daemon.
	asked chan map[string]error
	acted chan *daemon
	all   sync.WaitGroup
}

// New returns a Watch that does nothing until Run.
func New(cfg Config) *Watch {
	if cfg.AskEvery == 0 {
		cfg.AskEvery = askEvery
	}
	if cfg.StuckAfter == 0 {
		cfg.StuckAfter = stuckAfter
	}
	return &Watch{
		cfg: cfg, records: newRecords(cfg.RunDir), seen: map[name]*daemon{},
		asked: make(chan map[string]error, 1), acted: make(chan *daemon),
	}
}

// name is a daemon's own, of all there ever were.
type name struct {
	key             string
	generation, pid int
	start           uint64
}

// daemon is what is known of one that serves a generation.
type daemon struct {
	rec *instance.Record
	g   instance.Generation
	log *slog.Logger

	// good is when it was last seen not stopped, or nobody waiting; turns how often
	// its threads had run by then, and ran when that had last changed.
	good, ran time.Time
	turns     uint64
	// silent is since when it has not answered a question, zero when it has.
	silent time.Time
	// acting says that something is being done about it, killed that this was to
	// kill it.
	acting, killed bool
}

// Run works until ctx ends, and returns an error only when it cannot work. At its
// end daemons stay as they are.
func (w *Watch) Run(ctx context.Context) (err error) {
	if w.conns, err = rootfs.OpenConnections(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer func() { err = errors.Join(err, w.conns.Close()) }()
	defer w.all.Wait()
	defer cancel()
	// That a daemon hangs makes no event.
	timer := time.NewTimer(w.every())
	defer timer.Stop()
	round := time.NewTimer(w.cfg.AskEvery)
	defer round.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			w.look(ctx)
			timer.Reset(w.pause(time.Now()))
		case <-round.C:
			w.ask(ctx)
		case answers := <-w.asked:
			w.take(answers)
			round.Reset(w.cfg.AskEvery)
		case d := <-w.acted:
			d.alive(time.Now())
			d.acting = false
		}
	}
}

// every is how often daemons are looked at.
func (w *Watch) every() time.Duration { return min(w.cfg.Timeout/looks, maxLook) }

// pause is the time until the next look.
func (w *Watch) pause(now time.Time) time.Duration {
	if w.due.IsZero() {
		return w.every()
	}
	return min(w.every(), max(w.due.Sub(now), time.Millisecond))
}

// look looks at every daemon once.
func (w *Watch) look(ctx context.Context) {
	w.due = time.Time{}
	list, err := w.records.read()
	now := time.Now()
	if err != nil {
		w.cfg.Log.Error("look for daemons that hang", "error", err)
		return
	}
	since := w.observed(now)
	present := make(map[name]bool, len(w.seen))
	for _, rec := range list {
		for _, g := range rec.Generations() {
			if !g.Ready || g.Daemonless() {
				continue // its helper watches it, or there is no daemon
			}
			n := name{rec.Key, g.Number, g.PID, g.StartTime}
			present[n] = true
			d := w.seen[n]
			if d == nil {
				d = &daemon{log: w.cfg.Log.With("instance", rec.Key, "generation", g.Number, "image", rec.Image, "pid", g.PID)}
				d.alive(since)
				w.seen[n] = d
			}
			if d.acting {
				continue
			}
			d.rec, d.g = rec, g
			w.judge(ctx, d, now)
		}
	}
	for n, d := range w.seen {
		if !present[n] && !d.acting {
			delete(w.seen, n)
		}
	}
}

// observed returns since when a daemon can have hung that was not there before. What
// happened while we did not run nobody knows, so that time does not count, for no
// daemon: on a busy machine looks come late.
func (w *Watch) observed(now time.Time) (since time.Time) {
	if w.looked.IsZero() {
		w.looked = now
	}
	if missed := now.Sub(w.looked) - w.every(); missed > w.every() {
		w.looked = w.looked.Add(missed)
		for _, d := range w.seen {
			d.good, d.ran = d.good.Add(missed), d.ran.Add(missed)
		}
	}
	since, w.looked = w.looked, now
	return since
}

// alive notes that nothing is wrong.
func (d *daemon) alive(now time.Time) { d.good, d.ran = now, now }

// judge looks whether a daemon keeps somebody waiting, and why.
func (w *Watch) judge(ctx context.Context, d *daemon, now time.Time) {
	n, err := w.conns.Waiting(d.g.Dev)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Error("look whether nydusd hangs", "error", err)
	}
	if !d.g.Kept {
		n -= w.asking[d.g.Dev] // nobody is to lose his files for our questions
	}
	if n <= 0 {
		d.alive(now)
		return
	}
	p, err := nydusd.Find(d.g.PID, d.g.StartTime)
	if err != nil || p == nil {
		d.alive(now) // it has died, which is for others to handle
		return
	}
	defer p.Close()
	cause, due := d.hangs(p, now, w.cfg.Timeout, max(w.cfg.Timeout, w.cfg.StuckAfter))
	if cause == "" {
		if w.due.IsZero() || due.Before(w.due) {
			w.due = due
		}
		return
	}
	// Its device number is its own as long as it is connected.
	if connected, err := p.Connected(); err != nil || !connected {
		d.alive(now)
		return
	}
	w.act(ctx, d, cause, n)
}

// hangs says why a daemon, for which somebody waits, counts as hung; empty when it
// does not, but would from due on.
func (d *daemon) hangs(p *nydusd.Process, now time.Time, timeout, stuck time.Duration) (cause string, due time.Time) {
	if p.Stopped() {
		d.ran = now
		if due = d.good.Add(timeout); now.Before(due) {
			return "", due
		}
		return fmt.Sprintf("it was stopped, for %s", now.Sub(d.good).Round(time.Second)), due
	}
	d.good = now
	turns, err := p.Turns()
	if err != nil || turns != d.turns {
		d.turns, d.ran = turns, now
	}
	if due = d.ran.Add(stuck); now.Before(due) {
		return "", due
	}
	return fmt.Sprintf("it is stuck: none of its threads has run for %s", now.Sub(d.ran).Round(time.Second)), due
}

// act gets a daemon out of the way. It takes as long as the daemon takes to end, so
// others are looked at meanwhile.
func (w *Watch) act(ctx context.Context, d *daemon, cause string, waiting int) {
	d.acting = true
	succeeded := d.g.Kept && !d.killed
	d.killed = true
	log := d.log.With("cause", cause, "waiting", waiting)
	w.all.Go(func() {
		if succeeded {
			w.kill(d, log)
		} else {
			w.abort(ctx, d, log, cause)
		}
		select {
		case w.acted <- d:
		case <-ctx.Done():
		}
	})
}

// kill lets a successor take over. A daemon that does not even end is aborted the
// next time.
func (w *Watch) kill(d *daemon, log *slog.Logger) {
	log.Warn("nydusd hangs and is killed; its successor goes on", "event", "hang")
	p, err := nydusd.Find(d.g.PID, d.g.StartTime)
	if err == nil && p != nil {
		err = errors.Join(p.Abandon(), p.Close())
	}
	if err != nil {
		log.Error("kill nydusd that hangs", "error", err)
	}
}

func (w *Watch) abort(ctx context.Context, d *daemon, log *slog.Logger, cause string) {
	started := time.Now()
	err := instance.Abort(ctx, w.cfg.RunDir, d.rec.Key, d.g.Number, cause)
	switch {
	case errors.Is(err, instance.ErrGone), errors.Is(err, fs.ErrNotExist):
	case err != nil && ctx.Err() == nil:
		log.Error("nydusd hangs and could not be aborted", "event", "hang", "error", err, "took", time.Since(started))
	case err == nil:
		log.Error("nydusd hangs and was aborted: its containers fail, new ones get another nydusd", "event", "hang", "took", time.Since(started))
	}
}

// ask asks all daemons in the background: an idle one keeps nobody waiting, so it
// would not be noticed.
func (w *Watch) ask(ctx context.Context) {
	var mountpoints []string
	w.asking = map[string]int{}
	for _, d := range w.seen {
		if g := d.rec.Current; g != nil && g.Number == d.g.Number && !g.Failed {
			mountpoints = append(mountpoints, d.g.Mountpoint)
			w.asking[d.g.Dev]++
		}
	}
	if len(mountpoints) == 0 || w.cfg.Asker == nil {
		w.asked <- nil
		return
	}
	w.all.Go(func() {
		// Longer than a daemon may be stopped: then it is over before.
		w.asked <- w.cfg.Asker.Ask(ctx, mountpoints, w.cfg.Timeout+2*maxLook)
	})
}

// take notes what was answered.
func (w *Watch) take(answers map[string]error) {
	now := time.Now()
	w.asking = nil
	for _, d := range w.seen {
		err, ok := answers[d.g.Mountpoint]
		switch {
		case !ok || errors.Is(err, probe.ErrNotAsked) || errors.Is(err, probe.ErrGone):
		case errors.Is(err, probe.ErrNoAnswer):
			if d.silent.IsZero() {
				d.silent = now
				d.log.Warn("nydusd does not answer; is its registry reachable? New containers of the image fail meanwhile", "event", "silent", "error", err)
			}
		case err == nil && !d.silent.IsZero():
			d.log.Info("nydusd answers again", "event", "answers", "after", now.Sub(d.silent))
			d.silent = time.Time{}
		}
	}
}
