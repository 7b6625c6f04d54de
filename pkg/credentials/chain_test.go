package credentials

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// stub is a provider whose answer is known.
type stub struct {
	name  string
	list  []*registry.Credentials
	err   error
	asked int
	// forgotten is what it was told to forget.
	forgotten []*registry.Credentials
}

func (s *stub) Name() string { return s.name }

func (s *stub) Lookup(context.Context, string, string) ([]*registry.Credentials, error) {
	s.asked++
	return s.list, s.err
}

func (s *stub) Forget(c *registry.Credentials) { s.forgotten = append(s.forgotten, c) }

func one(token string) *registry.Credentials {
	return &registry.Credentials{RegistryToken: token, Source: token}
}

func TestChainOrder(t *testing.T) {
	broken := errors.New("is broken")
	for name, c := range map[string]struct {
		providers []*stub
		want      string // source
		faults    []string
	}{
		"nobody knows":             {[]*stub{{name: "a"}, {name: "b"}}, "", nil},
		"the first wins":           {[]*stub{{name: "a", list: []*registry.Credentials{one("1")}}, {name: "b", list: []*registry.Credentials{one("2")}}}, "1", nil},
		"the second knows":         {[]*stub{{name: "a"}, {name: "b", list: []*registry.Credentials{one("2")}}}, "2", nil},
		"the first fails":          {[]*stub{{name: "a", err: broken}, {name: "b", list: []*registry.Credentials{one("2")}}}, "2", nil},
		"one fails, nobody knows":  {[]*stub{{name: "a"}, {name: "b", err: broken}, {name: "c"}}, "", []string{"b: is broken", "r.example/x/y"}},
		"two fail, nobody knows":   {[]*stub{{name: "a", err: broken}, {name: "b", err: broken}}, "", []string{"a: is broken", "b: is broken"}},
		"it has some, and a fault": {[]*stub{{name: "a", err: broken, list: []*registry.Credentials{one("1")}}}, "1", nil},
	} {
		t.Run(name, func(t *testing.T) {
			var providers []Provider
			for _, p := range c.providers {
				providers = append(providers, p)
			}
			got, err := NewChain(nil, providers...).Credentials(t.Context(), "r.example", "x/y")
			if (err != nil) != (len(c.faults) > 0) || (got == nil) != (c.want == "") || got != nil && got.Source != c.want {
				t.Fatalf("got %v, %v", got, err)
			}
			for _, fault := range c.faults {
				if !strings.Contains(err.Error(), fault) {
					t.Errorf("the error lacks %q: %v", fault, err)
				}
			}
			if len(c.faults) > 0 && !errors.Is(err, broken) {
				t.Errorf("the chain of errors is cut: %v", err)
			}
		})
	}
}

// What was refused is passed over while there is something else.
func TestChainPassesOverWhatWasRefused(t *testing.T) {
	clock := newClock()
	a := &stub{name: "a", list: []*registry.Credentials{one("1"), one("2")}}
	b := &stub{name: "b", list: []*registry.Credentials{one("3")}}
	c := NewChain(clock.Now, a, b)
	next := func(want string) {
		t.Helper()
		got, err := c.Credentials(t.Context(), "r.example", "x")
		if err != nil || got == nil || got.RegistryToken != want {
			t.Fatalf("got %#v from %v, %v; want %s", got, got.Source, err, want)
		}
		clock.move(time.Second)
	}
	next("1")
	for _, token := range []string{"1", "2"} {
		next(token)
		c.Refused("r.example", "x", one(token))
	}
	next("3")
	if got, _ := c.Credentials(t.Context(), "r.example", "other"); got.RegistryToken != "1" {
		t.Error("what is refused for a repository is for another, too")
	}
	c.Refused("r.example", "x", one("3"))
	next("1") // refused first
	c.Refused("r.example", "x", one("1"))
	next("2")
	clock.move(refusedFor)
	next("1")
	if len(a.forgotten) != 4 || len(b.forgotten) != 4 || a.forgotten[0].RegistryToken != "1" {
		t.Errorf("told to forget %d and %d", len(a.forgotten), len(b.forgotten))
	}
}

func TestRefusalsAreBounded(t *testing.T) {
	clock := newClock()
	c := NewChain(clock.Now)
	for i := range 5 * maxRefused {
		c.Refused("r.example", fmt.Sprint(i), one("x"))
		clock.move(time.Millisecond)
	}
	if len(c.refused) > maxRefused {
		t.Errorf("%d refusals are kept", len(c.refused))
	}
	if text := fmt.Sprintf("%v %+v %#v", c.refused, c.refused, c.refused); strings.Contains(text, `"x"`) {
		t.Error("refusals tell the secret")
	}
}

// dockerConfig makes docker's configuration with a helper that counts its runs and
// returns the name of the count's file.
func dockerConfig(t *testing.T, config string) (registry.Docker, string) {
	t.Helper()
	dir := t.TempDir()
	count := filepath.Join(dir, "count")
	script := fmt.Sprintf("#!/bin/sh\necho x >>%s\nread -r host\ncase $host in none.*) echo 'credentials not found in native keychain'; exit 1;; bad.*) exit 3;; esac\n"+
		`echo "{\"Username\":\"u\",\"Secret\":\"$(wc -l <%s | tr -d ' ')\"}"`, count, count)
	for name, text := range map[string]string{"config.json": config, "docker-credential-counting": script} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return registry.Docker{Dir: dir}, count
}

