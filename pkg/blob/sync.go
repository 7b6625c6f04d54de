package blob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
)

// Synced is what a Sync did.
type Synced struct {
	// Blobs is how many blobs had something new, Chunks how much that was.
	Blobs  int `json:"blobs"`
	Chunks int `json:"chunks"`
	// Lost is how many chunks may not have reached the disk before the machine was
	// started, and are fetched again on demand.
	Lost int `json:"lost"`
}

// Sync brings to the disk what daemons have fetched, and writes down that it is there: it
// is what counts after a power cut (package checkpoint). In a boot's first look at a
// directory it takes back what may have been lost. The error says what could not be done;
// the rest was done all the same.
func (c *Cache) Sync(ctx context.Context) (Synced, error) {
	var out Synced
	dirs, err := filepath.Glob(filepath.Join(c.o.Root, "cache", "*"))
	errs := []error{err}
	for _, dir := range dirs {
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			errs = append(errs, c.syncCache(ctx, dir, &out))
		}
		if ctx.Err() != nil {
			break
		}
	}
	if err := errors.Join(errs...); err != nil {
		return out, fmt.Errorf("sync cache: %w", err)
	}
	return out, nil
}

func (c *Cache) syncCache(ctx context.Context, cacheDir string, out *Synced) error {
	lost, err := instance.TrustCache(ctx, c.o.RunDir, cacheDir)
	out.Lost += lost.Chunks
	if lost.Blobs > 0 {
		c.o.Log.WarnContext(ctx, "what may not have reached the disk before this machine stopped is fetched again on demand",
			"event", "distrusted", "directory", cacheDir, "blobs", lost.Blobs, "chunks", lost.Chunks)
	}
	if err != nil {
		return err
	}
	dirs, err := instance.CacheDirs(cacheDir)
	errs := []error{err}
	hold := func() (func(), error) {
		f, err := instance.HoldCache(ctx, cacheDir)
		if err != nil {
			return nil, err
		}
		return func() { f.Close() }, nil
	}
	for _, dir := range dirs {
		r, err := checkpoint.Take(ctx, dir, c.o.Now(), hold)
		out.Blobs, out.Chunks = out.Blobs+r.Blobs, out.Chunks+r.Chunks
		if !errors.Is(err, fs.ErrNotExist) { // removed meanwhile
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// RunSync syncs now and every interval, and once more at the end of ctx: after last it
// begins with no further blob then. What fails is logged, each failure once, and tried again.
func (c *Cache) RunSync(ctx context.Context, interval, last time.Duration) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	told := ""
	for {
		synced, err := c.Sync(ctx)
		if ctx.Err() == nil {
			told = c.tellSync(ctx, synced, err, told)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), last)
			defer cancel()
			synced, err := c.Sync(rest)
			c.tellSync(rest, synced, err, told)
			return ctx.Err()
		}
	}
}

// tellSync returns the failure that was told last.
func (c *Cache) tellSync(ctx context.Context, s Synced, err error, told string) string {
	if err == nil {
		if told != "" {
			c.o.Log.InfoContext(ctx, "the cache can be written to again", "event", "cache mended")
		}
		c.o.Log.DebugContext(ctx, "cache synced", "blobs", s.Blobs, "chunks", s.Chunks)
		return ""
	}
	if err.Error() == told {
		return told
	}
	text, event := "the cache cannot be synced: after a power cut more of it would be fetched again", "cache failed"
	level := slog.LevelWarn
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		text, event = "the cache is full: nydusd serves on without keeping what it fetches; free space, or run nydus-snapshotter cache gc", "cache full"
	case errors.Is(err, syscall.EROFS):
		text, event = "the cache is read-only: images that are not running cannot be mounted by nydusd", "cache read-only"
	case errors.Is(err, checkpoint.ErrNotSynced), errors.Is(err, syscall.EIO):
		level = slog.LevelError
		text, event = "the disk of the cache fails: stop the containers of these images, mend the disk, and run nydus-snapshotter cache verify", "cache failed"
	}
	c.o.Log.LogAttrs(ctx, level, text, slog.String("event", event), slog.Any("error", err))
	return err.Error()
}
