package registry

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Endpoint is a host that serves what belongs to a registry, and how to talk to it.
// Its Authorizer is nil: see NewAuthorizer.
type Endpoint struct {
	docker.RegistryHost
	// File is the hosts.toml, or the directory with certificates, that says so;
	// empty when nothing does.
	File string
	// NewAuthorizer returns an authorizer without any tokens. One is for one
	// repository: it asks for tokens with every scope that it has met.
	NewAuthorizer func(ctx context.Context, repository string) docker.Authorizer
	// needs are what nydusd cannot do for the host.
	needs []string
	// ownCA says that it has certificate authorities of its own. caFile is their
	// file, which nydusd can be given when it is the only one.
	ownCA  bool
	caFile string
	// skipVerify says that any certificate is accepted.
	skipVerify bool
}

// EndpointsConfig is what Endpoints need.
type EndpointsConfig struct {
	// Dirs are the directories in containerd's config_path, the first first.
	Dirs []string
	// PlainHTTP and SkipVerify count for registries of which Dirs say nothing.
	PlainHTTP, SkipVerify []string
	// Keychain opens them; it is asked for each token.
	Keychain Keychain
	Log      *slog.Logger
}

// Endpoints finds the hosts of a registry as containerd does: those in hosts.toml,
// in their order, and the registry itself behind them.
//
// Each answer is as the files are then, certificates and keys included. Where they are
// broken the last good answer stands, and the log says what is wrong; without one, that
// is an error: a registry that somebody has meant to replace is not asked instead.
//
// It may be used by several goroutines. Clients, with their connections, stay the same
// until the files change.
type Endpoints struct {
	cfg EndpointsConfig

	mu    sync.Mutex
	known map[string]*known
}

// stamp tells one state of files from another.
type stamp [sha256.Size]byte

// known is what was found for a registry.
type known struct {
	stamp stamp
	// files are those that hosts.toml names.
	files []string
	hosts []Endpoint
	// bad is a later state, and err what is wrong with it.
	bad stamp
	err error
	// said is what the log has.
	said string
}

// NewEndpoints returns Endpoints.
func NewEndpoints(cfg EndpointsConfig) *Endpoints {
	return &Endpoints{cfg: cfg, known: map[string]*known{}}
}

// For returns the hosts for a registry, as it stands in references: host or
// host:port. The error says which file and, where it is known, which line.
func (e *Endpoints) For(ctx context.Context, registry string) ([]Endpoint, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k := e.known[registry]
	if k == nil {
		k = &known{}
		e.known[registry] = k
	}
	if err := e.renew(ctx, registry, k); err != nil {
		err = fmt.Errorf("find hosts of registry %s: %w", registry, err)
		if k.hosts == nil {
			return nil, err
		}
		if said := err.Error(); k.said != said {
			k.said = said
			e.cfg.Log.Error("a registry's configuration cannot be used; the one before it stays in force", "event", "configuration", "registry", registry, "error", err)
		}
	}
	return k.hosts, nil
}

// renew looks whether a registry's files have changed, and reads them then.
func (e *Endpoints) renew(ctx context.Context, registry string, k *known) error {
	dir, err := e.dir(registry)
	if err != nil {
		return err
	}
	now, err := stampOf(dir, k.files)
	if err != nil {
		return err
	}
	if k.hosts != nil && k.stamp == now {
		return nil
	}
	if k.err != nil && k.bad == now {
		return k.err
	}
	files, _ := configured(dir)
	if now, err = stampOf(dir, files); err != nil {
		return err
	}
	hosts, err := e.read(ctx, registry, dir)
	k.files, k.bad, k.err = files, now, nil
	if err == nil {
		*k = known{stamp: now, files: files, hosts: hosts}
		return nil
	}
	var system syscall.Errno
	if !errors.As(err, &system) {
		k.err = err // which the files' next state alone can change
	}
	return err
}

// dir is the directory for a registry, empty when there is none, or nothing in it.
func (e *Endpoints) dir(registry string) (string, error) {
	for _, root := range e.cfg.Dirs {
		dir, err := config.HostDirFromRoot(root)(registry)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			return dir, err
		}
	}
	return "", nil
}

// stampOf tells states of a directory and of some files apart.
func stampOf(dir string, files []string) (s stamp, err error) {
	if dir == "" {
		return s, nil
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return s, err
	}
	for _, entry := range entries {
		stampFile(h, filepath.Join(dir, entry.Name()))
	}
	for _, file := range files {
		stampFile(h, file)
	}
	h.Sum(s[:0])
	return s, nil
}

// values are those of a hosts.toml, with what containerd's package does not tell.
type values map[string]any

// configured returns what a directory's hosts.toml says and the files that it names;
// nothing when it is broken, which whoever reads it says.
func configured(dir string) (files []string, v values) {
	text, err := os.ReadFile(filepath.Join(dir, hostsFile))
	if dir == "" || err != nil || toml.Unmarshal(text, &v) != nil {
		return nil, nil
	}
	for _, key := range []string{"ca", "client"} {
		files = append(files, v.files(dir, key)...)
	}
	return files, v
}

