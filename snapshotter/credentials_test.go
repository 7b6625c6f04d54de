package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
)

// Docker's configuration works alone, and is asked after what is configured beside it;
// a broken configuration of kubelet's is an error at once.
func TestKeychain(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	login := base64.StdEncoding.EncodeToString([]byte("u:p"))
	write("config.json", fmt.Sprintf(`{"auths": {"one.example": {"auth": %q}, "two.example": {"auth": %q}}}`, login, login))
	cfg := config.Default()
	cfg.RunDir = filepath.Join(dir, "run")
	from := func(host, want string) {
		t.Helper()
		k, err := newKeychain(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c, err := k.Credentials(t.Context(), host, "x")
		if err != nil || (c == nil) != (want == "") || c != nil && !strings.Contains(c.Source, want) {
			t.Errorf("%s: %+v, %v; want from %q", host, c, err, want)
		}
	}
	from("one.example", "config.json")
	from("other.example", "")

	cfg.Credentials.CRI.Address = filepath.Join(dir, "cri.sock") // nothing was pulled yet
	cfg.Credentials.Kubelet = config.KubeletSource{BinDir: dir, Config: write("providers.yaml", "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"+
		"- {name: plugin, apiVersion: credentialprovider.kubelet.k8s.io/v1, matchImages: [one.example], defaultCacheDuration: 1h}\n")}
	write("plugin", `#!/bin/sh
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","auth":{"one.example":{"username":"k","password":"p"}}}'
`)
	from("one.example", "credential provider plugin")
	from("two.example", "config.json")
	write("plugin", "#!/bin/sh\nexit 1\n")
	from("one.example", "config.json")

	path := write("providers.yaml", "kind: Nothing\n")
	if _, err := newKeychain(cfg); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
}
