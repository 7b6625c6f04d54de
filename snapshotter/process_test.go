package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// limit bounds what should take milliseconds.
const limit = 60 * time.Second

// built is the program as it is shipped, without the race detector's memory.
var built = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "nydus-snapshotter-test")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "nydus-snapshotter")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := built(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

func program(t *testing.T) string {
	t.Helper()
	path, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// process is the snapshotter, running in a mount namespace with a /run of its own.
type process struct {
	t       *testing.T
	cmd     *exec.Cmd
	dir     string
	address string
	log     *bytes.Buffer
	notify  *net.UnixConn
	ended   chan error
}

// start runs `serve` until it is ready. The directory holds root, socket and
// docker's configuration and may be used again.
func start(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	p := launch(t, dir, args...)
	if got := p.state(); got != "READY=1" {
		t.Fatalf("got state %q; its log:\n%s", got, p.stop())
	}
	return p
}

func launch(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: the snapshotter mounts its run directory")
	}
	p := &process{t: t, dir: dir, address: filepath.Join(dir, "sock"), log: &bytes.Buffer{}, ended: make(chan error, 1)}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	p.notify = notify
	own := []string{"-m", "--propagation", "private", "sh", "-c", `mount -t tmpfs -o mode=0755 none /run && exec "$@"`, "sh",
		program(t), "serve", "--root", filepath.Join(dir, "root"), "--address", p.address}
	p.cmd = exec.Command("unshare", append(own, args...)...)
	p.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"), "DOCKER_CONFIG="+filepath.Join(dir, "docker"))
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- p.cmd.Wait(); notify.Close() }()
	t.Cleanup(func() { p.stop() })
	return p
}

// state returns the next word to systemd, or "" when the process ended.
func (p *process) state() string {
	p.t.Helper()
	buffer := make([]byte, 256)
	_ = p.notify.SetReadDeadline(time.Now().Add(limit))
	n, err := p.notify.Read(buffer)
	if err != nil {
		return ""
	}
	return string(buffer[:n])
}

// end waits for the process and returns its error and what it said.
func (p *process) end() (string, error) {
	p.t.Helper()
	select {
	case err := <-p.ended:
		p.ended <- err
		os.Remove(filepath.Join(p.dir, "notify"))
		return p.log.String(), err
	case <-time.After(limit):
		_ = p.cmd.Process.Kill()
		p.t.Fatalf("it does not end; its log:\n%s", p.log)
		return "", nil
	}
}

// stop ends the process as systemd does, if it has not ended.
func (p *process) stop() string {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	said, _ := p.end()
	return said
}

// client is containerd's.
func (p *process) client() snapshots.Snapshotter {
	p.t.Helper()
	conn, err := grpc.NewClient("unix://"+p.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "nydus")
}

// keys are those of the process's own /run.
func (p *process) keys() mountspec.KeyDir {
	return mountspec.KeyDir(fmt.Sprintf("/proc/%d/root%s", p.cmd.Process.Pid, mountspec.DefaultKeyDir))
}

// rss is the process's resident memory in KiB.
func (p *process) rss() int {
	p.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		p.t.Fatal(err)
	}
	return kib
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ns")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}
