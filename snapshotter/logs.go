package main

import (
	"context"
	"log/slog"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/logs"
)

// followLogs bounds the logs of daemons, and of others, and passes them on.
func followLogs(cfg config.Config, others ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		return logs.New(logs.Config{
			Dir: instance.DiskDir(cfg.Root), Name: instance.LogName, Files: others, Limit: int64(cfg.Daemon.LogMaxSize),
			Origin: func(key string) (logs.Origin, bool) { return instance.LogOrigin(cfg.RunDir, key) }, Log: slog.Default(),
		}).Run(ctx)
	}
}
