package registry

import (
	"maps"
	"time"
)

// rank says when a host is asked: after all those with a lower one.
type rank int

const (
	// stumbled is that of one that failed, or lacks the blob; wrong that of one whose
	// content was not the blob's.
	stumbled rank = 1 + iota
	wrong
)

// avoided is until when something is asked later, and how often it has failed.
type avoided struct {
	rank  rank
	until time.Time
	times int
}

func (a avoided) rankAt(now time.Time) rank {
	if now.Before(a.until) {
		return a.rank
	}
	return 0
}

const (
	// avoidMissing is how long a host is asked later for a blob that it does not have:
	// mirrors get what is asked for from others. avoidWrong is that for content which
	// is not the blob's.
	avoidMissing = time.Minute
	avoidWrong   = time.Hour
	// mostAvoid bounds what doubling makes of a time.
	mostAvoid = 5 * time.Minute
	// maxAvoided bounds how much of that is remembered.
	maxAvoided = 8192
)

// avoid has a host, or a blob of it, asked after the others for a while, which is twice as
// long when it has failed again after the last one.
func (f *Fetcher) avoid(name string, r rank, while time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if len(f.avoided) >= maxAvoided {
		maps.DeleteFunc(f.avoided, func(_ string, a avoided) bool { return now.After(a.until) })
	}
	if len(f.avoided) >= maxAvoided {
		clear(f.avoided) // each costs a request
	}
	a := f.avoided[name]
	// What many parts meet at the same time is one failure.
	if a.rankAt(now) == 0 {
		a.times++
	}
	for range a.times - 1 {
		if 2*while <= mostAvoid {
			while *= 2
		}
	}
	f.avoided[name] = avoided{max(r, a.rankAt(now)), now.Add(while), a.times}
}

// fine says that a host has given out a whole part.
func (f *Fetcher) fine(host Endpoint) {
	f.mu.Lock()
	delete(f.avoided, nameOf(host))
	f.mu.Unlock()
}

// outage is a time in which no host of a registry has answered.
type outage struct {
	since, last time.Time
	// trying says that somebody waits for the hosts as long as usual.
	trying bool
}

const (
	// outageEnds is after how long a failure says nothing of the present.
	outageEnds = time.Minute
	// goneTimeout bounds the question to a host of a registry that is gone.
	goneTimeout = 2 * time.Second
)

// failed notes that nothing was to be had of a registry since some time, served that
// something was.
func (f *Fetcher) failed(registry string, since time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.gone[registry]
	if o == nil || time.Since(o.last) >= outageEnds {
		o = &outage{since: since}
		f.gone[registry] = o
	}
	o.last = time.Now()
}

func (f *Fetcher) served(registry string) {
	f.mu.Lock()
	delete(f.gone, registry)
	f.mu.Unlock()
}

// isGone tells whether a registry has given out nothing for so long that nobody is to ask
// its hosts more than once. One at a time waits for them as long as usual, until it has
// called done; the others do not.
func (f *Fetcher) isGone(registry string) (gone, hasty bool, done func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.gone[registry]
	// Who has waited may have given up a pause before the end.
	if o == nil || time.Since(o.last) >= outageEnds || time.Since(o.since) < f.cfg.GiveUp*3/4 {
		return false, false, func() {}
	}
	if o.trying {
		return true, true, func() {}
	}
	o.trying = true
	return true, false, func() {
		f.mu.Lock()
		o.trying = false
		f.mu.Unlock()
	}
}
