package health

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const canary = "canary-secret"

// configOf is a daemon's configuration for a registry.
func configOf(t *testing.T, host, more string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	text := fmt.Sprintf(`{"device":{"backend":{"type":"registry","config":{"scheme":"http","host":%q,"repo":"a/b","auth":%q%s}}}}`,
		host, base64.StdEncoding.EncodeToString([]byte("user:"+canary)), more)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func serve(t *testing.T, h http.HandlerFunc) (host string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// A real registry answers in test/mount; these are the ways in which one does not.
func TestAnswers(t *testing.T) {
	storage := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the credentials were sent to the storage")
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	for name, c := range map[string]struct {
		code   int
		header map[string]string
		blobs  []string
		want   string
	}{
		"gives it out":        {code: 206, blobs: []string{blob}},
		"all of it":           {code: 200, blobs: []string{blob}},
		"lives":               {code: 200},
		"wants a token":       {code: 401, header: map[string]string{"WWW-Authenticate": `Bearer realm="https://auth"`}, blobs: []string{blob}},
		"refuses":             {code: 401, header: map[string]string{"WWW-Authenticate": "Basic"}, blobs: []string{blob}, want: "credentials of the mount"},
		"forbids":             {code: 403, blobs: []string{blob}, want: "credentials of the mount"},
		"has it not":          {code: 404, blobs: []string{blob}, want: "404"},
		"is overloaded":       {code: 429, blobs: []string{blob}, want: "429"},
		"has a fault":         {code: 500, want: "500"},
		"is behind a gateway": {code: 502, blobs: []string{blob}, want: "502"},
		"storage is away":     {code: 307, header: map[string]string{"Location": "http://localhost:" + port(storage) + "/?signature=" + canary}, blobs: []string{blob}, want: "503"},
		"storage is nowhere":  {code: 307, header: map[string]string{"Location": "http://127.0.0.1:1/?signature=" + canary}, blobs: []string{blob}, want: "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			host := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if user, password, _ := r.BasicAuth(); user != "user" || password != canary {
					t.Errorf("asked as %q", user)
				}
				if want := "/v2/"; len(c.blobs) == 0 && r.URL.Path != want || len(c.blobs) > 0 && r.URL.Path != "/v2/a/b/blobs/sha256:"+blob {
					t.Errorf("asked for %s", r.URL.Path)
				}
				for k, v := range c.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(c.code)
			})
			check(t, Answers(t.Context(), configOf(t, host, ""), nil, c.blobs), c.want)
		})
	}
}

func port(host string) string {
	_, p, _ := strings.Cut(host, ":")
	return p
}

func check(t *testing.T, err error, want string) {
	t.Helper()
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	if err != nil && strings.Contains(err.Error(), canary) {
		t.Errorf("the error tells a secret: %v", err)
	}
}

func TestAnswersOfNobody(t *testing.T) {
	check(t, Answers(t.Context(), configOf(t, "127.0.0.1:1", ""), nil, nil), "refused")
	release := make(chan struct{})
	host := serve(t, func(http.ResponseWriter, *http.Request) { <-release })
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	check(t, Answers(ctx, configOf(t, host, ""), nil, nil), "deadline")
	check(t, Answers(t.Context(), "/missing", nil, nil), "configuration")
	broken := filepath.Join(t.TempDir(), "c")
	if err := os.WriteFile(broken, []byte(canary), 0o600); err != nil {
		t.Fatal(err)
	}
	check(t, Answers(t.Context(), broken, nil, nil), "not a JSON object")
}

func TestDirectoryAnswers(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(t.TempDir(), "c")
	text := fmt.Sprintf(`{"device":{"backend":{"type":"localfs","config":{"dir":%q}}}}`, dir)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	check(t, Answers(t.Context(), path, nil, nil), "")
	check(t, Answers(t.Context(), path, nil, []string{blob}), "no such file")
	if err := os.WriteFile(filepath.Join(dir, blob), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check(t, Answers(t.Context(), path, nil, []string{blob}), "")
}
