package registry_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// hub stands for registry-1.docker.io: whoever asks its proxy for that is connected with
// it.
type hub struct {
	front *front
	proxy string // URL

	mu    sync.Mutex
	asked []string
}

func newHub(t *testing.T, ca *authority, r *kit.Registry) *hub {
	t.Helper()
	h := &hub{front: newFront(t, before(r, nil))}
	behind := httptest.NewUnstartedServer(before(&kit.Registry{Host: h.front.Host}, nil))
	behind.TLS = &tls.Config{Certificates: []tls.Certificate{ca.issueFor("registry-1.docker.io").tls}}
	behind.StartTLS()
	t.Cleanup(behind.Close)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.asked = append(h.asked, r.Host)
		h.mu.Unlock()
		connect(w, behind.Listener.Addr().String())
	}))
	t.Cleanup(proxy.Close)
	h.proxy = proxy.URL
	return h
}

func (h *hub) hosts() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.asked)
}

// connect answers CONNECT.
func connect(w http.ResponseWriter, to string) {
	server, err := net.Dial("tcp", to)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer server.Close()
	client, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer client.Close()
	_, _ = io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(server, client)
		_ = server.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(client, server)
}
