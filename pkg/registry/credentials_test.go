package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const secret = "s3cr3t-canary"

func auth(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

// dockerDir makes a directory with that config.json and puts helpers, given as
// shell scripts by name, in front of PATH.
func dockerDir(t *testing.T, text string, helpers map[string]string) Docker {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "config.json"), text, 0o600)
	for name, script := range helpers {
		write(t, filepath.Join(dir, "bin", helperPrefix+name), "#!/bin/sh\n"+script, 0o755)
	}
	t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	return Docker{Dir: dir}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func TestDockerFile(t *testing.T) {
	d := dockerDir(t, fmt.Sprintf(`{"auths": {
		"registry.example": {"auth": %q},
		"registry.example:5000": {"auth": %q},
		"https://old.example/v2/": {"auth": %q},
		"https://index.docker.io/v1/": {"auth": %q},
		"token.example": {"registrytoken": "bearer"},
		"identity.example": {"identitytoken": "exchange"},
		"empty.example": {}
	}}`, auth("a", "1"), auth("b", "2:3"), auth("c", "4"), auth("hub", "5")), nil)
	for host, want := range map[string]*Credentials{
		"registry.example":      {Auth: auth("a", "1")},
		"registry.example:5000": {Auth: auth("b", "2:3")},
		"old.example":           {Auth: auth("c", "4")},
		"registry-1.docker.io":  {Auth: auth("hub", "5")},
		"token.example":         {RegistryToken: "bearer"},
		"identity.example":      {IdentityToken: "exchange"},
		"empty.example":         nil,
		"other.example":         nil,
		"example":               nil,
	} {
		got, err := d.Credentials(t.Context(), host, "a/b")
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		if want != nil {
			want.Source = filepath.Join(d.Dir, "config.json")
		}
		if (got == nil) != (want == nil) || got != nil && *got != *want {
			t.Errorf("%s: got %#v, want %#v", host, got, want)
		}
	}
}

func TestDockerFileMissing(t *testing.T) {
	for _, dir := range []string{t.TempDir(), "/nonexistent"} {
		if c, err := (Docker{Dir: dir}).Credentials(t.Context(), "registry.example", "a/b"); c != nil || err != nil {
			t.Errorf("%s: got %v, %v, want nothing", dir, c, err)
		}
	}
}

// A login takes effect without a restart.
func TestDockerFileIsReadAnew(t *testing.T) {
	d := dockerDir(t, `{}`, nil)
	if c, err := d.Credentials(t.Context(), "registry.example", "a/b"); c != nil || err != nil {
		t.Fatalf("got %v, %v, want nothing", c, err)
	}
	write(t, filepath.Join(d.Dir, "config.json"), fmt.Sprintf(`{"auths":{"registry.example":{"auth":%q}}}`, auth("u", "p")), 0o600)
	c, err := d.Credentials(t.Context(), "registry.example", "a/b")
	if err != nil || c == nil || c.Auth != auth("u", "p") {
		t.Fatalf("got %#v, %v", c, err)
	}
}

func TestDockerHelpers(t *testing.T) {
	d := dockerDir(t, `{
		"auths": {"one.example": {}, "https://index.docker.io/v1/": {}},
		"credsStore": "all", "credHelpers": {"one.example": "one", "anonymous.example": "nothing"}
	}`, map[string]string{
		"one":     `read key; echo "{\"Username\":\"one-$key\",\"Secret\":\"p1\"}"`,
		"all":     `read key; echo "{\"Username\":\"all-$key\",\"Secret\":\"p2\"}"`,
		"nothing": `echo "credentials not found in native keychain"; exit 1`,
	})
	for host, want := range map[string]string{
		"one.example":          auth("one-one.example", "p1"),
		"two.example":          auth("all-two.example", "p2"),
		"registry-1.docker.io": auth("all-https://index.docker.io/v1/", "p2"),
		"anonymous.example":    "",
	} {
		got, err := d.Credentials(t.Context(), host, "a/b")
		if err != nil {
			t.Errorf("%s: %v", host, err)
		} else if want == "" && got != nil || want != "" && (got == nil || got.Auth != want) {
			t.Errorf("%s: got %#v", host, got)
		}
	}
}

