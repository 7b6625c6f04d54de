package registry_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// secrets are texts that must not show, by what they are.
type secrets map[string]string

// add adds a login's forms.
func (s secrets) login(a login) {
	s[a.user+"'s password"] = a.password
	s[a.user+"'s password, escaped"] = url.QueryEscape(a.password)
	s[a.user+"'s login"] = a.basic()
	s[a.user+"'s password in hex"] = hex.EncodeToString([]byte(a.password))
	// In nydusd's configuration, which is base64 in the mount option.
	for shift := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + a.basic()))
		s[fmt.Sprintf("%s's login, encoded again (%d)", a.user, shift)] = text[4 : len(text)-8]
	}
}

// key adds a private key: any line of its text.
func (s secrets) key(name string, p pair) {
	lines := strings.Split(p.keyPEM, "\n")
	s[name] = lines[1]
}

// in tells which secret is in a text.
func (s secrets) in(text string) string {
	for name, secret := range s {
		if secret != "" && strings.Contains(text, secret) {
			return name
		}
	}
	return ""
}

// nowhere looks for the secrets in all processes, the mount table, and in all files below
// the kit's directories but those that allowed names, with their modes.
func (s secrets) nowhere(t *testing.T, when string, allowed func(path, find string) bool) {
	t.Helper()
	for name, secret := range s {
		finds := s.finds(t, secret)
		for _, find := range finds {
			path, _, _ := strings.Cut(find, " (mode")
			if !allowed(path, find) {
				t.Errorf("%s: %s shows in %s", when, name, find)
			}
		}
	}
}

// finds looks for a secret, again when a file of those that there were has gone since.
func (s secrets) finds(t *testing.T, secret string) []string {
	t.Helper()
	for range 100 {
		finds, err := kit.FindSecret(secret, s.roots(t)...)
		if !errors.Is(err, fs.ErrNotExist) {
			must(t, err)
			return finds
		}
	}
	t.Fatal("files come and go without an end")
	return nil
}

// found fails the test unless a secret that stands in a file is found there: otherwise
// nothing is proven.
func (s secrets) found(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for name, secret := range s {
		file := write(t, dir, "planted", "x"+secret+"y", 0o644)
		finds := s.finds(t, secret)
		if !slices.ContainsFunc(finds, func(find string) bool { return strings.HasPrefix(find, file) }) {
			t.Errorf("%s was planted in %s and not found there: %q", name, file, finds)
		}
	}
}

// roots are all directories with what servers wrote; registries' contents and images are
// left out.
func (s secrets) roots(t *testing.T) (list []string) {
	t.Helper()
	for _, top := range []string{kit.Scratch(), "/run"} {
		err := filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile
			}
			var st unix.Statfs_t
			if d.IsDir() && (filepath.Base(path) == "storage" || unix.Statfs(path, &st) != nil || st.Type == unix.FUSE_SUPER_MAGIC || st.Type == unix.OVERLAYFS_SUPER_MAGIC) {
				return filepath.SkipDir
			}
			if d.Type().IsRegular() {
				list = append(list, path)
			}
			return nil
		})
		must(t, err)
	}
	return list
}

// daemonAnswers asks the daemons of all instances for everything that they tell, and
// returns it.
func daemonAnswers(t *testing.T) string {
	t.Helper()
	keys, err := instance.Keys(runDir)
	must(t, err)
	var all strings.Builder
	for _, key := range keys {
		rec, err := instance.ReadRecord(runDir, key)
		must(t, err)
		if rec.Current == nil || rec.Current.Socket == "" {
			continue
		}
		client := http.Client{Timeout: soon, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", rec.Current.Socket)
		}}}
		for _, path := range []string{
			"/api/v1/daemon", "/api/v1/daemon/events", "/api/v1/daemon/backend", "/api/v1/metrics", "/api/v1/metrics/files", "/api/v1/metrics/files?latest=true", "/api/v1/metrics/pattern",
			"/api/v1/metrics/backend", "/api/v1/metrics/blobcache", "/api/v1/metrics/inflight", "/api/v2/daemon", "/api/v2/blobs", "/api/v2/config", "/api/v1/config", "/metrics",
		} {
			resp, err := client.Get("http://nydusd" + path)
			must(t, err)
			text, err := io.ReadAll(resp.Body)
			must(t, err)
			resp.Body.Close()
			fmt.Fprintf(&all, "%s: %s %s\n", path, resp.Status, text)
		}
	}
	if !strings.Contains(all.String(), "RUNNING") {
		t.Errorf("no daemon has answered: %s", &all)
	}
	return all.String()
}

