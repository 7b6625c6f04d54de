package registry_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/pelletier/go-toml/v2"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) {
	zerolog.SetGlobalLevel(zerolog.Disabled) // toxiproxy's
	kit.Main(m)
}

const (
	// runDir is the one that programs use unless told otherwise: the sealing keys are
	// looked for there and nowhere else.
	runDir = "/run/nydus-snapshotter"
	// soon bounds everything that should happen at once, patience what may wait for
	// servers that are ill. atOnce is less than the gateway asks again for.
	soon     = 30 * time.Second
	patience = 3 * time.Minute
	atOnce   = 15 * time.Second
	// repository and tag are those of the lab's image, whatever the registry is called.
	repository = "team/image"
	tag        = "1"
	// capabilityKey is the snapshotter's word for the gateway's key.
	capabilityKey = "gateway capability"
)

// lab is a node without containerd and snapshotter: an image in a registry, the gateway,
// and nydusd. What a registry is called and who serves it is up to the tests: see hosts.
type lab struct {
	t     *testing.T
	store *kit.Registry // open, for whoever wants the content
	image *kit.Image
	boot  []byte
	tree  kit.Tree

	root, certs, docker string
	config              string
	key                 mountspec.Key
	sealing             gateway.Key
	gw                  *kit.Gateway
	count               *int
	disposed            *sync.Once
}

// in is the same lab for a subtest.
func (l *lab) in(t *testing.T) *lab {
	sub := *l
	sub.t = t
	return &sub
}

// newLab makes a lab with an image, whose gateway runs.
func newLab(t *testing.T, image *kit.Image) *lab {
	t.Helper()
	kit.Baseline(t)
	l := &lab{t: t, image: image.MustNydus(t, kit.NydusOptions{ChunkSize: "0x10000"}), certs: t.TempDir(), docker: t.TempDir(), count: new(int), disposed: &sync.Once{}}
	l.root = filepath.Join(t.TempDir(), "root")
	must(t, os.MkdirAll(l.root, 0o700))
	must(t, instance.SetupRunDir(runDir))
	var err error
	l.boot, err = l.image.BootstrapBytes()
	must(t, err)
	l.tree, err = l.image.Tree()
	must(t, err)
	l.key, err = mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(l.root)
	must(t, err)
	l.sealing, err = l.key.Derive(capabilityKey)
	must(t, err)
	l.store = l.registry(kit.RegistryOptions{})
	l.store.MustPush(t, l.image, repository+":"+tag)
	l.gw = kit.NewGateway(t)
	l.config = filepath.Join(t.TempDir(), "config.toml")
	l.configure("auto")
	l.start(0)
	return l
}

// smallLab has the kit's small image.
func smallLab(t *testing.T) *lab {
	t.Helper()
	return newLab(t, kit.SmallImage(t, t.Name()))
}

// configure writes the snapshotter's configuration.
func (l *lab) configure(gateway string) {
	l.t.Helper()
	text, err := toml.Marshal(map[string]any{
		"version": 1, "root": l.root, "run_dir": runDir, "log": map[string]any{"level": "trace"},
		"remote": map[string]any{"config_path": l.certs, "gateway": gateway, "gateway_address": l.gw.Address},
	})
	must(l.t, err)
	must(l.t, os.WriteFile(l.config, text, 0o600))
}

// start starts the gateway, with a bound for its descriptors unless that is 0.
func (l *lab) start(files int) {
	l.t.Helper()
	l.gw.Start(l.config, files, "DOCKER_CONFIG="+l.docker)
}

// registry starts a registry. The lab's mounts go before it does: the kit looks whether
// anything is left.
func (l *lab) registry(opts kit.RegistryOptions) *kit.Registry {
	l.t.Helper()
	r := kit.NewRegistry(l.t, opts)
	l.t.Cleanup(func() { l.disposed.Do(l.dispose) })
	return r
}

