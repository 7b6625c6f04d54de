package credentials

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// Provider is a source of credentials.
type Provider interface {
	// Name says which one it is, for people.
	Name() string
	// Lookup returns what may open a repository of a registry host, the best first,
	// and nothing when the source knows nothing. It may return an error beside that,
	// which says what is missing. The names are those of registry.Keychain.
	Lookup(ctx context.Context, host, repository string) ([]*registry.Credentials, error)
}

// forgetter is a Provider that keeps answers.
type forgetter interface {
	// forget forgets c, unless the source would say the same again.
	Forget(c *registry.Credentials)
}

// refusedFor is how long what was refused is passed over: until then it could have
// been granted what it lacked.
const refusedFor = time.Minute

// maxRefused bounds how many refusals are remembered.
const maxRefused = 1024

// Chain asks providers in their order. It may be used by several goroutines.
//
// What was refused for a repository is passed over for a minute, in favour of what
// else a provider, or the one after it, has. When all of it was refused, the one
// whose refusal is the longest ago is tried again.
type Chain struct {
	now       func() time.Time
	providers []Provider

	mu      sync.Mutex
	refused map[refusal]time.Time
}

// refusal is what was refused where.
type refusal struct {
	host, repository      string
	auth, token, identity string
}

func refusalOf(host, repository string, c *registry.Credentials) refusal {
	return refusal{host, repository, c.Auth, c.RegistryToken, c.IdentityToken}
}

// String hides the secret.
func (refusal) String() string { return "[refused credentials]" }

// GoString does so for %#v.
func (refusal) GoString() string { return "[refused credentials]" }

var (
	_ registry.Keychain = (*Chain)(nil)
	_ registry.Refuser  = (*Chain)(nil)
)

// NewChain returns a Chain. Now is the clock; nil means time.Now.
func NewChain(now func() time.Time, providers ...Provider) *Chain {
	if now == nil {
		now = time.Now
	}
	return &Chain{now: now, providers: providers, refused: map[refusal]time.Time{}}
}

// Credentials implements registry.Keychain. The error names each provider that
// failed.
func (c *Chain) Credentials(ctx context.Context, host, repository string) (*registry.Credentials, error) {
	var tried []*registry.Credentials
	var faults []error
	for _, p := range c.providers {
		list, err := p.Lookup(ctx, host, repository)
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", p.Name(), err))
		}
		if i := slices.IndexFunc(list, func(one *registry.Credentials) bool { return c.refusedAt(host, repository, one).IsZero() }); i >= 0 {
			one := *list[i]
			one.OneOfSeveral = len(list) > 1
			return &one, nil
		}
		tried = append(tried, list...)
		if ctx.Err() != nil {
			break
		}
	}
	if len(tried) > 0 {
		return slices.MinFunc(tried, func(a, b *registry.Credentials) int {
			return c.refusedAt(host, repository, a).Compare(c.refusedAt(host, repository, b))
		}), nil
	}
	if len(faults) > 0 {
		return nil, fmt.Errorf("find credentials for %s/%s: %w", host, repository, errors.Join(faults...))
	}
	return nil, nil
}

// refusedAt is when that was refused, and zero when it was not, or is long ago.
func (c *Chain) refusedAt(host, repository string, one *registry.Credentials) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.refused[refusalOf(host, repository, one)]
	if c.now().Sub(at) >= refusedFor {
		return time.Time{}
	}
	return at
}

// Refused implements registry.Refuser. Its source is asked again at the next lookup,
// unless it was asked just before.
func (c *Chain) Refused(host, repository string, one *registry.Credentials) {
	if one == nil {
		return
	}
	now := c.now()
	c.mu.Lock()
	if len(c.refused) >= maxRefused {
		c.makeRoom(now)
	}
	c.refused[refusalOf(host, repository, one)] = now
	c.mu.Unlock()
	for _, p := range c.providers {
		if f, ok := p.(forgetter); ok {
			f.Forget(one)
		}
	}
}

// makeRoom forgets refusals: those that no longer count, or else the older half. The
// caller holds the lock.
func (c *Chain) makeRoom(now time.Time) {
	type at struct {
		what refusal
		when time.Time
	}
	var left []at
	for what, when := range c.refused {
		if now.Sub(when) >= refusedFor {
			delete(c.refused, what)
		} else {
			left = append(left, at{what, when})
		}
	}
	if len(left) < maxRefused {
		return
	}
	slices.SortFunc(left, func(a, b at) int { return cmp.Compare(a.when.UnixNano(), b.when.UnixNano()) })
	for _, old := range left[:maxRefused/2] {
		delete(c.refused, old.what)
	}
}
