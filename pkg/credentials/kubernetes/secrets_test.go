package kubernetes

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// apiServer speaks as much of the API as the watch of secrets needs: list, watch,
// errors. It stands for a real API server, whose programs cannot be had everywhere
// that this is tested; what it says is what the API's documentation has.
type apiServer struct {
	*httptest.Server
	t *testing.T

	mu       sync.Mutex
	version  int
	secrets  map[string]*corev1.Secret
	removed  []*corev1.Secret
	watchers map[chan event]string // with the type that is watched
	away     bool                  // connections are cut
	refuses  bool                  // 403, as without a role
	forgot   int                   // what happened until then can no longer be watched
	lists    int
	paths    map[string]bool
}

type event struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

func newAPIServer(t *testing.T) *apiServer {
	a := &apiServer{t: t, version: 1, secrets: map[string]*corev1.Secret{}, watchers: map[chan event]string{}, paths: map[string]bool{}}
	a.Server = httptest.NewUnstartedServer(a)
	a.Config.ErrorLog = log.New(io.Discard, "", 0)
	a.StartTLS()
	t.Cleanup(func() {
		a.set(func() { a.away = true })
		a.CloseClientConnections()
		a.Close()
	})
	return a
}

// set changes the server, and ends all watches when it is away.
func (a *apiServer) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	if a.away {
		a.cut()
	}
}

// cut ends all watches. The caller holds the lock.
func (a *apiServer) cut() {
	for w := range a.watchers {
		close(w)
		delete(a.watchers, w)
	}
}

func (a *apiServer) put(name string, kind corev1.SecretType, key, text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	namespace, short, _ := strings.Cut(name, "/")
	a.version++
	what := "ADDED"
	if a.secrets[name] != nil {
		what = "MODIFIED"
	}
	a.secrets[name] = &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{Kind: "Secret", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: short, ResourceVersion: fmt.Sprint(a.version)},
		Type:       kind, Data: map[string][]byte{key: []byte(text)},
	}
	a.send(what, name)
}

func (a *apiServer) login(name, host, user string) {
	a.put(name, corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, fmt.Sprintf(`{"auths": {%q: {"username": %q, "password": "p"}}}`, host, user))
}

func (a *apiServer) remove(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	a.secrets[name].ResourceVersion = fmt.Sprint(a.version)
	a.send("DELETED", name)
	a.removed = append(a.removed, a.secrets[name])
	delete(a.secrets, name)
}

func (a *apiServer) send(what, name string) {
	for w, kind := range a.watchers {
		if string(a.secrets[name].Type) == kind {
			w <- event{what, a.secrets[name]}
		}
	}
}

// ServeHTTP implements http.Handler.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.paths[r.URL.Path] = true
	if a.away {
		a.mu.Unlock()
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Content-Type", "application/json")
	kind := strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "type=")
	namespace := ""
	if rest, ok := strings.CutPrefix(r.URL.Path, "/api/v1/namespaces/"); ok {
		namespace = strings.TrimSuffix(rest, "/secrets")
	}
	switch {
	case a.refuses || r.Header.Get("Authorization") != "Bearer node-token":
		a.mu.Unlock()
		a.fail(w, http.StatusForbidden, metav1.StatusReasonForbidden, "secrets is forbidden")
	case r.URL.Query().Get("sendInitialEvents") != "":
		a.mu.Unlock()
		a.fail(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is forbidden")
	case r.URL.Query().Get("watch") != "":
		events := make(chan event, 100)
		a.begin(events, kind, r.URL.Query().Get("resourceVersion"))
		a.mu.Unlock()
		a.watch(w, r, events)
	default:
		list := corev1.SecretList{TypeMeta: metav1.TypeMeta{Kind: "SecretList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: fmt.Sprint(a.version)}}
		for _, s := range a.secrets {
			if string(s.Type) == kind && (namespace == "" || s.Namespace == namespace) {
				list.Items = append(list.Items, *s)
			}
		}
		a.lists++
		a.mu.Unlock()
		_ = json.NewEncoder(w).Encode(list)
	}
}

// begin begins a watch with what happened since a version. The caller holds the lock.
func (a *apiServer) begin(events chan event, kind, version string) {
	since, err := strconv.Atoi(version)
	if err != nil || since < a.forgot {
		events <- event{"ERROR", metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: http.StatusGone, Reason: metav1.StatusReasonExpired, Message: "too old resource version"}}
		close(events)
		return
	}
	a.watchers[events] = kind
	for _, s := range a.secrets {
		if of, _ := strconv.Atoi(s.ResourceVersion); of > since && string(s.Type) == kind {
			events <- event{"MODIFIED", s}
		}
	}
	for _, s := range a.removed {
		if of, _ := strconv.Atoi(s.ResourceVersion); of > since && string(s.Type) == kind {
			events <- event{"DELETED", s}
		}
	}
}

func (a *apiServer) fail(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason, Message: message})
}

