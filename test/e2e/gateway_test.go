package e2e_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

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

// TestGatewayKilled kills the gateway again and again while containers of images that
// nothing is cached of are started and read.
func TestGatewayKilled(t *testing.T) {
	const kills, images = 50, 10
	// A gateway lives for so long at least, and there is an end: who is killed as soon as it
	// listens can serve nobody.
	const life, most = 100 * time.Millisecond, 10 * kills
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	g := managed24.newGateway(t, map[string]any{"remote.gateway": "always"})
	var pulled []containerd.Image
	var trees []kit.Tree
	for n := range images {
		ref, want := smallNydus(t, r, fmt.Sprintf("killed-%d", n))
		pulled, trees = append(pulled, pull(t, g.n, ref)), append(trees, want)
	}
	read := make(chan error, 1)
	go func() {
		var err error
		for n := range pulled {
			err = errors.Join(err, readOnce(t, g.n, pulled[n], fmt.Sprintf("reader-%d", n), trees[n]))
		}
		read <- err
	}()
	alive := time.NewTimer(life)
	defer alive.Stop()
	killed := 0
	var err error
	for done := false; !done; {
		select {
		case <-alive.C:
			g.end(unix.SIGKILL)
			g.start()
			if killed++; killed < most {
				alive.Reset(life)
			}
		case err = <-read:
			done = true
		}
	}
	if err != nil || killed < kills {
		t.Errorf("with %d kills, want %d at least: %v", killed, kills, err)
	}
	wantDaemons(t, g.n, 0, soon)
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
