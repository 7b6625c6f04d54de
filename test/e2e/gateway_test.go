package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// gatewayOf is a node with the registry gateway.
type gatewayOf struct {
	*kit.Gateway
	t *testing.T
	n *kit.Node
}

func (g *gatewayOf) start() {
	g.t.Helper()
	g.Start(g.n.SnapshotterConfig(), 0)
}

func (g *gatewayOf) end(s syscall.Signal) {
	g.t.Helper()
	if err := g.End(s); err != nil {
		g.t.Fatal(err)
	}
}

// newGateway starts a node whose images are read through the gateway.
func (s style) newGateway(t *testing.T, config map[string]any) *gatewayOf {
	t.Helper()
	gateway := kit.NewGateway(t)
	config["remote.gateway_address"] = gateway.Address
	g := &gatewayOf{gateway, t, s.node(t, kit.NodeConfig{Config: config})}
	g.start()
	return g
}

// TestGateway reads an image through the gateway: the registry of the image and its
// credentials are the gateway's business alone.
func TestGateway(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "gateway")
	eachStyle(t, func(t *testing.T, s style) {
		g := s.newGateway(t, map[string]any{"remote.gateway": "always"})
		img := pull(t, g.n, ref)
		pulled := len(r.Requests())
		c := run(t, g.n, img, "one", kit.RunOptions{})
		kit.EqualTrees(t, "the view through the gateway", want, kit.MustWalk(t, c.Root()))
		// A request is noted once its answer is written, so that the last of the pull's
		// may come late.
		read := slices.DeleteFunc(r.Requests()[pulled:], func(q kit.Request) bool { return strings.HasPrefix(q.UserAgent, "containerd/") })
		if len(read) == 0 {
			t.Error("nothing was asked of the registry")
		}
		for _, req := range read {
			if !strings.HasPrefix(req.UserAgent, "Go-http-client/") {
				t.Errorf("the registry is asked by %q, and not by the gateway", req.UserAgent)
			}
			if !strings.Contains(req.Path, "/blobs/") {
				t.Errorf("the registry is asked for %s", req.Path)
			}
		}
		text, err := os.ReadFile(g.Log)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "refused") {
			t.Errorf("the gateway has refused something:\n%s", text)
		}
		remove(t, c)
		wantDaemons(t, g.n, 0, soon)
	})
}

// TestGatewayKilled kills the gateway in the middle of every answer that it has not passed on
// before, while containers of images that nothing is cached of are started and read.
func TestGatewayKilled(t *testing.T) {
	const kills, images = 50, 10
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	g := managed24.newGateway(t, map[string]any{"remote.gateway": "always"})
	var pulled []containerd.Image
	var trees []kit.Tree
	for n := range images {
		ref, want := smallNydus(t, r, fmt.Sprintf("killed-%d", n))
		pulled, trees = append(pulled, pull(t, g.n, ref)), append(trees, want)
	}
	k := &killer{due: make(chan chan struct{}), over: t.Context().Done(), seen: map[string]bool{}}
	r.SetHook(k.hook)
	read := make(chan error, 1)
	go func() {
		var err error
		for n := range pulled {
			err = errors.Join(err, readOnce(t, g.n, pulled[n], fmt.Sprintf("reader-%d", n), trees[n]))
		}
		read <- err
	}()
	killed := 0
	for {
		select {
		case done := <-k.due:
			g.end(unix.SIGKILL)
			g.start()
			killed++
			close(done)
			continue
		case err := <-read:
			if err != nil || killed < kills {
				t.Errorf("with %d kills, want %d at least: %v", killed, kills, err)
			}
		}
		break
	}
	t.Logf("killed %d times, each time while it passed something on", killed)
	r.SetHook(nil)
	wantDaemons(t, g.n, 0, soon)
}

// killer has the gateway killed while the registry answers it, for the first time that it
// asks for something.
type killer struct {
	due  chan chan struct{}
	over <-chan struct{}

	mu   sync.Mutex
	seen map[string]bool
}

