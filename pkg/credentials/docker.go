package credentials

import (
	"context"

	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// Docker is docker's configuration as a Provider. What credential helpers answer is
// kept until config.json changes; what that has itself is read anew each time, so
// that a login counts at once.
type Docker struct {
	docker registry.Docker
	memo   *Memo[*registry.Credentials]
}

// NewDocker returns a Docker. The helpers' time is d's.
func NewDocker(d registry.Docker, cfg MemoConfig) *Docker {
	return &Docker{docker: d, memo: NewMemo[*registry.Credentials](cfg)}
}

// Name implements Provider.
func (d *Docker) Name() string { return "docker's configuration" }

// Lookup implements Provider.
func (d *Docker) Lookup(ctx context.Context, host, repository string) ([]*registry.Credentials, error) {
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
func (d *Docker) Forget(c *registry.Credentials) { d.memo.Forget(c.Opens) }

func some(c *registry.Credentials, err error) ([]*registry.Credentials, error) {
	if c == nil {
		return nil, err
	}
	return []*registry.Credentials{c}, err
}
