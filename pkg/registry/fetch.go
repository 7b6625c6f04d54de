package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// Blob is one of a repository's blobs.
type Blob struct {
	// Registry is as in references: host or host:port.
	Registry, Repository string
	Digest               digest.Digest
	// Size is the blob's, 0 when it is not known: then the first host that answers
	// says it. AtLeast is what it has at least.
	Size, AtLeast int64
}

func (b Blob) String() string { return b.Registry + "/" + b.Repository + "@" + b.Digest.String() }

// Finder finds a registry's hosts. Endpoints is one.
type Finder interface {
	For(ctx context.Context, registry string) ([]Endpoint, error)
}

// FetcherConfig is what a Fetcher needs. A duration of 0 is its default.
type FetcherConfig struct {
	Finder Finder
	// AnswerTimeout bounds the wait for the beginning of an answer, StallTimeout that
	// for more of it. The defaults are 10 seconds.
	AnswerTimeout, StallTimeout time.Duration
	// GiveUp bounds the time without any progress, whatever is tried; 25 seconds,
	// which is less than nydusd waits.
	GiveUp time.Duration
	// Avoid is how long a host that failed is asked after the others; 10 seconds. It is
	// twice as long each time until one of its parts has come whole.
	Avoid time.Duration
	// Streams bounds how many parts are read from one host at the same time, Rate how
	// many bytes come from it in a second; 0 for no bound. Who has to wait does so at
	// the host whose turn it is: that it is busy is no fault of its.
	Streams int
	Rate    int64
}

// Fetcher reads parts of blobs from whichever host of their registry gives them out.
//
// A host that fails, also in the middle of a blob, is replaced by the next one, which
// goes on where it stopped; the hosts are asked again, with growing pauses or those
// that they ask for, until GiveUp. It may be used by several goroutines.
//
// Content is not checked against digests, which parts do not have: only its length.
type Fetcher struct {
	cfg FetcherConfig

	mu sync.Mutex
	// avoided is until when a host is asked after the others: by its name, or by its
	// name and that of one blob.
	avoided map[string]avoided
	// sessions are those with hosts, for a repository each.
	sessions map[string]*session
	// bounds are those of hosts, by their names.
	bounds map[string]*bound
	// gone are registries of which nothing was to be had.
	gone map[string]outage
}

// outage is a time in which no host of a registry has answered.
type outage struct{ since, last time.Time }

// session is what a host has issued for a repository.
type session struct {
	host       *http.Client // whose configuration it is of
	authorizer docker.Authorizer

	mu sync.Mutex
	// challenges is how often the authorizer was told what is wanted. It forgets its
	// tokens then.
	challenges int
}

// met returns how many challenges the session has met.
func (s *session) met() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.challenges
}

// meet tells the authorizer what is wanted, unless somebody has since a number of
// challenges had been met: those who wait for the same want one token.
func (s *session) meet(ctx context.Context, challenge *http.Response, since int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.challenges != since {
		return nil
	}
	s.challenges++
	return s.authorizer.AddResponses(ctx, []*http.Response{challenge})
}

// NewFetcher returns a Fetcher.
func NewFetcher(cfg FetcherConfig) *Fetcher {
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{
		{&cfg.AnswerTimeout, 10 * time.Second}, {&cfg.StallTimeout, 10 * time.Second}, {&cfg.GiveUp, 25 * time.Second}, {&cfg.Avoid, 10 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.or
		}
	}
	return &Fetcher{cfg: cfg, avoided: map[string]avoided{}, sessions: map[string]*session{}, bounds: map[string]*bound{}, gone: map[string]outage{}}
}

// Errors of Open.
var (
	// ErrRange says that a blob does not have the part that was asked for, ErrNoBlob
	// that it is not there, ErrRefused that the credentials do not open it: each of all
	// hosts.
	ErrRange   = errors.New("the blob is shorter")
	ErrNoBlob  = errors.New("there is no such blob")
	ErrRefused = errors.New("access is refused")
)