func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, events chan event) {
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush()
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			_ = json.NewEncoder(w).Encode(e)
			_ = http.NewResponseController(w).Flush()
		case <-r.Context().Done():
			a.mu.Lock()
			delete(a.watchers, events)
			a.mu.Unlock()
			return
		}
	}
}

// kubeconfig writes one for the server.
func (a *apiServer) kubeconfig() string {
	path := filepath.Join(a.t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: k, cluster: {server: %q, certificate-authority-data: %s}}]\n"+
		"users: [{name: u, user: {token: node-token}}]\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n",
		a.URL, base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// record is a log that can be read.
type record struct {
	mu   sync.Mutex
	text strings.Builder
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

// run starts watching and returns what stops it.
func run(t *testing.T, cfg Config) (*Secrets, *record) {
	t.Helper()
	return runAt(t, cfg, slog.LevelInfo)
}

func runAt(t *testing.T, cfg Config, level slog.Level) (*Secrets, *record) {
	t.Helper()
	said := &record{}
	cfg.Log = slog.New(slog.NewTextHandler(said, &slog.HandlerOptions{Level: level}))
	s := New(cfg)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return s, said
}

// users waits until a lookup finds these users, in their order.
func users(t *testing.T, s *Secrets, host, repository string, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		list, err := s.Lookup(ctx, host, repository)
		var got []string
		for _, c := range list {
			text, _ := base64.StdEncoding.DecodeString(c.Auth)
			user, _, _ := strings.Cut(string(text), ":")
			got = append(got, user)
		}
		if err == nil && strings.Join(got, " ") == strings.Join(want, " ") {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("%s/%s: got %q, %v; want %q", host, repository, got, err, want)
		}
	}
}

const host = "registry.example"

// Both types count, changes reach us by the watch alone, and what is closest to the
// image comes first.
func TestSecretsAreWatched(t *testing.T) {
	a := newAPIServer(t)
	a.login("team/general", host, "general")
	a.put("team/old", corev1.SecretTypeDockercfg, corev1.DockerConfigKey, `{"registry.example/team": {"username": "old", "password": "p"}}`)
	a.put("team/other", corev1.SecretTypeOpaque, "data", "x")
	s, _ := run(t, Config{Kubeconfig: a.kubeconfig(), FirstList: time.Minute})
	users(t, s, host, "team/a", "old", "general")
	users(t, s, "other.example", "team/a")
	list, err := s.Lookup(t.Context(), host, "team/a")
	if err != nil || list[0].Source != "pull secret team/old" {
		t.Errorf("%v, %v", list, err)
	}
	lists := a.listed()
	a.login("other/new", "*.example", "new")
	users(t, s, host, "team/a", "old", "general", "new")
	a.login("other/new", host+"/team/a", "newer")
	users(t, s, host, "team/a", "newer", "old", "general")
	a.remove("team/old")
	users(t, s, host, "team/a", "newer", "general")
	if n := a.listed(); n != lists {
		t.Errorf("%d more lists: changes are not watched", n-lists)
	}
}

func (a *apiServer) listed() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lists
}

// Only what is asked for is watched.
func TestSecretsOfNamespaces(t *testing.T) {
	a := newAPIServer(t)
	a.login("one/s", host, "one")
	a.login("two/s", host, "two")
	a.login("three/s", host, "three")
	s, _ := run(t, Config{Kubeconfig: a.kubeconfig(), FirstList: time.Minute, Namespaces: []string{"one", "three"}})
	users(t, s, host, "x", "one", "three")
	a.mu.Lock()
	defer a.mu.Unlock()
	for path := range a.paths {
		if path != "/api/v1/namespaces/one/secrets" && path != "/api/v1/namespaces/three/secrets" {
			t.Errorf("%s was asked for", path)
		}
	}
}

// A server that is away at the start holds up nobody beyond FirstList, and is found
// when it comes. One that goes away later leaves what was seen.
func TestSecretsSurviveTheServer(t *testing.T) {
	a := newAPIServer(t)
	a.login("team/s", host, "one")
	a.set(func() { a.away = true })
	s, said := run(t, Config{Kubeconfig: a.kubeconfig(), FirstList: 50 * time.Millisecond})
	for range 10 {
		if list, err := s.Lookup(t.Context(), host, "x"); err != nil || list != nil {
			t.Fatalf("without a server: %v, %v", list, err)
		}
	}
	if text := said.String(); !strings.Contains(text, "kubernetes.io/dockerconfigjson in all namespaces") {
		t.Errorf("the log does not say what is missing: %s", text)
	}
	a.set(func() { a.away = false })
	users(t, s, host, "x", "one")

	a.set(func() { a.away = true })
	a.login("team/s", host, "two") // nobody hears of it
	users(t, s, host, "x", "one")
	a.set(func() { a.away = false })
	users(t, s, host, "x", "two")
}

