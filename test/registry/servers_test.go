package registry_test

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// server is one kind of registry, and how hosts.toml speaks of it.
type server struct {
	name string // of the registry, in references
	host string // HOST:PORT
	toml string
	// needs is what nydusd cannot do by itself, as errors name it; empty when it can.
	needs string
	// given says that it can be given that, unless the gateway may be used.
	given bool
	tls   string // as registry check has it
	as    *login
	key   pair         // the client's, when it has one
	from  *tokenServer // whose tokens it takes; nil for none
}

// newLogin is a login with a password that is like no other text.
func newLogin(user string) login { return login{user, "pw-" + rand.Text()} }

// servers starts one of each kind, all with the content of the lab's store.
func (l *lab) servers() []server {
	t := l.t
	t.Helper()
	ca := newAuthority(t)
	cert := ca.issue("server")
	private := &kit.RegistryTLS{Certificate: cert.cert, Key: cert.key}
	closed := &kit.RegistryTLS{Certificate: cert.cert, Key: cert.key, ClientCA: ca.file}
	client := ca.issue("client")
	alice, bob, carol := newLogin("alice"), newLogin("bob"), newLogin("carol")
	tls := l.registry(kit.RegistryOptions{Of: l.store, TLS: private})
	mutual := l.registry(kit.RegistryOptions{Of: l.store, TLS: closed})
	locked := l.registry(kit.RegistryOptions{Of: l.store, User: alice.user, Password: alice.password})
	both := l.registry(kit.RegistryOptions{Of: l.store, User: bob.user, Password: bob.password, TLS: closed})
	const life = 2 * time.Second
	issuer := newTokenServer(t, carol, life)
	tokens := newFront(t, issuer.refuseEnded(before(l.registry(kit.RegistryOptions{Of: l.store, Token: issuer.config()}), nil)))
	return []server{
		{name: "open.test", host: l.store.Host, toml: `server = "http://` + l.store.Host + `"`, tls: "none"},
		{name: "private-ca.test", host: tls.Host, toml: fmt.Sprintf("server = %q\nca = %q\n", "https://"+tls.Host, ca.file), tls: "verified", needs: "(ca)", given: true},
		{name: "skip.test", host: tls.Host, toml: fmt.Sprintf("server = %q\nskip_verify = true\n", "https://"+tls.Host), tls: "not verified"},
		{name: "mutual.test", host: mutual.Host, toml: fmt.Sprintf("server = %q\nca = [%q]\nclient = [[%q, %q]]\n", "https://"+mutual.Host, ca.file, client.cert, client.key), tls: "verified", needs: "(client)", key: client},
		{name: "htpasswd.test", host: locked.Host, toml: fmt.Sprintf("server = %q\n", "http://"+locked.Host), tls: "none", as: &alice},
		{name: "locked-twice.test", host: both.Host, as: &bob, tls: "verified", needs: "(client)", key: client,
			toml: fmt.Sprintf("server = %q\nca = %q\nclient = [[%q, %q]]\n", "https://"+both.Host, ca.file, client.cert, client.key)},
		{name: "tokens.test", host: tokens.Host, as: &carol, toml: fmt.Sprintf("server = %q\n", "http://"+tokens.Host), tls: "none", from: issuer},
		l.headers(), l.harbor(),
	}
}

// headers is a server that wants a header of everybody.
func (l *lab) headers() server {
	secret := rand.Text()
	f := newFront(l.t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Lab") != secret {
			http.Error(w, "no header", http.StatusForbidden)
			return
		}
		before(l.store, nil).ServeHTTP(w, r)
	}))
	return server{name: "headers.test", host: f.Host, tls: "none", needs: "(header)",
		toml: fmt.Sprintf("server = %q\n[host.%[1]q.header]\nX-Lab = %q\n", "http://"+f.Host, secret)}
}

