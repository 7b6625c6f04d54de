package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// snapshotOptions connects the snapshotter with what it asks for.
func snapshotOptions(cfg config.Config, key mountspec.Key, daemon nydusdOf, logins registry.Keychain) (snapshot.Options, error) {
	sealing, err := key.Derive(capabilityKey)
	if err != nil {
		return snapshot.Options{}, err
	}
	o := snapshot.Options{
		Root:     cfg.Root,
		RunDir:   cfg.RunDir,
		Managed:  cfg.Mount.Style == config.StyleManaged,
		Daemon:   daemon.spec,
		Backends: backends{cfg.Remote, endpoints(cfg.Remote, logins), logins, sealing},
		Sealer:   sealer{key},
	}
	if cfg.Mount.Credentials == config.CredentialsPlain {
		o.Plain = func(text string, c *mountspec.Credentials) (string, error) {
			return nydusd.AddCredentials(text, c.Auth, c.RegistryToken)
		}
	}
	return o, nil
}

func newSnapshotter(ctx context.Context, cfg config.Config, key mountspec.Key, daemon nydusdOf, logins registry.Keychain) (*snapshot.Snapshotter, error) {
	options, err := snapshotOptions(cfg, key, daemon, logins)
	if err != nil {
		return nil, err
	}
	return snapshot.New(ctx, options)
}

// capabilityKey is what the gateway's key is derived for.
const capabilityKey = "gateway capability"

// endpoints finds registries' hosts as configured.
func endpoints(r config.Remote, logins registry.Keychain) *registry.Endpoints {
	return registry.NewEndpoints(registry.EndpointsConfig{
		Dirs: filepath.SplitList(r.ConfigPath), PlainHTTP: r.PlainHTTP, SkipVerify: r.SkipVerify, Keychain: logins, Log: slog.Default(),
	})
}

// docker finds logins where docker keeps them. A service has no HOME, without
// which credential helpers do not find what they know.
func docker() registry.Docker {
	d := registry.Docker{Dir: os.Getenv("DOCKER_CONFIG")}
	home, err := os.UserHomeDir()
	if err != nil {
		home = "/root"
		d.Env = []string{"HOME=" + home}
	}
	if d.Dir == "" {
		d.Dir = filepath.Join(home, ".docker")
	}
	return d
}

// backends decides how an image's blobs are read.
type backends struct {
	remote    config.Remote
	endpoints *registry.Endpoints
	keychain  registry.Keychain
	sealing   gateway.Key
}

// Backend implements snapshot.Backends.
func (b backends) Backend(ctx context.Context, ref string) (snapshot.Backend, error) {
	if b.remote.Backend == config.BackendLocalFS {
		at, err := registry.Directory(b.remote.LocalFSDir).Resolve(ref)
		return snapshot.Backend{Repository: at.Dir, Config: rendered(nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: at.Dir})}, err
	}
	// The image's own host, whoever serves it: blobs that are cached are the same.
	own, err := registry.Hosts{}.Resolve(ref)
	if err != nil {
		return snapshot.Backend{}, err
	}
	out := snapshot.Backend{Host: own.Host, Repository: own.Repository}
	route, err := b.endpoints.Route(ctx, ref)
	if err != nil {
		return out, err
	}
	if viaGateway(b.remote, route) {
		return b.throughGateway(out, ref, route), nil
	}
	at, err := route.Direct(ctx)
	if err != nil {
		if errors.Is(err, registry.ErrGateway) {
			err = fmt.Errorf(`%w; set remote.gateway = "auto" and run the gateway`, err)
		}
		return out, err
	}
	out.Config = rendered(nydusd.Backend{
		Type: nydusd.BackendRegistry, Scheme: at.Scheme, Host: at.Host, Repository: at.Repository, SkipVerify: at.SkipVerify,
	})
	out.Credentials = func(ctx context.Context, _ string) (*mountspec.Credentials, error) {
		c, err := b.keychain.Credentials(ctx, at.Host, at.Repository)
		if err != nil || c == nil {
			return nil, err
		}
		if c.IdentityToken != "" {
			return nil, fmt.Errorf(`credentials for %s from %s: the login is an identity token, which nydusd cannot use by itself; set remote.gateway = "always" and run the gateway, or log in with a user name and an access token`, at.Host, c.Source)
		}
		return &mountspec.Credentials{Auth: c.Auth, RegistryToken: c.RegistryToken}, nil
	}
	return out, nil
}

// viaGateway tells whether nydusd is to read through the gateway.
func viaGateway(r config.Remote, route registry.Route) bool {
	return r.Gateway == config.GatewayAlways || r.Gateway == config.GatewayAuto && len(route.Needs) > 0
}

