package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// source is a registry's host that serves one blob, after a fault.
type source struct {
	*httptest.Server
	asked atomic.Int64
	seen  atomic.Pointer[http.Header]
	fault atomic.Pointer[http.HandlerFunc]
}

var content = func() []byte {
	b := make([]byte, 3<<20)
	_, _ = rand.Read(b)
	return b
}()

func newSource(t *testing.T) *source {
	s := &source{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		s.seen.Store(&r.Header)
		if f := s.fault.Load(); f != nil {
			(*f)(w, r)
			return
		}
		serve(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *source) host() string { return strings.TrimPrefix(s.URL, "http://") }

func (s *source) fail(f http.HandlerFunc) { s.fault.Store(&f) }

func serve(w http.ResponseWriter, r *http.Request) {
	if !strings.HasSuffix(r.URL.Path, "/v2/a/b/blobs/"+digest.FromBytes(content).String()) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

// setup makes the hosts.toml of registry.test with the sources in their order, the last
// one as the registry itself, with lines for that.
func setup(t *testing.T, lines string, sources ...*source) (*Endpoints, string) {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "registry.test")
	var b strings.Builder
	last := len(sources) - 1
	fmt.Fprintf(&b, "server = %q\n%s\n", sources[last].URL, lines)
	for _, s := range sources[:last] {
		fmt.Fprintf(&b, "[host.%q]\ncapabilities = [\"pull\"]\n", s.URL)
	}
	put(t, filepath.Join(dir, "hosts.toml"), b.String())
	return NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.DiscardHandler)}), dir
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func blob() Blob {
	return Blob{Registry: "registry.test", Repository: "a/b", Digest: digest.FromBytes(content), Size: int64(len(content))}
}

// quick is a Fetcher that does not wait for long.
func quick(e Finder) *Fetcher {
	return NewFetcher(FetcherConfig{Finder: e, AnswerTimeout: time.Second, StallTimeout: time.Second, GiveUp: 20 * time.Second, Avoid: time.Hour})
}

func read(t *testing.T, f *Fetcher, offset, length int64) ([]byte, error) {
	t.Helper()
	p, err := f.Open(t.Context(), blob(), offset, length)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return io.ReadAll(p)
}

func mustRead(t *testing.T, f *Fetcher, offset, length int64) {
	t.Helper()
	got, err := read(t, f, offset, length)
	if err != nil {
		t.Fatal(err)
	}
	end := int64(len(content))
	if length >= 0 {
		end = offset + length
	}
	if !bytes.Equal(got, content[offset:end]) {
		t.Fatalf("%d bytes from %d on are %d others", length, offset, len(got))
	}
}

func TestParts(t *testing.T) {
	s := newSource(t)
	e, _ := setup(t, "", s)
	f := quick(e)
	for _, r := range [][2]int64{{0, -1}, {0, 1}, {1, 100}, {2 << 20, 1 << 20}, {3<<20 - 1, 1}, {5, -1}, {0, 3 << 20}} {
		mustRead(t, f, r[0], r[1])
	}
	for _, r := range [][2]int64{{0, 3<<20 + 1}, {3 << 20, 1}, {4 << 20, -1}} {
		if _, err := read(t, f, r[0], r[1]); !errors.Is(err, ErrRange) {
			t.Errorf("%v: %v, want ErrRange", r, err)
		}
	}
	other := blob()
	other.Digest = digest.FromString("other")
	if _, err := f.Open(t.Context(), other, 0, -1); !errors.Is(err, ErrNoBlob) {
		t.Errorf("a blob that nobody has: %v", err)
	}
}

// faults of a host, after each of which the next one gives out what is left.
var hostFaults = map[string]http.HandlerFunc{
	"500": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
	"502": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
	"404": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) },
	"401": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) },
	"403": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
	"429": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "100")
		w.WriteHeader(http.StatusTooManyRequests)
	},
	"hang": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	"reset in the middle": func(w http.ResponseWriter, r *http.Request) {
		partly(w, r)
		panic(http.ErrAbortHandler)
	},
	"stall in the middle": func(w http.ResponseWriter, r *http.Request) {
		partly(w, r)
		<-r.Context().Done()
	},
	"reset": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	"another range": func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("Range", "bytes=7-99")
		serve(w, r)
	},
	"another size": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-9/10")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(content[:10])
	},
	"no size": func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush(); _, _ = w.Write(content) },
	"another blob": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Docker-Content-Digest", digest.FromString("other").String())
		serve(w, r)
	},
	"compressed": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		serve(w, r)
	},
	"a page": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>log in") },
	"endless redirect": func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
	},
	"nonsense": func(w http.ResponseWriter, _ *http.Request) {
		c, _, _ := w.(http.Hijacker).Hijack()
		_, _ = io.WriteString(c, "nonsense\r\n\r\n")
		c.Close()
	},
}

