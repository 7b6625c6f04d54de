package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/log"
	"google.golang.org/grpc"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/credentials"
	"github.com/nydusfs/nydus-snapshotter/pkg/credentials/cri"
	"github.com/nydusfs/nydus-snapshotter/pkg/credentials/kubelet"
	"github.com/nydusfs/nydus-snapshotter/pkg/credentials/kubernetes"
)

// keychain finds credentials as configured.
type keychain struct {
	*credentials.Chain
	secrets *kubernetes.Secrets // nil without
}

// newKeychain makes the chain of what is configured; docker's configuration is always
// the last. What it watches it watches as long as watch runs.
func newKeychain(cfg config.Config) (keychain, error) {
	var k keychain
	var providers []credentials.Provider
	c := cfg.Credentials
	if c.CRI.Address != "" {
		providers = append(providers, pulls(cfg))
	}
	if c.Kubernetes.Kubeconfig != "" {
		k.secrets = kubernetes.New(kubernetes.Config{Kubeconfig: c.Kubernetes.Kubeconfig, Namespaces: c.Kubernetes.Namespaces, Log: slog.Default()})
		providers = append(providers, k.secrets)
	}
	if c.Kubelet.Config != "" {
		plugins, err := plugins(cfg)
		if err != nil {
			return k, err
		}
		for _, why := range plugins.Skipped() {
			slog.Warn("a credential provider is left out", "reason", why)
		}
		providers = append(providers, plugins)
	}
	providers = append(providers, credentials.NewDocker(docker(), credentials.MemoConfig{}, slog.Default()))
	k.Chain = credentials.NewChain(nil, providers...)
	return k, nil
}

// plugins are kubelet's credential providers.
func plugins(cfg config.Config) (*kubelet.Plugins, error) {
	c := cfg.Credentials.Kubelet
	return kubelet.New(kubelet.Config{File: c.Config, BinDir: c.BinDir, Environ: os.Environ()})
}

// pulls is where kubelet's credentials are kept.
func pulls(cfg config.Config) *cri.Store {
	return cri.OpenStore(filepath.Join(cfg.RunDir, "credentials"), nil)
}

// watch watches until the returned function is called.
func (k keychain) watch(ctx context.Context) (stop func()) {
	if k.secrets == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { keepRunning(ctx, "image pull secrets are not seen", k.secrets.Run) })
	return func() {
		cancel()
		done.Wait()
	}
}

// startLogins makes the keychain, and what it lives of, until the returned function is
// called.
func startLogins(ctx context.Context, cfg config.Config) (k keychain, stop func() error, err error) {
	if k, err = newKeychain(cfg); err != nil {
		return k, nil, err
	}
	stopCRI, err := serveCRI(ctx, cfg)
	if err != nil {
		return k, nil, err
	}
	stopWatch := k.watch(ctx)
	return k, func() error {
		stopWatch()
		return stopCRI()
	}, nil
}

// serveCRI passes kubelet's image calls on to containerd until the returned function
// is called, if that is configured.
func serveCRI(ctx context.Context, cfg config.Config) (stop func() error, err error) {
	c := cfg.Credentials.CRI
	if c.Address == "" {
		return func() error { return nil }, nil
	}
	store := pulls(cfg)
	if err := store.Setup(); err != nil {
		return nil, err
	}
	proxy, err := cri.NewProxy(c.Containerd, store, slog.Default())
	if err != nil {
		return nil, err
	}
	listener, err := listen(ctx, c.Address)
	if err != nil {
		return nil, errors.Join(err, proxy.Close())
	}
	server := proxy.Server()
	failed := make(chan error, 1)
	go func() {
		err := server.Serve(listener)
		if err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			log.G(ctx).WithError(err).Error("kubelet's image calls are no longer passed on; restart the snapshotter")
		}
		failed <- err
	}()
	log.G(ctx).WithFields(log.Fields{"address": c.Address, "containerd": c.Containerd}).Info("passing kubelet's image calls on")
	return func() error {
		// Pulls are cut off: kubelet begins them anew, and containerd goes on where they were.
		server.Stop()
		err := <-failed
		if errors.Is(err, grpc.ErrServerStopped) {
			err = nil
		}
		return errors.Join(err, listener.remove(), proxy.Close())
	}, nil
}
