package kit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sys/unix"
)

// RegistryOptions says what a test's registry asks for. The zero value is an
// open registry.
type RegistryOptions struct {
	User, Password string // basic authentication when User is not empty
	// Of is a registry whose content this one serves too: another door to the same
	// blobs.
	Of *Registry
	// TLS makes the registry itself speak https. Nothing can see its requests then,
	// and nobody pushes to it: see Of.
	TLS *RegistryTLS
	// Token makes it want tokens of a token server.
	Token *RegistryToken
}

// RegistryTLS names files in PEM.
type RegistryTLS struct {
	Certificate, Key string
	// ClientCA is whose certificates clients must show; empty for none.
	ClientCA string
}

// RegistryToken is a token server as the registry knows it. The registry accepts a
// token for a minute after its end.
type RegistryToken struct {
	Realm, Service, Issuer string
	// Roots is a file in PEM: whose certificates sign tokens.
	Roots string
}

// Request is one answered request, as the registry's clients made it.
type Request struct {
	Time          time.Time
	Method, Path  string
	Range         string // Range header
	UserAgent     string
	Authenticated bool // carried an Authorization header
	Status        int
	Bytes         int64 // length of the answer's body as sent
}

// Registry is a real docker-registry on 127.0.0.1 and a random port, with
// storage of its own, behind a proxy that records each request and lets tests
// interfere.
type Registry struct {
	Host           string // 127.0.0.1:PORT, plain HTTP without RegistryOptions.TLS
	User, Password string // as in the options
	Log            string // path of the registry's own log

	t       TB
	storage string
	daemon  *Daemon
	proxy   io.Closer
	hook    atomic.Pointer[Hook]

	mu       sync.Mutex
	requests []Request
	pushed   map[string]bool // REPOSITORY@DIGEST of uploaded blobs
}

// Hook may answer a request itself, change it, wait, or pass it on to next
// (possibly with a ResponseWriter that alters the answer).
type Hook func(w http.ResponseWriter, r *http.Request, next http.Handler)

var registries atomic.Int32

// NewRegistry starts a registry that ends with the test.
func NewRegistry(t TB, opts RegistryOptions) *Registry {
	t.Helper()
	Baseline(t)
	tools := MustTools(t)
	number := registries.Add(1)
	dir := filepath.Join(Scratch(), fmt.Sprintf("registry-%d", number))
	socket := filepath.Join(RunRoot, fmt.Sprintf("registry-%d.sock", number))
	r := &Registry{User: opts.User, Password: opts.Password, Log: filepath.Join(dir, "registry.log"), storage: filepath.Join(dir, "storage"), t: t}
	if opts.Of != nil {
		r.storage = opts.Of.storage
	}
	config, err := r.writeConfig(dir, socket, opts)
	if err != nil {
		t.Fatalf("new registry: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	t.Cleanup(func() { dumpOnFailure(t, r.Log) })
	env := []string{"PATH=" + os.Getenv("PATH"), "OTEL_TRACES_EXPORTER=none"}
	if r.daemon, err = startDaemon("docker-registry", r.Log, env, []string{tools.Registry, "serve", config}); err != nil {
		t.Fatalf("new registry: %v", err)
	}
	t.Cleanup(func() {
		_ = r.daemon.end(unix.SIGKILL, settle)
		_ = os.Remove(socket)
	})
	if err := r.daemon.ready(t.Context(), socket); err != nil {
		t.Fatalf("new registry: %v", err)
	}
	serve := r.serve
	if opts.TLS != nil {
		serve = r.forward
	}
	if err := serve(socket); err != nil {
		t.Fatalf("new registry: %v", err)
	}
	t.Cleanup(func() { _ = r.proxy.Close() })
	return r
}

func (r *Registry) writeConfig(dir, socket string, opts RegistryOptions) (string, error) {
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.MkdirAll(r.storage, 0o755)); err != nil {
		return "", err
	}
	var secret [16]byte
	if _, err := unix.Getrandom(secret[:], 0); err != nil {
		return "", err
	}
	server := map[string]any{"net": "unix", "addr": socket, "relativeurls": true, "secret": fmt.Sprintf("%x", secret)}
	if opts.TLS != nil {
		tls := map[string]any{"certificate": opts.TLS.Certificate, "key": opts.TLS.Key}
		if opts.TLS.ClientCA != "" {
			tls["clientcas"] = []string{opts.TLS.ClientCA}
		}
		server["tls"] = tls
	}
	config := map[string]any{
		"version": "0.1",
		"log":     map[string]any{"level": "warn", "accesslog": map[string]any{"disabled": true}},
		"storage": map[string]any{
			"filesystem":  map[string]any{"rootdirectory": r.storage},
			"delete":      map[string]any{"enabled": true},
			"maintenance": map[string]any{"uploadpurging": map[string]any{"enabled": false}},
		},
		"http": server,
	}
	if opts.Token != nil {
		config["auth"] = map[string]any{"token": map[string]any{
			"realm": opts.Token.Realm, "service": opts.Token.Service, "issuer": opts.Token.Issuer, "rootcertbundle": opts.Token.Roots,
		}}
	}
	if r.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(r.Password), bcrypt.MinCost)
		if err != nil {
			return "", err
		}
		path := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(path, fmt.Appendf(nil, "%s:%s\n", r.User, hash), 0o600); err != nil {
			return "", err
		}
		config["auth"] = map[string]any{"htpasswd": map[string]any{"realm": "nydus test", "path": path}}
	}
	text, err := json.Marshal(config) // JSON is YAML
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "config.yml")
	return path, os.WriteFile(path, text, 0o600)
}

