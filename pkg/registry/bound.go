package registry

import (
	"math"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// bound is what a host's parts share.
type bound struct {
	streams *semaphore.Weighted
	rate    *rate.Limiter
}

// bound returns that of a host.
func (f *Fetcher) bound(host Endpoint) *bound {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.bounds[nameOf(host)]
	if b == nil {
		b = &bound{semaphore.NewWeighted(math.MaxInt64), rate.NewLimiter(rate.Inf, 0)}
		if f.cfg.Streams > 0 {
			b.streams = semaphore.NewWeighted(int64(f.cfg.Streams))
		}
		if f.cfg.Rate > 0 {
			b.rate = rate.NewLimiter(rate.Limit(f.cfg.Rate), int(min(max(f.cfg.Rate/burstsPerSecond, minBurst), math.MaxInt32)))
		}
		f.bounds[nameOf(host)] = b
	}
	return b
}

const (
	// burstsPerSecond and minBurst say how much of a second's bytes may come at once.
	burstsPerSecond = 10
	minBurst        = 64 << 10
)
