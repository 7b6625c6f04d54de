package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	lslog "github.com/sirupsen/logrus/hooks/slog"
	"github.com/urfave/cli/v2"
	"google.golang.org/grpc"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/hang"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/probe"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
)

const (
	// stopTimeout bounds how long calls may take to finish at the end.
	stopTimeout = 10 * time.Second
	// syncInterval is how often what daemons have fetched is brought to the disk: that is
	// what a power cut may cost. The kernel does so by itself after half of it.
	syncInterval = time.Minute
	// restartDelay is how long the reconciler rests after it failed.
	restartDelay = 10 * time.Second
)

// loadOverridden reads the configuration, of which options may replace a key.
func loadOverridden(c *cli.Context) (config.Config, error) {
	over := config.Overrides{}
	for flag, key := range map[string]string{"address": "address", "root": "root", "run-dir": "run_dir", "log-level": "log.level"} {
		if c.IsSet(flag) {
			over[key] = c.String(flag)
		}
	}
	return loadConfig(c.String("config"), c.IsSet("config"), over)
}

func rootFlag() cli.Flag {
	return &cli.StringFlag{Name: "root", Usage: "`DIR` for layers and cache, instead of the configured one"}
}

func logLevelFlag() cli.Flag {
	return &cli.StringFlag{Name: "log-level", Usage: "`LEVEL`, instead of the configured one"}
}

func serveCommand() *cli.Command {
	return &cli.Command{
		Name:   "serve",
		Usage:  "serve containerd until SIGINT or SIGTERM",
		Before: noArguments,
		Flags: []cli.Flag{
			configFlag(),
			&cli.StringFlag{Name: "address", Usage: "unix `SOCKET` for containerd, instead of the configured one"},
			rootFlag(), runDirFlag(), logLevelFlag(),
		},
		Action: func(c *cli.Context) error {
			cfg, err := loadOverridden(c)
			if err != nil {
				return err
			}
			return serve(c.Context, cfg)
		},
	}
}

// serve runs the snapshotter until ctx ends. It leaves mounts and daemons as they
// are.
func serve(ctx context.Context, cfg config.Config) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("serve: only root can do what this needs: mount, and own an image's files; run it as root")
	}
	if err := setupLog(cfg.Log); err != nil {
		return err
	}
	nydusd, err := newNydusd(cfg)
	if err != nil {
		return err
	}
	lock, err := lockRoot(cfg.Root)
	if err != nil {
		return err
	}
	defer lock.Close()
	key, err := setupRun(cfg)
	if err != nil {
		return err
	}
	logins, stopLogins, err := startLogins(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopLogins()) }()
	cache, err := newCache(cfg)
	if err != nil {
		return err
	}
	sn, err := newSnapshotter(ctx, cfg, key, nydusd, logins, cache)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	listener, err := listen(ctx, cfg.Address)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, listener.remove()) }()

	server := grpc.NewServer()
	pulled := &pulled{read: func() ([]pulledImage, error) { return pulledImages(cfg) }, now: time.Now}
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sweeping{sn, cache, pulled}))
	prover := newProver()
	stop, err := startBackground(ctx, cfg, cache, proveImages(cfg, pulled, prover), newDownload(cfg, key, nydusd, logins, cache, pulled, prover))
	if err != nil {
		return err
	}
	defer func() {
		stop()
		err = errors.Join(err, endShared(ctx, cfg.RunDir))
	}()

	warn(ctx, cfg, nydusd)
	log.G(ctx).WithFields(log.Fields{"version": version, "root": cfg.Root, "address": cfg.Address, "style": cfg.Mount.Style}).Info("serving")
	return answer(ctx, server, listener)
}

