package snapshot

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec/katatest"
)

const (
	testImage = "registry.example/team/app:v1"
	canary    = "Y2FuYXJ5OnMzY3IzdA=="
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: the snapshotter owns its directories and overlayfs is mounted")
	}
}

// fixture stands for everything that a snapshotter asks, and for the
// node's key.
type fixture struct {
	t   *testing.T
	key mountspec.Key

	mu          sync.Mutex
	credentials map[string]*mountspec.Credentials // by host
	failure     error                             // of the next lookups
}

func newFixture(t *testing.T) *fixture {
	key, err := mountspec.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return &fixture{t: t, key: key, credentials: map[string]*mountspec.Credentials{}}
}

func (f *fixture) options(root string) Options {
	return Options{
		Root: root, RunDir: "/run/test", Daemon: testDaemon,
		Backends: f, Sealer: f,
	}
}

func testDaemon() mountspec.Daemon {
	return mountspec.Daemon{Path: "/usr/bin/nydusd", LogLevel: "debug", Threads: 3, OOMScoreAdj: -5, CgroupParent: "/nydus"}
}

func (f *fixture) Backend(_ context.Context, ref, wanted string) (Backend, error) {
	if wanted != "" {
		if wanted == "forbidden" {
			return Backend{}, fmt.Errorf("image %q may not ask for %q", ref, wanted)
		}
		return Backend{Repository: wanted, Config: func(cache string) (string, error) { return fmt.Sprintf(`{"wanted":%q}`, wanted), nil }}, nil
	}
	host, rest, ok := strings.Cut(ref, "/")
	if !ok {
		return Backend{}, fmt.Errorf("read image reference %q: no host", ref)
	}
	repository, _, _ := strings.Cut(rest, ":")
	if host == "dir" {
		host, repository = "", "/"+repository
	}
	b := Backend{Host: host, Repository: repository, Config: func(cache string) (string, error) {
		return fmt.Sprintf(`{"host":%q,"cache":%q}`, host, cache), nil
	}}
	if host != "" {
		b.Credentials = func(_ context.Context, instance string) (*mountspec.Credentials, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if instance == "" {
				f.t.Error("credentials were asked for no instance")
			}
			return f.credentials[host], f.failure
		}
	}
	return b, nil
}

func (f *fixture) Seal(s *mountspec.Spec) (string, error) { return mountspec.Encode(s, f.key) }

// Key implements mountspec.Keys.
func (f *fixture) Key(id string) (mountspec.Key, error) {
	if id != f.key.ID() {
		return mountspec.Key{}, mountspec.ErrUnknownKey
	}
	return f.key, nil
}

// node is a snapshotter below containerd's metadata store, reached over gRPC
// as containerd does.
type node struct {
	*fixture
	ctx  context.Context
	root string
	opts Options
	sn   *Snapshotter          // ours
	db   *metadata.DB          // containerd's
	top  snapshots.Snapshotter // what containerd's clients see
	n    int
}

func newNode(t *testing.T, change ...func(*Options)) *node {
	t.Helper()
	needRoot(t)
	n := &node{fixture: newFixture(t), ctx: namespaces.WithNamespace(t.Context(), "k8s.io"), root: filepath.Join(t.TempDir(), "root")}
	n.opts = n.options(n.root)
	for _, c := range change {
		c(&n.opts)
	}
	bdb, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bdb.Close() })
	n.start(bdb)
	return n
}

func (n *node) start(bdb *bolt.DB) {
	n.t.Helper()
	sn, err := New(n.ctx, n.opts)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { sn.Close() })
	n.sn = sn
	n.db = metadata.NewDB(bdb, nil, map[string]snapshots.Snapshotter{"nydus": proxied(n.t, sn)})
	if err := n.db.Init(n.ctx); err != nil {
		n.t.Fatal(err)
	}
	n.top = n.db.Snapshotter("nydus")
}

// restart is a new process of the snapshotter on the same root. Only n.sn is
// usable afterwards.
func (n *node) restart() {
	n.t.Helper()
	if err := n.sn.Close(); err != nil {
		n.t.Fatal(err)
	}
	sn, err := New(n.ctx, n.opts)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { sn.Close() })
	n.sn = sn
}

// proxied returns a client of sn over a real socket.
func proxied(t *testing.T, sn snapshots.Snapshotter) snapshots.Snapshotter {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn") // short, as sockets need it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	go server.Serve(l)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "nydus")
}

// layer is one layer of an image that is pulled.
type layer struct {
	labels map[string]string
	fill   func(dir string)    // writes the content; nil for one that is not unpacked
	apply  func([]mount.Mount) // instead of fill
}

