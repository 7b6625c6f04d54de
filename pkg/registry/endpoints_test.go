package registry

import (
	"bytes"
	"encoding/pem"
	"log/slog"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

func TestEndpointsWithoutFiles(t *testing.T) {
	e := NewEndpoints(EndpointsConfig{Dirs: []string{t.TempDir(), filepath.Join(t.TempDir(), "none")}, PlainHTTP: []string{"plain.test:5000"}})
	for registry, want := range map[string]string{
		"docker.io": "https://registry-1.docker.io/v2", "quay.io": "https://quay.io/v2", "plain.test:5000": "http://plain.test:5000/v2", "127.0.0.1:5000": "https://127.0.0.1:5000/v2",
	} {
		hosts, err := e.For(t.Context(), registry)
		if err != nil || len(hosts) != 1 {
			t.Fatalf("%s: %v, %v", registry, hosts, err)
		}
		if got := hosts[0].Scheme + "://" + hosts[0].Host + hosts[0].Path; got != want || hosts[0].File != "" {
			t.Errorf("%s is %s, want %s", registry, got, want)
		}
	}
}

// A file that is edited counts at once; one that is broken leaves what was before in
// force, and is told once, with its line.
func TestEndpointsFollowFiles(t *testing.T) {
	var said bytes.Buffer
	root := t.TempDir()
	file := filepath.Join(root, "r.test_5000_", "hosts.toml")
	e := NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.NewTextHandler(&said, nil))})
	names := func() string {
		t.Helper()
		hosts, err := e.For(t.Context(), "r.test:5000")
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, h := range hosts {
			list = append(list, h.Host)
		}
		return strings.Join(list, " ")
	}
	if got := names(); got != "r.test:5000" {
		t.Errorf("without a file: %s", got)
	}
	put(t, file, "server = \"https://origin.test\"\n[host.\"https://mirror.test\"]\n")
	if got := names(); got != "mirror.test origin.test" {
		t.Errorf("with a file: %s", got)
	}
	put(t, file, "server = \"https://origin.test\"\n[host.\"https://mirror.test\"\n")
	for range 2 {
		if got := names(); got != "mirror.test origin.test" {
			t.Errorf("with a broken file: %s", got)
		}
	}
	if n := strings.Count(said.String(), "stays in force"); n != 1 || !strings.Contains(said.String(), file+":2:") {
		t.Errorf("the log says %d times, with the line?: %s", n, &said)
	}
	put(t, file, "server = \"https://other.test\"\n")
	if got := names(); got != "other.test" {
		t.Errorf("with a whole file: %s", got)
	}
}

// A registry whose file was broken from the beginning is not asked without it.
func TestBrokenFiles(t *testing.T) {
	for name, text := range map[string]string{
		"toml":       "server = ",
		"capability": "[host.\"https://a.test\"]\ncapabilities = [\"fly\"]\n",
		"no ca":      "ca = \"missing.crt\"\n",
		"no cert":    "client = \"missing.pem\"\n",
		"bad url":    "[host.\"https://a.test:x\"]\n",
	} {
		root := t.TempDir()
		put(t, filepath.Join(root, "_default", "hosts.toml"), text)
		hosts, err := NewEndpoints(EndpointsConfig{Dirs: []string{root}}).For(t.Context(), "r.test")
		if err == nil || !strings.Contains(err.Error(), "hosts.toml") {
			t.Errorf("%s: %v, %v", name, hosts, err)
		}
	}
}

// What a hosts.toml names counts, too: certificates are renewed.
func TestEndpointsFollowCertificates(t *testing.T) {
	root := t.TempDir()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	put(t, filepath.Join(root, "r.test", "hosts.toml"), "server = \"https://r.test\"\nca = \""+ca+"\"\n")
	e := NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.DiscardHandler)})
	if _, err := e.For(t.Context(), "r.test"); err == nil || !strings.Contains(err.Error(), ca) {
		t.Errorf("without the certificate: %v", err)
	}
	put(t, ca, certificate(t))
	hosts, err := e.For(t.Context(), "r.test")
	if err != nil || len(hosts) != 1 || !hosts[0].ownCA || hosts[0].caFile != ca {
		t.Fatalf("with it: %+v, %v", hosts, err)
	}
	again, _ := e.For(t.Context(), "r.test")
	if again[0].Client != hosts[0].Client {
		t.Error("the client is another one without a reason")
	}
	put(t, ca, "\n"+certificate(t))
	if again, _ = e.For(t.Context(), "r.test"); again[0].Client == hosts[0].Client {
		t.Error("the client has the old certificate")
	}
}

// certificate is some certificate.
func certificate(t *testing.T) string {
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// What is wrong with a value is said with the line that it stands in.
func TestLineOfFault(t *testing.T) {
	for text, want := range map[string]string{
		"server = \"https://a\"\n\n[host.\"https://b\"]\n  capabilities = [\n    \"pull\",\n    \"pul\",\n  ]\n": "hosts.toml:6: unknown capability pul",
		"server = \"https://a\"\n[host.\"https://b\"]\nca = 5\n":                                                 `hosts.toml:3: invalid type 5 for "ca"`,
		"[host.\"https://b\"]\ndial_timeout = \"soon\"\n":                                                        `hosts.toml:2: time: invalid duration "soon"`,
		"[host.\"https://b\"]\nclient = [[\"a\", \"b\", \"c\"]]\n":                                               `hosts.toml:2: invalid pair [`,
		"server = \"https://a\"\nca = \"gone.pem\"\n":                                                            `hosts.toml:2: unable to read CA cert`,
		"[host.\"https://b\".header]\nx-a = \"1\"\nx-b = 7\n":                                                    `hosts.toml:3: invalid type 7 for header "x-b"`,
		"[host.\"https://b\"]\nca = 5\n[host.\"https://c\"]\nca = 5\n":                                           `hosts.toml: invalid type 5 for "ca"`,
		"server = 1 2\n": "hosts.toml:1:12: ",
	} {
		root := t.TempDir()
		put(t, filepath.Join(root, "registry.test", "hosts.toml"), text)
		e := NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.DiscardHandler)})
		if _, err := e.For(t.Context(), "registry.test"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q:\ngot  %v\nwant %s", text, err, want)
		}
	}
}
