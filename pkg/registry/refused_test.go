package registry

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// several is a keychain with several logins, which it takes back one by one.
type several struct {
	mu      sync.Mutex
	logins  []string
	refused []string
}

func (s *several) Credentials(context.Context, string, string) (*Credentials, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Credentials{Auth: base64.StdEncoding.EncodeToString([]byte(s.logins[0]))}, nil
}

func (s *several) Refused(host, repository string, c *Credentials) {
	s.mu.Lock()
	defer s.mu.Unlock()
	login, _ := base64.StdEncoding.DecodeString(c.Auth)
	s.refused = append(s.refused, repository+" "+string(login))
	if i := slices.Index(s.logins, string(login)); i >= 0 && len(s.logins) > 1 {
		s.logins = slices.Delete(s.logins, i, i+1)
	}
}

// basic makes a source want a login, in whichever way.
func basic(s *source, code int) {
	s.fail(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user == "good" && password == "p" {
			serve(w, r)
		} else if w.Header().Set("WWW-Authenticate", `Basic realm="x"`); user == "" {
			w.WriteHeader(http.StatusUnauthorized)
		} else {
			w.WriteHeader(code)
		}
	})
}

// A login that is refused gives way to another one, within the request.
func TestRefusedLogins(t *testing.T) {
	for _, code := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		s := newSource(t)
		basic(s, code)
		e, _ := setup(t, "", s)
		k := &several{logins: []string{"bad:1", "bad:2", "good:p"}}
		e.cfg.Keychain = k
		f := quick(e)
		mustRead(t, f, 0, 10)
		if got := strings.Join(k.refused, ","); got != "a/b bad:1,a/b bad:2" {
			t.Errorf("%d: refused are %q", code, got)
		}
		before := s.asked.Load()
		mustRead(t, f, 0, 10)
		if n := s.asked.Load() - before; n != 1 {
			t.Errorf("%d: %d requests once it is known", code, n)
		}
	}
}

// The only login, which is wrong, is not tried for ever.
func TestTheOnlyLoginIsRefused(t *testing.T) {
	s := newSource(t)
	basic(s, http.StatusUnauthorized)
	e, _ := setup(t, "", s)
	k := &several{logins: []string{"bad:1"}}
	e.cfg.Keychain = k
	if _, err := read(t, quick(e), 0, 10); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("%v", err)
	}
	if n := s.asked.Load(); n > 4 || len(k.refused) != 1 {
		t.Errorf("%d requests, refused are %q", n, k.refused)
	}
}

// So does one that a token server refuses. A token that has ended says nothing of the
// login.
func TestTokenServerRefuses(t *testing.T) {
	i := newIssuer(t)
	i.token = func(w http.ResponseWriter, r *http.Request) {
		user, _, _ := r.BasicAuth()
		if r.PostFormValue("username") != "good" && user != "good" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, `{"access_token":"token-%d"}`, i.issued.Add(1))
	}
	i.refuse = func(w http.ResponseWriter, _ *http.Request) { i.challenge(w, `,error="invalid_token"`) }
	e := i.endpoints(t)
	k := &several{logins: []string{"bad:1", "good:p"}}
	e.cfg.Keychain = k
	f := quick(e)
	for range 3 {
		mustRead(t, f, 0, 10)
		i.issued.Add(1) // the token that it has is void
	}
	if got := strings.Join(k.refused, ","); got != "a/b bad:1" {
		t.Errorf("refused are %q", got)
	}
}

// The check finds the login that opens an image as reading its blobs does.
func TestCheckTriesLogins(t *testing.T) {
	for _, code := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		s := newSource(t)
		s.fail(func(w http.ResponseWriter, r *http.Request) {
			user, password, _ := r.BasicAuth()
			switch w.Header().Set("WWW-Authenticate", `Basic realm="x"`); {
			case user == "":
				w.WriteHeader(http.StatusUnauthorized)
			case user != "good" || password != "p":
				w.WriteHeader(code)
			case strings.Contains(r.URL.Path, "/manifests/"):
				text := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"layers":[{"digest":%q,"size":%d}]}`, ocispec.MediaTypeImageManifest, digest.FromBytes(content), len(content))
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				w.Header().Set("Content-Length", fmt.Sprint(len(text)))
				w.Header().Set("Docker-Content-Digest", digest.FromString(text).String())
				_, _ = io.WriteString(w, text)
			default:
				serve(w, r)
			}
		})
		e, _ := setup(t, "", s)
		e.cfg.Keychain = &several{logins: []string{"bad:1", "bad:2", "good:p"}}
		reports, err := e.Check(t.Context(), "registry.test/a/b:latest")
		if err != nil || len(reports) != 1 || reports[0].Manifest != ok || reports[0].Blob != ok {
			t.Errorf("%d: %+v, %v", code, reports, err)
		}
		e.cfg.Keychain = &several{logins: []string{"bad:1", "bad:2"}}
		if reports, err = e.Check(t.Context(), "registry.test/a/b:latest"); err != nil || reports[0].Manifest == ok {
			t.Errorf("%d: without the right one: %+v, %v", code, reports, err)
		}
	}
}