func (r *Registry) serve(socket string) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	r.Host = listener.Addr().String()
	backend := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", r.Host
			p.Out.Host = p.In.Host
		},
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", socket)
			},
			DisableCompression:  true,
			MaxIdleConnsPerHost: 64,
		},
		// A client that goes away is no news.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	proxy := &http.Server{Handler: r.record(backend), ReadHeaderTimeout: time.Minute}
	r.proxy = proxy
	go func() { _ = proxy.Serve(listener) }()
	return nil
}

// forward passes bytes on as they are.
func (r *Registry) forward(socket string) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	r.Host, r.proxy = listener.Addr().String(), listener
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go splice(client, socket)
		}
	}()
	return nil
}

// splice connects a client with a socket until both have ended.
func splice(client net.Conn, socket string) {
	defer client.Close()
	server, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	defer server.Close()
	answered := make(chan struct{})
	go func() {
		_, _ = io.Copy(client, server)
		_ = client.(*net.TCPConn).CloseWrite()
		close(answered)
	}()
	_, _ = io.Copy(server, client)
	_ = server.(*net.UnixConn).CloseWrite()
	<-answered
}

// record wraps the hook, so that what a hook answers is recorded as well.
func (r *Registry) record(backend http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		cw := &countingWriter{ResponseWriter: w, status: http.StatusOK}
		entry := Request{
			Time: time.Now(), Method: req.Method, Path: req.URL.Path,
			Range: req.Header.Get("Range"), UserAgent: req.UserAgent(),
			Authenticated: req.Header.Get("Authorization") != "",
		}
		defer func() { // a hook may panic with http.ErrAbortHandler to cut the connection
			entry.Status, entry.Bytes = cw.status, cw.bytes
			r.mu.Lock()
			r.requests = append(r.requests, entry)
			r.mu.Unlock()
		}()
		if hook := r.hook.Load(); hook != nil {
			(*hook)(cw, req, backend)
			return
		}
		backend.ServeHTTP(cw, req)
	})
}

type countingWriter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// SetHook installs h for the following requests; nil removes it.
func (r *Registry) SetHook(h Hook) {
	if h == nil {
		r.hook.Store(nil)
		return
	}
	r.hook.Store(&h)
}

// AlterBody passes the answer's body through f, for hooks; f gets bodies whole.
func AlterBody(w http.ResponseWriter, req *http.Request, next http.Handler, f func([]byte) []byte) {
	rec := &bodyRecorder{header: http.Header{}, status: http.StatusOK}
	next.ServeHTTP(rec, req)
	for k, v := range rec.header {
		w.Header()[k] = v
	}
	body := f(rec.body.Bytes())
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(rec.status)
	_, _ = w.Write(body)
}

type bodyRecorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (b *bodyRecorder) Header() http.Header         { return b.header }
func (b *bodyRecorder) WriteHeader(status int)      { b.status = status }
func (b *bodyRecorder) Write(p []byte) (int, error) { return b.body.Write(p) }

// Pause stops the registry's process (connections hang) until Resume.
func (r *Registry) Pause() error { return r.daemon.Signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (r *Registry) Resume() error { return r.daemon.Signal(syscall.SIGCONT) }

// Requests is what was answered since the start or the last ResetRequests.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Request(nil), r.requests...)
}

