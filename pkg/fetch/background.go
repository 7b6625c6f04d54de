package fetch

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Policy says whether an image is completed in the background.
type Policy string

// The policies.
const (
	// Never is for none.
	Never Policy = "never"
	// Idle is for images of which something is in the cache, because they are or were
	// mounted, once nothing was fetched for them for a while.
	Idle Policy = "idle"
	// Always is for all.
	Always Policy = "always"
)

// Candidate is an image that may be completed.
type Candidate struct {
	Image
	Policy Policy
	// Instance is the key of the instance that containers use.
	Instance string
}

func (c *Candidate) key() string { return c.CacheDir + " " + c.Digest }

// Background completes images one after the other, beside what containers read. It keeps
// nothing: what was begun when it ends is gone on with by the next one.
type Background struct {
	// Images lists the candidates, Servers who serves images. What they return beside an
	// error counts.
	Images  func() ([]Candidate, error)
	Servers func() ([]Server, error)
	// Room is how many bytes may be added to the cache.
	Room func() (int64, error)
	// Complete completes an image, and leaves nothing behind when its context ends.
	Complete func(ctx context.Context, c Candidate) (Result, error)
	Log      *slog.Logger
	// Proc is where /proc is; "" for there. Now is the clock; nil for the real one.
	Proc string
	Now  func() time.Time
	// The following are how long and how often; 0 for the defaults. Look is how often
	// it is seen what daemons fetch while something is being completed, or waits for them;
	// List how often that is done otherwise, and images are listed, while there are
	// candidates, and Sleep while there are none. Quiet is how long nothing may have been
	// fetched for an image that is Idle, and Yield how long for any.
	Look, List, Sleep, Quiet, Yield time.Duration

	demand *demand
	listed time.Time
	list   []Candidate
	later  map[string]later
	told   string // what was told last that could not be listed
	// running is what is being completed, nil for nothing.
	running *running
}

// later is when an image is looked at again, and why not now.
type later struct {
	at    time.Time
	delay time.Duration
	why   string
}

type running struct {
	Candidate
	cancel context.CancelCauseFunc
	done   chan outcome
	began  time.Time
}

type outcome struct {
	Result
	err error
}

const (
	defaultLook  = 2 * time.Second
	defaultList  = 10 * time.Second
	defaultSleep = time.Minute
	quietImage   = 30 * time.Second
	defaultYield = 5 * time.Second
	// again is when a complete image is looked at again, which may have been evicted.
	again = 10 * time.Minute
	// soon is when one is looked at again that is not to be completed yet.
	soon = 30 * time.Second
	// firstRetry and lastRetry are when one is tried again that failed.
	firstRetry, lastRetry = time.Minute, time.Hour
)

// errYield says that containers wait for their registries.
var errYield = errors.New("containers read what is not cached")

// Run works until ctx ends.
func (b *Background) Run(ctx context.Context) error {
	b.prepare()
	defer b.stop()
	for {
		wait := b.step(ctx)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case out := <-b.ended():
			b.finish(ctx, out)
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		timer.Stop()
	}
}

func (b *Background) prepare() {
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{{&b.Look, defaultLook}, {&b.List, defaultList}, {&b.Sleep, defaultSleep}, {&b.Quiet, quietImage}, {&b.Yield, defaultYield}} {
		if *d.value <= 0 {
			*d.value = d.or
		}
	}
	if b.Now == nil {
		b.Now = time.Now
	}
	if b.Proc == "" {
		b.Proc = "/proc"
	}
	b.demand, b.later = newDemand(b.Proc), map[string]later{}
	b.listed = time.Time{}
}

// ended is what becomes of what is running.
func (b *Background) ended() <-chan outcome {
	if b.running == nil {
		return nil
	}
	return b.running.done
}

// stop ends what is running.
func (b *Background) stop() {
	if r := b.running; r != nil {
		r.cancel(context.Canceled)
		<-r.done
		b.running = nil
	}
}

// step does what is to be done now, and returns when to come again.
func (b *Background) step(ctx context.Context) time.Duration {
	now := b.Now()
	if b.listed.IsZero() || now.Sub(b.listed) >= b.List {
		b.refresh(now)
	}
	if len(b.list) == 0 && b.running == nil {
		b.listed = time.Time{}
		return b.Sleep
	}
	servers, err := b.Servers()
	if err != nil {
		b.Log.Warn("look which images are mounted", "error", err)
	}
	b.demand.look(now, servers)
	busy := now.Sub(b.demand.last) < b.Yield
	switch {
	case b.running != nil && busy:
		b.running.cancel(errYield)
	case b.running == nil && !busy:
		b.begin(ctx, now, servers)
	}
	if b.running != nil || busy {
		return b.Look
	}
	return b.List
}