// TestCanary reads from every kind of server, with success and without, and looks for
// passwords, tokens, keys and the values of headers wherever something of them might
// show.
func TestCanary(t *testing.T) {
	l := smallLab(t)
	list := l.servers()
	l.prepare(list)
	s := secrets{}
	var said strings.Builder // errors, and what daemons answer
	for _, one := range list {
		if one.as != nil {
			s.login(*one.as)
		}
		if _, value, ok := strings.Cut(one.toml, "X-Lab = "); ok {
			s["header's value"] = strings.Trim(value, "\"\n")
		}
		if one.key.key != "" {
			s.key("client key", one.key)
		}
	}
	// What the operator has written himself. Through the gateway not even a daemon's
	// configuration has any of it.
	allowed := func(path, _ string) bool {
		key := slices.ContainsFunc(list, func(one server) bool { return one.key.key == path })
		return key || strings.HasPrefix(path, l.docker+"/") || strings.HasPrefix(path, l.certs+"/")
	}
	for _, one := range list {
		v := l.mustMount(one.name)
		v.same()
		capabilities := secrets{"capability of " + one.name: l.capability(v.instance, one.name)[:40]}
		if one.from != nil {
			for i, token := range one.from.tokens() {
				s[fmt.Sprintf("token %d of %s", i, one.name)] = token
			}
		}
		answers := daemonAnswers(t)
		said.WriteString(answers)
		if name := capabilities.in(answers + l.log()); name != "" {
			t.Errorf("the %s shows in the log, or in what nydusd answers", name)
		}
		s.nowhere(t, one.name, allowed)
		// Without success: another login, and a host that is not there.
		l.hosts("gone.test", strings.ReplaceAll(one.toml, one.host, deadHost(t))+"\n# "+one.name)
		if c, err := l.checked("auto", "gone.test"); err == nil {
			t.Errorf("registry check of a dead host: %+v", c)
		} else {
			fmt.Fprintf(&said, "%v %+v", err, c)
		}
		c, err := l.checked("auto", one.name)
		fmt.Fprintf(&said, "%v %+v", err, c)
		v.unmount()
	}
	wrong := map[string]login{}
	for _, one := range list {
		if one.as != nil {
			as := newLogin(one.as.user + "-wrong")
			s.login(as)
			wrong[one.host] = as
		}
	}
	l.login(wrong)
	for _, one := range list {
		if one.as != nil {
			c, err := l.checked("auto", one.name)
			fmt.Fprintf(&said, "%v %+v", err, c)
		}
	}
	s.nowhere(t, "with wrong logins", allowed)
	s.found(t)
	for what, text := range map[string]string{"errors and nydusd's answers": said.String(), "the gateway's log": l.log()} {
		if name := s.in(text); name != "" {
			t.Errorf("%s show in %s", name, what)
		}
	}
}

// other is a server to which a registry sends on. It takes note of who comes.
type other struct {
	*httptest.Server
	mu    sync.Mutex
	seen  []http.Header
	certs int // requests with a client's certificate
}

func newOther(t *testing.T, next http.Handler, config *tls.Config) *other {
	t.Helper()
	o := &other{}
	o.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		o.seen = append(o.seen, r.Header.Clone())
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			o.certs++
		}
		o.mu.Unlock()
		next.ServeHTTP(w, r)
	}))
	if config != nil {
		o.TLS = config
		o.StartTLS()
	} else {
		o.Start()
	}
	t.Cleanup(o.Close)
	return o
}

