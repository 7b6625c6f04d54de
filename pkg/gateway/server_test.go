package gateway

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

var (
	content = bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	known   = digest.FromBytes(content)
)

// fake has one blob, and one image, which is mounted until it is gone.
type fake struct {
	mu   sync.Mutex
	gone bool
	err  error
	// cut is after how many bytes it fails.
	cut int
}

func (f *fake) Has(instance string, blob digest.Digest) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone || instance != "instance" {
		return false, fmt.Errorf("instance: %w", ErrNotMounted)
	}
	return blob == known, nil
}

func (f *fake) Size(ctx context.Context, b Blob) (int64, error) {
	p, err := f.Open(ctx, b, 0, 1)
	if err != nil {
		return 0, err
	}
	return p.Size(), p.Close()
}

func (f *fake) Open(_ context.Context, b Blob, offset, length int64) (Content, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	if b != (Blob{"instance", "registry.test", "a/b", known}) {
		return nil, fmt.Errorf("%+v was asked for", b)
	}
	end := int64(len(content))
	if length >= 0 {
		end = offset + length
	}
	if offset >= int64(len(content)) || end > int64(len(content)) {
		return nil, fmt.Errorf("fetch: %w", ErrRange)
	}
	p := &part{Reader: bytes.NewReader(content[offset:end]), left: end - offset}
	if f.cut > 0 {
		p.Reader = io.MultiReader(io.LimitReader(p.Reader, int64(f.cut)), broken{})
	}
	return p, nil
}

type part struct {
	io.Reader
	left int64
}

func (*part) Size() int64   { return int64(len(content)) }
func (p *part) Left() int64 { return p.left }
func (*part) Close() error  { return nil }

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("all hosts are gone") }

var key = Key{1, 2, 3}

func capability(t testing.TB, change func(*Grant)) string {
	t.Helper()
	g := Grant{Instance: "instance", Image: "registry.test/a/b:v1", Registry: "registry.test", Repository: "a/b"}
	if change != nil {
		change(&g)
	}
	c, err := key.Seal(g)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type running struct {
	*httptest.Server
	fake   *fake
	said   *lockedBuffer
	closed chan struct{} // has one for each connection that was closed
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t *testing.T) *running {
	r := &running{fake: &fake{}, said: &lockedBuffer{}, closed: make(chan struct{}, 1000)}
	s := New(Config{Key: key, Images: r.fake, Source: r.fake, Patience: time.Second, Log: slog.New(slog.NewTextHandler(r.said, nil))})
	r.Server = httptest.NewUnstartedServer(s)
	r.Config = s.HTTP()
	r.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			r.closed <- struct{}{}
		}
	}
	r.Start()
	t.Cleanup(r.Close)
	return r
}

