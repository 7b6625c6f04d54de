package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// backends decides how an image's blobs are read.
type backends struct {
	remote    config.Remote
	endpoints *registry.Endpoints
	keychain  registry.Keychain
	sealing   gateway.Key
}

// Backend implements snapshot.Backends.
func (b backends) Backend(ctx context.Context, ref string) (snapshot.Backend, error) {
	if b.remote.Backend == config.BackendLocalFS {
		at, err := registry.Directory(b.remote.LocalFSDir).Resolve(ref)
		return snapshot.Backend{Repository: at.Dir, Config: rendered(nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: at.Dir})}, err
	}
	// The image's own host, whoever serves it: blobs that are cached are the same.
	own, err := registry.Hosts{}.Resolve(ref)
	if err != nil {
		return snapshot.Backend{}, err
	}
	out := snapshot.Backend{Host: own.Host, Repository: own.Repository}
	route, err := b.endpoints.Route(ctx, ref)
	if err != nil {
		return out, err
	}
	if viaGateway(b.remote, route) {
		return b.throughGateway(out, ref, route), nil
	}
	at, err := route.Direct(ctx)
	if err != nil {
		if errors.Is(err, registry.ErrGateway) {
			err = fmt.Errorf(`%w; set remote.gateway = "auto" and run the gateway`, err)
		}
		return out, err
	}
	out.Config = rendered(nydusd.Backend{
		Type: nydusd.BackendRegistry, Scheme: at.Scheme, Host: at.Host, Repository: at.Repository, SkipVerify: at.SkipVerify,
	})
	out.Credentials = func(ctx context.Context, _ string) (*mountspec.Credentials, error) {
		c, err := b.keychain.Credentials(ctx, at.Host, at.Repository)
		if err != nil || c == nil {
			return nil, err
		}
		if c.IdentityToken != "" {
			return nil, fmt.Errorf(`credentials for %s from %s: the login is an identity token, which nydusd cannot use by itself; set remote.gateway = "always" and run the gateway, or log in with a user name and an access token`, at.Host, c.Source)
		}
		return &mountspec.Credentials{Auth: c.Auth, RegistryToken: c.RegistryToken}, nil
	}
	return out, nil
}

// viaGateway tells whether nydusd is to read through the gateway.
func viaGateway(r config.Remote, route registry.Route) bool {
	return r.Gateway == config.GatewayAlways || r.Gateway == config.GatewayAuto && len(route.Needs) > 0
}

// throughGateway points nydusd at the gateway, which has to be there when the image is
// mounted.
func (b backends) throughGateway(out snapshot.Backend, ref string, route registry.Route) snapshot.Backend {
	address := b.remote.GatewayAddress
	out.Config = rendered(nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "http", Host: address, Repository: route.Repository, Retries: gatewayRetries})
	out.Credentials = func(ctx context.Context, instance string) (*mountspec.Credentials, error) {
		if err := gateway.Probe(ctx, address, b.sealing); err != nil {
			why := `remote.gateway is "always"`
			if len(route.Needs) > 0 {
				why = "nydusd cannot do what registry " + route.Registry + " needs: " + strings.Join(route.Needs, ", ")
			}
			return nil, fmt.Errorf("ask the gateway: %w; it is needed since %s; run it (systemctl enable --now nydus-gateway.socket)", err, why)
		}
		capability, err := b.sealing.Seal(gateway.Grant{Instance: instance, Image: ref, Registry: route.Registry, Repository: route.Repository})
		return &mountspec.Credentials{RegistryToken: capability}, err
	}
	return out
}

// gatewayRetries is how often nydusd asks again, which it does at once: each of them
// may fail by an end of the gateway, and costs next to nothing.
const gatewayRetries = 8

// rendered renders nydusd's configuration.
func rendered(b nydusd.Backend) func(cacheDir string) (string, error) {
	return func(cacheDir string) (string, error) { return nydusd.Config{Backend: b, CacheDir: cacheDir}.JSON() }
}
