package registry_test

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// gets reads a part of the image's blob by a registry's name, which must be right.
func (v *view) gets(registry string) {
	v.l.t.Helper()
	if err := v.tryGet(registry); err != nil {
		v.l.t.Errorf("read from %s: %v", registry, err)
	}
}

func (v *view) tryGet(registry string) error {
	v.l.t.Helper()
	const offset, length = 1000, 3000
	got, err := v.l.get(v.l.capability(v.instance, registry), offset, length)
	if err != nil {
		return err
	}
	if got.status != http.StatusPartialContent {
		return fmt.Errorf("status %d: %s", got.status, got.body)
	}
	if !bytes.Equal(got.body, v.l.blob()[offset:offset+length]) {
		return fmt.Errorf("wrong bytes")
	}
	return nil
}

// asked fails the test unless a host was asked for blobs as often as that, with the
// registry's name as ns.
func asked(t *testing.T, what string, f *front, times int, ns string) {
	t.Helper()
	list := f.requests()
	if n := blobs(list); n != times {
		t.Errorf("%s was asked for blobs %d times, want %d", what, n, times)
	}
	for _, s := range list {
		if want := (url.Values{"ns": {ns}}).Encode(); s.query != want {
			t.Errorf("%s was asked with %q, want %q", what, s.query, want)
		}
	}
}

// TestHostsFiles is what operators write: each directory that containerd knows for a
// registry, and the files that mirrors' documentations ask for.
func TestHostsFiles(t *testing.T) {
	l := smallLab(t)
	origin, mirror := newFront(t, before(l.store, nil)), newFront(t, before(l.store, nil))
	stale := newFront(t, before(l.registry(kit.RegistryOptions{}), nil)) // it has nothing
	l.hosts("base.test", `server = "http://`+l.store.Host+`"`)
	v := l.mustMount("base.test")
	defer v.unmount()
	in := func(t *testing.T) *view { w := *v; w.l = l.in(t); return &w }
	both := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", "http://"+origin.Host, "http://"+mirror.Host)

	for name, registry := range map[string]string{
		"port.test_5000_": "port.test:5000", "colon.test:5000": "colon.test:5000", "plain.test": "plain.test", "[::1]_5000_": "[::1]:5000", "docker.io": "docker.io",
	} {
		t.Run("directory "+name, func(t *testing.T) {
			v := in(t)
			v.l.hosts(name, both)
			v.gets(registry)
			asked(t, "the mirror", mirror, 1, registry)
			asked(t, "the origin", origin, 0, registry)
		})
	}
	t.Run("_default", func(t *testing.T) {
		v := in(t)
		file := v.l.hosts("_default", both)
		v.gets("whatever.test")
		asked(t, "the mirror", mirror, 1, "whatever.test")
		must(t, os.RemoveAll(filepath.Dir(file)))
	})
	t.Run("stale mirror", func(t *testing.T) { // Spegel, and any mirror that is behind
		v := in(t)
		v.l.hosts("stale.test", fmt.Sprintf("server = %q\n[host.%q]\n[host.%q]\n", "http://"+origin.Host, "http://"+stale.Host, "http://"+mirror.Host))
		v.gets("stale.test")
		v.gets("stale.test")
		asked(t, "the stale mirror", stale, 1, "stale.test") // not for each part of a blob
		asked(t, "the mirror", mirror, 2, "stale.test")
		asked(t, "the origin", origin, 0, "stale.test")
	})
	t.Run("capabilities", func(t *testing.T) {
		v := in(t)
		v.l.hosts("capabilities.test", fmt.Sprintf("server = %q\ncapabilities = [\"push\"]\n[host.%q]\ncapabilities = [\"resolve\"]\n[host.%q]\ncapabilities = [\"pull\"]\n",
			"http://"+origin.Host, "http://"+stale.Host, "http://"+mirror.Host))
		v.gets("capabilities.test")
		asked(t, "who may resolve", stale, 0, "")
		asked(t, "who may be pulled from", mirror, 1, "capabilities.test")
	})
	t.Run("dragonfly", func(t *testing.T) {
		v := in(t)
		v.l.hosts("dragonfly.test", fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n[host.%[2]q.header]\nX-Dragonfly-Registry = [\"https://dragonfly.test\"]\n",
			"http://"+origin.Host, "http://"+mirror.Host))
		v.gets("dragonfly.test")
		list := mirror.requests()
		if len(list) != 1 || list[0].header.Get("X-Dragonfly-Registry") != "https://dragonfly.test" {
			t.Errorf("dfdaemon was asked with %+v", list)
		}
	})
	t.Run("another path", func(t *testing.T) { // ECR's pull-through cache, Harbor's proxy projects
		v := in(t)
		ecr := newFront(t, http.StripPrefix("/v2/docker-hub", inside("/v2", before(v.l.store, nil))))
		v.l.hosts("ecr.test", fmt.Sprintf("server = %q\n[host.%q]\noverride_path = true\n", "http://"+origin.Host, "http://"+ecr.Host+"/v2/docker-hub"))
		v.gets("ecr.test")
		asked(t, "the cache", ecr, 1, "ecr.test")
		asked(t, "the origin", origin, 0, "")
	})
	t.Run("paths that are none", func(t *testing.T) {
		v := in(t)
		v.l.hosts("slash.test", fmt.Sprintf("server = %q\n[host.%q]\n", "http://"+origin.Host+"/", "http://"+mirror.Host+"/v2"))
		v.gets("slash.test")
		asked(t, "the mirror", mirror, 1, "slash.test")
	})
	t.Run("IPv6", func(t *testing.T) {
		v := in(t)
		listener, err := net.Listen("tcp6", "[::1]:0")
		must(t, err)
		server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: before(v.l.store, nil)}}
		server.Start()
		defer server.Close()
		host := listener.Addr().String()
		v.l.hosts("six.test", "server = \"http://"+host+"\"\n")
		v.gets("six.test")
		v.l.hosts(strings.Replace(host, "]:", "]_", 1)+"_", "server = \"http://"+host+"\"\n")
		v.gets(host)
	})
}