// ask sends a request and returns status, headers and body.
func (r *running) ask(t *testing.T, method, path, capability string, headers ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if capability != "" {
		req.Header.Set("Authorization", "Bearer "+capability)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	resp, err := r.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

var path = "/v2/a/b/blobs/" + known.String()

func TestServe(t *testing.T) {
	r := start(t)
	all := int64(len(content))
	for _, c := range []struct {
		text         string
		first, after int64
	}{{"", 0, all}, {"bytes=0-", 0, all}, {"bytes=0-0", 0, 1}, {"bytes=17-99", 17, 100}, {"bytes=17-99999999", 17, all}, {fmt.Sprintf("bytes=%d-", all-1), all - 1, all}} {
		var headers []string
		status := http.StatusOK
		if c.text != "" {
			headers, status = []string{"Range", c.text}, http.StatusPartialContent
		}
		resp, body := r.ask(t, http.MethodGet, path, capability(t, nil), headers...)
		if resp.StatusCode != status || !bytes.Equal(body, content[c.first:c.after]) {
			t.Errorf("%q: status %d, %d bytes", c.text, resp.StatusCode, len(body))
		}
		if want := fmt.Sprintf("bytes %d-%d/%d", c.first, c.after-1, all); c.text != "" && resp.Header.Get("Content-Range") != want {
			t.Errorf("%q: Content-Range %q, want %q", c.text, resp.Header.Get("Content-Range"), want)
		}
	}
	if resp, _ := r.ask(t, http.MethodHead, path, capability(t, nil)); resp.StatusCode != http.StatusOK || resp.ContentLength != all {
		t.Errorf("HEAD: %s, length %d", resp.Status, resp.ContentLength)
	}
	if err := Probe(t.Context(), r.Listener.Addr().String(), key); err != nil {
		t.Errorf("probe: %v", err)
	}
	if err := Probe(t.Context(), r.Listener.Addr().String(), Key{9}); err == nil {
		t.Error("a gateway with another key is taken for the one")
	}
	if said := r.said.String(); said != "" {
		t.Errorf("the log says %s", said)
	}
}

// changed is a text with another character at a place.
func changed(text string, at int) string {
	other := "A"
	if text[at:at+1] == other {
		other = "B"
	}
	return text[:at] + other + text[at+1:]
}

func TestRefuse(t *testing.T) {
	good := capability(t, nil)
	foreign, err := Key{9}.Seal(Grant{Instance: "instance", Registry: "registry.test", Repository: "a/b"})
	if err != nil {
		t.Fatal(err)
	}
	other := digest.FromString("other").String()
	for name, c := range map[string]struct {
		method, path, capability string
		headers                  []string
		status                   int
	}{
		"no capability":      {"GET", path, "", nil, 401},
		"wrong capability":   {"GET", path, "x", nil, 401},
		"changed capability": {"GET", path, changed(good, len(good)/2), nil, 401},
		"foreign key":        {"GET", path, foreign, nil, 401},
		"two capabilities":   {"GET", path, good, []string{"Authorization", "Bearer " + good}, 401},
		"ping without one":   {"GET", "/v2/", "", nil, 401},
		"another repository": {"GET", "/v2/a/c/blobs/" + known.String(), good, nil, 403},
		"another blob":       {"GET", "/v2/a/b/blobs/" + other, good, nil, 403},
		"ended instance":     {"GET", path, capability(t, func(g *Grant) { g.Instance = "ended" }), nil, 403},
		"manifest":           {"GET", "/v2/a/b/manifests/latest", good, nil, 404},
		"catalog":            {"GET", "/v2/_catalog", good, nil, 404},
		"escaped":            {"GET", "/v2/a%2fb/blobs/" + known.String(), good, nil, 404},
		"traversal":          {"GET", "/v2/a/b/blobs/../../c/blobs/" + known.String(), good, nil, 404},
		"traversal escaped":  {"GET", "/v2/a/b/%2e%2e/b/blobs/" + known.String(), good, nil, 404},
		"two slashes":        {"GET", "//v2/a/b/blobs/" + known.String(), good, nil, 404},
		"upper case":         {"GET", "/v2/a/b/blobs/sha256:" + strings.ToUpper(known.Encoded()), good, nil, 404},
		"put":                {"PUT", path, good, nil, 405},
		"delete":             {"DELETE", path, good, nil, 405},
		"several ranges":     {"GET", path, good, []string{"Range", "bytes=0-1,3-4"}, 400},
		"two ranges":         {"GET", path, good, []string{"Range", "bytes=0-1", "Range", "bytes=3-4"}, 400},
		"suffix":             {"GET", path, good, []string{"Range", "bytes=-5"}, 400},
		"range upside down":  {"GET", path, good, []string{"Range", "bytes=5-4"}, 400},
		"range of other":     {"GET", path, good, []string{"Range", "lines=1-2"}, 400},
		"huge range":         {"GET", path, good, []string{"Range", "bytes=9999999999999999999-"}, 400},
		"range beyond":       {"GET", path, good, []string{"Range", "bytes=1048576-1048577"}, 416},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t)
			resp, body := r.ask(t, c.method, c.path, c.capability, c.headers...)
			if resp.StatusCode != c.status {
				t.Errorf("status %d, want %d: %s", resp.StatusCode, c.status, body)
			}
			said := r.said.String()
			if strings.Count(said, "event=refused") != 1 {
				t.Errorf("the log says %q", said)
			}
			for _, secret := range []string{good, foreign} {
				if strings.Contains(said+string(body), secret[:20]) {
					t.Error("the capability is told")
				}
			}
		})
	}
}

// What the source says becomes the status, and its text stays with us.
func TestSourceFails(t *testing.T) {
	for err, status := range map[error]int{
		fmt.Errorf("canary: %w", ErrNoBlob): http.StatusNotFound, fmt.Errorf("canary: %w", ErrRange): http.StatusRequestedRangeNotSatisfiable, errors.New("canary"): http.StatusBadGateway,
	} {
		r := start(t)
		r.fake.err = err
		resp, body := r.ask(t, http.MethodGet, path, capability(t, nil))
		if resp.StatusCode != status || strings.Contains(string(body), "canary") || !strings.Contains(r.said.String(), "canary") {
			t.Errorf("%v: %s, %s, %s", err, resp.Status, body, r.said)
		}
	}
}

// A part is never taken for the whole.
func TestBrokenOff(t *testing.T) {
	r := start(t)
	r.fake.cut = 100_000
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, r.URL+path, nil)
	req.Header.Set("Authorization", "Bearer "+capability(t, nil))
	resp, err := r.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("%d bytes are taken for the whole", len(got))
	}
	if !strings.Contains(r.said.String(), "all hosts are gone") {
		t.Errorf("the log says %s", r.said)
	}
}

// The capability of an image that is not mounted any more opens nothing.
func TestEndedInstance(t *testing.T) {
	r := start(t)
	c := capability(t, nil)
	if resp, _ := r.ask(t, http.MethodGet, path, c); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	r.fake.mu.Lock()
	r.fake.gone = true
	r.fake.mu.Unlock()
	if resp, _ := r.ask(t, http.MethodGet, path, c); resp.StatusCode != http.StatusForbidden {
		t.Error(resp.Status)
	}
}

