package fetch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Daemon is a nydusd that fetches all of an image.
type Daemon interface {
	// Over tells whether it has ended, or cannot get anything any more.
	Over() bool
	// Turns counts what it does: while it stays the same, the daemon does nothing.
	Turns() (uint64, error)
	// Ask asks where the blobs come from for a little of each. The error says why they
	// cannot be had.
	Ask(ctx context.Context, blobs []string) error
	// Said is the end of its log.
	Said() string
	// Stop ends it. It is called once, and waits until nothing of it is left.
	Stop(ctx context.Context) error
}

// Fetcher has nydusd fetch what is missing. A duration or number of 0 is its default.
type Fetcher struct {
	// Start starts a daemon that fetches all of an image.
	Start func(ctx context.Context, im Image) (Daemon, error)
	// Rate is how many bytes a second are fetched on average; 0 for no bound. nydusd
	// itself cannot be slowed down below 16 MiB a second: it is ended when it is ahead,
	// and another one started later.
	Rate int64
	// Poll is how often the maps are looked at, which make no events.
	Poll time.Duration
	// Quiet is how long a daemon that does nothing may have nothing to do, and Stall how
	// long one that does something may get nothing, before it is replaced.
	Quiet, Stall time.Duration
	// Tries is how many daemons in a row may get nothing.
	Tries int
	// StopWait bounds how long a daemon may take to end.
	StopWait time.Duration
}

const (
	defaultPoll     = 200 * time.Millisecond
	defaultQuiet    = 6 * time.Second // longer than it waits for a connection
	defaultStall    = 100 * time.Second
	defaultTries    = 3
	defaultStopWait = 20 * time.Second
	// leastAhead is how far ahead of the rate it gets before it is ended, in bytes, or
	// as much as two seconds have: to start another one takes time.
	leastAhead = 4 << 20
)

func (f Fetcher) withDefaults() Fetcher {
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{{&f.Poll, defaultPoll}, {&f.Quiet, defaultQuiet}, {&f.Stall, defaultStall}, {&f.StopWait, defaultStopWait}} {
		if *d.value <= 0 {
			*d.value = d.or
		}
	}
	if f.Tries <= 0 {
		f.Tries = defaultTries
	}
	return f
}

// Fetch fetches what the cache lacks of an image, and returns what it has then. tell, when
// set, is told what there is whenever that was looked at. The state is there after an error,
// too, as far as it is known.
func (f Fetcher) Fetch(ctx context.Context, im Image, tell func(State)) (State, error) {
	blobs, err := blobsOf(im)
	if err != nil {
		return nil, err
	}
	s, err := look(im.CacheDir, blobs)
	if err != nil {
		return nil, err
	}
	if tell == nil {
		tell = func(State) {}
	}
	tell(s)
	r := &run{Fetcher: f.withDefaults(), im: im, blobs: blobs, tell: tell, state: s, pace: pace{rate: f.Rate, from: s.Done(), since: time.Now()}}
	for got := 0; !r.state.Complete(); {
		before := r.state.Ready()
		why, err := r.daemon(ctx)
		if err != nil {
			return r.state, err
		}
		if got++; r.state.Ready() > before || why == ahead {
			got = 0
		}
		if got >= r.Tries || got > 0 && r.refused != nil {
			return r.state, r.stalled()
		}
		if why == ahead {
			err = r.pause(ctx)
		}
		if err != nil {
			return r.state, err
		}
	}
	return r.state, nil
}

// run is one Fetch.
type run struct {
	Fetcher
	im    Image
	blobs []rafs.Blob
	tell  func(State)
	state State
	pace  pace
	// said is what the last daemon has said, refused why it cannot get anything.
	said    string
	refused error
}

// reason is why a daemon is not needed any more.
type reason string

const (
	complete reason = "complete"
	ended    reason = "ended"
	idle     reason = "idle"
	ahead    reason = "ahead"
)

