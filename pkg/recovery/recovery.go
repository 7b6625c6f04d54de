// Package recovery keeps images served whose daemon dies, hangs or is replaced: it
// follows the daemons of all instances in a run directory, keeps what a successor
// needs, and starts one.
//
// What it promises: with PolicyFailover and a daemon that can be succeeded, users of
// an image wait for some ten milliseconds when its daemon dies, and lose nothing.
// With PolicyRestart, and for a daemon that cannot, what is mounted fails from then
// on, and new mounts work at once. An image whose daemons die again and again is
// given up: its users get errors, and nothing is left of it once they are gone.
//
// Each death, hang, takeover, restart and giving up is a line in the log with the
// attribute event, the instance, its image, the daemon's process and the cause.
//
// It never touches a mount, so nothing that hangs can keep it; it never signals a
// daemon that serves. Mounts do not need it: without it a daemon that died is
// replaced by the next mount of its image.
package recovery

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Policy says what to do about a daemon that died.
type Policy string

// The policies.
const (
	// PolicyNone tells what happens and does nothing: the next mount of the image
	// starts a new daemon.
	PolicyNone Policy = "none"
	// PolicyRestart starts a new one at once. What is mounted keeps failing.
	PolicyRestart Policy = "restart"
	// PolicyFailover starts a successor that goes on with what is mounted.
	PolicyFailover Policy = "failover"
)

// Config is what a Recovery needs.
type Config struct {
	RunDir string
	Policy Policy
	// StartTimeout bounds the start of a daemon.
	StartTimeout time.Duration
	// Spare connects to the second keeper; nil for none.
	Spare Connector
	Log   *slog.Logger
}

const (
	// maxStarts bounds how many daemons are started at a time.
	maxStarts = 4
	// More than maxDeaths in deathWindow by its own fault, or as many in a row that
	// came soon, or successors in a row that failed, are a crash loop, which is given
	// up.
	maxDeaths   = 5
	deathWindow = 10 * time.Second
	// firstBackoff is the wait before a start after a daemon that has lived for
	// less than shortLife; it doubles with each.
	firstBackoff = 200 * time.Millisecond
	shortLife    = time.Second
	// killedLife is shortLife for one that somebody has killed: what makes a daemon
	// crash is asked of its successor at once, while whoever kills may do so again.
	killedLife = 100 * time.Millisecond
	// maxCut is how many successors in a row may be killed by somebody before they
	// serve.
	maxCut = 50
	// fedLife is what a daemon must live at least that was killed at its memory
	// limit, so that the limit is not too small for what is asked of it. More than
	// maxDeaths in a row that do not are a crash loop.
	fedLife = time.Minute
	// again is when something is tried again that failed without an event to
	// wait for; lastAgain bounds how that grows.
	again     = time.Second
	lastAgain = 30 * time.Second
)

// Recovery follows daemons. Use New.
type Recovery struct {
	cfg    Config
	starts chan struct{}

	mu       sync.Mutex
	followed map[string]*follower
	// done are the daemons of generations of which all was done, and that are not
	// gone.
	done map[string]int
	// deaths are the last ones of each instance.
	deaths map[string][]time.Time
	// unable are the executables that were reported as unable to be succeeded.
	unable map[string]bool
	spare  Spare
}

// New returns a Recovery that does nothing until Run.
func New(cfg Config) *Recovery {
	return &Recovery{
		cfg: cfg, starts: make(chan struct{}, maxStarts),
		followed: map[string]*follower{}, deaths: map[string][]time.Time{}, unable: map[string]bool{}, done: map[string]int{},
	}
}

// Run works until ctx ends, and returns an error only when it cannot follow the
// mount table. At its end daemons, and what the spare keeps, stay as they are.
// After an error it may be called again.
func (r *Recovery) Run(ctx context.Context) error {
	if r.cfg.Policy != PolicyFailover {
		// What an earlier configuration had kept would let users wait for nobody.
		r.forgoAll(ctx)
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
	all.Go(func() { r.glance(ctx) })
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
	present := make(map[string]bool, len(keys))
	defer r.forget(present)
	for _, key := range keys {
		present[key] = true
		rec, err := instance.ReadRecord(r.cfg.RunDir, key)
		if err != nil {
			pending = true
			continue
		}
		for _, g := range rec.Generations() {
			if g.Berth != nil || g.Daemonless() || g.Held {
				continue // its pool has the daemon, or there is none, or nobody would miss it
			}
			if !g.Ready {
				pending = true
				continue
			}
			r.follow(ctx, all, rec, g)
		}
	}
	return pending
}

// forget forgets what was done about instances that are gone.
func (r *Recovery) forget(present map[string]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name := range r.done {
		if key, _, _ := strings.Cut(name, "."); !present[key] {
			delete(r.done, name)
		}
	}
}

// follow begins to follow a generation, unless that is done already.
func (r *Recovery) follow(ctx context.Context, all *sync.WaitGroup, rec *instance.Record, g instance.Generation) {
	// An instance that comes again begins with the same numbers.
	name := fmt.Sprintf("%s.g%d.%d", rec.Key, g.Number, g.Started.UnixNano())
	r.mu.Lock()
	defer r.mu.Unlock()
	if pid, ok := r.done[name]; ok && pid == g.PID {
		return
	}
	if f, ok := r.followed[name]; ok {
		// What was added to a shared daemon is not in what is kept of it.
		if f.latest.Swap(int64(g.Revision)) != int64(g.Revision) {
			poke(f.wake)
		}
		return
	}
	f := &follower{
		r: r, name: name, rec: rec, g: g, first: g, logPath: instance.LogPath(rec),
		wake: make(chan struct{}, 1), stale: make(chan struct{}, 1),
		log: r.cfg.Log.With("instance", rec.Key, "generation", g.Number, "image", rec.Image),
	}
	f.latest.Store(int64(g.Revision))
	r.followed[name] = f
	all.Go(func() {
		f.run(ctx)
		r.mu.Lock()
		delete(r.followed, name)
		if ctx.Err() == nil { // otherwise another Run goes on
			r.done[name] = f.g.PID
		}
		r.mu.Unlock()
	})
}

// died counts a death of an instance's daemon, or a successor that failed, and
// returns how many there were within the window.
func (r *Recovery) died(key string, now time.Time) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	recent := []time.Time{now}
	for _, d := range r.deaths[key] {
		if now.Sub(d) < deathWindow {
			recent = append(recent, d)
		}
	}
	r.deaths[key] = recent
	return len(recent)
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

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
