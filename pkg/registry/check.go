package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Report is what a host said.
type Report struct {
	// Host is the host's name with its port, Scheme how it is spoken to, File what
	// says so; empty when nothing does.
	Host   string `json:"host"`
	Scheme string `json:"scheme"`
	File   string `json:"file,omitempty"`
	// TLS is the verdict on its certificate: "verified", "not verified" (by
	// configuration), "none" (plain http), what is wrong with it, or "-" when none was
	// seen.
	TLS string `json:"tls"`
	// Credentials is where those come from that it got, empty for none.
	Credentials string `json:"credentials,omitempty"`
	// Manifest and Blob are "ok" or what went wrong; "-" when it was not asked, since
	// it lacks the capability or there is no manifest to know a blob from.
	Manifest string `json:"manifest"`
	Blob     string `json:"blob"`
	// Took is from the first request to the last answer.
	Took time.Duration `json:"took_ns"`
}

// Works tells whether an image could be read from the host.
func (r Report) Works() bool { return r.Blob == ok }

const (
	ok       = "ok"
	notAsked = "-"
)

// Check asks every host of an image's registry for the image's manifest and for the
// beginning of one of its blobs, in their order.
func (e *Endpoints) Check(ctx context.Context, ref string) ([]Report, error) {
	name, err := parse(ref)
	if err != nil {
		return nil, err
	}
	name = reference.TagNameOnly(name)
	hosts, err := e.For(ctx, reference.Domain(name))
	if err != nil {
		return nil, err
	}
	reports, shown := make([]Report, len(hosts)), make([]*handshakes, len(hosts))
	var blob *ocispec.Descriptor
	for i, h := range hosts {
		shown[i] = newHandshakes(h)
		reports[i] = Report{Host: h.Host, Scheme: h.Scheme, File: h.File, Manifest: notAsked, Blob: notAsked}
	}
	// Who may resolve tells which blobs there are, for those too that may not.
	for i, h := range hosts {
		if !h.Capabilities.Has(docker.HostCapabilityResolve) {
			continue
		}
		begun := time.Now()
		found, err := e.manifest(shown[i].watch(ctx), h, name)
		reports[i].Took, reports[i].Manifest = time.Since(begun), said(err)
		if err == nil && blob == nil {
			blob = found
		}
	}
	for i, h := range hosts {
		if blob == nil || !h.Capabilities.Has(docker.HostCapabilityPull) {
			continue
		}
		begun := time.Now()
		err := e.beginning(shown[i].watch(ctx), h, Blob{Registry: reference.Domain(name), Repository: reference.Path(name), Digest: blob.Digest, Size: blob.Size})
		reports[i].Took, reports[i].Blob = reports[i].Took+time.Since(begun), said(err)
	}
	for i, h := range hosts {
		reports[i].TLS = shown[i].verdict()
		if c, err := e.credentials(ctx, h.Host, reference.Path(name)); err != nil {
			reports[i].Credentials = err.Error()
		} else if c != nil {
			reports[i].Credentials = c.Source
		}
	}
	return reports, nil
}

func said(err error) string {
	if err == nil {
		return ok
	}
	return err.Error()
}

// checkTimeout bounds each question.
const checkTimeout = 10 * time.Second

// manifest fetches an image's manifest from one host, with one login after the other,
// and returns one of its layers.
func (e *Endpoints) manifest(ctx context.Context, h Endpoint, name reference.Named) (*ocispec.Descriptor, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, checkTimeout, fmt.Errorf("no answer within %s", checkTimeout))
	defer cancel()
	ctx = silent(ctx)
	for tries := 1; ; tries++ {
		authorizer := h.NewAuthorizer(ctx, reference.Path(name))
		found, err := h.manifest(ctx, authorizer, name)
		n, _ := authorizer.(*noticing)
		if err == nil {
			return found, nil
		}
		if n == nil || tries > maxLogins || !isRefused(err) {
			return nil, plain(err)
		}
		n.refused() // for the keychain to have another one
		if !n.hasOther(ctx) {
			return nil, plain(err)
		}
	}
}

