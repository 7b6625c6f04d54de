package nydusd

import (
	"bufio"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestPing(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(net.Conn)
		want   string
	}{
		"answers": {func(c net.Conn) {
			if req, err := http.ReadRequest(bufio.NewReader(c)); err == nil && req.URL.Path == "/api/v1/daemon" {
				_, _ = c.Write([]byte("HTTP/1.1 503 Not Ready\r\n\r\n"))
			}
		}, ""},
		"hangs":    {func(net.Conn) { <-t.Context().Done() }, "no answer within 200ms"},
		"hangs up": {func(c net.Conn) { _, _ = bufio.NewReader(c).ReadString('\n') }, "hung up"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			must(t, err)
			defer l.Close()
			go func() {
				if conn, err := l.Accept(); err == nil {
					c.answer(conn)
					conn.Close()
				}
			}()
			started := time.Now()
			err = Ping(socket, 200*time.Millisecond)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), socket)) {
				t.Errorf("%v; want %q", err, c.want)
			}
			if took := time.Since(started); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	missing := filepath.Join(t.TempDir(), "s")
	if err := Ping(missing, time.Second); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("of no socket: %v", err)
	}
}
