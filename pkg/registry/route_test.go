package registry

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// routeOf is the route of registry.test/a/b:v1 with a hosts.toml and a directory for
// what that names.
func routeOf(t *testing.T, lines string, files map[string]string) (Route, string) {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "registry.test")
	for name, text := range files {
		put(t, filepath.Join(dir, name), text)
	}
	if lines != "" {
		put(t, filepath.Join(dir, "hosts.toml"), lines)
	}
	r, err := NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.DiscardHandler)}).Route(t.Context(), "registry.test/a/b:v1")
	if err != nil {
		t.Fatal(err)
	}
	return r, dir
}

// What nydusd cannot do takes the gateway; without one it is an error that names it.
func TestNeeds(t *testing.T) {
	pair := certificate(t)
	for name, c := range map[string]struct {
		lines string
		files map[string]string
		need  string
	}{
		"header":     {`[host."https://registry.test".header]` + "\nx-mirror = \"a\"\n", nil, "header"},
		"path":       {`[host."https://registry.test/other"]` + "\noverride_path = true\n", nil, "override_path"},
		"dial":       {`[host."https://registry.test"]` + "\ndial_timeout = \"3s\"\n", nil, "dial_timeout"},
		"two ca":     {`ca = ["a.crt", "b.crt"]` + "\n", map[string]string{"a.crt": pair, "b.crt": pair}, "(ca)"},
		"two .crt":   {"", map[string]string{"a.crt": pair, "b.crt": pair}, "(ca)"},
		"ca, header": {"ca = \"a.crt\"\n[header]\nx = \"y\"\n", map[string]string{"a.crt": pair}, "(ca)"},
	} {
		r, dir := routeOf(t, c.lines, c.files)
		if !strings.Contains(strings.Join(r.Needs, "; "), c.need) {
			t.Errorf("%s: it needs %q, want %q", name, r.Needs, c.need)
		}
		_, err := r.Direct(t.Context())
		if !errors.Is(err, ErrGateway) || !strings.Contains(err.Error(), strings.Trim(c.need, "()")) && name != "ca, header" || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: direct: %v", name, err)
		}
	}
}

// One file of authorities is something that nydusd can be given.
func TestDirectCA(t *testing.T) {
	for name, lines := range map[string]string{"hosts.toml": "ca = \"a.crt\"\n", "directory": "", "once": "ca = [\"a.crt\"]\nserver = \"https://registry.test\"\n"} {
		r, dir := routeOf(t, lines, map[string]string{"a.crt": certificate(t)})
		if len(r.Needs) == 0 {
			t.Errorf("%s: nothing is needed", name)
		}
		got, err := r.Direct(t.Context())
		want := Backend{Scheme: "https", Host: "registry.test", Repository: "a/b", CAFile: filepath.Join(dir, "a.crt")}
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, want)
		}
	}
}

// Of several hosts nydusd gets the first that answers.
func TestDirectTakesTheFirstThatLives(t *testing.T) {
	sick, dead, good, last := newSource(t), newSource(t), newSource(t), newSource(t)
	dead.Close()
	sick.fail(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	e, dir := setup(t, "", sick, dead, good, last)
	r, err := e.Route(t.Context(), "registry.test/a/b:v1")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("4 hosts (%s)", filepath.Join(dir, "hosts.toml")); len(r.Needs) != 1 || r.Needs[0] != want {
		t.Errorf("it needs %q, want %q", r.Needs, want)
	}
	got, err := r.Direct(t.Context())
	if want := (Backend{Scheme: "http", Host: good.host(), Repository: "a/b"}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	good.Close()
	last.Close()
	_, err = r.Direct(t.Context())
	for _, s := range []*source{sick, dead, good, last} {
		if err == nil || !strings.Contains(err.Error(), s.host()) {
			t.Errorf("all are gone, %s: %v", s.host(), err)
		}
	}
}

// A registry of which nothing is said is reached as references say.
func TestDirectWithoutFiles(t *testing.T) {
	e := NewEndpoints(EndpointsConfig{Dirs: []string{t.TempDir()}, PlainHTTP: []string{"plain.test"}, SkipVerify: []string{"lax.test"}, Log: slog.New(slog.DiscardHandler)})
	for ref, want := range map[string]Backend{
		"registry.test/a/b": {Scheme: "https", Host: "registry.test", Repository: "a/b"},
		"plain.test/a":      {Scheme: "http", Host: "plain.test", Repository: "a"},
		"lax.test/a":        {Scheme: "https", Host: "lax.test", Repository: "a", SkipVerify: true},
		"busybox":           {Scheme: "https", Host: "registry-1.docker.io", Repository: "library/busybox"},
	} {
		r, err := e.Route(t.Context(), ref)
		if err != nil || len(r.Needs) > 0 {
			t.Fatalf("%s: %+v, %v", ref, r, err)
		}
		if got, err := r.Direct(t.Context()); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", ref, got, err, want)
		}
	}
}
