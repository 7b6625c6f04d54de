package credentials

import (
	"encoding/base64"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The expectations are those of Kubernetes' documentation on pull secrets ("Interpretation
// of config.json") and of matchImages.
func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, host, repository string
		want                      bool
	}{
		{"registry.example", "registry.example", "a", true},
		{"registry.example", "registry.example:5000", "a", false},
		{"registry.example:5000", "registry.example:5000", "a", true},
		{"registry.example:5000", "registry.example", "a", false},
		{"https://registry.example/v2/", "registry.example", "a", true},
		{"http://registry.example/v1/", "registry.example", "a", true},
		{"registry.example/v2", "registry.example", "a", false},
		{"registry.example/v2", "registry.example", "v2/a", true},
		{"registry.example/v1/v2/a", "registry.example", "v2/a", true},
		{"registry.example/team", "registry.example", "team/a", true},
		{"registry.example/team", "registry.example", "other/a", false},
		{"registry.example/team/a", "registry.example", "team", false},
		{"https://registry.example/v2/team", "registry.example", "team/a", true},
		{"*.example", "registry.example", "a", true},
		{"*.example", "a.registry.example", "a", false},
		{"*.example", "example", "a", false},
		{"*.*.example", "a.registry.example", "a", true},
		{"reg*.example", "registry.example", "a", true},
		{"registry.*", "registry.io", "a", true},
		{"*.example:5000", "registry.example:5000", "a", true},
		{"*", "localhost", "a", true},
		{"*", "registry.example", "a", false},
		{"https://index.docker.io/v1/", "registry-1.docker.io", "library/a", true},
		{"docker.io", "registry-1.docker.io", "library/a", true},
		{"docker.io", "docker.io", "library/a", true},
		{"docker.io/team", "registry-1.docker.io", "library/a", false},
		{"*.docker.io", "registry-1.docker.io", "library/a", true},
		{"[::1]:5000", "[::1]:5000", "a", true},
	} {
		p, err := ParseEntry(c.pattern)
		if err != nil {
			t.Errorf("%s: %v", c.pattern, err)
		} else if got := p.Matches(c.host, c.repository); got != c.want {
			t.Errorf("%s for %s/%s: %v", c.pattern, c.host, c.repository, got)
		}
	}
	if p, err := ParsePattern("registry.example/v2/team"); err != nil || p.Matches("registry.example", "team/a") || !p.Matches("registry.example", "v2/team/a") {
		t.Errorf("matchImages has no API in it: %+v, %v", p, err)
	}
	for _, bad := range []string{"https://user:password@registry.example", "", "/a", "https://", "registry[.example", "a b.example"} {
		if p, err := ParsePattern(bad); err == nil {
			t.Errorf("%q is a pattern: %+v", bad, p)
		}
	}
}

func TestSelectPrefersTheClosest(t *testing.T) {
	text := `{"auths": {
		"*.example": {"username": "glob", "password": "1"},
		"registry.example": {"username": "host", "password": "1"},
		"registry.example/team": {"username": "team", "password": "1"},
		"registry.example/team/a": {"auth": "` + base64.StdEncoding.EncodeToString([]byte("repository:1")) + `", "username": "old", "password": "old"},
		"https://registry.example": {"username": "host", "password": "1"},
		"other.example": {"identitytoken": "t"},
		"empty.example": {}
	}}`
	entries, err := ParseConfigJSON([]byte(text), "somewhere", time.Time{})
	if err != nil || len(entries) != 6 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	var users []string
	for _, c := range Select(entries, "registry.example", "team/a") {
		user, _, err := DecodeAuth(c.Auth)
		if err != nil || c.Source != "somewhere" {
			t.Fatal(err, c.Source)
		}
		users = append(users, user)
	}
	if got := strings.Join(users, " "); got != "repository team host glob" {
		t.Errorf("the order is: %s", got)
	}
	if got := Select(entries, "other.example", "a"); len(got) != 2 || got[0].IdentityToken != "t" {
		t.Errorf("%d for the identity token", len(got))
	}
}

func TestBrokenEntriesTellNoSecret(t *testing.T) {
	const secret = "s3cr3t"
	for name, text := range map[string]string{
		"no JSON":         `{"auths": ` + secret,
		"a number":        `{"auths": {"r.example": {"username": ` + `1234567` + `}}}`,
		"no base64":       `{"auths": {"r.example": {"auth": "` + secret + `!"}}}`,
		"without a colon": `{"auths": {"r.example": {"auth": "` + base64.StdEncoding.EncodeToString([]byte(secret)) + `"}}}`,
	} {
		_, err := ParseConfigJSON([]byte(text), "somewhere", time.Time{})
		if err == nil || strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "1234567") || strings.Contains(err.Error(), base64.StdEncoding.EncodeToString([]byte(secret))) {
			t.Errorf("%s: %v", name, err)
		}
	}
	list, err := ParseConfig([]byte(`{"bad[.example": {"auth": "eDp5"}, "r.example": {"auth": "eDp5"}}`), "somewhere", time.Time{})
	if len(list) != 1 || err == nil || !strings.Contains(err.Error(), "bad[.example") {
		t.Errorf("%d entries, %v; want the good one, and what is wrong with the other", len(list), err)
	}
}

// Names of entries are in errors only when they are names.
func TestBrokenNamesTellNoSecret(t *testing.T) {
	for _, name := range []string{
		"https://user:canary@registry.example", "user:canary@registry.example/a", "canary%zz", "registry.example/?token=canary", "registry.example/#canary",
		"registry.example:canary", "canary registry.example", "https://canary:canary", "bad[.example/?canary", "canary\nx", strings.Repeat("canary", 100),
	} {
		text := `{` + strconv.Quote(name) + `: {"auth": "!"}}`
		if _, err := ParseConfig([]byte(text), "somewhere", time.Time{}); err == nil || strings.Contains(err.Error(), "canary") || !strings.Contains(err.Error(), "an entry") {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"https://registry.example:5000/v2/team/a_b", "*.example", "bad[.example"} {
		if _, err := ParseConfig([]byte(`{"`+name+`": {"auth": "!"}}`), "somewhere", time.Time{}); err == nil || !strings.Contains(err.Error(), strconv.Quote(name)) {
			t.Errorf("%q is not named: %v", name, err)
		}
	}
}
