package blob

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Options is what a Cache needs. Root, RunDir, Place and Now are required.
type Options struct {
	// Root is the snapshotter's, RunDir where instances are.
	Root, RunDir string
	// Place tells the cache directory of an image by its reference and the backend
	// that its labels ask for. When it fails, the image's blobs count as in use in all
	// directories.
	Place func(ctx context.Context, image, backend string) (dir string, err error)
	// Grace is how old a blob must be that nothing names, or that is evicted: the time
	// since anything of it was last written.
	Grace time.Duration
	// Above High blobs are evicted until the cache is below Low; none when High is zero.
	High, Low Mark
	// Now is the clock, which must agree with the filesystem's.
	Now func() time.Time
	// Log receives what Run does. Nil drops it.
	Log *slog.Logger

	// step is called before anything is changed; an error ends the work there, as a
	// kill would.
	step func(what, path string) error
}

// Mark is an amount of data: bytes, or a part of the filesystem that the cache is on.
type Mark struct {
	// Bytes is what all files of the cache occupy.
	Bytes int64
	// Part is how full the filesystem is, by whatever is on it: 0 to 1.
	Part float64
}

// IsZero tells whether there is no mark.
func (m Mark) IsZero() bool { return m == Mark{} }

// Cache is all cache directories of a snapshotter. Several processes may work on the same
// ones at a time. Its methods may be called concurrently; they wait for one another.
type Cache struct {
	o    Options
	wake chan struct{}

	mu   sync.Mutex
	memo memo
	// seen is when a blob was last seen in use by an instance, see Blob.LastUse.
	seen map[place]time.Time
}

// place is where a blob is.
type place struct{ dir, id string }

// New returns the caches below o.Root.
func New(o Options) *Cache {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.step == nil {
		o.step = func(string, string) error { return nil }
	}
	return &Cache{o: o, wake: make(chan struct{}, 1), seen: map[place]time.Time{}}
}

// state is all that is known at one moment.
type state struct {
	dirs []*directory
	refs *refs
}

// look learns the state. What could not be read is in the error, beside a state that can
// be worked with; without one the context has ended.
func (c *Cache) look(ctx context.Context) (*state, error) {
	// What is there first: whatever comes later is too young to be removed.
	dirs, err := scan(c.o.Root)
	r, ended := c.collect(ctx)
	if ended != nil {
		return nil, ended
	}
	now := c.o.Now()
	seen := make(map[place]time.Time, len(c.seen))
	for _, d := range dirs {
		for _, b := range d.blobs {
			p := place{d.path, b.id}
			if r.of(d, b.id).living() {
				seen[p] = now
			} else if t, ok := c.seen[p]; ok {
				seen[p] = t
			}
		}
	}
	c.seen = seen
	return &state{dirs, r}, err
}

// lastUse is when a blob was last used, as Blob.LastUse says.
func (c *Cache) lastUse(b *cached) time.Time {
	use := b.lastUse()
	if t := c.seen[place{b.dir.path, b.id}]; t.After(use) {
		return t
	}
	return use
}
