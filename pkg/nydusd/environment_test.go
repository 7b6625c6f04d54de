package nydusd

import (
	"slices"
	"testing"
)

// What nydusd gets of a proxy's variables; its client asks a proxy even for addresses
// of this machine, where the gateway is, unless it is told not to.
func TestEnvironment(t *testing.T) {
	const loop = "localhost,127.0.0.1,127.0.0.0/8,::1"
	for name, c := range map[string]struct{ all, want []string }{
		"nothing":       {[]string{"HOME=/root"}, []string{"NO_PROXY=" + loop, "no_proxy=" + loop}},
		"a proxy":       {[]string{"https_proxy=http://p", "PATH=/x"}, []string{"https_proxy=http://p", "NO_PROXY=" + loop, "no_proxy=" + loop}},
		"one exception": {[]string{"no_proxy=a.test"}, []string{"NO_PROXY=" + loop + ",a.test", "no_proxy=" + loop + ",a.test"}},
		"twice":         {[]string{"no_proxy=a.test", "NO_PROXY=a.test"}, []string{"NO_PROXY=" + loop + ",a.test", "no_proxy=" + loop + ",a.test"}},
		"both":          {[]string{"no_proxy=a.test", "NO_PROXY=b.test"}, []string{"NO_PROXY=" + loop + ",a.test,b.test", "no_proxy=" + loop + ",a.test,b.test"}},
		"empty":         {[]string{"NO_PROXY="}, []string{"NO_PROXY=" + loop, "no_proxy=" + loop}},
	} {
		if got := Environment(c.all, ""); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// The authorities of a registry's configuration count before those of whoever mounts.
func TestEnvironmentCA(t *testing.T) {
	all := []string{"SSL_CERT_FILE=/theirs", "SSL_CERT_DIR=/dir"}
	for file, want := range map[string][]string{"": {"SSL_CERT_FILE=/theirs", "SSL_CERT_DIR=/dir"}, "/ours": {"SSL_CERT_FILE=/ours", "SSL_CERT_DIR=/dir"}} {
		if got := Environment(all, file); !slices.Equal(got[:2], want) || len(got) != 4 {
			t.Errorf("with %q: %q, want %q", file, got, want)
		}
	}
}