func (k *killer) hook(w http.ResponseWriter, req *http.Request, next http.Handler) {
	what := req.Method + " " + req.URL.Path + " " + req.Header.Get("Range")
	k.mu.Lock()
	first := !k.seen[what]
	k.seen[what] = true
	k.mu.Unlock()
	if first && strings.Contains(req.URL.Path, "/blobs/") {
		w = &deadly{ResponseWriter: w, k: k}
	}
	next.ServeHTTP(w, req)
}

// deadly is an answer in whose middle the gateway is killed.
type deadly struct {
	http.ResponseWriter
	k    *killer
	done bool
}

func (d *deadly) Write(p []byte) (int, error) {
	if d.done || len(p) < 2 {
		return d.ResponseWriter.Write(p)
	}
	d.done = true
	n, err := d.ResponseWriter.Write(p[:len(p)/2])
	if err == nil {
		err = http.NewResponseController(d.ResponseWriter).Flush()
	}
	if err != nil {
		return n, err
	}
	killed := make(chan struct{})
	select {
	case d.k.due <- killed:
	case <-d.k.over:
		return n, context.Canceled
	}
	select {
	case <-killed:
	case <-d.k.over:
	}
	rest, err := d.ResponseWriter.Write(p[len(p)/2:])
	return n + rest, err
}

// readOnce reads all of an image through a container.
func readOnce(t *testing.T, n *kit.Node, img containerd.Image, id string, want kit.Tree) error {
	c, err := tryRun(t, n, img, id, kit.RunOptions{})
	if err != nil {
		return err
	}
	got, err := kit.Walk(c.Root())
	if err == nil {
		kit.EqualTrees(t, "the view of "+id, want, got)
	}
	return errors.Join(err, c.Remove(t.Context()))
}

// checked asks for what registry check says of the mirrors.
func checked(t *testing.T, n *kit.Node, ref string) {
	t.Helper()
	var said struct {
		Gateway, Works bool
		Hosts          []struct{ Host, Manifest, Blob, TLS string }
	}
	text, err := n.Command(t.Context(), "nydus-snapshotter", "registry", "check", "--config", n.SnapshotterConfig(), "--format", "json", ref).Output()
	if err != nil {
		t.Fatalf("registry check: %v: %s", err, text)
	}
	if err := json.Unmarshal(text, &said); err != nil {
		t.Fatal(err)
	}
	if !said.Gateway || !said.Works || len(said.Hosts) != 3 {
		t.Fatalf("registry check says %s", text)
	}
	for i, h := range said.Hosts {
		if good := h.Manifest == "ok" && h.Blob == "ok"; good != (i > 0) || h.TLS != "none" {
			t.Errorf("registry check says of host %d: %+v", i, h)
		}
	}
	if text, err := n.Command(t.Context(), "nydus-snapshotter", "registry", "check", "--config", n.SnapshotterConfig(), ref+"-missing").CombinedOutput(); err == nil || !strings.Contains(string(text), "not found") {
		t.Errorf("registry check of an image that is not there: %v: %s", err, text)
	}
}

// TestMirrors gives the image's registry two mirrors by hosts.toml, the first of which
// nobody listens on: only the gateway gets on with that.
func TestMirrors(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "mirrored")
	certs := t.TempDir()
	dir := filepath.Join(certs, strings.Replace(r.Host, ":", "_", 1)+"_")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://127.0.0.1:1\"]\n[host.\"http://%s\"]\n", r.Host, r.Host)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o600); err != nil {
		t.Fatal(err)
	}
	g := helper24.newGateway(t, map[string]any{"remote.config_path": certs})
	img := pull(t, g.n, ref)
	c := run(t, g.n, img, "one", kit.RunOptions{})
	kit.EqualTrees(t, "the view through the gateway", want, kit.MustWalk(t, c.Root()))
	remove(t, c)
	checked(t, g.n, ref)
	// Without it: an error that says why it is needed.
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := tryRun(t, g.n, img, "two", kit.RunOptions{}); err == nil || !strings.Contains(err.Error(), "3 hosts") {
		t.Errorf("without the gateway: %v", err)
	}
}