// harbor is a project of Harbor that is a proxy of a registry, as its documentation has
// containerd use it: the project in the path, and a token for the project's repository.
func (l *lab) harbor() server {
	robot := newLogin("robot$proxy+pull")
	issuer := newTokenServer(l.t, robot, 2*time.Second)
	real := l.registry(kit.RegistryOptions{Of: l.store, Token: issuer.config()})
	f := newFront(l.t, http.StripPrefix("/v2/proxy", inside("/v2", issuer.refuseEnded(before(real, nil)))))
	return server{name: "harbor.test", host: f.Host, as: &robot, tls: "none", needs: "(override_path)", from: issuer,
		toml: fmt.Sprintf("[host.%q]\noverride_path = true\ncapabilities = [\"pull\", \"resolve\"]\n", "http://"+f.Host+"/v2/proxy") +
			// The registry itself is not to be asked.
			"[host.\"http://127.0.0.1:1\"]\ncapabilities = [\"push\"]\n"}
}

// inside puts a prefix before paths.
func inside(prefix string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path, r.URL.RawPath = prefix+r.URL.Path, ""
		next.ServeHTTP(w, r)
	})
}

// prepare makes the lab know all servers.
func (l *lab) prepare(list []server) {
	logins := map[string]login{}
	for _, s := range list {
		l.hosts(s.name, s.toml)
		if s.as != nil {
			logins[s.host] = *s.as
		}
	}
	l.login(logins)
}

// TestServers reads an image from every kind of registry through the gateway, and from
// the registry itself where nydusd can; where it cannot, the error names what for. What
// registry check says of it is the truth.
func TestServers(t *testing.T) {
	l := smallLab(t)
	list := l.servers()
	l.prepare(list)
	for _, s := range list {
		t.Run(s.name, func(t *testing.T) {
			l := l.in(t)
			l.reads(s.name)
			if s.from != nil && len(s.from.tokens()) == 0 {
				t.Error("no token was ever issued")
			}
			l.direct(s)
			said, err := l.checked("auto", s.name)
			if err != nil || !said.Works || said.Gateway != (s.needs != "" || len(said.Hosts) > 1) {
				t.Errorf("registry check: %v, %+v", err, said)
			}
			h := said.host(s.host)
			if h.TLS != s.tls || h.Manifest != "ok" || h.Blob != "ok" || (h.Credentials != "") != (s.as != nil) {
				t.Errorf("registry check says of %s: %+v", s.host, h)
			}
			if _, err := l.checked("never", s.name); (err != nil) != (s.needs != "" && !s.given) {
				t.Errorf("registry check without the gateway: %v", err)
			} else if err != nil && !strings.Contains(err.Error(), s.needs) {
				t.Errorf("registry check without the gateway does not name %s: %v", s.needs, err)
			}
		})
	}
	t.Run("nothing given away", func(t *testing.T) { l.in(t).mistakes(list) })
}

// direct reads the image from the registry itself.
func (l *lab) direct(s server) {
	t := l.t
	t.Helper()
	hosts := registry.NewEndpoints(registry.EndpointsConfig{Dirs: []string{l.certs}, Log: slog.New(slog.DiscardHandler)})
	route, err := hosts.Route(t.Context(), reference(s.name))
	must(t, err)
	at, err := route.Direct(t.Context())
	if s.needs != "" && !s.given {
		if !errors.Is(err, registry.ErrGateway) || !strings.Contains(err.Error(), s.needs) || !strings.Contains(err.Error(), filepath.Join(l.certs, s.name)) {
			t.Errorf("without the gateway: %v; want an error with %s and the file", err, s.needs)
		}
		return
	}
	must(t, err)
	c, err := registry.Docker{Dir: l.docker}.Credentials(t.Context(), at.Host, at.Repository)
	must(t, err)
	v, err := l.mountWith(s.name, nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: at.Scheme, Host: at.Host, Repository: at.Repository, SkipVerify: at.SkipVerify}, at.CAFile,
		func(string) *mountspec.Credentials {
			if c == nil {
				return nil
			}
			return &mountspec.Credentials{Auth: c.Auth, RegistryToken: c.RegistryToken}
		})
	must(t, err)
	defer v.unmount()
	v.same()
}

