package kit

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Gateway is the program `nydus-snapshotter gateway`. Its socket is the kit's, as
// systemd has it, and stays when the program ends.
type Gateway struct {
	Address string // where it listens, for remote.gateway_address
	Log     string // path of its output

	t      TB
	socket *os.File
	daemon *Daemon
}

// NewGateway makes a gateway's socket. Programs, which Start starts, end with the test.
func NewGateway(t TB) *Gateway {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("new gateway: %v", err)
	}
	defer l.Close()
	g := &Gateway{Address: l.Addr().String(), Log: filepath.Join(t.TempDir(), "gateway.log"), t: t}
	if g.socket, err = l.(*net.TCPListener).File(); err != nil {
		t.Fatalf("new gateway: %v", err)
	}
	t.Cleanup(func() { g.socket.Close() })
	t.Cleanup(func() { dumpOnFailure(t, g.Log) })
	return g
}

// Start starts the program with a configuration. Who connects before it is ready waits.
// files bounds how many descriptors it may have; 0 leaves that as it is.
func (g *Gateway) Start(config string, files int, env ...string) {
	g.t.Helper()
	program := filepath.Join(Binaries(g.t, "nydus-snapshotter"), "nydus-snapshotter")
	out, err := os.OpenFile(g.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		g.t.Fatalf("start gateway: %v", err)
	}
	defer out.Close()
	limit := ""
	if files > 0 {
		limit = fmt.Sprintf("ulimit -n %d; ", files)
	}
	cmd := exec.Command("sh", "-c", limit+`LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" gateway --config "$1"`, program, config)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}, env...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = out, out, []*os.File{g.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if g.daemon, err = start("gateway", g.Log, cmd); err != nil {
		g.t.Fatalf("%v", err)
	}
	started := g.daemon
	g.t.Cleanup(func() {
		if err := started.end(unix.SIGTERM, settle); err != nil {
			g.t.Errorf("%v", err)
		}
	})
}

// PID is the program's.
func (g *Gateway) PID() int { return g.daemon.PID }

// Running reports whether the program has not ended.
func (g *Gateway) Running() bool { return g.daemon.Running() }

// End sends a signal and waits for the end.
func (g *Gateway) End(s syscall.Signal) error { return g.daemon.end(s, settle) }

// Close ends the program and its socket: who connects then is refused.
func (g *Gateway) Close() error {
	err := g.End(unix.SIGTERM)
	g.socket.Close()
	return err
}
