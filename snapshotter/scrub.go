package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
)

// scrubRate is how many bytes a second are read to scrub the cache: 9 TiB in a week.
const scrubRate = 16 << 20

// scrub compares what is cached with the images' digests, over and over.
func scrub(cfg config.Config, cache *blob.Cache) func(context.Context) error {
	how := blob.Scrubbing{
		Interval: cfg.Cache.ScrubInterval, Rate: prove.NewRate(scrubRate),
		Jitter: func(most time.Duration) time.Duration { return rand.N(most) },
	}
	return func(ctx context.Context) error { return cache.Scrub(ctx, how) }
}

// printScrub tells how far the scrub is, for people.
func printScrub(w io.Writer, s blob.ScrubState, now time.Time) {
	switch {
	case s.Pass != nil:
		fmt.Fprintf(w, "being scrubbed for %s: %s\n", age(now.Sub(s.Pass.Started)), scrubbed(s.Pass))
	case s.Last != nil:
		fmt.Fprintf(w, "scrubbed %s ago: %s; again in %s\n", age(now.Sub(s.Last.Ended)), scrubbed(s.Last), age(s.Next.Sub(now)))
	case !s.Next.IsZero():
		fmt.Fprintf(w, "not scrubbed yet; begins in %s\n", age(s.Next.Sub(now)))
	}
}

func scrubbed(p *blob.ScrubPass) string {
	return fmt.Sprintf("%d blobs, %d chunks compared, %d blobs wrong and removed, %d wrong and in use, %d not read", p.Blobs, p.Checked, p.Removed, p.Damaged, p.Failed)
}
