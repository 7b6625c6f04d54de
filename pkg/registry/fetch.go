package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
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
	gone map[string]*outage
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
	return &Fetcher{cfg: cfg, avoided: map[string]avoided{}, sessions: map[string]*session{}, bounds: map[string]*bound{}, gone: map[string]*outage{}}
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
	if list, err = f.cfg.Finder.For(ctx, b.Registry); err != nil {
		return nil, err
	}
	if list, err = pullable(list, b.Registry); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	rank := func(host Endpoint) rank {
		return max(f.avoided[nameOf(host)].rankAt(now), f.avoided[blobAt(host, b)].rankAt(now))
	}
	slices.SortStableFunc(list, func(a, b Endpoint) int { return cmp.Compare(rank(a), rank(b)) })
	return list, nil
}

func nameOf(host Endpoint) string { return host.Scheme + "://" + host.Host + host.Path }

// blobAt names a blob at a host.
func blobAt(host Endpoint, b Blob) string {
	return nameOf(host) + "/" + b.Repository + "@" + b.Digest.String()
}