// refresh lists the candidates.
func (b *Background) refresh(now time.Time) {
	all, err := b.Images()
	fault := ""
	if err != nil {
		fault = err.Error()
	}
	if fault != "" && fault != b.told {
		b.Log.Warn("list images to complete", "error", err)
	}
	b.told, b.listed = fault, now
	b.list = slices.DeleteFunc(all, func(c Candidate) bool { return c.Policy != Idle && c.Policy != Always })
	known := make(map[string]later, len(b.list))
	for i := range b.list {
		if l, ok := b.later[b.list[i].key()]; ok {
			known[b.list[i].key()] = l
		}
	}
	b.later = known
}

// begin begins with the next image, those that are mounted first.
func (b *Background) begin(ctx context.Context, now time.Time, servers []Server) {
	mounted := make(map[string]bool, len(servers))
	for _, s := range servers {
		mounted[s.Instance] = true
	}
	room := sync.OnceValues(b.Room) // it may have to look at all of the cache
	for _, first := range []bool{true, false} {
		for i := range b.list {
			c := b.list[i]
			if mounted[c.Instance] != first || now.Before(b.later[c.key()].at) || !b.wanted(now, c, room) {
				continue
			}
			b.start(ctx, now, c)
			return
		}
	}
}

// wanted tells whether an image is to be completed now; otherwise it is noted when to ask
// again.
func (b *Background) wanted(now time.Time, c Candidate, room func() (int64, error)) bool {
	put := func(after time.Duration, why string) bool {
		l := b.later[c.key()]
		if why != "" && why != l.why {
			b.Log.Info("an image is not completed in the background", "image", c.Name, "bootstrap", c.Digest, "reason", why)
		}
		b.later[c.key()] = later{at: now.Add(after), delay: l.delay, why: why}
		return false
	}
	s, err := Look(c.Image)
	if err != nil {
		b.fail(now, c, err)
		return false
	}
	if c.Policy == Idle {
		if s.Ready() == 0 && !s.Complete() {
			return put(soon, "") // it was not mounted yet
		}
		if quiet := now.Sub(b.demand.of[c.Instance]); quiet < b.Quiet {
			return put(b.Quiet-quiet, "")
		}
	}
	need := s.Missing()
	if need == 0 {
		return true // to be proven
	}
	left, err := room()
	if err != nil {
		b.fail(now, c, err)
		return false
	}
	if need > left {
		return put(firstRetry, "there is no room for it in the cache")
	}
	return true
}

func (b *Background) start(ctx context.Context, now time.Time, c Candidate) {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &running{Candidate: c, cancel: cancel, done: make(chan outcome, 1), began: now}
	b.running = r
	go func() {
		res, err := b.Complete(ctx, c)
		if err != nil && errors.Is(context.Cause(ctx), errYield) {
			err = errYield
		}
		r.done <- outcome{res, err}
		cancel(nil)
	}()
}

// finish notes what became of what was running.
func (b *Background) finish(ctx context.Context, out outcome) {
	r, now := b.running, b.Now()
	b.running = nil
	log := b.Log.With("image", r.Name, "bootstrap", r.Digest, "fetched", out.Fetched, "took", now.Sub(r.began).Round(time.Millisecond))
	switch {
	case ctx.Err() != nil:
	case errors.Is(out.err, errYield):
		log.Debug("completing an image waits for containers")
	case out.err != nil:
		b.fail(now, r.Candidate, out.err)
	default:
		if out.Fetched > 0 {
			log.Info("an image is complete in the cache", "event", "completed", "proven", out.Proven, "unproven", out.Unproven)
		}
		b.later[r.key()] = later{at: now.Add(again)}
	}
}

// fail notes that an image cannot be completed for now.
func (b *Background) fail(now time.Time, c Candidate, err error) {
	last := b.later[c.key()]
	l := later{delay: min(max(2*last.delay, firstRetry), lastRetry), why: err.Error()}
	l.at = now.Add(l.delay)
	if l.why != last.why {
		b.Log.Warn("an image cannot be completed in the background for now", "image", c.Name, "bootstrap", c.Digest, "again", l.delay, "error", err)
	}
	b.later[c.key()] = l
}
