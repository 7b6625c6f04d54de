package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

const (
	// downloadThreads is how many requests nydusd makes at a time when nobody waits.
	downloadThreads = 2
	// downloadPoll is how often progress is looked at then.
	downloadPoll = 500 * time.Millisecond
	// downloadSleep is how often it is looked whether there are images to complete, when
	// that is not for their labels alone.
	downloadSleep = 10 * time.Second
)

// newDownload is downloadImages for serve.
func newDownload(cfg config.Config, key mountspec.Key, nydusd nydusdOf, logins registry.Keychain, cache *blob.Cache, pulled *pulled, prover prove.Prover) func(context.Context) error {
	return func(ctx context.Context) error {
		with, err := newBackends(cfg, key, logins)
		if err != nil {
			return err
		}
		with.shared = false // what fetches has a nydusd of its own
		return downloadImages(cfg, nydusd, with, cache, pulled, prover)(ctx)
	}
}

// downloadImages completes images in the background, as [cache] download or their labels
// say.
func downloadImages(cfg config.Config, nydusd nydusdOf, with backends, cache *blob.Cache, pulled *pulled, prover prove.Prover) func(context.Context) error {
	rate := int64(cfg.Cache.DownloadRate)
	d := &daemons{cfg: cfg, nydusd: nydusd, backends: with.prefetch(downloadThreads, rate), purpose: "download"}
	completer := fetch.Completer{
		Fetcher: fetch.Fetcher{Rate: rate, Poll: downloadPoll},
		Prover:  prover,
	}
	b := &fetch.Background{
		Images:  func() ([]fetch.Candidate, error) { return candidates(pulled, fetch.Policy(cfg.Cache.Download)) },
		Servers: func() ([]fetch.Server, error) { return servers(cfg.RunDir) },
		Room:    cache.Room,
		Complete: func(ctx context.Context, c fetch.Candidate) (fetch.Result, error) {
			im, err := pulled.find(c.Image)
			if err != nil {
				return fetch.Result{}, err
			}
			one := completer
			one.Fetcher.Start = func(ctx context.Context, _ fetch.Image) (fetch.Daemon, error) { return d.start(ctx, im) }
			return one.Complete(ctx, c.Image, nil)
		},
		Log: slog.Default(),
	}
	if cfg.Cache.Download != config.DownloadNever {
		b.Sleep = downloadSleep
	}
	return b.Run
}

// candidates lists the images that may be completed, with what is wanted of each.
func candidates(pulled *pulled, policy fetch.Policy) ([]fetch.Candidate, error) {
	all, err := pulled.images()
	var list []fetch.Candidate
	for _, im := range all {
		c := fetch.Candidate{Image: im.Image, Instance: im.instance, Policy: policy}
		if im.download != "" {
			c.Policy = fetch.Policy(im.download)
		}
		if c.Policy != fetch.Never {
			list = append(list, c)
		}
	}
	return list, err
}

// servers lists the daemons that serve containers.
func servers(runDir string) ([]fetch.Server, error) {
	all, err := instance.Records(runDir)
	records := make(map[string]*instance.Record, len(all))
	for _, rec := range all {
		records[rec.Key] = rec
	}
	var list []fetch.Server
	for key, rec := range records {
		g := rec.Current
		if g == nil || !g.Ready || g.Held || g.Shared || g.Daemonless() {
			continue
		}
		if g.Berth != nil {
			// What a shared daemon fetches may be for any of its images.
			pool := records[g.Berth.Pool]
			if pool == nil || pool.Current == nil || pool.Current.Number != g.Berth.Generation {
				continue // it has ended, and what reads from it gets errors
			}
			g = pool.Current
		}
		list = append(list, fetch.Server{Instance: key, PID: g.PID, StartTime: g.StartTime})
	}
	return list, err
}
