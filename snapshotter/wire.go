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

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
	"github.com/nydusfs/nydus-snapshotter/pkg/signature"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// snapshotOptions connects the snapshotter with what it asks for.
func snapshotOptions(cfg config.Config, key mountspec.Key, daemon nydusdOf, logins registry.Keychain, cache *blob.Cache) (snapshot.Options, error) {
	with, err := newBackends(cfg, key, logins)
	if err != nil {
		return snapshot.Options{}, err
	}
	o := snapshot.Options{
		Root:     cfg.Root,
		RunDir:   cfg.RunDir,
		Managed:  cfg.Mount.Style == config.StyleManaged,
		Driver:   cfg.Mount.Driver,
		Daemon:   daemon.spec,
		Backends: with,
		Sealer:   sealer{key},
		Blobs:    cache,
	}
	if cfg.Image.ValidateSignature {
		// Without keys nothing could be mounted: that is to show now.
		if o.Signatures, err = signature.NewVerifier(cfg.Image.PublicKeyFile); err != nil {
			return snapshot.Options{}, fmt.Errorf("read the keys whose signatures count: %w", err)
		}
	}
	if cfg.Mount.Credentials == config.CredentialsPlain {
		o.Plain = func(text string, c *mountspec.Credentials) (string, error) {
			return nydusd.AddCredentials(text, *c)
		}
	}
	return o, nil
}

// newBackends finds images' backends as configured.
func newBackends(cfg config.Config, key mountspec.Key, logins registry.Keychain) (backends, error) {
	sealing, err := key.Derive(capabilityKey)
	return backends{
		rules: cfg.Backends, tuning: tuningOf(cfg.Daemon.ConfigTemplate), remote: cfg.Remote, endpoints: endpoints(cfg.Remote, logins), keychain: logins,
		validate: cfg.Daemon.Validate, sealing: sealing, shared: cfg.Daemon.Mode == config.ModeShared,
	}, err
}

func newSnapshotter(ctx context.Context, cfg config.Config, key mountspec.Key, daemon nydusdOf, logins registry.Keychain, cache *blob.Cache) (*snapshot.Snapshotter, error) {
	options, err := snapshotOptions(cfg, key, daemon, logins, cache)
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

// warn tells whether nydusd can be executed.
func (d nydusdOf) warn(ctx context.Context) {
	name := d.NydusdPath
	if name == "" {
		name = "nydusd"
	}
	if _, err := exec.LookPath(name); err != nil {
		log.G(ctx).WithError(err).Warn("nydusd cannot be executed: plain images work and nydus images can be pulled, but not mounted; install it or set daemon.nydusd_path")
	}
}
