package nydusd

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// answering listens like a daemon that says what it is told to, and closes unless it
// is to hang.
func answering(t *testing.T, text string, hangs bool) (socket string, asked chan string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	asked = make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		buf := make([]byte, 64<<10)
		n, _ := conn.Read(buf)
		asked <- string(buf[:n])
		_, _ = io.WriteString(conn, text)
		if hangs {
			_, _ = conn.Read(buf) // until the other side goes
		}
		conn.Close()
	}()
	return socket, asked
}

func TestAddSubmount(t *testing.T) {
	socket, asked := answering(t, "HTTP/1.1 204 \r\nServer: x\r\n\r\n", true)
	if err := AddSubmount(t.Context(), socket, Submount{"abc.1", "/b", `{"a":"b"}`}); err != nil {
		t.Error(err)
	}
	head, body, _ := strings.Cut(<-asked, "\r\n\r\n")
	if !strings.HasPrefix(head, "POST /api/v1/mount?mountpoint=/abc.1 HTTP/1.1\r\n") || !strings.Contains(head, "\r\nContent-Length: 77") {
		t.Errorf("asked with %q", head)
	}
	if want := `{"config":"{\"a\":\"b\"}","fs_type":"rafs","prefetch_files":[],"source":"/b"}`; body != want {
		t.Errorf("asked for %s, want %s", body, want)
	}
}

func TestAddSubmountFails(t *testing.T) {
	for name, c := range map[string]struct {
		answer  string
		hangs   bool
		want    string
		refused bool
	}{
		"refused":   {"HTTP/1.1 500 \r\ncontent-length: 31\r\n\r\n{\"code\":\"C\",\"message\":\"broken\"}", true, "status 500: C broken", true},
		"no JSON":   {"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\noh\n", true, "status 404: oh", true},
		"closes":    {"", false, "unexpected EOF", false},
		"half":      {"HTTP/1.1 500 \r\nContent-Length: 10\r\n\r\n{", false, "unexpected EOF", false},
		"no HTTP":   {"hello\r\n\r\n", true, `begins with "hello"`, false},
		"bad size":  {"HTTP/1.1 500 \r\nContent-Length: -1\r\n\r\n", true, `length "-1"`, false},
		"too large": {strings.Repeat("x", maxAnswer+1), true, "more than", false},
		"silent":    {"", true, "enough of it", false},
	} {
		t.Run(name, func(t *testing.T) {
			socket, _ := answering(t, c.answer, c.hangs)
			ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, errors.New("enough of it"))
			defer cancel()
			if name == "silent" {
				ctx, cancel = context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("enough of it"))
				defer cancel()
			}
			err := AddSubmount(ctx, socket, Submount{"abc.1", "/b", "canary"})
			var refused *RefusedError
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), socket) || errors.As(err, &refused) != c.refused {
				t.Errorf("%v; want an error that says %q, refused: %v", err, c.want, c.refused)
			}
			if err != nil && strings.Contains(err.Error(), "canary") {
				t.Errorf("the error repeats the configuration: %v", err)
			}
		})
	}
	if err := AddSubmount(t.Context(), filepath.Join(t.TempDir(), "none"), Submount{}); err == nil {
		t.Error("nobody listens, and there is no error")
	}
}
