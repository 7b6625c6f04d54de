// Package recovery keeps images served whose daemon dies: it follows the daemons
// of all instances in a run directory, keeps what a successor needs, and starts
// one.
//
// What it promises: with PolicyFailover and a daemon that can be succeeded, users of
// an image wait for some ten milliseconds when its daemon dies, and lose nothing.
// With PolicyRestart, and for a daemon that cannot, what is mounted fails from then
// on, and new mounts work at once. An image whose daemons die again and again is
// given up, which is said in the log.
//
// It never touches a mount, so nothing that hangs can keep it; it never signals a
// daemon that serves. Mounts do not need it: without it a daemon that died is
// replaced by the next mount of its image.
package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Policy says what to do about a daemon that died.
type Policy string

// The policies.
const (
	// PolicyNone does nothing: the next mount of the image starts a new daemon.
	PolicyNone Policy = "none"
	// PolicyRestart starts a new one at once. What is mounted keeps failing.
	PolicyRestart Policy = "restart"
	// PolicyFailover starts a successor that goes on with what is mounted.
	PolicyFailover Policy = "failover"
)

// Spare keeps a second copy of what a successor needs, in another process.
// custody.Spare is one.
type Spare interface {
	Put(name string, c *custody.Custody) error
	Get(name string) (*custody.Custody, error)
	Drop(name string) error
	// Close ends the connection: what is kept stays kept.
	Close() error
}

// Config is what a Recovery needs.
type Config struct {
	RunDir string
	Policy Policy
	// StartTimeout bounds the start of a daemon.
	StartTimeout time.Duration
	// Spare connects to the second keeper, starting it if need be; nil for none.
	// Gone waits for the keeper's end.
	Spare func(ctx context.Context) (s Spare, gone func(), err error)
	Log   *slog.Logger
}

const (
	// maxStarts bounds how many daemons are started at a time.
	maxStarts = 4
	// maxDeaths in deathWindow are a crash loop, which is given up.
	maxDeaths   = 5
	deathWindow = time.Minute
	// firstBackoff is the wait before the second start within the window; it
	// doubles with each. The first start does not wait.
	firstBackoff = 200 * time.Millisecond
	// again is when something is tried again that failed without an event to
	// wait for.
	again = time.Second
)

// Recovery follows daemons. Use New.
type Recovery struct {
	cfg    Config
	starts chan struct{}

	mu       sync.Mutex
	followed map[string]*follower
	// unable are the executables that were reported as unable to be succeeded.
	unable map[string]bool
	spare  Spare
}

// New returns a Recovery that does nothing until Run.
func New(cfg Config) *Recovery {
	return &Recovery{cfg: cfg, starts: make(chan struct{}, maxStarts), followed: map[string]*follower{}, unable: map[string]bool{}}
}