// mistakes are logins and certificates that are missing or wrong: an error at once that
// names the host, and nothing of the image.
func (l *lab) mistakes(list []server) {
	t := l.t
	stranger := newAuthority(t)
	theirs := stranger.issue("stranger")
	v := l.mustMount("open.test")
	defer v.unmount()
	logins := map[string]login{}
	for _, s := range list {
		if s.as != nil {
			logins[s.host] = login{s.as.user, "wrong"}
		}
	}
	l.login(logins)
	for i, s := range list {
		switch {
		case s.as != nil && s.needs != "(override_path)":
		case s.name == "mutual.test":
			s.toml = strings.NewReplacer("client.crt", "../stranger.crt", "client.key", "../stranger.key").Replace(s.toml)
			s.toml = s.toml[:strings.Index(s.toml, "client")] + fmt.Sprintf("client = [[%q, %q]]\n", theirs.cert, theirs.key)
		case s.name == "private-ca.test":
			s.toml = fmt.Sprintf("server = %q\nca = %q\n", "https://"+s.host, stranger.file)
		case s.name == "headers.test":
			s.toml = fmt.Sprintf("server = %q\n", "http://"+s.host)
		default:
			continue
		}
		name := fmt.Sprintf("mistake%d.test", i)
		l.hosts(name, s.toml)
		begun := time.Now()
		got, err := l.get(l.capability(v.instance, name), 0, 100)
		if took := time.Since(begun); took > atOnce {
			t.Errorf("%s with a mistake: refused after %s only, though asking again is of no use", s.name, took)
		}
		if err != nil || got.status != http.StatusBadGateway {
			t.Errorf("%s with a mistake: %v, status %d", s.name, err, got.status)
		}
		l.refusal(name, s.host)
		if said, err := l.checked("auto", name); err == nil || said.Works || said.host(s.host).Blob == "ok" || said.host(s.host).Manifest == "ok" {
			t.Errorf("registry check of %s with a mistake: %v, %+v", s.name, err, said)
		}
	}
}

// refusal waits until the gateway's log says that it gave out nothing of a registry, and
// why.
func (l *lab) refusal(registry string, why ...string) {
	l.t.Helper()
	kit.Eventually(l.t, fmt.Sprintf("the gateway's log tells of registry %s: %q", registry, why), soon, func() bool {
		return slices.ContainsFunc(strings.Split(l.log(), "\n"), func(line string) bool {
			for _, w := range append(why, reference(registry), "refused") {
				if !strings.Contains(line, w) {
					return false
				}
			}
			return true
		})
	})
}

// checkedHost and checked are what registry check prints.
type checkedHost struct{ Host, Scheme, File, TLS, Credentials, Manifest, Blob string }

type checked struct {
	Gateway, Works bool
	Needs          []string
	Hosts          []checkedHost
	table          string
}

func (c checked) host(name string) checkedHost {
	i := slices.IndexFunc(c.Hosts, func(h checkedHost) bool { return h.Host == name })
	if i < 0 {
		return checkedHost{}
	}
	return c.Hosts[i]
}

// checked runs registry check in both formats. The error has what it says.
func (l *lab) checked(gateway, name string) (c checked, err error) {
	l.t.Helper()
	l.configure(gateway)
	defer l.configure("auto")
	run := func(format string) (string, error) {
		cmd := exec.CommandContext(l.t.Context(), filepath.Join(kit.Binaries(l.t, "nydus-snapshotter"), "nydus-snapshotter"),
			"registry", "check", "--config", l.config, "--format", format, reference(name))
		cmd.Env = []string{"DOCKER_CONFIG=" + l.docker, "HOME=/root"}
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, errs.String())
		}
		return string(out), err
	}
	table, tableErr := run("table")
	text, err := run("json")
	if (err == nil) != (tableErr == nil) {
		l.t.Errorf("registry check: %v as JSON, %v as table", err, tableErr)
	}
	if text != "" {
		must(l.t, json.Unmarshal([]byte(text), &c))
	}
	for _, h := range c.Hosts {
		if !slices.ContainsFunc(strings.Split(table, "\n"), func(line string) bool {
			return strings.HasPrefix(line, h.Scheme+"://"+h.Host+" ") && strings.Contains(line, h.TLS)
		}) {
			l.t.Errorf("registry check: no row for %+v in\n%s", h, table)
		}
	}
	c.table = table
	return c, err
}