// TestCertificateDirectory is docker's form: certificates in the registry's directory, and
// no hosts.toml. They are renewed as cert-manager does it: by a link to another directory.
func TestCertificateDirectory(t *testing.T) {
	l := smallLab(t)
	l.hosts("base.test", `server = "http://`+l.store.Host+`"`)
	v := l.mustMount("base.test")
	defer v.unmount()
	ca, other := newAuthority(t), newAuthority(t)
	cert, client := ca.issue("server"), ca.issue("client")
	r := l.registry(kit.RegistryOptions{Of: l.store, TLS: &kit.RegistryTLS{Certificate: cert.cert, Key: cert.key, ClientCA: ca.file}})
	dir := filepath.Join(l.certs, strings.Replace(r.Host, ":", "_", 1)+"_")
	fill := func(name string, a *authority, p pair) {
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
		for to, from := range map[string]string{"ca.crt": a.file, "client.cert": p.cert, "client.key": p.key} {
			text, err := os.ReadFile(from)
			must(t, err)
			write(t, filepath.Join(dir, name), to, string(text), 0o600)
		}
	}
	fill("..1", other, other.issue("client"))
	must(t, os.Symlink("..1", filepath.Join(dir, "..data")))
	for _, name := range []string{"ca.crt", "client.cert", "client.key"} {
		must(t, os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
	}
	if err := v.tryGet(r.Host); err == nil {
		t.Error("the wrong authority was accepted")
	}
	fill("..2", ca, client)
	must(t, os.Symlink("..2", filepath.Join(dir, "..new")))
	must(t, os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data")))
	v.gets(r.Host)
}

// TestDockerHub asks registry-1.docker.io for docker.io with docker's login for it, through
// a proxy and with an authority that the gateway has by its environment.
func TestDockerHub(t *testing.T) {
	l := smallLab(t)
	l.hosts("base.test", `server = "http://`+l.store.Host+`"`)
	v := l.mustMount("base.test")
	defer v.unmount()
	as := newLogin("hub")
	locked := l.registry(kit.RegistryOptions{Of: l.store, User: as.user, Password: as.password})
	ca := newAuthority(t)
	hub := newHub(t, ca, locked)
	l.login(map[string]login{"https://index.docker.io/v1/": as})
	must(t, l.gw.End(unix.SIGTERM))
	l.gw.Start(l.config, 0, "DOCKER_CONFIG="+l.docker, "HTTPS_PROXY="+hub.proxy, "SSL_CERT_FILE="+ca.file)
	v.gets("docker.io")
	if hosts := hub.hosts(); len(hosts) == 0 || hosts[0] != "registry-1.docker.io:443" {
		t.Errorf("the proxy was asked for %q", hosts)
	}
	for _, s := range hub.front.requests() {
		if s.query != "" {
			t.Errorf("Docker Hub was asked with %q", s.query)
		}
	}
}

// TestWrongEdit edits what the gateway reads while it runs, wrongly: what was before stays
// in force, and the log says where the mistake is.
func TestWrongEdit(t *testing.T) {
	l := smallLab(t)
	as := newLogin("carol")
	issuer := newTokenServer(t, as, time.Second)
	f := newFront(t, issuer.refuseEnded(before(l.registry(kit.RegistryOptions{Of: l.store, Token: issuer.config()}), nil)))
	good := fmt.Sprintf("server = %q\n", "http://"+f.Host)
	l.login(map[string]login{f.Host: as})
	file := l.hosts("edited.test", good)
	v := l.mustMount("edited.test")
	defer v.unmount()
	v.gets("edited.test")
	for _, edit := range []struct{ name, text, at string }{
		{"no TOML", good + "[host.\"http://127.0.0.1:1\"\n", ":2:"},
		{"no string", "# comment\n\nserver = 1.2.3\n", ":3:"},
		{"capability", good + "\n[host.\"http://127.0.0.1:1\"]\ncapabilities = [\"fly\"]\n", "fly"},
		{"certificate", good + "ca = \"missing.crt\"\n", "missing.crt"},
		{"address", good + "[host.\"http://127.0.0.1:x\"]\n", "127.0.0.1:x"},
		{"empty", "", "empty"},
	} {
		t.Run(edit.name, func(t *testing.T) {
			v := *v
			v.l = l.in(t)
			before := len(v.l.log())
			v.l.hosts("edited.test", edit.text)
			for range 3 {
				v.gets("edited.test")
			}
			kit.Eventually(t, "the log tells of "+edit.name, soon, func() bool { return strings.Contains(v.l.log()[before:], "stays in force") })
			text := v.l.log()[before:]
			if n := strings.Count(text, "stays in force"); n != 1 || !strings.Contains(text, file) || !strings.Contains(text, edit.at) {
				t.Errorf("the log tells %d times, want once, with %s and %s:\n%s", n, file, edit.at, text)
			}
			v.l.hosts("edited.test", good+"# "+edit.name+"\n")
			v.gets("edited.test")
		})
	}
	t.Run("login", func(t *testing.T) {
		v := *v
		v.l = l.in(t)
		write(t, l.docker, "config.json", `{"auths": {"`+f.Host+`": {"auth": "`+as.basic()+`"`, 0o600)
		issued := len(issuer.tokens())
		// The session's token ends, and another is asked for.
		kit.Eventually(t, "the token has ended", soon, func() bool { return issuer.ended(issuer.tokens()[issued-1]) })
		v.gets("edited.test")
		if strings.Contains(v.l.log(), as.basic()) {
			t.Error("the log has the login")
		}
	})
}