// Open returns length bytes of a blob from offset on; what there is when length is
// negative. It is never 0. The error names each host and what is wrong with it.
//
// The returned Part ends with ctx.
func (f *Fetcher) Open(ctx context.Context, b Blob, offset, length int64) (*Part, error) {
	if err := b.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", b, err)
	}
	if offset < 0 || length == 0 {
		return nil, fmt.Errorf("fetch %s: %d bytes from %d on", b, length, offset)
	}
	ctx, cancel := context.WithCancel(silent(docker.WithScope(ctx, "repository:"+b.Repository+":pull")))
	p := &Part{f: f, ctx: ctx, cancel: cancel, blob: b, offset: offset, left: length, size: b.Size, moved: time.Now()}
	if err := p.open(); err != nil {
		cancel()
		return nil, fmt.Errorf("fetch %s: %w", b, err)
	}
	return p, nil
}

// hosts are those that may be asked, the best first.
func (f *Fetcher) hosts(ctx context.Context, b Blob) (list []Endpoint, err error) {
	all, err := f.cfg.Finder.For(ctx, b.Registry)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	var later []Endpoint
	for _, host := range all {
		switch {
		case !host.Capabilities.Has(docker.HostCapabilityPull):
		case now.Before(f.avoided[nameOf(host)].until), now.Before(f.avoided[blobAt(host, b)].until):
			later = append(later, host)
		default:
			list = append(list, host)
		}
	}
	if list = append(list, later...); len(list) == 0 {
		return nil, fmt.Errorf("no host of registry %s may be pulled from: none has the capability \"pull\" in its hosts.toml", b.Registry)
	}
	return list, nil
}

func nameOf(host Endpoint) string { return host.Scheme + "://" + host.Host + host.Path }

// blobAt names a blob at a host.
func blobAt(host Endpoint, b Blob) string {
	return nameOf(host) + "/" + b.Repository + "@" + b.Digest.String()
}

// avoid has a host, or a blob of it, asked after the others for a while.
func (f *Fetcher) avoid(name string, while time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if len(f.avoided) >= maxAvoided {
		maps.DeleteFunc(f.avoided, func(_ string, a avoided) bool { return now.After(a.until) })
	}
	if len(f.avoided) >= maxAvoided {
		clear(f.avoided) // each costs a request
	}
	times := f.avoided[name].times
	f.avoided[name] = avoided{now.Add(while << times), min(times+1, maxDoubled)}
}

// fine says that a host has given out a whole part.
func (f *Fetcher) fine(host Endpoint) {
	f.mu.Lock()
	delete(f.avoided, nameOf(host))
	f.mu.Unlock()
}

// avoided is until when something is asked later, and how often it has failed.
type avoided struct {
	until time.Time
	times int
}

const (
	// avoidMissing is how long a host is asked later for a blob that it does not have:
	// mirrors get what is asked for from others. avoidWrong is that for content which
	// is not the blob's.
	avoidMissing = time.Minute
	avoidWrong   = time.Hour
	// maxDoubled is how often the time is doubled: to some five minutes.
	maxDoubled = 5
	// maxAvoided bounds how much of that is remembered.
	maxAvoided = 8192
)

// failed notes that nothing was to be had of a registry since some time, served that
// something was.
func (f *Fetcher) failed(registry string, since time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if o, ok := f.gone[registry]; ok && time.Since(o.last) < outageEnds {
		since = o.since
	}
	f.gone[registry] = outage{since, time.Now()}
}

func (f *Fetcher) served(registry string) {
	f.mu.Lock()
	delete(f.gone, registry)
	f.mu.Unlock()
}

// isGone tells whether a registry has given out nothing for so long that nobody is to
// wait again.
func (f *Fetcher) isGone(registry string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	o, ok := f.gone[registry]
	// Who has waited may have given up a pause before the end.
	return ok && time.Since(o.last) < outageEnds && time.Since(o.since) >= f.cfg.GiveUp*3/4
}

const (
	// outageEnds is after how long a failure says nothing of the present.
	outageEnds = time.Minute
	// goneTimeout bounds the question to a host of a registry that is gone.
	goneTimeout = 2 * time.Second
)

// session returns what a host has issued for a repository, without what not is or was
// of another configuration.
func (f *Fetcher) session(ctx context.Context, b Blob, host Endpoint, not *session) *session {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := nameOf(host) + " " + b.Registry + "/" + b.Repository
	s := f.sessions[key]
	if s != nil && s.host == host.Client && s != not {
		return s
	}
	if len(f.sessions) >= maxSessions {
		clear(f.sessions) // each costs a token
	}
	s = &session{host: host.Client, authorizer: host.NewAuthorizer(ctx, b.Repository)}
	f.sessions[key] = s
	return s
}

// maxSessions bounds how many repositories' tokens are kept.
const maxSessions = 4096

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
