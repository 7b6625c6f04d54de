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
	"runtime/debug"

	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

func gatewayCommand() *cli.Command {
	return &cli.Command{
		Name:  "gateway",
		Usage: "give nydusd the blobs of mounted images, from wherever their registries' hosts.toml files say",
		Description: "Its own process, so that neither its end nor the snapshotter's is noticed by the other.\n" +
			"With a socket from systemd (nydus-gateway.socket) not even its restart is: who connects meanwhile waits.",
		Flags: []cli.Flag{
			configFlag(), rootFlag(), runDirFlag(), logLevelFlag(),
		},
		Before: noArguments,
		Action: func(c *cli.Context) error {
			cfg, err := loadOverridden(c)
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
	// What streams hold comes and goes in large pieces: the usual half of the memory for
	// garbage would be more than all else.
	debug.SetGCPercent(gatewayGarbage)
	sealing, err := gatewayKey(cfg.Root)
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
	images := newMounted(cfg.RunDir, cfg.Remote.GatewayVerify, slog.Default())
	fetcher := registry.NewFetcher(registry.FetcherConfig{Finder: endpoints(cfg.Remote, logins), Streams: cfg.Remote.HostStreams, Rate: int64(cfg.Remote.HostBandwidth)})
	server := gateway.New(gateway.Config{Key: sealing, Images: images, Source: source{fetcher, images}, Log: slog.Default()}).HTTP()
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

// gatewayKey finds the key of the gateway for a snapshotter's root. It makes none and
// mounts nothing: in a mount namespace of our own nobody would see that.
func gatewayKey(root string) (gateway.Key, error) {
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Named(root)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("no nydus-snapshotter with root %s has run since the boot; start it first: %w", root, err)
	}
	if err != nil {
		return gateway.Key{}, err
	}
	return key.Derive(capabilityKey)
}

// gatewayGarbage is how much garbage there may be, in hundredths of what is in use.
const gatewayGarbage = 25

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
