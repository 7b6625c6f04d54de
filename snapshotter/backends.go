package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/distribution/reference"

	"github.com/nydusfs/nydus-snapshotter/pkg/accesskey"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/tuning"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// backends decides how an image's blobs are read.
type backends struct {
	rules []config.Backend
	// tuning is read anew for each mount.
	tuning func() (nydusd.Tuning, error)
	// validate has nydusd compare chunks with their digests.
	validate bool

	remote    config.Remote
	endpoints *registry.Endpoints
	keychain  registry.Keychain
	sealing   gateway.Key
	// shared says that daemons are for many images.
	shared bool
}

// Backend implements snapshot.Backends.
func (b backends) Backend(ctx context.Context, ref, wanted string) (snapshot.Backend, error) {
	rule, err := selectRule(b.rules, ref, wanted)
	if err != nil {
		return snapshot.Backend{}, err
	}
	var out snapshot.Backend
	out.Host, out.Repository, err = origin(rule, ref)
	switch {
	case err != nil:
	case rule == nil || rule.Type == config.BackendRegistry:
		out, err = b.registry(ctx, ref, out)
	case rule.Type == config.BackendLocalFS:
		out.Config = b.rendered(nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: rule.Dir})
	default:
		out.Config, out.Credentials = b.rendered(bucket(*rule)), opened(*rule)
	}
	if rule == nil {
		return out, err
	}
	return named(out, err, ref, rule.Name)
}

// origin is what names the cache directory of an image with a rule, or without any: images
// that share it share their blobs. Of a registry's it is the image's own host, whoever
// serves it, and of a bucket's what mount.nydus takes from such a configuration.
func origin(rule *config.Backend, ref string) (host, repository string, err error) {
	switch {
	case rule == nil || rule.Type == config.BackendRegistry:
		own, err := registry.Hosts{}.Resolve(ref)
		return own.Host, own.Repository, err
	case rule.Type == config.BackendLocalFS:
		return "", rule.Dir, nil
	}
	text, err := nydusd.Config{Backend: bucket(*rule)}.FuseDev()
	if err != nil {
		return "", "", err
	}
	at, err := nydusd.OriginOf(text)
	return at.Host, at.Repository, err
}

// named makes errors tell which rule they are about. Of which image, tells who asks for
// its configuration and credentials.
func named(b snapshot.Backend, err error, ref, rule string) (snapshot.Backend, error) {
	if err != nil {
		return b, fmt.Errorf("image %q with [[backend]] %q: %w", ref, rule, err)
	}
	say := func(err error) error {
		if err != nil {
			err = fmt.Errorf("[[backend]] %q: %w", rule, err)
		}
		return err
	}
	render, open, change := b.Config, b.Credentials, b.ForMount
	if change != nil {
		b.ForMount = func(ctx context.Context) (snapshot.Backend, error) {
			b, err := change(ctx)
			return named(b, err, ref, rule)
		}
	}
	if render != nil {
		b.Config = func(cacheDir string) (string, error) {
			text, err := render(cacheDir)
			return text, say(err)
		}
	}
	if open != nil {
		b.Credentials = func(ctx context.Context, instance string) (*mountspec.Credentials, error) {
			c, err := open(ctx, instance)
			return c, say(err)
		}
	}
	return b, nil
}

// selectRule finds the rule of an image: the one that its labels ask for if they do,
// and otherwise the first that matches. nil is none.
func selectRule(rules []config.Backend, ref, wanted string) (*config.Backend, error) {
	name, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("read image reference %q: %w", ref, err)
	}
	host, repository := reference.Domain(name), reference.Path(name)
	for i := range rules {
		r := &rules[i]
		switch {
		case wanted == "" && !r.Match.IsZero() && r.Match.Fits(host, repository):
			return r, nil
		case wanted != "" && r.Name == wanted:
			return r, allowed(r, ref, host, repository)
		}
	}
	if wanted != "" {
		return nil, fmt.Errorf("image %q asks by its label %s for backend %q, and no [[backend]] has that name", ref, snapshot.LabelBackend, wanted)
	}
	return nil, nil
}

// allowed tells whether an image may have a rule that it asks for.
func allowed(r *config.Backend, ref, host, repository string) error {
	if !r.AllowLabel {
		return fmt.Errorf("image %q asks by its label %s for [[backend]] %q, which does not allow it (allow_label = false)", ref, snapshot.LabelBackend, r.Name)
	}
	if !r.Match.Fits(host, repository) {
		return fmt.Errorf("image %q asks by its label %s for [[backend]] %q, which is for images of %s only", ref, snapshot.LabelBackend, r.Name, r.Match)
	}
	return nil
}

// bucket is a backend of objects.
func bucket(r config.Backend) nydusd.Backend {
	kind := nydusd.BackendS3
	if r.Type == config.BackendOSS {
		kind = nydusd.BackendOSS
	}
	return nydusd.Backend{
		Type: kind, Scheme: cmp.Or(r.Scheme, "https"), SkipVerify: r.SkipVerify,
		Bucket: nydusd.Bucket{Endpoint: r.Endpoint, Region: r.Region, Name: r.BucketName, Prefix: r.ObjectPrefix},
	}
}