// A watch whose history is gone is begun anew by a list.
func TestSecretsAfterGone(t *testing.T) {
	a := newAPIServer(t)
	a.login("team/s", host, "one")
	s, _ := run(t, Config{Kubeconfig: a.kubeconfig(), FirstList: time.Minute})
	users(t, s, host, "x", "one")
	lists := a.listed()
	a.set(func() { a.away = true })
	a.login("team/s", host, "two") // nobody hears of it, and nobody can any more
	a.set(func() { a.away, a.forgot = false, a.version })
	users(t, s, host, "x", "two")
	if a.listed() == lists {
		t.Error("not by a list")
	}
}

// The log says once for a cause, and once in a minute, that lists are missing.
func TestMissingListsAreToldOnce(t *testing.T) {
	said := &record{}
	now := time.Unix(1e9, 0)
	s := New(Config{Now: func() time.Time { return now }, Log: slog.New(slog.NewTextHandler(said, nil))})
	for _, c := range []struct {
		cause string
		after time.Duration
		want  int
	}{{"one", 0, 1}, {"one", time.Hour, 1}, {"two", 0, 2}, {"three", time.Second, 2}, {"three", tellAgain, 3}, {"three", tellAgain, 3}} {
		now = now.Add(c.after)
		s.warn(errors.New(c.cause))
		if got := strings.Count(said.String(), "not known yet"); got != c.want {
			t.Errorf("%s: told %d times, want %d", c.cause, got, c.want)
		}
	}
}

// Whatever the level, what client-go reads is not in the log: neither what it lists
// nor what it watches.
func TestTraceTellsNoSecret(t *testing.T) {
	a := newAPIServer(t)
	a.login("team/listed", host, "listed-canary")
	s, said := runAt(t, Config{Kubeconfig: a.kubeconfig(), FirstList: time.Minute}, slog.Level(-100))
	users(t, s, host, "x", "listed-canary")
	a.login("team/watched", host, "watched-canary")
	users(t, s, host, "x", "listed-canary", "watched-canary")
	a.set(func() { a.away = true })
	a.login("team/again", host, "again-canary")
	a.set(func() { a.away, a.forgot = false, a.version })
	users(t, s, host, "x", "again-canary", "listed-canary", "watched-canary")
	text := said.String()
	if !strings.Contains(text, "level=DEBUG") {
		t.Fatalf("client-go says nothing to this log: %s", text)
	}
	for _, secret := range a.secrets {
		data := secret.Data[corev1.DockerConfigJsonKey]
		for _, form := range []string{"canary", base64.StdEncoding.EncodeToString(data), string(data), "node-token", "Response Body"} {
			if strings.Contains(text, form) {
				t.Errorf("the log has %q: %s", form, text)
			}
		}
	}
}

// Whoever lacks a role learns that.
func TestSecretsRefused(t *testing.T) {
	a := newAPIServer(t)
	a.set(func() { a.refuses = true })
	now := time.Unix(1e9, 0)
	s, said := run(t, Config{Kubeconfig: a.kubeconfig(), FirstList: time.Millisecond, Now: func() time.Time { now = now.Add(time.Hour); return now }})
	late, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if _, err := s.Lookup(late, host, "x"); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(said.String(), "not known yet") && strings.Contains(said.String(), "forbidden") {
			return
		}
		select {
		case <-changed:
		case <-late.Done():
			t.Fatal(said)
		}
	}
}

// A kubeconfig that is not there yet is an error, and lookups find nothing.
func TestKubeconfigMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	said := &record{}
	s := New(Config{Kubeconfig: path, FirstList: time.Millisecond, Log: slog.New(slog.NewTextHandler(said, nil))})
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("run: %v", err)
	}
	if list, err := s.Lookup(t.Context(), host, "x"); err != nil || list != nil || !strings.Contains(said.String(), path) {
		t.Errorf("lookup: %v, %v, %s", list, err, said)
	}
}

// A lookup ends with its context.
func TestLookupEnds(t *testing.T) {
	s := New(Config{Kubeconfig: "/nonexistent", FirstList: time.Hour, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Lookup(ctx, host, "x"); err == nil {
		t.Error("no error")
	}
}

// A broken secret is told, and nothing of what it holds.
func TestBrokenSecretsTellNothing(t *testing.T) {
	const secret = "s3cr3t-canary"
	a := newAPIServer(t)
	a.put("team/bad", corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, `{"auths": `+secret)
	a.put("team/half", corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey,
		`{"auths": {"other.example": {"auth": "`+secret+`"}, "registry.example": {"username": "good", "password": "`+secret+`"}}}`)
	s, said := run(t, Config{Kubeconfig: a.kubeconfig(), FirstList: time.Minute})
	users(t, s, host, "x", "good")
	list, _ := s.Lookup(t.Context(), host, "x")
	text := said.String() + fmt.Sprintf("%v %+v %#v", list, list, list)
	for _, name := range []string{"team/bad", "team/half"} {
		if !strings.Contains(text, name) {
			t.Errorf("the log does not name %s: %s", name, text)
		}
	}
	if strings.Contains(text, secret) {
		t.Errorf("the log tells the secret: %s", text)
	}
}