// throughGateway points nydusd at the gateway, which has to be there when the image is
// mounted.
func (b backends) throughGateway(out snapshot.Backend, ref string, route registry.Route) snapshot.Backend {
	address := b.remote.GatewayAddress
	out.Config = rendered(nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "http", Host: address, Repository: route.Repository, Retries: gatewayRetries})
	out.Credentials = func(ctx context.Context, instance string) (*mountspec.Credentials, error) {
		if err := gateway.Probe(ctx, address, b.sealing); err != nil {
			why := `remote.gateway is "always"`
			if len(route.Needs) > 0 {
				why = "nydusd cannot do what registry " + route.Registry + " needs: " + strings.Join(route.Needs, ", ")
			}
			return nil, fmt.Errorf("ask the gateway: %w; it is needed since %s; run it (systemctl enable --now nydus-gateway.socket)", err, why)
		}
		capability, err := b.sealing.Seal(gateway.Grant{Instance: instance, Image: ref, Registry: route.Registry, Repository: route.Repository})
		return &mountspec.Credentials{RegistryToken: capability}, err
	}
	return out
}

// gatewayRetries is how often nydusd asks again, which it does at once: each of them
// may fail by an end of the gateway, and costs next to nothing.
const gatewayRetries = 8

// rendered renders nydusd's configuration.
func rendered(b nydusd.Backend) func(cacheDir string) (string, error) {
	return func(cacheDir string) (string, error) { return nydusd.Config{Backend: b, CacheDir: cacheDir}.JSON() }
}

type sealer struct{ key mountspec.Key }

// Seal implements snapshot.Sealer.
func (s sealer) Seal(spec *mountspec.Spec) (string, error) { return mountspec.Encode(spec, s.key) }

type nydusdOf struct {
	config.Daemon
	limits config.Limits
}

// newNydusd resolves the limits on this machine.
func newNydusd(cfg config.Config) (nydusdOf, error) {
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err != nil {
		return nydusdOf{}, fmt.Errorf("learn how much memory this machine has: %w", err)
	}
	cpus, err := onlineCPUs("/sys/devices/system/cpu/online")
	if err != nil {
		return nydusdOf{}, err
	}
	limits, err := cfg.Cgroup.Limits(int64(machine.Totalram)*int64(machine.Unit), cpus)
	return nydusdOf{cfg.Daemon, limits}, err
}

// onlineCPUs counts those in the kernel's list, such as "0-3,6". What this process
// itself may run on is not what counts: daemons do not inherit it from us.
func onlineCPUs(file string) (count int, err error) {
	text, err := os.ReadFile(filepath.Clean(file))
	if err != nil {
		return 0, fmt.Errorf("count the CPUs: %w", err)
	}
	for _, part := range strings.Split(strings.TrimSpace(string(text)), ",") {
		low, high, ranged := strings.Cut(part, "-")
		if !ranged {
			high = low
		}
		first, err1 := strconv.Atoi(low)
		last, err2 := strconv.Atoi(high)
		if err := errors.Join(err1, err2); err != nil || last < first {
			return 0, fmt.Errorf("count the CPUs: %s says %q: %w", file, text, err)
		}
		count += last - first + 1
	}
	return count, nil
}

// fallbackNydusd stands in options while there is no nydusd, so that the mount
// fails with its name.
const fallbackNydusd = "/usr/local/bin/nydusd"

// spec looks for nydusd each time: it may be installed after us.
func (d nydusdOf) spec() mountspec.Daemon {
	path, err := d.find()
	if err != nil {
		path = fallbackNydusd
	}
	mode := mountspec.ModeDedicated
	if d.Mode == config.ModeShared {
		mode = mountspec.ModeShared
	}
	return mountspec.Daemon{
		Path: path, Mode: mode, LogLevel: d.LogLevel, LogMaxSize: int64(d.LogMaxSize), Threads: d.Threads, StartTimeout: d.StartTimeout, HangTimeout: d.HangTimeout,
		OOMScoreAdj: d.OOMScoreAdj, CgroupParent: d.CgroupParent,
		MemoryLimit: d.limits.Memory, CPULimit: d.limits.CPU,
	}
}

func (d nydusdOf) find() (string, error) {
	name := d.NydusdPath
	if name == "" {
		name = "nydusd"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		if d.NydusdPath != "" {
			return d.NydusdPath, nil // whoever mounts says what is wrong with it
		}
		return "", err
	}
	return filepath.Abs(path)
}

// warn tells at start what would otherwise show at the first mount only.
func (d nydusdOf) warn(ctx context.Context) {
	name := d.NydusdPath
	if name == "" {
		name = "nydusd"
	}
	if _, err := exec.LookPath(name); err != nil {
		log.G(ctx).WithError(err).Warn("nydusd cannot be executed: plain images work and nydus images can be pulled, but not mounted; install it or set daemon.nydusd_path")
	}
}
