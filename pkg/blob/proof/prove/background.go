package prove

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

const (
	// lookEvery is how often it is looked whether an image has become complete, which
	// makes no event. It takes a read of the chunk maps.
	lookEvery = 15 * time.Second
	// firstRetry is when an image that could not be proven is looked at again; that
	// doubles up to lastRetry.
	firstRetry = time.Minute
	lastRetry  = 24 * time.Hour
)

// Image is one that may be proven.
type Image struct {
	// Name is for people.
	Name string
	// CacheDir has its blobs, Bootstrap is the path of its bootstrap, Digest that file's.
	CacheDir, Bootstrap, Digest string
}

// Background proves images one after the other, as they become complete.
type Background struct {
	// Root is the snapshotter's root directory, where what killed ones left is removed.
	Root string
	// Images lists those that are of interest. What it returns beside an error counts.
	Images func() ([]Image, error)
	// Every is how often they are looked at; zero for the default.
	Every  time.Duration
	Prover Prover
	Log    *slog.Logger

	retry map[string]retry
}

// retry is when an image is looked at again that could not be proven.
type retry struct {
	at    time.Time
	delay time.Duration
	why   string
}

// Run works until ctx ends. It must be the only one on the cache directories.
func (b *Background) Run(ctx context.Context) error {
	b.retry = map[string]retry{}
	dirs, _ := filepath.Glob(filepath.Join(b.Root, "cache", "*"))
	for _, dir := range dirs {
		if err := Tidy(dir); err != nil {
			b.Log.Warn("remove what an interrupted proof left", "error", err)
		}
	}
	every := b.Every
	if every == 0 {
		every = lookEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		b.pass(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// pass looks at each image once.
func (b *Background) pass(ctx context.Context) {
	images, err := b.Images()
	if err != nil {
		b.Log.Error("look for images that are complete", "error", err)
	}
	known := map[string]retry{}
	for _, im := range images {
		key := proof.Path(im.CacheDir, im.Digest)
		r, failed := b.retry[key]
		if !failed || !b.Prover.now().Before(r.at) {
			r, failed = b.one(ctx, im, r)
		}
		if failed {
			known[key] = r
		}
		if ctx.Err() != nil {
			return
		}
	}
	b.retry = known
}

// one proves an image, and returns when it is to be looked at again if it could not.
func (b *Background) one(ctx context.Context, im Image, last retry) (r retry, failed bool) {
	log := b.Log.With("image", im.Name, "bootstrap", im.Digest)
	started := b.Prover.now()
	proven, err := b.Prover.Prove(ctx, im.CacheDir, im.Bootstrap, im.Digest)
	switch {
	case err == nil:
		if proven {
			log.Info("all of the image is in the cache: its next start needs no nydusd", "event", "proven", "took", b.Prover.now().Sub(started).Round(time.Millisecond))
		}
		return retry{}, false
	case ctx.Err() != nil, errors.Is(err, ErrIncomplete):
		return retry{}, false
	}
	r = retry{delay: min(max(2*last.delay, firstRetry), lastRetry), why: err.Error()}
	r.at = b.Prover.now().Add(r.delay)
	switch {
	case r.why == last.why:
	case errors.Is(err, ErrWrong):
		log.Error("what the cache has of the image is damaged: it goes on to be served by nydusd", "event", "damaged", "error", err)
	default:
		log.Info("the image goes on to be served by nydusd", "reason", err)
	}
	return r, true
}
