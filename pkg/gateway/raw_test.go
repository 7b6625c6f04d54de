package gateway

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// strict is a source and images that take note of what is beyond the grant.
type strict struct {
	fake
	opened, beyond atomic.Int64
}

func (s *strict) Has(instance string, blob digest.Digest) (bool, error) {
	if instance != "instance" {
		s.beyond.Add(1)
	}
	return s.fake.Has(instance, blob)
}

func (s *strict) Open(ctx context.Context, b Blob, offset, length int64) (Content, error) {
	s.opened.Add(1)
	if b != (Blob{"instance", "registry.test", "a/b", known}) || offset < 0 || length == 0 {
		s.beyond.Add(1)
	}
	return s.fake.Open(ctx, b, offset, length)
}

// FuzzBytes sends whatever comes over a connection; @@ stands for a capability. Only what
// the capability opens may come out, and nothing without one.
func FuzzBytes(f *testing.F) {
	for _, text := range []string{
		"GET PATH HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer @@\r\nRange: bytes=0-9\r\n\r\n",
		"HEAD PATH HTTP/1.0\r\nAuthorization: Bearer @@\r\n\r\nGET PATH HTTP/1.1\r\n\r\n",
		"GET http://y//v2/a/../PATH?x#y HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer @@\r\n\r\n",
		"POST PATH HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\nAuthorization: Bearer @@\r\n\r\n1\r\nx\r\n0\r\n\r\n",
		"GET PATH HTTP/1.1\r\nHost: x\r\nX: y\r\n Authorization: Bearer @@\r\nRange: bytes=1-,2-\r\n\r\n",
		"GET /v2/a/%62/blobs/sha256:00 HTTP/1.1\r\nHost: x\r\nNydus-Nonce: 1\r\n\r\n",
	} {
		f.Add([]byte(strings.ReplaceAll(text, "PATH", path)))
	}
	source := &strict{}
	server := New(Config{Key: key, Images: source, Source: source, Patience: 5 * time.Second, Log: slog.New(slog.DiscardHandler)}).HTTP()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }()
	f.Cleanup(func() { _ = server.Close() })
	good := capability(f, nil)
	f.Fuzz(func(t *testing.T, text []byte) {
		source.opened.Store(0)
		bodies := exchange(t, listener.Addr().String(), bytes.ReplaceAll(text, []byte("@@"), []byte(good)))
		if source.beyond.Load() > 0 {
			t.Fatal("something beyond the grant was asked for")
		}
		if source.opened.Load() > 0 && !bytes.Contains(text, []byte("@@")) {
			t.Fatal("a blob was opened without a capability")
		}
		for _, body := range bodies {
			if len(body) > 0 && !bytes.Contains(content, body) {
				t.Fatalf("%d bytes came out that are not the blob's", len(body))
			}
		}
	})
}

// exchange writes a text and returns the bodies of all answers that are none of errors.
func exchange(t *testing.T, address string, text []byte) (bodies [][]byte) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	go func() {
		_, _ = c.Write(text)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	in := bufio.NewReader(c)
	for {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return bodies
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, int64(len(content))))
		if resp.StatusCode >= http.StatusOK && resp.StatusCode < http.StatusMultipleChoices && resp.Header.Get("Docker-Content-Digest") != "" {
			bodies = append(bodies, body)
		}
	}
}