// files lists those that a key names, wherever it is, once each.
func (v values) files(dir, key string) (files []string) {
	for _, path := range texts(v.all(key)) {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		files = append(files, path)
	}
	slices.Sort(files)
	return slices.Compact(files)
}

// all lists the values of a key, wherever it is.
func (v values) all(key string) (found []any) {
	for _, name := range slices.Sorted(maps.Keys(v)) {
		table, isTable := v[name].(map[string]any)
		switch {
		case name == key:
			found = append(found, v[name])
		case isTable:
			found = append(found, values(table).all(key)...)
		}
	}
	return found
}

const hostsFile = "hosts.toml"

func stampFile(h hash.Hash, path string) {
	info, err := os.Stat(path)
	if err != nil {
		fmt.Fprintf(h, "%q %v\n", path, err)
		return
	}
	fmt.Fprintf(h, "%q %d %d %v\n", path, info.Size(), info.ModTime().UnixNano(), info.Mode())
}

// texts lists the texts in whatever form a hosts.toml may have them.
func texts(value any) (list []string) {
	switch v := value.(type) {
	case string:
		return []string{v}
	case []any:
		for _, one := range v {
			list = append(list, texts(one)...)
		}
	}
	return list
}

// read reads a registry's configuration with containerd's own package.
func (e *Endpoints) read(ctx context.Context, registry, dir string) ([]Endpoint, error) {
	faults := &faults{}
	bases := map[*http.Client]http.RoundTripper{}
	opts := config.HostOptions{
		Credentials: func(host string) (string, string, error) { return "", "", nil },
		UpdateClient: func(c *http.Client) error {
			// As it is before containerd lets it fall back to http.
			bases[c] = tuned(c.Transport)
			c.Transport = bases[c]
			return nil
		},
	}
	file := dir
	if dir != "" {
		opts.HostDir = func(string) (string, error) { return dir, nil }
		if info, err := os.Stat(filepath.Join(dir, hostsFile)); err == nil {
			file = filepath.Join(dir, hostsFile)
			if info.Size() == 0 {
				return nil, fmt.Errorf("%s is empty; write it beside and rename it, or remove it", file)
			}
		}
	} else if slices.Contains(e.cfg.PlainHTTP, registry) {
		opts.DefaultScheme = "http"
	}
	list, err := config.ConfigureHosts(faults.collect(ctx), opts)(registry)
	// containerd says in its log what is wrong, and goes on without the file.
	if err = errors.Join(faults.err, err); err != nil {
		return nil, located(file, err)
	}
	hosts := make([]Endpoint, len(list))
	for i, host := range list {
		hosts[i] = e.endpoint(host, bases[host.Client], file, dir == "" && slices.Contains(e.cfg.SkipVerify, registry))
		if dir != "" {
			hosts[i].know(dir)
		}
	}
	return hosts, nil
}

// know adds what the host's directory alone tells of what nydusd can.
func (h *Endpoint) know(dir string) {
	_, values := configured(dir)
	if len(values.all("dial_timeout")) > 0 {
		h.needs = append(h.needs, "a bound for connecting (dial_timeout)")
	}
	files := values.files(dir, "ca")
	if values == nil {
		files, _ = filepath.Glob(filepath.Join(dir, "*.crt"))
	}
	if h.ownCA && len(files) == 1 {
		h.caFile = files[0]
	}
}

// tuned is a transport for many ranges of a few hosts.
func tuned(rt http.RoundTripper) http.RoundTripper {
	t, isPlain := rt.(*http.Transport)
	if !isPlain {
		return rt
	}
	t = t.Clone()
	t.MaxIdleConns, t.MaxIdleConnsPerHost = 4*maxStreams, maxStreams
	// What comes must be the bytes themselves.
	t.DisableCompression = true
	return t
}

// maxStreams is how many connections to a host are kept open while idle.
const maxStreams = 64