func (l *lab) dispose() {
	if err := l.tidy(); err != nil {
		l.t.Error(err)
	}
	must(l.t, unix.Unmount(runDir, 0))
	must(l.t, os.Remove(runDir))
	dirs, err := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent())
	must(l.t, err)
	for _, dir := range append(dirs, "/sys/fs/cgroup"+cgroupParent()) {
		_ = unix.Rmdir(dir) // what is in the way the kit tells
	}
}

func cgroupParent() string { return kit.CgroupRoot() + "/nydus" }

// tidy lets go of all images that nobody has mounted.
func (l *lab) tidy() error {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- instance.NewReconciler(instance.ReconcilerConfig{RunDir: runDir, Root: l.root, Log: slog.New(slog.DiscardHandler)}).Run(ctx)
	}()
	tick := time.NewTicker(10 * time.Millisecond) // it makes no event
	defer tick.Stop()
	for {
		keys, err := instance.Keys(runDir)
		if err != nil || len(keys) == 0 {
			cancel()
			return errors.Join(err, <-done)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("instances %q are still there after %s", keys, soon)
		}
	}
}

// hosts writes a registry's hosts.toml, as a whole.
func (l *lab) hosts(registry, text string) (file string) {
	l.t.Helper()
	file = filepath.Join(l.certs, registry, "hosts.toml")
	must(l.t, os.MkdirAll(filepath.Dir(file), 0o755))
	must(l.t, os.WriteFile(file+".new", []byte(text), 0o644))
	must(l.t, os.Rename(file+".new", file))
	return file
}

// login writes docker's configuration.
func (l *lab) login(logins map[string]login) {
	l.t.Helper()
	auths := map[string]any{}
	for host, as := range logins {
		auths[host] = map[string]string{"auth": as.basic()}
	}
	text, err := json.Marshal(map[string]any{"auths": auths})
	must(l.t, err)
	must(l.t, os.WriteFile(filepath.Join(l.docker, "config.json.new"), text, 0o600))
	must(l.t, os.Rename(filepath.Join(l.docker, "config.json.new"), filepath.Join(l.docker, "config.json")))
}

type login struct{ user, password string }

func (a login) basic() string {
	return base64.StdEncoding.EncodeToString([]byte(a.user + ":" + a.password))
}

// reference is the image's in a registry.
func reference(registry string) string { return registry + "/" + repository + ":" + tag }

// view is a mount of the image with a nydusd and a cache of its own.
type view struct {
	l        *lab
	dir      string
	instance string
	cache    string
}

// mount mounts the image of a registry, read through the gateway.
func (l *lab) mount(registry string) (*view, error) {
	// As the snapshotter has it.
	const retries = 5
	return l.mountWith(registry, nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "http", Host: l.gw.Address, Repository: repository, Retries: retries}, "",
		func(instance string) *mountspec.Credentials {
			return &mountspec.Credentials{RegistryToken: l.capability(instance, registry)}
		})
}

