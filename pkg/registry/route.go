package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
)

// Route is how an image's blobs can be read.
type Route struct {
	// Registry is as in references, Repository the path in it.
	Registry, Repository string
	// Needs are what the registry's configuration asks for and nydusd cannot do by
	// itself, each with the file that says so.
	Needs []string

	hosts []Endpoint // that may be pulled from
	// plain is how the registry is reached when nothing is configured.
	plain Backend
}

// Route looks up an image's registry.
func (e *Endpoints) Route(ctx context.Context, ref string) (Route, error) {
	name, err := parse(ref)
	if err != nil {
		return Route{}, err
	}
	r := Route{Registry: reference.Domain(name), Repository: reference.Path(name)}
	if r.plain, err = (Hosts{PlainHTTP: e.cfg.PlainHTTP, SkipVerify: e.cfg.SkipVerify}).Resolve(ref); err != nil {
		return Route{}, err
	}
	hosts, err := e.For(ctx, r.Registry)
	if err == nil {
		hosts, err = pullable(hosts, r.Registry)
	}
	if err != nil {
		return Route{}, err
	}
	r.hosts = hosts
	if len(hosts) > 1 {
		r.Needs = append(r.Needs, fmt.Sprintf("%d hosts (%s)", len(hosts), hosts[0].File))
	}
	for _, h := range hosts {
		for _, need := range h.allNeeds() {
			r.Needs = append(r.Needs, fmt.Sprintf("%s for %s (%s)", need, h.Host, h.File))
		}
	}
	return r, nil
}

// allNeeds are what takes the gateway, or what nydusd has to be given beside its
// configuration.
func (h *Endpoint) allNeeds() []string {
	if !h.ownCA {
		return h.needs
	}
	return append(slices.Clone(h.needs), "a certificate authority (ca)")
}

// pullable are those of a registry's hosts that may be pulled from, of which there is at
// least one.
func pullable(all []Endpoint, registry string) (list []Endpoint, err error) {
	for _, h := range all {
		if h.Capabilities.Has(docker.HostCapabilityPull) {
			list = append(list, h)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("no host of registry %s may be pulled from: none has the capability \"pull\" in its hosts.toml", registry)
	}
	return list, nil
}

// ErrGateway says that nydusd cannot read an image's blobs by itself.
var ErrGateway = errors.New("nydusd cannot do that by itself")

// Direct returns how nydusd reads an image's blobs by itself: from the only host, or
// from the first of several that answers. The error wraps ErrGateway when what is
// configured takes the gateway.
func (r Route) Direct(ctx context.Context) (Backend, error) {
	if len(r.hosts) == 1 && r.hosts[0].File == "" {
		return r.plain, nil
	}
	var errs []error
	for _, h := range r.hosts {
		needs := h.needs
		if h.caFile == "" {
			needs = h.allNeeds()
		}
		if len(needs) > 0 {
			return Backend{}, fmt.Errorf("registry %s: %s wants %s for %s: %w", r.Registry, h.File, strings.Join(needs, " and "), h.Host, ErrGateway)
		}
		if len(r.hosts) > 1 {
			if err := h.ping(ctx); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		return Backend{Scheme: h.Scheme, Host: h.Host, Repository: r.Repository, SkipVerify: h.skipVerify && h.Scheme == "https", CAFile: h.caFile}, nil
	}
	return Backend{}, fmt.Errorf("no host of registry %s answers: %w", r.Registry, errors.Join(errs...))
}

// pingTimeout bounds how long one host is waited for.
const pingTimeout = 2 * time.Second

// ping asks whether a host answers, whatever it says about credentials.
func (h Endpoint) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pingTimeout, fmt.Errorf("no answer within %s", pingTimeout))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Scheme+"://"+h.Host+h.Path+"/", nil)
	if err != nil {
		return err
	}
	resp, err := h.Client.Do(req)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", h.Host, plain(err))
	}
	resp.Body.Close()
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%s answers %s", h.Host, resp.Status)
	}
	return nil
}