// isRefused tells whether a host, or its token server, refuses a login.
func isRefused(err error) bool {
	var status remoteerrors.ErrUnexpectedStatus
	return errors.Is(err, docker.ErrInvalidAuthorization) ||
		errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden)
}

// manifest fetches it with one authorizer.
func (h Endpoint) manifest(ctx context.Context, authorizer docker.Authorizer, name reference.Named) (*ocispec.Descriptor, error) {
	host := h.RegistryHost
	host.Authorizer = authorizer
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) { return []docker.RegistryHost{host}, nil }})
	full, desc, err := resolver.Resolve(ctx, name.String())
	if err != nil {
		return nil, err
	}
	fetcher, err := resolver.Fetcher(ctx, full)
	if err != nil {
		return nil, err
	}
	// An index in an index is nobody's.
	for range 3 {
		rc, err := fetcher.Fetch(ctx, desc)
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(io.LimitReader(rc, maxManifest))
		rc.Close()
		if err != nil {
			return nil, err
		}
		if !images.IsIndexType(desc.MediaType) {
			var m ocispec.Manifest
			if json.Unmarshal(text, &m) != nil || len(m.Layers) == 0 {
				return nil, errors.New("it is no manifest with layers")
			}
			return &m.Layers[0], nil
		}
		var index ocispec.Index
		if json.Unmarshal(text, &index) != nil || len(index.Manifests) == 0 {
			return nil, errors.New("it is no index with manifests")
		}
		desc = index.Manifests[0]
	}
	return nil, errors.New("an index within an index")
}

const maxManifest = 4 << 20

// beginning reads the first byte of a blob.
func (e *Endpoints) beginning(ctx context.Context, h Endpoint, b Blob) error {
	f := NewFetcher(FetcherConfig{AnswerTimeout: checkTimeout, StallTimeout: checkTimeout, GiveUp: 2 * checkTimeout})
	p := &Part{f: f, ctx: silent(docker.WithScope(ctx, "repository:"+b.Repository+":pull")), blob: b, left: 1, size: b.Size, moved: time.Now()}
	a, err := p.askHost(h, checkTimeout)
	if err != nil {
		return err
	}
	defer a.Close()
	if _, err := io.CopyN(io.Discard, a, 1); err != nil {
		return fmt.Errorf("%s breaks off: %w", h.Host, plain(err))
	}
	return nil
}

// handshakes watches those with a host, for a verdict on its certificate.
type handshakes struct {
	host Endpoint
	at   string // as a connection names it

	mu   sync.Mutex
	last string // to where a connection was wanted
	done bool
	err  error
}

func newHandshakes(h Endpoint) *handshakes {
	at := h.Host
	if _, _, err := net.SplitHostPort(at); err != nil {
		at = net.JoinHostPort(strings.Trim(at, "[]"), "443")
	}
	return &handshakes{host: h, at: at}
}

// watch returns a context whose requests are watched. They are made one by one, some of
// them to token servers.
func (w *handshakes) watch(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(at string) {
			w.mu.Lock()
			w.last = at
			w.mu.Unlock()
		},
		GotConn: func(c httptrace.GotConnInfo) {
			if _, isTLS := c.Conn.(*tls.Conn); isTLS && c.Reused {
				w.note(nil)
			}
		},
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) { w.note(err) },
	})
}

func (w *handshakes) note(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last == w.at {
		w.done, w.err = err == nil, err
	}
}

// verdict says what is known of the host's certificate.
func (w *handshakes) verdict() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var bad *tls.CertificateVerificationError
	switch {
	case w.host.Scheme != "https":
		return "none"
	case errors.As(w.err, &bad):
		return bad.Error()
	case !w.done:
		return notAsked
	case w.host.skipVerify:
		return "not verified"
	}
	return "verified"
}