func TestDockerErrorsNameTheCauseAndNoSecret(t *testing.T) {
	for name, c := range map[string]struct {
		config  string
		helper  string
		message string
	}{
		"not JSON":            {config: `{"auths": {"registry.example": {"auth": ` + secret, message: "is not JSON"},
		"number for password": {config: `{"auths": {"registry.example": {"password": 1234567890123}}}`, message: "is not JSON"},
		"auth not base64":     {config: `{"auths": {"registry.example": {"auth": "` + secret + `!"}}}`, message: "base64"},
		"auth without colon":  {config: `{"auths": {"registry.example": {"auth": "` + base64.StdEncoding.EncodeToString([]byte(secret)) + `"}}}`, message: "base64"},
		"helper is missing":   {config: `{"credsStore": "missing"}`, message: "docker-credential-missing"},
		"helper is a path":    {config: `{"credsStore": "../../bin/sh"}`, message: "not a path"},
		"helper fails":        {config: `{"credsStore": "h"}`, helper: "echo " + secret + "; echo " + secret + " >&2; exit 3", message: "exit status 3"},
		"helper talks":        {config: `{"credsStore": "h"}`, helper: "echo " + secret, message: "not a credential"},
	} {
		t.Run(name, func(t *testing.T) {
			d := dockerDir(t, c.config, map[string]string{"h": c.helper})
			got, err := d.Credentials(t.Context(), "registry.example", "a/b")
			if err == nil {
				t.Fatalf("got %#v, want an error", got)
			}
			for _, leak := range []string{secret, base64.StdEncoding.EncodeToString([]byte(secret)), "1234567890123"} {
				if strings.Contains(err.Error(), leak) {
					t.Fatalf("the error tells the secret: %v", err)
				}
			}
			if !strings.Contains(err.Error(), c.message) || !strings.Contains(err.Error(), d.Dir) {
				t.Fatalf("the error does not say what is wrong (%q) and where: %v", c.message, err)
			}
		})
	}
}

// A helper that hangs, and one whose child holds its pipe, end with their time.
func TestDockerHelperHangs(t *testing.T) {
	for name, script := range map[string]string{"itself": "exec tail -f /dev/null", "its child": "tail -f /dev/null & echo $! >\"$0.pid\"; wait"} {
		t.Run(name, func(t *testing.T) {
			d := dockerDir(t, `{"credsStore": "h"}`, map[string]string{"h": script})
			d.Timeout = 300 * time.Millisecond
			t.Cleanup(func() { killChild(filepath.Join(d.Dir, "bin", helperPrefix+"h.pid")) })
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := d.Credentials(ctx, "registry.example", "a/b")
			if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
				t.Fatalf("got %v, want the helper's own time to end", err)
			}
		})
	}
}

func killChild(pidFile string) {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return
	}
	var pid int
	if _, err := fmt.Sscan(string(text), &pid); err != nil {
		return
	}
	if p, err := os.FindProcess(pid); err == nil {
		_ = p.Kill()
	}
}

func TestCredentialsHideThemselves(t *testing.T) {
	c := &Credentials{Auth: secret, RegistryToken: secret, IdentityToken: secret}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T %v"} {
		for _, value := range []any{c, *c, []*Credentials{c}, []Credentials{*c}, struct{ C Credentials }{*c}, map[string]Credentials{"c": *c}} {
			text := fmt.Sprintf(format, value, value)
			if strings.Contains(text, secret) || strings.Contains(text, fmt.Sprintf("%x", secret)) {
				t.Errorf("%s of a %T tells the secret: %s", format, value, text)
			}
		}
	}
	var out strings.Builder
	log := slog.New(slog.NewJSONHandler(&out, nil))
	log.Info("both", "pointer", c, "value", *c, "within", struct{ C *Credentials }{c})
	slog.New(slog.NewTextHandler(&out, nil)).Info("both", "pointer", c, "value", *c, "within", struct{ C *Credentials }{c})
	if err := json.NewEncoder(&out).Encode([]any{c, *c}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), secret) || strings.Count(out.String(), hidden) < 8 {
		t.Errorf("a log or JSON tells the secret, or nothing at all: %s", out.String())
	}
}