// endpoint completes what containerd says of a host.
func (e *Endpoints) endpoint(host docker.RegistryHost, base http.RoundTripper, file string, skipVerify bool) Endpoint {
	out := Endpoint{RegistryHost: host, File: file}
	if t, isPlain := base.(*http.Transport); isPlain && t.TLSClientConfig != nil {
		if skipVerify {
			t.TLSClientConfig.InsecureSkipVerify = true
		}
		out.skipVerify = t.TLSClientConfig.InsecureSkipVerify
		if len(t.TLSClientConfig.Certificates) > 0 {
			out.needs = append(out.needs, "a client certificate (client)")
		}
		out.ownCA = t.TLSClientConfig.RootCAs != nil
	}
	if host.Client.Transport != base {
		out.needs = append(out.needs, "https that falls back to http")
	}
	if len(host.Header) > 0 {
		out.needs = append(out.needs, "headers (header)")
	}
	if host.Path != "/v2" {
		out.needs = append(out.needs, "another path (override_path)")
	}
	if file == "" {
		out.needs, out.ownCA = nil, false // what nobody has configured nydusd can
	}
	out.Client = &http.Client{
		Transport:     &guard{scheme: host.Scheme, host: host.Host, header: host.Header, own: host.Client.Transport, foreign: base, beyond: withoutCertificate(base)},
		CheckRedirect: followWithoutSecrets,
	}
	out.Authorizer, out.Header = nil, nil
	out.NewAuthorizer = func(ctx context.Context, repository string) docker.Authorizer {
		n := &noticing{find: e.credentials, keychain: e.cfg.Keychain, host: host.Host, repository: repository}
		if c, err := n.credentials(ctx, host.Host); err == nil && c != nil && c.RegistryToken != "" {
			n.Authorizer = bearer{host.Host, c.RegistryToken}
			return n
		}
		ctx = context.WithoutCancel(ctx) // tokens are others' too
		n.Authorizer = docker.NewDockerAuthorizer(docker.WithAuthClient(out.Client), docker.WithAuthCreds(func(host string) (string, string, error) { return login(ctx, host, n.credentials) }))
		return n
	}
	return out
}

// bearer is the authorizer for a host with a token that is final.
type bearer struct{ host, token string }

// Authorize implements docker.Authorizer.
func (b bearer) Authorize(_ context.Context, r *http.Request) error {
	if r.URL.Host == b.host {
		r.Header.Set("Authorization", "Bearer "+b.token)
	}
	return nil
}

// AddResponses implements docker.Authorizer.
func (b bearer) AddResponses(context.Context, []*http.Response) error {
	return fmt.Errorf("the token for %s was refused: %w", b.host, docker.ErrInvalidAuthorization)
}

// guard keeps what is meant for one host from others, to which that may send us: token
// servers and redirects.
type guard struct {
	scheme, host string
	header       http.Header
	// own may fall back to http, foreign does not: it is for token servers, which may
	// want the client certificate, too. beyond is for where redirects lead.
	own, foreign, beyond http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	switch {
	case r.URL.Host == g.host && r.URL.Scheme == g.scheme:
	case r.Response != nil:
		return g.beyond.RoundTrip(r)
	default:
		return g.foreign.RoundTrip(r)
	}
	if len(g.header) > 0 {
		r = r.Clone(r.Context())
		for name, values := range g.header {
			if name != "Authorization" || r.Header.Get(name) == "" {
				r.Header[name] = values
			}
		}
	}
	return g.own.RoundTrip(r)
}

// withoutCertificate is a transport like another one that shows no client certificate.
func withoutCertificate(rt http.RoundTripper) http.RoundTripper {
	t, isPlain := rt.(*http.Transport)
	if !isPlain || t.TLSClientConfig == nil || len(t.TLSClientConfig.Certificates) == 0 && t.TLSClientConfig.GetClientCertificate == nil {
		return rt
	}
	t = t.Clone()
	t.TLSClientConfig.Certificates, t.TLSClientConfig.GetClientCertificate = nil, nil
	return t
}

// login finds what opens a host, in the form that containerd's authorizer wants. It is
// bounded by the keychain.
func login(ctx context.Context, host string, find func(context.Context, string) (*Credentials, error)) (user, secret string, err error) {
	c, err := find(ctx, host)
	if err != nil || c == nil {
		return "", "", err
	}
	if c.IdentityToken != "" {
		return "", c.IdentityToken, nil // it is exchanged for others
	}
	pair, err := base64.StdEncoding.DecodeString(c.Auth)
	if err != nil {
		return "", "", fmt.Errorf("credentials for %s from %s are not base64 of user:password", host, c.Source)
	}
	user, secret, _ = strings.Cut(string(pair), ":")
	return user, secret, nil
}

func (e *Endpoints) credentials(ctx context.Context, host, repository string) (*Credentials, error) {
	if e.cfg.Keychain == nil {
		return nil, nil
	}
	return e.cfg.Keychain.Credentials(ctx, host, repository)
}

// maxRedirects bounds how often a registry may send on.
const maxRedirects = 10

// followWithoutSecrets follows a redirect. What was meant for one host, credentials
// above all, is not sent to another.
func followWithoutSecrets(next *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	first := via[0].URL
	if next.URL.Scheme == first.Scheme && next.URL.Host == first.Host {
		return nil
	}
	if next.Body != nil && next.Body != http.NoBody {
		return errors.New("a redirect that would take credentials to another host is not followed")
	}
	maps.DeleteFunc(next.Header, func(name string, _ []string) bool { return !slices.Contains(harmless(), name) })
	return nil
}

// harmless are the headers that may go anywhere.
func harmless() []string { return []string{"Accept", "Accept-Encoding", "Range", "User-Agent"} }
