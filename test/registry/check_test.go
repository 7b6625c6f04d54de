package registry_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestCheckIsTrue asks registry check about hosts that are ill, each in its own way. It
// may not claim what it cannot know.
func TestCheckIsTrue(t *testing.T) {
	l := smallLab(t)
	ca := newAuthority(t)
	other := newAuthority(t).issue("other")
	private := l.registry(kit.RegistryOptions{Of: l.store, TLS: &kit.RegistryTLS{Certificate: other.cert, Key: other.key}})
	dead := deadHost(t)
	ill := newFront(t, before(l.store, nil))
	ill.spoil(status(http.StatusInternalServerError))
	stale := newFront(t, before(l.registry(kit.RegistryOptions{}), nil))
	liar := newFront(t, before(l.store, nil))
	liar.spoil(page())
	plain := newFront(t, before(l.store, nil))
	for _, c := range []struct {
		name, host, toml string
		tls              func(string) bool
		manifest, blob   string
	}{
		{"dead", dead, fmt.Sprintf("[host.%q]\nca = %q\n", "https://"+dead, ca.file), func(s string) bool { return s != "verified" }, "refused", "refused"},
		{"unknown-ca", private.Host, fmt.Sprintf("[host.%q]\nca = %q\n", "https://"+private.Host, ca.file), func(s string) bool { return strings.Contains(s, "unknown authority") }, "unknown authority", "unknown authority"},
		{"not-tls", plain.Host, fmt.Sprintf("[host.%q]\nca = %q\n", "https://"+plain.Host, ca.file), func(s string) bool { return s != "verified" }, "", ""},
		{"ill", ill.Host, fmt.Sprintf("[host.%q]\n", "http://"+ill.Host), func(s string) bool { return s == "none" }, "500", "500"},
		{"stale", stale.Host, fmt.Sprintf("[host.%q]\n", "http://"+stale.Host), func(s string) bool { return s == "none" }, "not found", "no such blob"},
		{"liar", liar.Host, fmt.Sprintf("[host.%q]\n", "http://"+liar.Host), func(s string) bool { return s == "none" }, "", ""},
		{"not-asked", dead, fmt.Sprintf("[host.%q]\nca = %q\ncapabilities = [\"push\"]\n", "https://"+dead, ca.file), func(s string) bool { return s != "verified" }, "-", "-"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			name := c.name + ".test"
			// The last host is well: it tells which blobs there are.
			l.hosts(name, fmt.Sprintf("server = %q\n%s", "http://"+l.store.Host, c.toml))
			said, err := l.checked("auto", name)
			if err != nil || !said.Works {
				t.Errorf("one host works, but registry check says %v, %+v", err, said)
			}
			h := said.host(c.host)
			if h.Manifest == "ok" || h.Blob == "ok" || h.Manifest == "" || h.Blob == "" {
				t.Errorf("it claims of the host: %+v", h)
			}
			if !strings.Contains(h.Manifest, c.manifest) || !strings.Contains(h.Blob, c.blob) {
				t.Errorf("manifest %q and blob %q; want %q and %q", h.Manifest, h.Blob, c.manifest, c.blob)
			}
			if !c.tls(h.TLS) {
				t.Errorf("it claims of TLS: %q", h.TLS)
			}
			if last := said.host(l.store.Host); last.Manifest != "ok" || last.Blob != "ok" {
				t.Errorf("it says of the host that is well: %+v", last)
			}
		})
	}
}