// What a user's name tells to be a token is short-lived, from wherever it comes.
func TestTokensExpire(t *testing.T) {
	now := time.Unix(1e9, 0)
	d := dockerDir(t, fmt.Sprintf(`{
		"auths": {"aws.example": {"auth": %q}, "plain.example": {"auth": %q}, "identity.example": {"identitytoken": "t"}},
		"credHelpers": {"gcp.example": "gcp", "acr.example": "acr", "token.example": "token", "user.example": "user"}
	}`, auth("AWS", "x"), auth("u", "p")), map[string]string{
		"gcp":   `echo '{"Username":"_dcgcloud_token","Secret":"s"}'`,
		"acr":   `echo '{"Username":"00000000-0000-0000-0000-000000000000","Secret":"s"}'`,
		"token": `echo '{"Username":"<token>","Secret":"s"}'`,
		"user":  `echo '{"Username":"_json_key","Secret":"s"}'`,
	})
	d.Now = func() time.Time { return now }
	for host, want := range map[string]bool{
		"aws.example": true, "gcp.example": true, "acr.example": true, "token.example": true,
		"plain.example": false, "user.example": false, "identity.example": false,
	} {
		c, err := d.Credentials(t.Context(), host, "a/b")
		if err != nil || c == nil {
			t.Errorf("%s: %v, %v", host, c, err)
		} else if expires := c.Expires.Equal(now.Add(tokenKept)); expires != want || !want && !c.Expires.IsZero() {
			t.Errorf("%s: expires %v, want that: %v", host, c.Expires, want)
		}
	}
}

// An answer of a helper is kept until config.json changes; what the file itself has
// is not kept at all.
func TestHelperKey(t *testing.T) {
	d := dockerDir(t, `{"auths": {"file.example": {"auth": "dTpw"}}, "credHelpers": {"one.example": "one"}}`, nil)
	if key := d.HelperKey("file.example"); key != "" {
		t.Errorf("key %q for what the file has", key)
	}
	key := d.HelperKey("one.example")
	if key == "" || key != d.HelperKey("one.example") {
		t.Errorf("key %q, then %q", key, d.HelperKey("one.example"))
	}
	write(t, filepath.Join(d.Dir, "new"), `{"credHelpers": {"one.example": "two"}}`, 0o600)
	if err := os.Rename(filepath.Join(d.Dir, "new"), filepath.Join(d.Dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	if now := d.HelperKey("one.example"); now == "" || now == key {
		t.Errorf("the key stays %q", now)
	}
	write(t, filepath.Join(d.Dir, "config.json"), `{`, 0o600)
	if key := d.HelperKey("one.example"); key != "" {
		t.Errorf("key %q for a broken file", key)
	}
}

// A helper gets what is configured for it, and may leave a child behind that
// keeps its output open.
func TestHelperEnvironment(t *testing.T) {
	d := dockerDir(t, `{"credsStore": "h"}`, map[string]string{
		"h": `sleep 30 & echo "{\"Username\":\"u\",\"Secret\":\"$HOME\"}"`,
	})
	t.Setenv("HOME", "")
	d.Env = []string{"HOME=/where"}
	c, err := d.Credentials(t.Context(), "registry.example", "a/b")
	if err != nil || c == nil || c.Auth != auth("u", "/where") {
		t.Errorf("%#v, %v", c, err)
	}
}
