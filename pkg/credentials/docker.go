package credentials

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"

	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// Docker is docker's configuration as a Provider. What credential helpers answer is
// kept until config.json changes; what that has itself is read anew each time, so
// that a login counts at once. While config.json is broken, as when somebody edits it, what
// it said of a host before stays in force.
type Docker struct {
	docker registry.Docker
	memo   *Memo[*registry.Credentials]
	log    *slog.Logger

	mu     sync.Mutex
	last   map[string]*registry.Credentials // by host; nil for one that had none
	broken bool                             // and said so
}

// maxLast bounds of how many hosts the last answer is kept.
const maxLast = 1024

// NewDocker returns a Docker. The helpers' time is d's. Log is told when config.json cannot
// be read.
func NewDocker(d registry.Docker, cfg MemoConfig, log *slog.Logger) *Docker {
	return &Docker{docker: d, memo: NewMemo[*registry.Credentials](cfg), log: log, last: map[string]*registry.Credentials{}}
}

// Name implements Provider.
func (d *Docker) Name() string { return "docker's configuration" }

// Lookup implements Provider.
func (d *Docker) Lookup(ctx context.Context, host, repository string) ([]*registry.Credentials, error) {
	list, err := d.lookup(ctx, host, repository)
	d.mu.Lock()
	defer d.mu.Unlock()
	if errors.Is(err, registry.ErrDockerConfig) {
		if !d.broken {
			d.broken = true
			d.log.Error("docker's configuration cannot be read; what it said before stays in force", "event", "configuration", "error", err)
		}
		c, known := d.last[host]
		if known && c == nil {
			return nil, nil // it had none, and needs none to be read
		}
		return some(c, err)
	}
	if err != nil {
		return list, err // a helper's
	}
	d.broken = false
	d.keep(host, list)
	return list, nil
}

// keep notes what config.json says of a host, also that it says nothing.
func (d *Docker) keep(host string, list []*registry.Credentials) {
	if _, known := d.last[host]; !known && len(d.last) >= maxLast {
		clear(d.last)
	}
	d.last[host] = nil
	if len(list) > 0 {
		d.last[host] = list[0]
	}
}

func (d *Docker) lookup(ctx context.Context, host, repository string) ([]*registry.Credentials, error) {
	key := d.docker.HelperKey(host)
	if key == "" {
		return some(d.docker.Credentials(ctx, host, repository))
	}
	return some(d.memo.Get(ctx, []string{key}, func(ctx context.Context) (Answer[*registry.Credentials], error) {
		c, err := d.docker.Credentials(ctx, host, repository)
		if err != nil || c == nil {
			return Answer[*registry.Credentials]{Nothing: true}, err
		}
		return Answer[*registry.Credentials]{Value: c, Expires: c.Expires}, nil
	}))
}

// Forget forgets c, so that its helper is asked again.
func (d *Docker) Forget(c *registry.Credentials) {
	d.memo.Forget(c.Opens)
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.last, func(_ string, kept *registry.Credentials) bool { return c.Opens(kept) })
}

func some(c *registry.Credentials, err error) ([]*registry.Credentials, error) {
	if c == nil {
		return nil, err
	}
	return []*registry.Credentials{c}, err
}