func (n *node) data() layer {
	return layer{labels: map[string]string{labelData: "true", labelImage: testImage}}
}

func (n *node) bootstrap(name string) layer {
	return layer{
		labels: map[string]string{labelBootstrap: "true", labelImage: testImage, labelParent: "sha256:x"},
		fill:   func(dir string) { place(n.t, filepath.Join(dir, "image/image.boot"), bootstrap(n.t, name)) },
	}
}

func (n *node) plain(file string) layer {
	return layer{labels: map[string]string{labelImage: testImage}, fill: func(dir string) { place(n.t, filepath.Join(dir, file), []byte(file)) }}
}

// pull unpacks layers as containerd's unpacker does and returns the chain ID of
// the uppermost.
func (n *node) pull(layers ...layer) string {
	n.t.Helper()
	chain, err := n.tryPull(n.ctx, layers...)
	if err != nil {
		n.t.Fatal(err)
	}
	return chain
}

func (n *node) tryPull(ctx context.Context, layers ...layer) (string, error) {
	parent := ""
	for i, l := range layers {
		n.n++
		chain := chainID(parent, fmt.Sprint(i, l.labels))
		labels := map[string]string{snapshots.LabelSnapshotRef: chain}
		for k, v := range l.labels {
			labels[k] = v
		}
		key := fmt.Sprintf(snapshots.UnpackKeyFormat, fmt.Sprintf("%d-AbC=", n.n), chain)
		mounts, err := n.top.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		switch {
		case errdefs.IsAlreadyExists(err):
			if _, err := n.top.Stat(ctx, chain); err != nil {
				return "", fmt.Errorf("containerd does not find the layer that exists: %w", err)
			}
		case err != nil:
			return "", err
		case l.fill == nil && l.apply == nil:
			return "", errors.New("containerd would download the layer")
		default:
			if l.apply != nil {
				l.apply(mounts)
			} else {
				l.fill(upperOf(n.t, mounts))
			}
			if err := n.top.Commit(ctx, chain, key, snapshots.WithLabels(labels)); err != nil {
				return "", errors.Join(err, n.top.Remove(ctx, key))
			}
		}
		parent = chain
	}
	return parent, nil
}

func chainID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// upperOf finds where containerd's applier writes, as it does.
func upperOf(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	if len(mounts) != 1 {
		t.Fatalf("an unpack has mounts %v", mounts)
	}
	if mounts[0].Type == "bind" {
		return mounts[0].Source
	}
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok && mounts[0].Type == "overlay" {
			return upper
		}
	}
	t.Fatalf("nothing can be applied to %v", mounts)
	return ""
}

// container prepares a container's snapshot on an image.
func (n *node) container(parent string) ([]mount.Mount, string) {
	n.t.Helper()
	n.n++
	key := fmt.Sprintf("container-%d", n.n)
	mounts, err := n.top.Prepare(n.ctx, key, parent)
	if err != nil {
		n.t.Fatal(err)
	}
	return mounts, key
}

// decode reads the option of a nydus mount.
func (n *node) decode(m mount.Mount) *mountspec.Spec {
	n.t.Helper()
	if m.Type != mountspec.MountType || m.Target != "" || len(m.Options) != 1 {
		n.t.Fatalf("got mount %+v", m)
	}
	if info, err := os.Stat(m.Source); err != nil || !info.IsDir() {
		n.t.Fatalf("the source %s is not a directory that exists: %v", m.Source, err)
	}
	value, err := mountspec.Find(m.Options)
	if err != nil {
		n.t.Fatal(err)
	}
	s, err := mountspec.Decode(value, n)
	if err != nil {
		n.t.Fatal(err)
	}
	if s.SnapshotDir != m.Source {
		n.t.Fatalf("source %s, snapshot directory %s", m.Source, s.SnapshotDir)
	}
	return s
}

// kataTakes checks that Kata takes the mounts and reads from them what s says.
func kataTakes(t *testing.T, mounts []mount.Mount, s *mountspec.Spec) {
	t.Helper()
	var list []katatest.Mount
	for _, m := range mounts {
		list = append(list, katatest.Mount{Type: m.Type, Source: m.Source, Options: m.Options})
	}
	katatest.Takes(t, t.Name(), katatest.Volume{Source: s.Bootstrap, Config: s.Config, SnapshotDir: s.SnapshotDir, FSVersion: s.FSVersion}, list...)
}

// bootstrap returns a real one, by its name in pkg/rafs/testdata.
func bootstrap(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "rafs", "testdata", name+".boot.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func place(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
}

func digestOf(text []byte) string {
	sum := sha256.Sum256(text)
	return "sha256:" + hex.EncodeToString(sum[:])
}