func runs(t *testing.T, count string) int {
	t.Helper()
	text, err := os.ReadFile(count)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return len(text) / 2
}

// A helper is run once for what it says, nothing and failures included; a changed
// config.json counts at once.
func TestDockerHelpersAreKept(t *testing.T) {
	d, count := dockerConfig(t, `{"credsStore": "counting"}`)
	clock := newClock()
	c := NewChain(clock.Now, NewDocker(d, MemoConfig{Now: clock.Now}, slog.New(slog.DiscardHandler)))
	for host, fails := range map[string]bool{"good.example": false, "none.example": false, "bad.example": true} {
		before := runs(t, count)
		for range 5 {
			got, err := c.Credentials(t.Context(), host, "x")
			if (err != nil) != fails || (got != nil) != (host == "good.example") {
				t.Fatalf("%s: %v, %v", host, got, err)
			}
		}
		if n := runs(t, count) - before; n != 1 {
			t.Errorf("%s: the helper ran %d times", host, n)
		}
	}
	before := runs(t, count)
	good, err := c.Credentials(t.Context(), "good.example", "x")
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		c.Refused("good.example", "x", good) // too young to be another one by now
		if _, err := c.Credentials(t.Context(), "good.example", "x"); err != nil {
			t.Fatal(err)
		}
	}
	if n := runs(t, count) - before; n != 0 {
		t.Errorf("a wrong password ran the helper %d times", n)
	}
	clock.move(time.Minute)
	c.Refused("good.example", "x", good)
	if again, err := c.Credentials(t.Context(), "good.example", "x"); err != nil || again.Opens(good) {
		t.Errorf("what was refused is not asked for again: %v, %v", again, err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir, "config.json"), []byte(`{"auths": {"good.example": {"auth": "dTpuZXc="}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if now, err := c.Credentials(t.Context(), "good.example", "x"); err != nil || now == nil || now.Auth != "dTpuZXc=" {
		t.Errorf("a login does not count at once: %v, %v", now, err)
	}
}

// Whoever hands credentials on, and cannot tell what is refused, learns that there are
// others.
func TestOneOfSeveral(t *testing.T) {
	one, two := registry.Basic("a", "1", "s", time.Time{}), registry.Basic("b", "2", "s", time.Time{})
	for name, c := range map[string]struct {
		list []*registry.Credentials
		want bool
	}{"one": {[]*registry.Credentials{one}, false}, "two": {[]*registry.Credentials{one, two}, true}} {
		got, err := NewChain(nil, several(c.list)).Credentials(t.Context(), "r.test", "a/b")
		if err != nil || got.OneOfSeveral != c.want || !got.Opens(one) {
			t.Errorf("%s: %v, %v", name, got.OneOfSeveral, err)
		}
	}
	if one.OneOfSeveral {
		t.Error("the provider's own credentials were changed")
	}
}

// several is a provider.
type several []*registry.Credentials

func (several) Name() string { return "several" }

func (s several) Lookup(context.Context, string, string) ([]*registry.Credentials, error) {
	return s, nil
}

// While config.json is broken the last logins stay in force, and the log says so once; what
// was refused meanwhile does not.
func TestBrokenDockerConfig(t *testing.T) {
	const good = `{"auths": {"one.example": {"auth": "dTox"}}}`
	d, _ := dockerConfig(t, good)
	path := filepath.Join(d.Dir, "config.json")
	edit := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var log strings.Builder
	c := NewChain(nil, NewDocker(d, MemoConfig{}, slog.New(slog.NewTextHandler(&log, nil))))
	want := func(host, auth string, fails bool) {
		t.Helper()
		got, err := c.Credentials(t.Context(), host, "x")
		if (err != nil) != fails || (got == nil) != (auth == "") || got != nil && got.Auth != auth {
			t.Errorf("%s: %v, %v; want %q, error %t", host, got != nil, err, auth, fails)
		}
		if err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("the error does not say where: %v", err)
		}
	}
	want("one.example", "dTox", false)
	want("public.example", "", false)
	edit(good[:30])
	for range 3 {
		want("one.example", "dTox", false)
	}
	want("two.example", "", true)     // nobody knows whether it has a login
	want("public.example", "", false) // it had none
	if said := log.String(); strings.Count(said, "stays in force") != 1 || !strings.Contains(said, path) || strings.Contains(said, "dTox") {
		t.Errorf("the log says: %s", said)
	}
	c.Refused("one.example", "x", &registry.Credentials{Auth: "dTox"})
	want("one.example", "", true)
	want("public.example", "", false)
	edit(`{"auths": {"one.example": {"auth": "dToy"}}}`)
	want("one.example", "dToy", false)
	edit(`{"auths": {}}`)
	want("one.example", "", false)
	edit("{")
	want("one.example", "", false) // it had none
	want("two.example", "", true)
}