// mountWith mounts the image from wherever backend says. Its cache is new.
func (l *lab) mountWith(registry string, backend nydusd.Backend, caFile string, credentials func(instance string) *mountspec.Credentials) (*view, error) {
	l.t.Helper()
	*l.count++
	snapshot := filepath.Join(l.root, "snapshots", strconv.Itoa(*l.count))
	boot := filepath.Join(snapshot, "fs", "image", "image.boot")
	must(l.t, os.MkdirAll(filepath.Dir(boot), 0o755))
	must(l.t, os.Mkdir(filepath.Join(snapshot, "work"), 0o711))
	must(l.t, os.WriteFile(boot, l.boot, 0o644))
	s := &mountspec.Spec{
		Bootstrap: boot, BootstrapDigest: digest.FromBytes(l.boot).String(), FSVersion: "v6", SnapshotDir: snapshot,
		Kind: mountspec.KindImage, ReadOnly: true, Image: reference(registry), Host: registry, Repository: repository, Root: l.root, RunDir: runDir,
		CacheDir: mountspec.CacheDir(l.root, registry, strconv.Itoa(*l.count)), Driver: mountspec.DriverAuto,
		Daemon: mountspec.Daemon{
			Path: kit.MustTools(l.t).Nydusd, LogLevel: "trace", Threads: 4, StartTimeout: 20 * time.Second, CgroupParent: cgroupParent(), CAFile: caFile,
		},
	}
	s.Instance = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
	s.Credentials = credentials(s.Instance)
	var err error
	s.Config, err = nydusd.Config{Backend: backend, CacheDir: s.CacheDir}.FuseDev()
	must(l.t, err)
	option, err := mountspec.Encode(s, l.key)
	must(l.t, err)
	v := &view{l: l, dir: l.t.TempDir(), instance: s.Instance, cache: s.CacheDir}
	l.t.Cleanup(func() { _ = rootfs.Detach(v.dir) })
	bin := kit.Binaries(l.t, "nydus-overlayfs")
	cmd := exec.CommandContext(l.t.Context(), kit.MustTools(l.t).MountFuse, snapshot, v.dir, "-o", option, "-t", "nydus-overlayfs")
	cmd.Env, cmd.WaitDelay = []string{"PATH=" + bin + ":/usr/sbin:/usr/bin:/sbin:/bin"}, 2*time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mount image of %s: %w: %s", registry, err, out)
	}
	return v, nil
}

func (l *lab) capability(instance, registry string) string {
	l.t.Helper()
	c, err := l.sealing.Seal(gateway.Grant{Instance: instance, Image: reference(registry), Registry: registry, Repository: repository})
	must(l.t, err)
	return c
}

func (l *lab) mustMount(registry string) *view {
	l.t.Helper()
	v, err := l.mount(registry)
	must(l.t, err)
	return v
}

// unmount unmounts the image, ends its nydusd and forgets what it has read.
func (v *view) unmount() {
	v.l.t.Helper()
	must(v.l.t, unix.Unmount(v.dir, 0))
	must(v.l.t, v.l.tidy())
	must(v.l.t, os.RemoveAll(v.cache))
}

// same compares all of the image with its source.
func (v *view) same() {
	v.l.t.Helper()
	got, err := kit.Walk(v.dir)
	if err != nil {
		v.l.t.Fatalf("read the image: %v", err)
	}
	kit.EqualTrees(v.l.t, "the image of "+v.dir, v.l.tree, got)
}

// reads mounts the image of a registry, compares all of it, and unmounts it.
func (l *lab) reads(registry string) {
	l.t.Helper()
	v := l.mustMount(registry)
	defer v.unmount()
	v.same()
}

// part is what the gateway answers.
type part struct {
	status int
	body   []byte
}

// get asks the gateway for a part of the image's first blob with a capability.
func (l *lab) get(capability string, offset, length int) (part, error) {
	return l.getBlob(capability, l.image.Layers[0].Desc.Digest, offset, length)
}

func (l *lab) getBlob(capability string, blob digest.Digest, offset, length int) (part, error) {
	req, err := http.NewRequestWithContext(l.t.Context(), http.MethodGet, "http://"+l.gw.Address+"/v2/"+repository+"/blobs/"+blob.String(), nil)
	if err != nil {
		return part{}, err
	}
	req.Header.Set("Authorization", "Bearer "+capability)
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return part{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return part{resp.StatusCode, body}, err
}

// blob is the content of the image's first blob.
func (l *lab) blob() []byte {
	l.t.Helper()
	text, err := os.ReadFile(l.image.Layers[0].Path)
	must(l.t, err)
	return text
}

// log is what the gateway has said so far.
func (l *lab) log() string {
	l.t.Helper()
	text, err := os.ReadFile(l.gw.Log)
	must(l.t, err)
	return string(text)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write writes a file beneath a directory of the test.
func write(t *testing.T, dir, name, text string, mode fs.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.WriteFile(path, []byte(text), mode))
	return path
}