// opened finds what opens a bucket.
func opened(r config.Backend) func(context.Context, string) (*mountspec.Credentials, error) {
	return func(context.Context, string) (*mountspec.Credentials, error) {
		key, err := accessKey(r)
		if err != nil {
			return nil, err
		}
		return &mountspec.Credentials{AccessKeyID: key.ID, AccessKeySecret: key.Secret}, nil
	}
}

// accessKey reads what opens a bucket.
func accessKey(r config.Backend) (accesskey.Key, error) {
	format := accesskey.AWS
	if r.Type == config.BackendOSS {
		format = accesskey.Alibaba
	}
	return accesskey.Read(r.CredentialsFile, format, r.Profile)
}

// registry completes the backend of images that are read from where they were pulled from.
func (b backends) registry(ctx context.Context, ref string, out snapshot.Backend) (snapshot.Backend, error) {
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
	if at.CAFile != "" && b.shared {
		return out, fmt.Errorf(`registry %s: %s has a certificate authority of its own (ca), and daemon.daemon_mode is "shared": %w; set remote.gateway = "auto" and run the gateway`, route.Registry, at.CAFile, registry.ErrGateway)
	}
	out.CAFile = at.CAFile
	out.Config = b.rendered(nydusd.Backend{
		Type: nydusd.BackendRegistry, Scheme: at.Scheme, Host: at.Host, Repository: at.Repository, SkipVerify: at.SkipVerify,
	})
	out.Credentials = func(ctx context.Context, _ string) (*mountspec.Credentials, error) {
		return directCredentials(ctx, b.keychain, at)
	}
	if b.remote.Gateway == config.GatewayAuto {
		direct := out
		out.ForMount = func(ctx context.Context) (snapshot.Backend, error) {
			need, err := credentialsNeed(ctx, b.keychain, at)
			if err != nil || need == "" {
				return direct, err
			}
			route.Needs = append(route.Needs, need)
			return b.throughGateway(direct, ref, route), nil
		}
	}
	return out, nil
}

// directCredentials are those that nydusd gets for a registry.
func directCredentials(ctx context.Context, keychain registry.Keychain, at registry.Backend) (*mountspec.Credentials, error) {
	c, err := keychain.Credentials(ctx, at.Host, at.Repository)
	if err != nil || c == nil {
		return nil, err
	}
	if c.IdentityToken != "" {
		return nil, fmt.Errorf(`credentials for %s from %s: the login is an identity token, which nydusd cannot use by itself; set remote.gateway = "auto" and run the gateway, or log in with a user name and an access token`, at.Host, c.Source)
	}
	return &mountspec.Credentials{Auth: c.Auth, RegistryToken: c.RegistryToken}, nil
}

// credentialsNeed tells why nydusd cannot use what opens a registry by itself; it gets
// that once and keeps it. "" if it can.
func credentialsNeed(ctx context.Context, keychain registry.Keychain, at registry.Backend) (string, error) {
	c, err := keychain.Credentials(ctx, at.Host, at.Repository)
	switch {
	case err != nil || c == nil:
		return "", err
	case c.IdentityToken != "":
		return fmt.Sprintf("a login that is an identity token (%s)", c.Source), nil
	case c.OneOfSeveral:
		return fmt.Sprintf("one of several logins (%s)", c.Source), nil
	case !c.Expires.IsZero():
		return fmt.Sprintf("credentials that expire (%s)", c.Source), nil
	}
	return "", nil
}

// viaGateway tells whether nydusd is to read through the gateway.
func viaGateway(r config.Remote, route registry.Route) bool {
	return r.Gateway == config.GatewayAlways || r.Gateway == config.GatewayAuto && len(route.Needs) > 0
}

// throughGateway points nydusd at the gateway, which has to be there when the image is
// mounted.
func (b backends) throughGateway(out snapshot.Backend, ref string, route registry.Route) snapshot.Backend {
	out.CAFile = "" // the gateway is on this machine
	address := b.remote.GatewayAddress
	out.Config = b.rendered(nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "http", Host: address, Repository: route.Repository, Retries: gatewayRetries, Fixed: true})
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

// gatewayRetries is how often nydusd asks again, after half a second and then twice as
// long each time, for the case that the gateway ends. It is not for registries, which the
// gateway itself asks again.
const gatewayRetries = 4

// rendered renders nydusd's configuration.
func (b backends) rendered(at nydusd.Backend) func(cacheDir string) (string, error) {
	return func(cacheDir string) (string, error) {
		tuned, err := b.tuning()
		if err != nil {
			return "", err
		}
		return nydusd.Config{Backend: at, CacheDir: cacheDir, Validate: b.validate, Tuning: tuned}.FuseDev()
	}
}

// tuningOf reads an operator's template, if there is one.
func tuningOf(template string) func() (nydusd.Tuning, error) {
	return func() (nydusd.Tuning, error) {
		if template == "" {
			return nydusd.Tuning{}, nil
		}
		return tuning.Read(template)
	}
}