// TestRedirects sends on from a registry that has seen all that opens it: login, token,
// header and client certificate. The blob is read, and the other host gets none of them.
func TestRedirects(t *testing.T) {
	l := smallLab(t)
	ca := newAuthority(t)
	server, client := ca.issue("server"), ca.issue("client")
	config := &tls.Config{Certificates: []tls.Certificate{server.tls}, ClientAuth: tls.RequestClientCert, ClientCAs: ca.pool()}
	l.hosts("base.test", `server = "http://`+l.store.Host+`"`)
	v := l.mustMount("base.test")
	defer v.unmount()
	as, header := newLogin("alice"), "canary-"+rand.Text()
	locked := l.registry(kit.RegistryOptions{Of: l.store, User: as.user, Password: as.password})
	logins := map[string]login{}
	targets := map[string]func() *other{
		"http":  func() *other { return newOther(t, before(l.store, nil), nil) },
		"https": func() *other { return newOther(t, before(l.store, nil), config.Clone()) },
	}
	for scheme, target := range targets {
		for _, code := range []int{301, 302, 307, 308} {
			name := fmt.Sprintf("redirect-%d-%s.test", code, scheme)
			t.Run(name, func(t *testing.T) {
				v := *v
				v.l = l.in(t)
				to := target()
				first := newOther(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					rec := httptest.NewRecorder()
					before(locked, nil).ServeHTTP(rec, r)
					if rec.Code >= 300 || r.Header.Get("X-Canary") != header || len(r.TLS.PeerCertificates) == 0 {
						copyHeader(w, rec)
						w.WriteHeader(max(rec.Code, 400))
						return
					}
					w.Header().Set("Location", to.URL+r.URL.Path+"?signature=canary")
					w.WriteHeader(code)
				}), config.Clone())
				host := first.Listener.Addr().String()
				logins[host] = as
				l.login(logins)
				l.hosts(name, fmt.Sprintf("server = %q\nca = %q\nclient = [[%q, %q]]\n[header]\nX-Canary = %q\n", "https://"+host, ca.file, client.cert, client.key, header))
				v.gets(name)
				if len(to.seen) == 0 {
					t.Fatal("nobody came to the other host")
				}
				s := secrets{"header": header}
				s.login(as)
				for _, h := range to.seen {
					if found := s.in(fmt.Sprint(h)); found != "" || h.Get("Authorization") != "" {
						t.Errorf("the other host got %v", h)
					}
				}
				if to.certs > 0 {
					t.Errorf("the other host was shown the client certificate %d times", to.certs)
				}
				if strings.Contains(l.log(), "signature") {
					t.Error("the log has the address that was redirected to")
				}
			})
		}
	}
}

// TestDowngrade sends on from https to http of the very same host and port.
func TestDowngrade(t *testing.T) {
	l := smallLab(t)
	ca := newAuthority(t)
	l.hosts("base.test", `server = "http://`+l.store.Host+`"`)
	v := l.mustMount("base.test")
	defer v.unmount()
	header := "canary-" + rand.Text()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	host := listener.Addr().String()
	secure, plain := make(chan net.Conn), make(chan net.Conn)
	go sort(listener, secure, plain)
	open := &http.Server{Handler: before(l.store, nil)}
	note := newOther(t, open.Handler, nil)
	go func() { _ = (&http.Server{Handler: note.Config.Handler}).Serve(accepted{listener, plain}) }()
	closed := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+host+r.URL.Path, http.StatusTemporaryRedirect)
	}), TLSConfig: &tls.Config{Certificates: []tls.Certificate{ca.issue("server").tls}, NextProtos: []string{"http/1.1"}}}
	go func() { _ = closed.ServeTLS(accepted{listener, secure}, "", "") }()
	t.Cleanup(func() { listener.Close() })
	l.hosts("downgrade.test", fmt.Sprintf("server = %q\nca = %q\n[header]\nX-Canary = %q\nAuthorization = %[3]q\n", "https://"+host, ca.file, header))
	_ = v.tryGet("downgrade.test") // it may be refused
	note.mu.Lock()
	defer note.mu.Unlock()
	for _, h := range note.seen {
		if strings.Contains(fmt.Sprint(h), header) {
			t.Errorf("what is meant for https went over http: %v", slices.Sorted(func(yield func(string) bool) {
				for name := range h {
					if !yield(name) {
						return
					}
				}
			}))
		}
	}
}

// accepted is a listener whose connections somebody else has accepted.
type accepted struct {
	net.Listener
	conns <-chan net.Conn
}

// Accept implements net.Listener.
func (a accepted) Accept() (net.Conn, error) {
	c, ok := <-a.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

// peeked is a connection whose first byte was read.
type peeked struct {
	net.Conn
	first []byte
}

// Read implements net.Conn.
func (p *peeked) Read(buf []byte) (int, error) {
	if len(p.first) > 0 {
		n := copy(buf, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(buf)
}

// sort tells TLS by its first byte.
func sort(l net.Listener, secure, plain chan<- net.Conn) {
	defer close(secure)
	defer close(plain)
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		p := &peeked{c, make([]byte, 1)}
		if _, err := io.ReadFull(c, p.first); err != nil {
			c.Close()
			continue
		}
		if p.first[0] == 0x16 {
			secure <- p
		} else {
			plain <- p
		}
	}
}
