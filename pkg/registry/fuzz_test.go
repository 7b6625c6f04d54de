package registry

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// canary stands in fuzzed files where a secret would.
const canary = "canary-0f9d"

// FuzzHosts reads hosts.toml files of all kinds; @@ stands for a secret. Whatever they
// say, there are hosts or there is an error without the secret that names the file.
func FuzzHosts(f *testing.F) {
	for _, text := range []string{
		"server = \"https://a.test\"\n[header]\nAuthorization = \"Basic @@\"\n",
		"[host.\"http://127.0.0.1:5000/v2/x\"]\noverride_path = true\ncapabilities = [\"pull\", \"resolve\"]\nskip_verify = true\n[host.\"http://127.0.0.1:5000/v2/x\".header]\nX = [\"@@\", 1]\n",
		"ca = [\"a.crt\", [\"b\"]]\nclient = [[\"a\", \"b\"], [\"c\"]]\nserver = \"b.test:1\"\n",
		"[host.\"https://user:@@@a.test:x\"]\n", "[host]\n[host.\"[::1]:5000\"]\ndial_timeout = \"1s\"\n", "header = {x = \"@@\"\n", "[host.\"https://a\".header]\nAuthorization = @@\n",
	} {
		f.Add(text)
	}
	root := f.TempDir()
	dir := filepath.Join(root, "r.test")
	if err := os.Mkdir(dir, 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(filepath.Join(dir, hostsFile), []byte(strings.ReplaceAll(text, "@@", canary)), 0o600); err != nil {
			t.Fatal(err)
		}
		e := NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.DiscardHandler)})
		hosts, err := e.For(t.Context(), "r.test")
		switch {
		case err == nil && len(hosts) == 0:
			t.Error("neither hosts nor an error")
		case err != nil && strings.Contains(err.Error(), canary):
			t.Errorf("the secret shows in the error: %v", err)
		case err != nil && !strings.Contains(err.Error(), hostsFile):
			t.Errorf("the error does not name the file: %v", err)
		}
		route, err := e.Route(t.Context(), "r.test/a/b:1")
		if text := fmt.Sprintf("%v %v", route.Needs, err); strings.Contains(text, canary) {
			t.Errorf("the secret shows in the route: %s", text)
		}
		for _, host := range hosts {
			p := &Part{blob: Blob{Registry: "r.test", Repository: "a/b", Digest: "sha256:00"}, left: -1}
			if req, err := p.request(t.Context(), host); err == nil && req.URL.Host != host.Host {
				t.Errorf("%s is asked in place of %s", req.URL.Host, host.Host)
			}
		}
	})
}

// FuzzDockerConfig reads docker's configuration of all kinds; @@ stands for a secret.
// There are credentials, or none, or an error without the secret.
func FuzzDockerConfig(f *testing.F) {
	for _, text := range []string{
		`{"auths": {"r.test": {"auth": "@@"}}}`, `{"auths": {"https://r.test/v1/": {"username": "u", "password": "@@"}}}`,
		`{"auths": {"r.test": {"identitytoken": "@@", "registrytoken": "@@"}}}`, `{"credsStore": "@@", "credHelpers": {"r.test": "@@"}}`,
		`{"auths": {"r.test": "@@"}}`, `{"auths": [{"@@": 1}]`, `{"HttpHeaders": {"X": "@@"}, "proxies": {"default": {"httpProxy": "@@"}}}`, `{"@@"`,
	} {
		f.Add(text)
	}
	f.Setenv("PATH", f.TempDir()) // without any helper
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(strings.ReplaceAll(text, "@@", canary)), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Docker{Dir: dir}.Credentials(t.Context(), "r.test", "a/b")
		// A helper's name is none.
		if err != nil && !strings.Contains(err.Error(), "helper") && !strings.Contains(err.Error(), helperPrefix) && strings.Contains(err.Error(), canary) {
			t.Errorf("the secret shows in the error: %v", err)
		}
		if shown := fmt.Sprintf("%v %+v %#v", c, c, c); strings.Contains(shown, canary) {
			t.Errorf("the secret shows: %s", shown)
		}
	})
}
