package registry_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// front is a fault proxy before a registry: toxiproxy, which spoils connections, before
// a proxy of ours, which spoils answers and takes note of requests.
type front struct {
	Host string // 127.0.0.1:PORT, plain HTTP

	t     *testing.T
	tcp   *toxiproxy.Proxy
	fault atomic.Pointer[fault]

	mu   sync.Mutex
	seen []seen
}

// seen is a request as it came.
type seen struct {
	method, path, query string
	header              http.Header
	spoilt              string // by which fault
}

// fault spoils the answer of next, or answers instead.
type fault struct {
	name  string
	serve func(w http.ResponseWriter, r *http.Request, next http.Handler)
	// toxic is toxiproxy's, none for an empty type; down refuses connections.
	toxic string
	attrs map[string]any
	down  bool
	// lies says that what comes has the right length and the wrong content.
	lies bool
}

// newFront starts a proxy before a handler, such as before makes of a registry.
func newFront(t *testing.T, next http.Handler) *front {
	t.Helper()
	f := &front{t: t}
	server := httptest.NewServer(f.note(next))
	t.Cleanup(server.Close)
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	f.tcp = toxiproxy.NewProxy(api, t.Name(), quietAddress(t), server.Listener.Addr().String())
	must(t, f.tcp.Start())
	t.Cleanup(f.tcp.Stop)
	f.Host = f.tcp.Listen
	return f
}

// before passes requests on to a registry.
func before(r *kit.Registry, config *tls.Config) http.Handler {
	scheme := "http"
	if config != nil {
		scheme = "https"
	}
	to := &url.URL{Scheme: scheme, Host: r.Host}
	return &httputil.ReverseProxy{
		Rewrite:      func(p *httputil.ProxyRequest) { p.SetURL(to); p.Out.Host = p.In.Host },
		Transport:    &http.Transport{TLSClientConfig: config, DisableCompression: true, MaxIdleConnsPerHost: 64},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
}

func (f *front) note(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := f.fault.Load()
		s := seen{method: r.Method, path: r.URL.Path, query: r.URL.RawQuery, header: r.Header.Clone()}
		if now != nil {
			s.spoilt = now.name
		}
		f.mu.Lock()
		f.seen = append(f.seen, s)
		f.mu.Unlock()
		if now != nil && now.serve != nil {
			now.serve(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// spoil makes a fault the only one. nil heals.
func (f *front) spoil(with *fault) {
	f.t.Helper()
	f.fault.Store(with)
	f.tcp.Toxics.ResetToxics(context.Background())
	if with != nil && with.down {
		f.tcp.Stop()
		return
	}
	if !f.tcp.Enabled {
		must(f.t, f.tcp.Start())
	}
	if with != nil && with.toxic != "" {
		text, err := json.Marshal(map[string]any{"type": with.toxic, "attributes": with.attrs})
		must(f.t, err)
		_, err = f.tcp.Toxics.AddToxicJson(bytes.NewReader(text))
		must(f.t, err)
	}
}

// requests lists what came, and forgets it.
func (f *front) requests() []seen {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := f.seen
	f.seen = nil
	return list
}

// blobs counts requests for blobs.
func blobs(list []seen) (n int) {
	for _, s := range list {
		if strings.Contains(s.path, "/blobs/") {
			n++
		}
	}
	return n
}

// The faults of answers.

func status(code int, header ...string) *fault {
	return &fault{name: fmt.Sprint(code), serve: func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		http.Error(w, "the lab is ill", code)
	}}
}

// halved answers with the beginning of the body and ends the connection.
func halved() *fault {
	return &fault{name: "truncated", serve: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		copyHeader(w, rec)
		w.WriteHeader(rec.Code)
		_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
		panic(http.ErrAbortHandler)
	}}
}

// shortened answers with the beginning of the body as if that were all.
func shortened() *fault {
	return altered("shortened", func(body []byte) []byte { return body[:len(body)/2] })
}

// oversized answers with more than was asked for.
func oversized() *fault {
	return altered("oversized", func(body []byte) []byte { return append(bytes.Clone(body), body...) })
}

// wrong answers with other content of the same length.
func wrong() *fault {
	f := altered("wrong content", func(body []byte) []byte {
		other := bytes.Clone(body)
		for i := range other {
			other[i] ^= 0x55
		}
		return other
	})
	f.lies = true
	return f
}

// page answers with a page of HTML, as a captive portal does.
func page() *fault {
	return &fault{name: "page", lies: true, serve: func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>"+strings.Repeat("Please log in. ", 100_000))
	}}
}

func altered(name string, alter func([]byte) []byte) *fault {
	return &fault{name: name, serve: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		body := rec.Body.Bytes()
		if rec.Code < 300 {
			body = alter(body)
		}
		copyHeader(w, rec)
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.WriteHeader(rec.Code)
		_, _ = w.Write(body)
	}}
}

func copyHeader(w http.ResponseWriter, rec *httptest.ResponseRecorder) {
	for name, values := range rec.Header() {
		w.Header()[name] = values
	}
}

// redirect sends on to another server.
func redirect(code int, to string) *fault {
	return &fault{name: fmt.Sprintf("redirect %d", code), serve: func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Location", to+r.URL.Path)
		w.WriteHeader(code)
	}}
}

// hang answers nothing until the client has gone.
func hang() *fault {
	return &fault{name: "hang", serve: func(_ http.ResponseWriter, r *http.Request, _ http.Handler) { <-r.Context().Done() }}
}

// The faults of connections.

func down() *fault { return &fault{name: "down", down: true} }

func toxic(kind string, attrs map[string]any) *fault {
	return &fault{name: kind, toxic: kind, attrs: attrs}
}

// quietAddress is an address of which the kernel gives the port to nobody who does not ask
// for it, so that whoever has left it can return.
func quietAddress(t *testing.T) string {
	t.Helper()
	const first, all = 20000, 12000 // below ip_local_port_range
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(all)))
		if err == nil {
			l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// deadHost is an address at which nobody listens.
func deadHost(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}
