package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serve answers like a daemon.
func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return socket
}

func TestCalls(t *testing.T) {
	var got []string
	socket := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = append(got, r.Method+" "+r.URL.Path)
		switch r.URL.Path {
		case "/api/v1/daemon":
			_, _ = w.Write([]byte(`{"id":"x","state":"RUNNING","version":{"package_ver":"v2.4.0"},"more":1}`))
		case "/api/v1/daemon/events":
			_, _ = w.Write([]byte(`{"total_errors":2,"errors":["a","b"]}`))
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	})
	c := New(socket)
	info, err := c.Info(t.Context())
	if err != nil || info.State != StateRunning || info.Version.Package != "v2.4.0" {
		t.Errorf("info: %+v, %v", info, err)
	}
	if e, err := c.Events(t.Context()); err != nil || e.Total != 2 || len(e.Errors) != 2 {
		t.Errorf("events: %+v, %v", e, err)
	}
	for _, call := range []func(context.Context) error{c.Start, c.Exit, c.SendFD, c.Takeover} {
		if err := call(t.Context()); err != nil {
			t.Error(err)
		}
	}
	want := "GET /api/v1/daemon, GET /api/v1/daemon/events, PUT /api/v1/daemon/start, PUT /api/v1/daemon/exit, PUT /api/v1/daemon/fuse/sendfd, PUT /api/v1/daemon/fuse/takeover"
	if all := strings.Join(got, ", "); all != want {
		t.Errorf("calls %s, want %s", all, want)
	}
}

// Errors name call, socket and cause, and a daemon that hangs does not hang us.
func TestErrors(t *testing.T) {
	refuse := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write([]byte(`{"code":"UNDEFINED","message":"UnexpectedEvent"}`))
	})
	var refused *Error
	err := New(refuse).Start(t.Context())
	if !errors.As(err, &refused) || refused.Status != http.StatusBadRequest || refused.Message != "UnexpectedEvent" || !strings.Contains(err.Error(), "PUT /api/v1/daemon/start at "+refuse) {
		t.Errorf("refused: %v", err)
	}
	var key = strings.Repeat("0a", 16)
	gone := filepath.Join(t.TempDir(), "i", key, "g3", "s1.sock")
	want := "PUT /api/v1/daemon/fuse/takeover at " + gone + " (instance " + key + ", generation 3): no such file or directory"
	if err := New(gone).Takeover(t.Context()); err == nil || err.Error() != want {
		t.Errorf("an instance's daemon that is gone: %v, want %s", err, want)
	}
	none := filepath.Join(t.TempDir(), "none")
	if err := New(none).Exit(t.Context()); err == nil || !strings.Contains(err.Error(), none) || !strings.Contains(err.Error(), "no such file") || strings.Contains(err.Error(), "http://") {
		t.Errorf("no socket: %v", err)
	}
	hang := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("bound"))
	defer cancel()
	if _, err := New(hang).Info(ctx); err == nil || !strings.HasSuffix(err.Error(), ": bound") {
		t.Errorf("hanging: %v", err)
	}
	text := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("text")) })
	if _, err := New(text).Info(t.Context()); err == nil || !strings.Contains(err.Error(), "answer: ") {
		t.Errorf("no JSON: %v", err)
	}
}