// Run works until ctx ends, and returns an error only when it cannot follow the
// mount table. At its end daemons, and what the spare keeps, stay as they are.
func (r *Recovery) Run(ctx context.Context) error {
	if r.cfg.Policy == PolicyNone {
		<-ctx.Done()
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	changed := make(chan struct{}, 1)
	failed := make(chan error, 1)
	go func() { failed <- rootfs.Follow(ctx, func() { poke(changed) }) }()
	if r.cfg.Spare != nil && r.cfg.Policy == PolicyFailover {
		// Before the first look: what died in our absence is with it.
		gone := r.connect(ctx)
		all.Go(func() { r.keepSpare(ctx, gone) })
	}
	for {
		pending := r.look(ctx, &all)
		var later <-chan time.Time
		timer := time.NewTimer(again)
		if pending {
			// Mounted, and not written down as ready yet.
			later = timer.C
		}
		select {
		case <-changed:
		case <-later:
		case err := <-failed:
			timer.Stop()
			return err
		}
		timer.Stop()
		if ctx.Err() != nil {
			return <-failed
		}
	}
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// look begins to follow what is new, and tells whether something is about to be.
func (r *Recovery) look(ctx context.Context, all *sync.WaitGroup) (pending bool) {
	keys, err := instance.Keys(r.cfg.RunDir)
	if err != nil {
		r.cfg.Log.Error("look for daemons", "error", err)
		return true
	}
	for _, key := range keys {
		rec, err := instance.ReadRecord(r.cfg.RunDir, key)
		if err != nil {
			pending = true
			continue
		}
		for _, g := range rec.Generations() {
			if !g.Ready {
				pending = true
				continue
			}
			name := fmt.Sprintf("%s.g%d", key, g.Number)
			r.mu.Lock()
			if _, ok := r.followed[name]; !ok {
				f := &follower{r: r, name: name, rec: rec, g: g, log: r.cfg.Log.With("instance", key, "generation", g.Number, "image", rec.Image)}
				r.followed[name] = f
				all.Go(func() {
					f.run(ctx)
					r.mu.Lock()
					delete(r.followed, name)
					r.mu.Unlock()
				})
			}
			r.mu.Unlock()
		}
	}
	return pending
}

// connect gets a spare, or none. r.spare is nil then.
func (r *Recovery) connect(ctx context.Context) (gone func()) {
	s, gone, err := r.cfg.Spare(ctx)
	if err != nil {
		if ctx.Err() == nil {
			r.cfg.Log.Warn("no second keeper: when snapshotter and a daemon end together, its containers fail", "error", err)
		}
		return nil
	}
	r.mu.Lock()
	r.spare = s
	r.mu.Unlock()
	return gone
}

// keepSpare replaces the second keeper when it ends, and gives it all there is.
// gone waits for the end of the first one, nil for none.
func (r *Recovery) keepSpare(ctx context.Context, gone func()) {
	for {
		if gone != nil {
			r.useSpare(ctx, gone)
		} else {
			wait(ctx, again)
		}
		if ctx.Err() != nil {
			return
		}
		gone = r.connect(ctx)
	}
}

// useSpare returns when the second keeper has ended, or ctx.
func (r *Recovery) useSpare(ctx context.Context, gone func()) {
	r.mu.Lock()
	spare := r.spare
	all := make([]*follower, 0, len(r.followed))
	for _, f := range r.followed {
		all = append(all, f)
	}
	r.mu.Unlock()
	for _, f := range all {
		f.share(spare)
	}
	ended := make(chan struct{})
	go func() {
		gone()
		close(ended)
	}()
	select {
	case <-ended:
		r.cfg.Log.Warn("the second keeper has ended; starting another")
	case <-ctx.Done():
	}
	r.mu.Lock()
	r.spare = nil
	r.mu.Unlock()
	_ = spare.Close()
	<-ended
}

func (r *Recovery) currentSpare() Spare {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.spare
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// reportUnable says once of an executable that it cannot be succeeded.
func (r *Recovery) reportUnable(path string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.unable[path] {
		r.unable[path] = true
		r.cfg.Log.Warn("this nydusd cannot hand a filesystem over: when it dies its containers fail, and it is restarted for new ones; use 2.3 or newer",
			"nydusd", path, "error", err)
	}
}

// follower follows one generation through its daemons.
type follower struct {
	r    *Recovery
	name string
	rec  *instance.Record
	g    instance.Generation
	log  *slog.Logger

	mu      sync.Mutex
	custody *custody.Custody
	deaths  []time.Time
}

// run returns when the generation has ended, or ctx.
func (f *follower) run(ctx context.Context) {
	defer f.drop()
	f.reportUnmet(f.g.Unmet)
	for ctx.Err() == nil {
		p := f.process()
		if p != nil {
			f.keep(ctx)
			ended := p.WaitContext(ctx)
			how := p.Exit() // its parent learns it
			_ = p.Close()
			if !ended {
				wait(ctx, again)
				continue
			}
			if f.finished(ctx) {
				return
			}
			f.log.Warn("nydusd has died", "pid", f.g.PID, "exit", how, "kept", f.kept() != nil)
		} else if f.adopt(); f.finished(ctx) {
			return
		}
		if !f.recover(ctx) {
			return
		}
	}
}

// reportUnmet says which limits the daemon runs without.
func (f *follower) reportUnmet(unmet []string) {
	for _, what := range unmet {
		f.log.Warn("a limit of nydusd is not in force", "pid", f.g.PID, "reason", what)
	}
}

// process opens the daemon, nil for one that has ended. A successor whose starter
// was killed before it wrote that down is found by its arguments, and ended.
func (f *follower) process() *nydusd.Process {
	p, err := nydusd.Find(f.g.PID, f.g.StartTime)
	if err != nil {
		f.log.Error("follow nydusd", "pid", f.g.PID, "error", err)
		return nil
	}
	if p != nil {
		return p
	}
	orphans, err := instance.Orphans(f.g)
	for _, o := range orphans {
		// Whether it serves cannot be told. Two must not, and with what is kept
		// nothing is lost: the next one goes on where it stopped.
		if f.g.Kept {
			f.log.Warn("end a successor that was left half way", "pid", o.PID)
			err = errors.Join(err, kill(o))
		}
		err = errors.Join(err, o.Close())
	}
	if err != nil {
		f.log.Error("look for successors that were left half way", "error", err)
	}
	return nil
}

func (f *follower) kept() *custody.Custody {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.custody
}

// finished tells whether the generation's filesystem is gone, as after its last
// unmount, and forgets it then.
func (f *follower) finished(ctx context.Context) bool {
	c := f.kept()
	if c != nil && c.Alive() {
		return false
	}
	if c == nil {
		// Nothing was kept. Then the mount table must tell.
		m, ok, err := rootfs.Lookup(f.g.Mountpoint)
		if err == nil && ok && m.Dev == f.g.Dev {
			return false
		}
	}
	if f.g.Kept {
		f.change(ctx, func(g *instance.Generation) { g.Kept = false })
	}
	return true
}

func (f *follower) change(ctx context.Context, change func(*instance.Generation)) {
	err := instance.Change(ctx, f.r.cfg.RunDir, f.rec.Key, f.g.Number, func(g *instance.Generation) {
		change(g)
		f.g = *g
	})
	if err != nil && !errors.Is(err, instance.ErrGone) {
		f.log.Error("write instance record", "error", err)
	}
}

// keep takes what a successor needs from the living daemon.
func (f *follower) keep(ctx context.Context) {
	if f.r.cfg.Policy != PolicyFailover || f.g.Supervisor == "" || f.kept() != nil {
		return
	}
	bounded, cancel := context.WithTimeoutCause(ctx, client.Timeout, fmt.Errorf("not within %s", client.Timeout))
	defer cancel()
	c, err := custody.Receive(bounded, f.g.Supervisor, client.New(f.g.Socket).SendFD)
	switch {
	case err == nil:
		f.set(c)
		f.change(ctx, func(g *instance.Generation) { g.Kept = true })
	case errors.Is(err, custody.ErrUnable):
		f.r.reportUnable(f.g.Nydusd, err)
	case ctx.Err() == nil:
		f.log.Warn("cannot keep what a successor of nydusd needs: when it dies its containers fail", "pid", f.g.PID, "error", err)
	}
}

// adopt fetches what the spare keeps of a daemon that has died.
func (f *follower) adopt() {
	spare := f.r.currentSpare()
	if spare == nil || f.kept() != nil || !f.g.Kept {
		return
	}
	c, err := spare.Get(f.name)
	if err != nil {
		f.log.Error("fetch what a successor of nydusd needs", "error", err)
		return
	}
	f.set(c)
}

func (f *follower) set(c *custody.Custody) {
	f.mu.Lock()
	f.custody = c
	f.mu.Unlock()
	f.share(f.r.currentSpare())
}

// share gives the spare its copy.
func (f *follower) share(spare Spare) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if spare == nil || f.custody == nil {
		return
	}
	if err := spare.Put(f.name, f.custody); err != nil {
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

// recover brings the generation back, and tells whether it is to be followed
// further.
func (f *follower) recover(ctx context.Context) bool {
	started := time.Now()
	if !f.backoff(ctx) {
		return false
	}
	select {
	case f.r.starts <- struct{}{}:
		defer func() { <-f.r.starts }()
	case <-ctx.Done():
		return false
	}
	if f.kept() == nil {
		f.restart(ctx, started)
		return false
	}
	if err := f.succeed(ctx); err != nil {
		if ctx.Err() == nil {
			f.log.Error("successor of nydusd failed", "error", err)
		}
		return ctx.Err() == nil // backoff decides how often
	}
	f.log.Info("nydusd was succeeded", "pid", f.g.PID, "restarts", f.g.Restarts, "took", time.Since(started))
	return true
}

// backoff waits before all starts but the first, and gives a crash loop up.
func (f *follower) backoff(ctx context.Context) bool {
	now := time.Now()
	recent := f.deaths[:0]
	for _, d := range f.deaths {
		if now.Sub(d) < deathWindow {
			recent = append(recent, d)
		}
	}
	f.deaths = append(recent, now)
	n := len(f.deaths)
	if n > maxDeaths {
		f.log.Error("nydusd keeps dying and is given up; its containers fail, new ones get a new daemon", "deaths", n, "within", deathWindow)
		f.change(ctx, func(g *instance.Generation) { g.Kept = false })
		if spare := f.r.currentSpare(); spare != nil {
			if err := spare.Drop(f.name); err != nil {
				f.log.Warn("make the second keeper let go", "error", err)
			}
		}
		return false
	}
	if n > 1 {
		wait(ctx, firstBackoff<<(n-2))
	}
	return ctx.Err() == nil
}

// restart replaces a daemon that cannot be succeeded.
func (f *follower) restart(ctx context.Context, started time.Time) {
	err := instance.Restart(ctx, f.r.cfg.RunDir, f.rec.Key, f.g.Number, f.r.cfg.StartTimeout)
	if err != nil && ctx.Err() == nil {
		f.log.Error("restart of nydusd failed; the next mount tries again", "error", err)
		return
	}
	f.log.Info("nydusd was restarted: what was mounted fails, new containers work", "took", time.Since(started))
}

// succeed starts a daemon and hands it what is kept.
func (f *follower) succeed(ctx context.Context) (err error) {
	c := f.kept()
	// What the dead daemon had read and not answered is asked again.
	if err := c.Resend(); err != nil {
		f.log.Warn("requests in flight may hang", "error", err)
	}
	p, socket, err := instance.StartSuccessor(f.rec, f.g)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, kill(p))
		}
		err = errors.Join(err, p.Close())
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, f.r.cfg.StartTimeout, fmt.Errorf("not within %s", f.r.cfg.StartTimeout))
	defer cancel()
	api := client.New(socket)
	if err := awaitSocket(ctx, p, socket); err != nil {
		return err
	}
	if err := custody.Give(ctx, f.g.Supervisor, c, api.Takeover); err != nil {
		return err
	}
	if err := api.Start(ctx); err != nil {
		return err
	}
	f.change(context.WithoutCancel(ctx), func(g *instance.Generation) {
		g.PID, g.StartTime, g.Socket, g.Restarts, g.Kept = p.PID, p.StartTime, socket, g.Restarts+1, true
		g.Unmet = p.Unmet
	})
	f.reportUnmet(p.Unmet)
	return nil
}

// kill ends a successor that came to nothing. It has mounted nothing.
func kill(p *nydusd.Process) error {
	err := p.Abandon()
	p.Wait(time.Now().Add(again))
	p.Exit()
	return err
}

// awaitSocket waits until the daemon listens: bind tells by the file, listen by
// nothing, so it is asked.
func awaitSocket(ctx context.Context, p *nydusd.Process, socket string) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := client.New(socket).Info(ctx); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("nydusd %d does not listen on %s: %w", p.PID, socket, context.Cause(ctx))
		}
		if p.Wait(time.Now()) {
			return fmt.Errorf("nydusd %d ended before it listened: %s: %w", p.PID, p.Exit(), os.ErrProcessDone)
		}
	}
}
