package health

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// askTimeout bounds Answers when its context does not.
const askTimeout = 10 * time.Second

// Answers returns nil when the backend of a daemon's configuration, its file's path,
// in the daemon's environment, gives out the blobs, or at least says that it lives
// when there are none: so a daemon that is started now will fetch their metadata. A
// backend other than a registry, a bucket or a directory is taken to answer. The error
// says what is wrong with it.
func Answers(ctx context.Context, config string, env, blobs []string) error {
	text, err := os.ReadFile(filepath.Clean(config))
	if err != nil {
		return fmt.Errorf("read nydusd's configuration: %w", err)
	}
	kind, settings, err := nydusd.BackendOf(string(text))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	switch kind {
	case nydusd.BackendRegistry:
		return answersOf(ctx, settings, env, blobs)
	case nydusd.BackendLocalFS:
		return directoryAnswers(setting(settings, "dir"), blobs)
	case nydusd.BackendS3, nydusd.BackendOSS:
		return bucketAnswers(ctx, kind, settings, env, blobs)
	}
	return nil
}

func directoryAnswers(dir string, blobs []string) error {
	for _, path := range append([]string{""}, blobs...) {
		if _, err := os.Stat(filepath.Join(dir, path)); dir != "" && err != nil {
			return fmt.Errorf("look for the image's blobs: %w", err)
		}
	}
	return nil
}

// registry is how a daemon reaches one. It holds secrets.
type registry struct {
	scheme, host, repository string
	authorization            string
	client                   *http.Client
}

func setting(settings map[string]any, name string) string {
	s, _ := settings[name].(string)
	return s
}

func answersOf(ctx context.Context, settings map[string]any, env, blobs []string) error {
	r, err := registryOf(settings, env)
	if err != nil {
		return err
	}
	return r.answers(ctx, blobs)
}

func registryOf(settings map[string]any, env []string) (*registry, error) {
	r := &registry{scheme: setting(settings, "scheme"), host: setting(settings, "host"), repository: setting(settings, "repo")}
	if r.scheme == "" {
		r.scheme = "https"
	}
	if auth := setting(settings, "auth"); auth != "" {
		r.authorization = "Basic " + auth
	}
	if token := setting(settings, "registry_token"); token != "" {
		r.authorization = "Bearer " + token
	}
	var err error
	r.client, err = clientOf(settings, env)
	return r, err
}

// clientOf is a client that goes the daemon's way.
func clientOf(settings map[string]any, env []string) (*http.Client, error) {
	transport := &http.Transport{Proxy: proxyOf(settings, env), DisableKeepAlives: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}
	// As the daemon does, by the configuration's skip_verify.
	transport.TLSClientConfig.InsecureSkipVerify, _ = settings["skip_verify"].(bool)
	if file := valueOf(env, "SSL_CERT_FILE"); file != "" {
		text, err := os.ReadFile(filepath.Clean(file))
		if err != nil {
			return nil, fmt.Errorf("read SSL_CERT_FILE of the daemon: %w", err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(text)
	}
	return &http.Client{Transport: transport}, nil
}

// valueOf is a variable of an environment, whose names may be in lower case.
func valueOf(env []string, name string) string {
	for _, e := range env {
		if n, value, _ := strings.Cut(e, "="); strings.EqualFold(n, name) {
			return value
		}
	}
	return ""
}

func proxyOf(settings map[string]any, env []string) func(*http.Request) (*url.URL, error) {
	proxy, _ := settings["proxy"].(map[string]any)
	if at, err := url.Parse(setting(proxy, "url")); err == nil && at.Host != "" {
		return http.ProxyURL(at)
	}
	of := (&httpproxy.Config{HTTPProxy: valueOf(env, "HTTP_PROXY"), HTTPSProxy: valueOf(env, "HTTPS_PROXY"), NoProxy: valueOf(env, "NO_PROXY")}).ProxyFunc()
	return func(r *http.Request) (*url.URL, error) { return of(r.URL) }
}

func (r *registry) answers(ctx context.Context, blobs []string) error {
	if len(blobs) == 0 {
		return r.get(ctx, "/v2/")
	}
	for _, b := range blobs {
		if err := r.get(ctx, "/v2/"+r.repository+"/blobs/sha256:"+b); err != nil {
			return err
		}
	}
	return nil
}

// get asks for the first byte. What is redirected is followed, without credentials,
// as the daemon does: the storage behind the registry may be what is away.
func (r *registry) get(ctx context.Context, path string) error {
	fail := func(err error) error { return fmt.Errorf("ask registry %s for %s: %w", r.host, path, err) }
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.scheme+"://"+r.host+path, nil)
	if err != nil {
		return fail(errors.New("not a URL"))
	}
	req.Header.Set("Range", "bytes=0-0")
	if r.authorization != "" {
		req.Header.Set("Authorization", r.authorization)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) {
			err = at.Err // without the URL: one that was redirected may be signed
		}
		return fail(err)
	}
	_, _ = io.CopyN(io.Discard, resp.Body, 1)
	_ = resp.Body.Close()
	return verdict(resp, fail)
}

// verdict reads the answer. A registry that wants a token, which the daemon fetches
// somewhere else, answers.
func verdict(resp *http.Response, fail func(error) error) error {
	challenge := strings.ToLower(resp.Header.Get("WWW-Authenticate"))
	switch code := resp.StatusCode; {
	case code < 300, code == http.StatusRequestedRangeNotSatisfiable:
		return nil
	case code == http.StatusUnauthorized && strings.HasPrefix(challenge, "bearer"):
		return nil
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return fail(fmt.Errorf("%s; the credentials of the mount are not, or no longer, valid: start the container anew", resp.Status))
	}
	return fail(errors.New(resp.Status))
}