// startBackground starts what looks after mounted images, until the returned function
// is called.
func startBackground(ctx context.Context, cfg config.Config, cache *blob.Cache, prove, download func(context.Context) error) (stop func(), err error) {
	reconciler := instance.NewReconciler(instance.ReconcilerConfig{
		RunDir: cfg.RunDir, Root: cfg.Root, Linger: cfg.Mount.IdleLinger, Log: slog.Default(),
	})
	spare, err := holderOf(cfg)
	if err != nil {
		return nil, err
	}
	recoverer := recovery.New(recovery.Config{
		RunDir: cfg.RunDir, Policy: recovery.Policy(cfg.Daemon.RecoverPolicy), StartTimeout: cfg.Daemon.StartTimeout,
		Spare: spare.connect, Log: slog.Default(),
	})
	background, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { keepRunning(background, "unused images are not released", reconciler.Run) })
	done.Go(func() {
		keepRunning(background, "logs of daemons are neither passed on nor bounded", followLogs(cfg, spare.log()))
	})
	done.Go(func() { keepRunning(background, "daemons that die are not replaced", recoverer.Run) })
	done.Go(func() {
		keepRunning(background, "the cache is not swept", func(ctx context.Context) error { return cache.Run(ctx, cfg.Cache.SweepInterval) })
	})
	done.Go(func() {
		keepRunning(background, "what is fetched is not made to last over a power cut", func(ctx context.Context) error {
			return cache.RunSync(ctx, syncInterval, stopTimeout)
		})
	})
	if cfg.Cache.ScrubInterval > 0 {
		done.Go(func() { keepRunning(background, "the cache is not scrubbed", scrub(cfg, cache)) })
	}
	done.Go(func() { keepRunning(background, "images are not completed in the background", download) })
	hung := hang.New(hang.Config{
		RunDir: cfg.RunDir, Timeout: cfg.Daemon.HangTimeout, Asker: &probe.Prober{Program: spare.program}, Log: slog.Default(),
	})
	done.Go(func() { keepRunning(background, "daemons that hang are not noticed", hung.Run) })
	if cfg.Mount.Driver != mountspec.DriverFUSE {
		done.Go(func() { keepRunning(background, "complete images go on to be served by nydusd", prove) })
	}
	return func() {
		cancel()
		done.Wait()
	}, nil
}

// warn tells at start what would otherwise show at the first mount only.
func warn(ctx context.Context, cfg config.Config, nydusd nydusdOf) {
	nydusd.warn(ctx)
	if err := checkFiles("in force", cfg); err != nil {
		log.G(ctx).WithError(err).Warn("images cannot be mounted that need what is wrong here; it is read again for each mount")
	}
}

// endShared ends what would otherwise stay without any user until the next start.
func endShared(ctx context.Context, runDir string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := instance.EndShared(ctx, runDir); err != nil {
		return fmt.Errorf("end shared nydusd: %w", err)
	}
	return nil
}

// setupRun prepares what lives until the next boot: the run directory, and the
// key, which is always in the default one because the mount helper knows no
// other.
func setupRun(cfg config.Config) (mountspec.Key, error) {
	for _, dir := range []string{filepath.Dir(mountspec.DefaultKeyDir), cfg.RunDir} {
		if err := instance.SetupRunDir(dir); err != nil {
			return mountspec.Key{}, err
		}
	}
	return mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(cfg.Root)
}

// answer serves until ctx ends, and then lets running calls finish.
func answer(ctx context.Context, server *grpc.Server, l net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	notify(ctx, daemon.SdNotifyReady)
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	notify(ctx, daemon.SdNotifyStopping)
	log.G(ctx).Info("stopping; mounts and nydusd stay")
	late := time.AfterFunc(stopTimeout, server.Stop)
	defer late.Stop()
	server.GracefulStop()
	return <-failed
}

func notify(ctx context.Context, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).Warn("cannot tell systemd")
	}
}

// keepRunning runs what the snapshotter can do without for a while.
func keepRunning(ctx context.Context, harm string, run func(context.Context) error) {
	for ctx.Err() == nil {
		err := run(ctx)
		if ctx.Err() != nil {
			return
		}
		log.G(ctx).WithError(err).Errorf("%s; trying again in %s", harm, restartDelay)
		again := time.NewTimer(restartDelay)
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
		}
	}
}

// setupLog makes containerd's logger, and slog through it, write to standard
// error as configured.
func setupLog(cfg config.Log) error {
	format := log.TextFormat
	if cfg.Format == "json" {
		format = log.JSONFormat
	}
	if err := errors.Join(log.SetLevel(cfg.Level), log.SetFormat(format)); err != nil {
		return fmt.Errorf("set up log: %w", err)
	}
	slog.SetDefault(slog.New(lslog.NewHandler(log.L.Logger, nil)))
	return nil
}