// daemon has one daemon fetch for as long as that is of use.
func (r *run) daemon(ctx context.Context) (why reason, err error) {
	d, err := r.Start(ctx, r.im)
	if err != nil {
		return "", err
	}
	defer func() {
		// Also, and above all, when ctx has ended.
		end, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), r.StopWait, fmt.Errorf("not within %s", r.StopWait))
		defer cancel()
		err = errors.Join(err, d.Stop(end))
	}()
	before := r.state.Ready()
	why, err = r.follow(ctx, d)
	r.said, r.refused = d.Said(), nil
	if err == nil && why != complete && r.state.Ready() == before {
		r.refused = d.Ask(ctx, r.missing())
	}
	return why, err
}

// missing are some of the blobs that are not complete.
func (r *run) missing() (ids []string) {
	for i := range r.state {
		if b := &r.state[i]; b.Ready < b.Chunks && len(ids) < someBlobs {
			ids = append(ids, b.ID)
		}
	}
	return ids
}

// someBlobs is how many are asked for, and told of.
const someBlobs = 3

// follow looks at the maps until there is nothing more to wait for.
func (r *run) follow(ctx context.Context, d Daemon) (reason, error) {
	tick := time.NewTicker(r.Poll)
	defer tick.Stop()
	now := time.Now()
	w := watch{quiet: now, stall: now, ready: r.state.Ready()}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
		over := d.Over() // before the maps: they have its last word
		if err := r.look(); err != nil {
			return "", err
		}
		turns, err := d.Turns()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		now := time.Now()
		w.see(now, r.state.Ready(), turns)
		switch {
		case r.state.Complete():
			return complete, nil
		case over:
			return ended, nil
		case now.Sub(w.quiet) >= r.Quiet, now.Sub(w.stall) >= r.Stall:
			return idle, nil
		case r.pace.ahead(now, r.state.Done()) > 0:
			return ahead, nil
		}
	}
}

// watch tells since when a daemon does nothing, and gets nothing.
type watch struct {
	quiet, stall time.Time
	ready        int
	turns        uint64
}

func (w *watch) see(now time.Time, ready int, turns uint64) {
	if ready > w.ready {
		w.quiet, w.stall = now, now
	}
	// Timers of its own give it a turn now and then.
	if turns > w.turns+fewTurns {
		w.quiet = now
	}
	w.ready, w.turns = ready, turns
}

// fewTurns is how many turns a daemon may have between two looks that does nothing.
const fewTurns = 3

func (r *run) look() error {
	if _, err := os.Lstat(r.im.Bootstrap); err != nil {
		return fmt.Errorf("look for bootstrap: %w", err) // nobody wants a removed image
	}
	s, err := look(r.im.CacheDir, r.blobs)
	if err != nil {
		return err
	}
	r.state = s
	r.tell(s)
	return nil
}

// pause waits until no more was fetched than is allowed.
func (r *run) pause(ctx context.Context) error {
	timer := time.NewTimer(r.pace.wait(time.Now(), r.state.Done()))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (r *run) stalled() error {
	var parts []string
	for i := range r.state {
		if b := &r.state[i]; b.Ready < b.Chunks {
			parts = append(parts, fmt.Sprintf("blob %s has %d of %d chunks", b.ID, b.Ready, b.Chunks))
		}
	}
	if more := len(parts) - someBlobs; more > 0 {
		parts = append(parts[:someBlobs], fmt.Sprintf("%d more are incomplete", more))
	}
	text := strings.Join(parts, ", ")
	if r.refused != nil {
		return fmt.Errorf("%w: %s: %w", ErrStalled, text, r.refused)
	}
	if r.said != "" {
		text += "; the end of its log: " + r.said
	}
	return fmt.Errorf("%w: %s", ErrStalled, text)
}

// pace is how fast it may go.
type pace struct {
	rate  int64
	from  int64 // bytes there were
	since time.Time
}

// over is how many bytes more were fetched than the rate allows.
func (p *pace) over(now time.Time, done int64) int64 {
	return done - p.from - int64(now.Sub(p.since).Seconds()*float64(p.rate))
}

// ahead is how far it got beyond what is tolerated.
func (p *pace) ahead(now time.Time, done int64) int64 {
	if p.rate <= 0 {
		return 0
	}
	return p.over(now, done) - max(leastAhead, 2*p.rate)
}

func (p *pace) wait(now time.Time, done int64) time.Duration {
	return time.Duration(float64(max(0, p.over(now, done))) / float64(p.rate) * float64(time.Second))
}
