package health

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// askTimeout bounds Answers when its context does not.
const askTimeout = 10 * time.Second

// Answers returns nil when the backend of a daemon's configuration, its file's path,
// gives out the blobs, or at least says that it lives when there are none: so a
// daemon that is started now will fetch their metadata. A backend other than a
// registry or a directory is taken to answer. The error says what is wrong with it.
func Answers(ctx context.Context, config string, blobs []string) error {
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
		return registryOf(settings).answers(ctx, blobs)
	case nydusd.BackendLocalFS:
		return directoryAnswers(setting(settings, "dir"), blobs)
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

func registryOf(settings map[string]any) *registry {
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
	transport := &http.Transport{Proxy: proxyOf(settings), DisableKeepAlives: true}
	if skip, _ := settings["skip_verify"].(bool); skip {
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // as the daemon does, by [remote] skip_verify
	}
	r.client = &http.Client{Transport: transport}
	return r
}

func proxyOf(settings map[string]any) func(*http.Request) (*url.URL, error) {
	proxy, _ := settings["proxy"].(map[string]any)
	if at, err := url.Parse(setting(proxy, "url")); err == nil && at.Host != "" {
		return http.ProxyURL(at)
	}
	return http.ProxyFromEnvironment
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
