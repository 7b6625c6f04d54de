package registry

import (
	"strings"
	"testing"
)

func TestHostsResolve(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("a", 64)
	hosts := Hosts{
		PlainHTTP:  []string{"plain.example:8080", "quiet.example"},
		SkipVerify: []string{"self.example:5443", "docker.io"},
	}
	for _, c := range []struct {
		ref  string
		want Backend
	}{
		{"registry.example/a/b/c:v1", Backend{Scheme: "https", Host: "registry.example", Repository: "a/b/c"}},
		{"registry.example:5000/app" + digest, Backend{Scheme: "https", Host: "registry.example:5000", Repository: "app"}},
		{"registry.example/app:v1" + digest, Backend{Scheme: "https", Host: "registry.example", Repository: "app"}},
		{"docker.io/library/debian:12", Backend{Scheme: "https", Host: "registry-1.docker.io", Repository: "library/debian", SkipVerify: true}},
		{"index.docker.io/library/debian:12", Backend{Scheme: "https", Host: "registry-1.docker.io", Repository: "library/debian", SkipVerify: true}},
		{"debian", Backend{Scheme: "https", Host: "registry-1.docker.io", Repository: "library/debian", SkipVerify: true}},
		{"me/app", Backend{Scheme: "https", Host: "registry-1.docker.io", Repository: "me/app", SkipVerify: true}},
		{"localhost/app", Backend{Scheme: "http", Host: "localhost", Repository: "app"}},
		{"localhost:5000/app", Backend{Scheme: "http", Host: "localhost:5000", Repository: "app"}},
		{"127.0.0.1:5000/app", Backend{Scheme: "http", Host: "127.0.0.1:5000", Repository: "app"}},
		{"127.9.8.7:5000/app", Backend{Scheme: "http", Host: "127.9.8.7:5000", Repository: "app"}},
		{"[::1]:5000/app", Backend{Scheme: "http", Host: "[::1]:5000", Repository: "app"}},
		{"[::1]/app", Backend{Scheme: "http", Host: "[::1]", Repository: "app"}},
		{"[fd00::1]:5000/app", Backend{Scheme: "https", Host: "[fd00::1]:5000", Repository: "app"}},
		{"128.0.0.1:5000/app", Backend{Scheme: "https", Host: "128.0.0.1:5000", Repository: "app"}},
		{"localhost.example/app", Backend{Scheme: "https", Host: "localhost.example", Repository: "app"}},
		{"plain.example:8080/app", Backend{Scheme: "http", Host: "plain.example:8080", Repository: "app"}},
		{"plain.example/app", Backend{Scheme: "https", Host: "plain.example", Repository: "app"}},
		{"quiet.example/app", Backend{Scheme: "http", Host: "quiet.example", Repository: "app"}},
		{"self.example:5443/app", Backend{Scheme: "https", Host: "self.example:5443", Repository: "app", SkipVerify: true}},
	} {
		got, err := hosts.Resolve(c.ref)
		if err != nil {
			t.Errorf("%s: %v", c.ref, err)
		} else if got != c.want {
			t.Errorf("%s: got %+v, want %+v", c.ref, got, c.want)
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	for _, ref := range []string{
		"", "/app", "registry.example/", "registry.example/APP", "registry.example/../etc", "https://registry.example/app",
		"registry.example/app:", "registry.example/app@sha256:12", strings.Repeat("a", 64), "registry.example/a b", "registry.example/a\nb",
	} {
		if b, err := (Hosts{}).Resolve(ref); err == nil {
			t.Errorf("it accepts %q as %+v", ref, b)
		} else if !strings.Contains(err.Error(), "image reference") {
			t.Errorf("%q: the error does not say what is wrong: %v", ref, err)
		}
	}
}
