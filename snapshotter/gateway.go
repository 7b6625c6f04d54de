package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

func gatewayCommand() *cli.Command {
	return &cli.Command{
		Name:  "gateway",
		Usage: "give nydusd the blobs of mounted images, from wherever their registries' hosts.toml files say",
		Description: "Its own process, so that neither its end nor the snapshotter's is noticed by the other.\n" +
			"With a socket from systemd (nydus-gateway.socket) not even its restart is: who connects meanwhile waits.",
		Flags:  []cli.Flag{configFlag()},
		Before: noArguments,
		Action: func(c *cli.Context) error {
			cfg, err := loadConfig(c.String("config"), c.IsSet("config"), nil)
			if err != nil {
				return err
			}
			return serveGateway(c.Context, cfg)
		},
	}
}

// serveGateway serves nydusd until ctx ends.
func serveGateway(ctx context.Context, cfg config.Config) error {
	if os.Geteuid() != 0 {
		return errors.New("gateway: only root can read the node's key and what is mounted; run it as root")
	}
	if err := setupLog(cfg.Log); err != nil {
		return err
	}
	// It makes no key and mounts nothing: in a mount namespace of its own nobody would
	// see that.
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Named(cfg.Root)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("no nydus-snapshotter with root %s has run since the boot; start it first: %w", cfg.Root, err)
	}
	if err != nil {
		return err
	}
	sealing, err := key.Derive(capabilityKey)
	if err != nil {
		return err
	}
	logins, err := newKeychain(cfg)
	if err != nil {
		return err
	}
	defer logins.watch(ctx)()
	listener, err := gatewayListener(ctx, cfg.Remote.GatewayAddress)
	if err != nil {
		return err
	}
	server := gateway.New(gateway.Config{
		Key: sealing, Images: &mounted{runDir: cfg.RunDir, blobs: map[string]blobs{}},
		Source: source{registry.NewFetcher(registry.FetcherConfig{Finder: endpoints(cfg.Remote, logins)})}, Log: slog.Default(),
	}).HTTP()
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	notify(ctx, daemon.SdNotifyReady)
	log.G(ctx).WithFields(log.Fields{"version": version, "address": listener.Addr().String()}).Info("serving nydusd")
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	notify(ctx, daemon.SdNotifyStopping)
	log.G(ctx).Info("stopping; requests that are being answered are completed")
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := server.Shutdown(late); err != nil {
		return errors.Join(server.Close(), fmt.Errorf("complete requests: %w", err))
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// gatewayListener takes the socket that systemd has, or makes one.
func gatewayListener(ctx context.Context, address string) (net.Listener, error) {
	given, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take the socket from systemd: %w", err)
	}
	switch len(given) {
	case 0:
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen for nydusd: %w; is another gateway running? See remote.gateway_address", err)
		}
		return l, nil
	case 1:
		if got := given[0].Addr().String(); got != address {
			return nil, fmt.Errorf("systemd's socket listens on %s, but remote.gateway_address is %s, where nydusd will look for it; make them equal", got, address)
		}
		return given[0], nil
	}
	return nil, fmt.Errorf("systemd has %d sockets for the gateway, want one", len(given))
}

// source lets the gateway fetch from registries.
type source struct{ fetcher *registry.Fetcher }

// Open implements gateway.Source.
func (s source) Open(ctx context.Context, b gateway.Blob, offset, length int64) (gateway.Content, error) {
	part, err := s.fetcher.Open(ctx, registry.Blob{Registry: b.Registry, Repository: b.Repository, Digest: b.Digest}, offset, length)
	switch {
	case errors.Is(err, registry.ErrRange):
		return nil, fmt.Errorf("%w: %w", gateway.ErrRange, err)
	case errors.Is(err, registry.ErrNoBlob):
		return nil, fmt.Errorf("%w: %w", gateway.ErrNoBlob, err)
	case err != nil:
		return nil, err
	}
	return part, nil
}

// mounted knows which blobs the images consist of that are mounted.
type mounted struct {
	runDir string

	mu    sync.Mutex
	blobs map[string]blobs
}

// blobs are those of one bootstrap.
type blobs struct {
	bootstrap string // its digest
	known     map[digest.Digest]bool
	used      time.Time
}

// maxKnown bounds how many images' blobs are remembered.
const maxKnown = 1000

// Has implements gateway.Images.
func (m *mounted) Has(key string, blob digest.Digest) (bool, error) {
	rec, err := instance.ReadRecord(m.runDir, key)
	if err != nil {
		return false, err
	}
	m.mu.Lock()
	b, ok := m.blobs[key]
	m.mu.Unlock()
	if !ok || b.bootstrap != rec.BootstrapDigest {
		b = blobs{bootstrap: rec.BootstrapDigest}
		if b.known, err = blobsOf(instance.BootstrapPath(rec)); err != nil {
			return false, err
		}
	}
	b.used = time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.blobs[key]; !ok {
		m.forgetOldest()
	}
	m.blobs[key] = b
	return b.known[blob], nil
}

// forgetOldest makes room for one more.
func (m *mounted) forgetOldest() {
	for len(m.blobs) >= maxKnown {
		oldest := ""
		for key, b := range m.blobs {
			if oldest == "" || b.used.Before(m.blobs[oldest].used) {
				oldest = key
			}
		}
		delete(m.blobs, oldest)
	}
}

// blobsOf reads which blobs a bootstrap names.
func blobsOf(path string) (map[digest.Digest]bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read which blobs the image has: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read which blobs the image has: %w", err)
	}
	boot, err := rafs.Open(f, info.Size())
	if err != nil {
		return nil, fmt.Errorf("read which blobs the image has: %s: %w", path, err)
	}
	known := make(map[digest.Digest]bool, len(boot.Blobs))
	for _, b := range boot.Blobs {
		known[digest.NewDigestFromEncoded(digest.SHA256, b.ID)] = true
		if b.MetaID != "" {
			known[digest.NewDigestFromEncoded(digest.SHA256, b.MetaID)] = true
		}
	}
	return known, nil
}