// ResetRequests forgets the requests so far.
func (r *Registry) ResetRequests() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = nil
}

var blobPath = regexp.MustCompile(`^/v2/.+/blobs/(sha256:[0-9a-f]{64})$`)

// BlobBytes is the number of blob bytes sent since the last ResetRequests, by
// blob digest; BlobTotal is their sum.
func (r *Registry) BlobBytes() map[string]int64 {
	sum := map[string]int64{}
	for _, req := range r.Requests() {
		m := blobPath.FindStringSubmatch(req.Path)
		if m != nil && req.Method == http.MethodGet && req.Status < 300 {
			sum[m[1]] += req.Bytes
		}
	}
	return sum
}

// BlobTotal is the number of blob bytes sent since the last ResetRequests.
func (r *Registry) BlobTotal() int64 {
	var total int64
	for _, n := range r.BlobBytes() {
		total += n
	}
	return total
}

// Ref is the full reference of an image in this registry.
func (r *Registry) Ref(name string) string { return r.Host + "/" + name }

// Push uploads an image under name (REPOSITORY:TAG) and returns its full
// reference. Its requests are not recorded and see no hook. A blob is uploaded
// once to each repository: one that a test deleted stays deleted.
func (r *Registry) Push(ctx context.Context, img *Image, name string) (string, error) {
	repo, tag, ok := strings.Cut(name, ":")
	if !ok {
		return "", fmt.Errorf("push %s: the name has no tag", name)
	}
	p := pusher{ctx: ctx, base: "http://" + r.Host + "/v2/" + repo, user: r.User, password: r.Password}
	hook := r.hook.Swap(nil)
	defer r.hook.Store(hook)
	before := len(r.Requests())
	defer func() {
		r.mu.Lock()
		r.requests = r.requests[:min(before, len(r.requests))]
		r.mu.Unlock()
	}()
	for _, b := range append([]Blob{img.Config}, img.Layers...) {
		if !r.claim(repo + "@" + b.Desc.Digest.String()) {
			continue
		}
		if err := p.blob(b); err != nil {
			return "", fmt.Errorf("push %s: blob %s: %w", name, b.Desc.Digest, err)
		}
	}
	if err := p.manifest(img, tag); err != nil {
		return "", fmt.Errorf("push %s: manifest: %w", name, err)
	}
	return r.Ref(name), nil
}

// claim reports whether a blob was never uploaded to its repository.
func (r *Registry) claim(blob string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pushed == nil {
		r.pushed = map[string]bool{}
	}
	first := !r.pushed[blob]
	r.pushed[blob] = true
	return first
}

// MustPush is Push for a test.
func (r *Registry) MustPush(t TB, img *Image, name string) string {
	t.Helper()
	ref, err := r.Push(t.Context(), img, name)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return ref
}

// pusher speaks as much of the distribution protocol as an upload needs.
type pusher struct {
	ctx            context.Context
	base           string
	user, password string
}

func (p pusher) do(method, url string, body io.Reader, size int64, contentType string, want int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(p.ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = size
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if p.user != "" {
		req.SetBasicAuth(p.user, p.password)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1000))
	resp.Body.Close()
	if err == nil && resp.StatusCode != want {
		err = fmt.Errorf("%s answered %s: %s", method, resp.Status, text)
	}
	return resp, err
}

func (p pusher) blob(b Blob) error {
	resp, err := p.do(http.MethodPost, p.base+"/blobs/uploads/", nil, 0, "", http.StatusAccepted)
	if err != nil {
		return err
	}
	to, err := resp.Location()
	if err != nil {
		return err
	}
	query := to.Query()
	query.Set("digest", b.Desc.Digest.String())
	to.RawQuery = query.Encode()
	body, err := b.Open()
	if err != nil {
		return err
	}
	defer body.Close()
	_, err = p.do(http.MethodPut, to.String(), body, b.Desc.Size, "application/octet-stream", http.StatusCreated)
	return err
}

func (p pusher) manifest(img *Image, tag string) error {
	_, err := p.do(http.MethodPut, p.base+"/manifests/"+tag, bytes.NewReader(img.Manifest),
		int64(len(img.Manifest)), img.ManifestType, http.StatusCreated)
	if err != nil && errors.Is(err, context.Canceled) {
		return p.ctx.Err()
	}
	return err
}