// partly answers with a part of what was asked for.
func partly(w http.ResponseWriter, r *http.Request) {
	rec := httptest.NewRecorder()
	serve(rec, r)
	for name, values := range rec.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(rec.Code)
	_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
	w.(http.Flusher).Flush()
}

func TestNextHost(t *testing.T) {
	for name, fault := range hostFaults {
		t.Run(name, func(t *testing.T) {
			bad, good := newSource(t), newSource(t)
			e, _ := setup(t, "", bad, good)
			bad.fail(fault)
			f := quick(e)
			mustRead(t, f, 1000, 2<<20)
			if good.asked.Load() == 0 || bad.asked.Load() == 0 {
				t.Error("not both were asked")
			}
			mustRead(t, f, 0, -1)
		})
	}
}

// The only host fails for a while.
func TestAgain(t *testing.T) {
	for _, name := range []string{"500", "502", "hang", "reset", "reset in the middle", "stall in the middle"} {
		t.Run(name, func(t *testing.T) {
			s := newSource(t)
			e, _ := setup(t, "", s)
			s.fail(func(w http.ResponseWriter, r *http.Request) {
				if s.asked.Load() > 2 {
					serve(w, r)
					return
				}
				hostFaults[name](w, r)
			})
			mustRead(t, quick(e), 5, 1<<20)
		})
	}
}

// Nobody has it: the error names each host and ends in time.
func TestAllFail(t *testing.T) {
	one, two := newSource(t), newSource(t)
	e, _ := setup(t, "", one, two)
	one.fail(hostFaults["502"])
	two.fail(hostFaults["hang"])
	begun := time.Now()
	f := NewFetcher(FetcherConfig{Finder: e, AnswerTimeout: time.Second, GiveUp: 5 * time.Second})
	_, err := read(t, f, 0, 10)
	if err == nil {
		t.Fatal("it was read")
	}
	for _, want := range []string{one.host() + " answers 502", two.host() + ": no answer within 1s", "registry.test/a/b@sha256:"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error has no %q: %v", want, err)
		}
	}
	if took := time.Since(begun); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	two.fault.Store(nil)
	mustRead(t, quick(e), 0, 10)
}

// A host that asks for a pause gets it.
func TestRetryAfter(t *testing.T) {
	s := newSource(t)
	e, _ := setup(t, "", s)
	var first, second time.Time
	s.fail(func(w http.ResponseWriter, r *http.Request) {
		if s.asked.Load() > 1 {
			second = time.Now()
			serve(w, r)
			return
		}
		first = time.Now()
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	mustRead(t, quick(e), 0, 10)
	if pause := second.Sub(first); pause < time.Second {
		t.Errorf("asked again after %v", pause)
	}
}

// A host that has failed is asked last for some time.
func TestAvoid(t *testing.T) {
	bad, good := newSource(t), newSource(t)
	e, _ := setup(t, "", bad, good)
	bad.fail(hostFaults["500"])
	f := quick(e)
	for range 3 {
		mustRead(t, f, 0, 10)
	}
	if n := bad.asked.Load(); n != 1 {
		t.Errorf("the host that fails was asked %d times", n)
	}
	good.fail(hostFaults["500"])
	bad.fault.Store(nil)
	mustRead(t, f, 0, 10)
}

// What was meant for one host does not follow a redirect to another.
func TestRedirect(t *testing.T) {
	for _, code := range []int{301, 302, 307, 308} {
		s, other := newSource(t), newSource(t)
		e, _ := setup(t, "[header]\n  X-Secret = \"canary\"\n    Authorization = \"Basic canary\"", s)
		s.fail(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("X-Secret") != "canary" || r.Header.Get("Authorization") != "Basic canary" {
				t.Errorf("the host gets %v", r.Header)
			}
			http.Redirect(w, r, other.URL+r.URL.Path+"?signature=canary", code)
		})
		mustRead(t, quick(e), 3, 10)
		for name, values := range *other.seen.Load() {
			if strings.Contains(strings.Join(values, ""), "canary") {
				t.Errorf("after %d the other host gets %s", code, name)
			}
		}
		other.fail(hostFaults["reset"])
		f := NewFetcher(FetcherConfig{Finder: e, GiveUp: time.Second})
		if _, err := read(t, f, 3, 10); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("the error tells where the redirect led: %v", err)
		}
	}
}

// fixed is a keychain with one login.
type fixed string

