package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"

	"github.com/containerd/log"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// proveRate is how many bytes a second are read to compare blobs with their digests. It is
// done once for each image, beside the containers' own reads.
const proveRate = 64 << 20

// proveImages finds mounted images that are complete, so that their next start needs no
// daemon.
func proveImages(cfg config.Config) func(context.Context) error {
	b := prove.Background{
		Root:   cfg.Root,
		Images: func() ([]prove.Image, error) { return mountedImages(cfg.RunDir) },
		Prover: prove.Prover{Rate: prove.NewRate(proveRate)},
		Log:    slog.Default(),
	}
	return func(ctx context.Context) error {
		if err := rootfs.ProbeEROFS(cfg.Root); err != nil {
			// With auto it is no fault of anybody's.
			level := log.InfoLevel
			if cfg.Mount.Driver == mountspec.DriverEROFS {
				level = log.WarnLevel
			}
			log.G(ctx).WithError(err).WithField("driver", cfg.Mount.Driver).Log(level, "this node cannot serve images without nydusd")
			<-ctx.Done()
			return nil
		}
		return b.Run(ctx)
	}
}

// mountedImages lists the images that are mounted, and what is known of each.
func mountedImages(runDir string) ([]prove.Image, error) {
	keys, err := instance.Keys(runDir)
	if err != nil {
		return nil, err
	}
	var images []prove.Image
	var errs []error
	for _, key := range keys {
		rec, err := instance.ReadRecord(runDir, key)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		case rec.Current == nil || !rec.Current.Ready || rec.Current.Shared || rec.Current.Daemonless():
		default:
			images = append(images, prove.Image{Name: rec.Image, CacheDir: rec.CacheDir, Bootstrap: instance.BootstrapPath(rec), Digest: rec.BootstrapDigest})
		}
	}
	return images, errors.Join(errs...)
}