// raw sends text as it stands, and returns all statuses that come back.
func (r *running) raw(t *testing.T, text string) (statuses []int) {
	t.Helper()
	c, err := net.Dial("tcp", r.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	for {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return statuses
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		statuses = append(statuses, resp.StatusCode)
	}
}

// Whatever two parsers might read differently gets one refusal, and nothing behind it
// is taken for a request.
func TestSmuggling(t *testing.T) {
	auth := "Authorization: Bearer " + capability(t, nil) + "\r\n"
	hidden := "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n"
	for name, text := range map[string]string{
		"both lengths":     "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two lengths":      "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: 4\r\nContent-Length: 5\r\n\r\n",
		"body":             fmt.Sprintf("GET %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n", path, auth, len(hidden)),
		"odd coding":       "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: xchunked\r\n\r\n",
		"space in a name":  "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length : 4\r\n\r\n",
		"two hosts":        "GET " + path + " HTTP/1.1\r\nHost: x\r\nHost: y\r\n" + auth + "\r\n",
		"no host":          "GET " + path + " HTTP/1.1\r\n" + auth + "\r\n",
		"endless header":   "GET " + path + " HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n",
		"line in the path": "GET " + path + "\x01 HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			statuses := start(t).raw(t, text+hidden)
			if len(statuses) != 1 || statuses[0] < 400 {
				t.Errorf("the answers are %v", statuses)
			}
		})
	}
}

// A client that takes nothing does not hold what it was to get for ever.
func TestSlowClient(t *testing.T) {
	r := start(t)
	c, err := net.Dial("tcp", r.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// 64 requests in one: more than the sockets take.
	text := "GET " + path + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + capability(t, nil) + "\r\n\r\n"
	if _, err := io.WriteString(c, strings.Repeat(text, 64)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.closed:
	case <-time.After(20 * time.Second):
		t.Fatal("it still waits for the client")
	}
}

func TestManyAtOnce(t *testing.T) {
	r := start(t)
	c := capability(t, nil)
	var all sync.WaitGroup
	for n := range 200 {
		all.Go(func() {
			first := n * 1000
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, r.URL+path, nil)
			req.Header.Set("Authorization", "Bearer "+c)
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, first+99_999))
			resp, err := r.Client().Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, content[first:first+100_000]) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
}

func FuzzRequest(f *testing.F) {
	f.Add("GET", "/v2/a/b/blobs/"+known.String(), "bytes=0-1", "x")
	f.Add("HEAD", "/v2/", "bytes=-1", "ngw1.AAAA")
	s := New(Config{Key: key, Images: &fake{}, Source: &fake{}, Log: slog.New(slog.DiscardHandler)})
	good := capability(f, nil)
	f.Fuzz(func(t *testing.T, method, at, ranged, token string) {
		for _, c := range []string{token, good} {
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			r.Method, r.URL.Path = method, at
			r.Header.Set("Authorization", "Bearer "+c)
			r.Header.Set("Range", ranged)
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if w.Code < 300 && c == token && token != good {
				t.Errorf("%q %q is answered with %d to %q", method, at, w.Code, token)
			}
			if w.Code < 300 && at != path {
				t.Errorf("%q is answered", at)
			}
		}
	})
}

func TestSeal(t *testing.T) {
	one, two := capability(t, nil), capability(t, nil)
	if one == two || strings.Contains(one, "instance") {
		t.Error("capabilities can be foretold or read")
	}
	g, err := key.Open(one)
	if err != nil || g.Instance != "instance" || g.Repository != "a/b" || g.Registry != "registry.test" {
		t.Errorf("%+v, %v", g, err)
	}
	for _, text := range []string{"", prefix, prefix + "AAAA", one[1:], "x" + one, one + "=", strings.Replace(one, prefix, "ngw2.", 1), one + strings.Repeat("A", maxCapability)} {
		if _, err := key.Open(text); !errors.Is(err, ErrCapability) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	for at := range one {
		if _, err := key.Open(changed(one, at)); !errors.Is(err, ErrCapability) {
			t.Errorf("changed at %d of %d: %v", at, len(one), err)
		}
	}
	// All spellings of the last bits but one.
	for _, last := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" {
		text := one[:len(one)-1] + string(last)
		if _, err := key.Open(text); text != one && !errors.Is(err, ErrCapability) {
			t.Errorf("with %q at the end: %v", last, err)
		}
	}
	if _, err := key.Seal(Grant{Repository: strings.Repeat("x", maxCapability)}); err == nil {
		t.Error("too long a name was sealed")
	}
	if text := fmt.Sprintf("%v %+v %#v %s", key, key, key, key); strings.ContainsAny(text, "123") {
		t.Errorf("the key is told: %s", text)
	}
}