func (f fixed) Credentials(context.Context, string, string) (*Credentials, error) {
	return &Credentials{Auth: base64.StdEncoding.EncodeToString([]byte(f))}, nil
}

// issuer is a registry that wants tokens and issues them.
type issuer struct {
	*source
	issued atomic.Int64
	// refuse answers who comes with an old token, token (when there is one) who wants
	// another.
	refuse, token http.HandlerFunc
}

func (i *issuer) challenge(w http.ResponseWriter, more string) {
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x",scope="repository:a/b:pull"%s`, i.URL, more))
	w.WriteHeader(http.StatusUnauthorized)
}

func newIssuer(t *testing.T) *issuer {
	i := &issuer{source: newSource(t)}
	i.fail(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			if i.token != nil {
				i.token(w, r)
				return
			}
			if user, password := r.PostFormValue("username"), r.PostFormValue("password"); user != "user" || password != "canary:word" {
				t.Errorf("a token is asked for by %q", user)
			}
			if scope := r.PostFormValue("scope"); scope != "repository:a/b:pull" {
				t.Errorf("with scope %q", scope)
			}
			fmt.Fprintf(w, `{"access_token":"token-%d"}`, i.issued.Add(1))
			return
		}
		switch r.Header.Get("Authorization") {
		case fmt.Sprintf("Bearer token-%d", i.issued.Load()):
			serve(w, r)
		case "":
			i.challenge(w, "")
		default:
			i.refuse(w, r)
		}
	})
	return i
}

func (i *issuer) endpoints(t *testing.T) *Endpoints {
	e, _ := setup(t, "", i.source)
	e.cfg.Keychain = fixed("user:canary:word")
	return e
}

// Tokens are fetched with the login, and again when they are refused, however that is
// said.
func TestTokens(t *testing.T) {
	for name, refuse := range map[string]func(*issuer) http.HandlerFunc{
		"invalid token": func(i *issuer) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { i.challenge(w, `,error="invalid_token"`) }
		},
		"no reason": func(i *issuer) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { i.challenge(w, "") }
		},
		"forbidden": func(*issuer) http.HandlerFunc { return hostFaults["403"] },
	} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t)
			i.refuse = refuse(i)
			f := quick(i.endpoints(t))
			for range 3 {
				mustRead(t, f, 0, 10)
				i.issued.Add(1) // the one that it has is void
			}
			mustRead(t, f, 5, 10)
		})
	}
}

// A token server that failed is asked again, and one that sends on gets no login taken
// along.
func TestTokenServer(t *testing.T) {
	i := newIssuer(t)
	f := quick(i.endpoints(t))
	i.token = func(w http.ResponseWriter, _ *http.Request) {
		i.token = nil
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, "canary")
	}
	mustRead(t, f, 0, 10)
	for _, code := range []int{301, 302, 307, 308} {
		other := newSource(t)
		other.fail(func(w http.ResponseWriter, r *http.Request) {
			_ = r.ParseForm()
			if text := fmt.Sprint(r.Header, r.Form); strings.Contains(text, ":word") || strings.Contains(text, "Authorization") {
				t.Errorf("after %d another host gets %s", code, text)
			}
			w.WriteHeader(http.StatusNotFound)
		})
		i := newIssuer(t)
		i.token = func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL+"/token?canary", code) }
		f := NewFetcher(FetcherConfig{Finder: i.endpoints(t), GiveUp: time.Second})
		if _, err := read(t, f, 0, 10); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("after %d: %v", code, err)
		}
	}
}

// A token server that does not know the login, and a host that does not take our
// certificate, are not asked for half a minute.
func TestRefusedForGood(t *testing.T) {
	i := newIssuer(t)
	asked := 0
	i.token = func(w http.ResponseWriter, _ *http.Request) {
		asked++
		w.WriteHeader(http.StatusUnauthorized)
	}
	if _, err := read(t, quick(i.endpoints(t)), 0, 10); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "the token server answers 401") {
		t.Errorf("the token server: %v", err)
	}
	if asked > 4 {
		t.Errorf("the token server was asked %d times", asked)
	}

	s := &source{}
	var conns atomic.Int64
	s.Server = httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert}
	s.StartTLS()
	defer s.Close()
	e, _ := setup(t, "skip_verify = true", s)
	if _, err := read(t, quick(e), 0, 10); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("the host: %v", err)
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections to the host", n)
	}
}

// A connection that nobody accepts is given up for the next host.
func TestDeadHost(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	good := newSource(t)
	e, _ := setup(t, "", &source{Server: &httptest.Server{URL: "http://" + l.Addr().String()}}, good)
	mustRead(t, quick(e), 0, 100)
}
