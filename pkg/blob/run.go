package blob

import (
	"context"
	"log/slog"
	"time"
)

// settle is how long Run waits after something was removed: images are removed layer by
// layer.
const settle = 2 * time.Second

// Wake tells Run that a snapshot was removed. It returns at once.
func (c *Cache) Wake() {
	select {
	case c.wake <- struct{}{}:
	default: // it is awake already
	}
}

// Run sweeps now, soon after each Wake, when something becomes old enough, and every
// interval, until ctx ends. What fails is logged and tried again.
func (c *Cache) Run(ctx context.Context, interval time.Duration) error {
	for {
		report, err := c.Sweep(ctx, false)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.tell(ctx, report, err)
		next := interval
		if !report.Next.IsZero() {
			next = min(next, max(report.Next.Sub(c.o.Now()), settle))
		}
		if err := c.rest(ctx, next); err != nil {
			return err
		}
	}
}

// rest waits for the next reason to sweep.
func (c *Cache) rest(ctx context.Context, most time.Duration) error {
	timer := time.NewTimer(most)
	defer timer.Stop()
	wake := c.wake
	for {
		select {
		case <-timer.C:
			return nil
		case <-wake:
			// The first one counts: those that go on and on must not put it off.
			timer.Reset(min(most, settle))
			wake = nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *Cache) tell(ctx context.Context, r Report, err error) {
	attrs := []slog.Attr{
		slog.Int("blobs", r.Blobs), slog.Int64("bytes", r.Usage), slog.Int("removed", len(r.Removed)),
		slog.Int("evicted", len(r.Evicted)), slog.Int64("freed", r.Freed),
	}
	level, text := slog.LevelDebug, "cache swept"
	if len(r.Removed)+len(r.Evicted) > 0 {
		level = slog.LevelInfo
	}
	if r.Orphans > 0 {
		attrs = append(attrs, slog.Int("proofs", r.Orphans))
	}
	if r.Busy > 0 {
		attrs = append(attrs, slog.Int("open", r.Busy))
	}
	if len(r.Unknown) > 0 {
		attrs = append(attrs, slog.Int("unknown", len(r.Unknown)), slog.String("such_as", r.Unknown[0]))
	}
	if r.Short > 0 {
		level, text = slog.LevelWarn, "cache swept, and it stays above its low watermark: all else is in use or too young"
		attrs = append(attrs, slog.Int64("short", r.Short))
	}
	if err != nil {
		level, text = slog.LevelWarn, "cache not swept as a whole"
		attrs = append(attrs, slog.Any("error", err))
	}
	c.o.Log.LogAttrs(ctx, level, text, attrs...)
}
