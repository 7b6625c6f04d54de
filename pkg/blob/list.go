package blob

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
)

// Blob is one blob in one cache directory, as of some moment.
type Blob struct {
	// ID is 64 hex digits: the blob's, or that of an OCI layer's index with nydusd 2.2.
	ID string `json:"id"`
	// Directory holds its files.
	Directory string `json:"directory"`
	// Host and Repository say where it came from, as in mountspec.Spec; empty when the
	// directory does not tell.
	Host       string `json:"host"`
	Repository string `json:"repository"`
	// Usage is what its files occupy on the disk in bytes.
	Usage int64 `json:"usage"`
	// Chunks is how many it has, 0 when no bootstrap tells. Ready is how many of them
	// are there as nydusd says, which List alone tells. Fault is why that cannot be
	// known.
	Chunks int    `json:"chunks"`
	Ready  int    `json:"ready"`
	Fault  string `json:"fault,omitempty"`
	// Damage is what Scrub has found wrong with it while it was in use; empty when nothing.
	// List alone tells.
	Damage string `json:"damage,omitempty"`
	// Images are those whose bootstraps name it, Instances those that may be reading
	// it. Without either it goes with the next sweep after its grace period.
	Images    []string `json:"images"`
	Instances []string `json:"instances"`
	// LastUse is the newest of: when its data was last read or written, when nydusd
	// last opened it, and when it was last seen in use by an instance by this process.
	// The times of access alone would not do: the kernel writes them once a day only
	// (relatime) or never (noatime), and does not see what is read from the page cache.
	// What a sweep sees alone would not outlive this process.
	LastUse time.Time `json:"last_use"`
	// Written is when anything of it was last written.
	Written time.Time `json:"written"`
}

// Complete tells whether nydusd says that it has all of the blob.
func (b *Blob) Complete() bool { return b.Chunks > 0 && b.Ready == b.Chunks }

// List tells what is in the cache, by repository and id. Unknown are files that are none
// of a blob's. An error means that the list may lack some, or some of who needs them.
func (c *Cache) List(ctx context.Context) (blobs []Blob, unknown []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.look(ctx)
	if s == nil {
		return nil, nil, err
	}
	scrubbed, failed := ReadScrubState(c.o.Root)
	for _, d := range s.dirs {
		unknown = append(unknown, d.unknown...)
		for _, b := range d.blobs {
			out := c.describe(b, s.refs.of(d, b.id))
			if n := scrubbed.damage(place{d.path, b.id}); n >= 0 {
				out.Damage = scrubbed.Damaged[n].Problem
			}
			if out.Chunks > 0 && b.has(kindMap) {
				out.count()
			}
			blobs = append(blobs, out)
		}
	}
	slices.SortFunc(blobs, func(a, b Blob) int { return compare(&a, &b) })
	return blobs, unknown, errors.Join(err, failed, s.refs.errors())
}

func compare(a, b *Blob) int {
	return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.ID, b.ID), cmp.Compare(a.Directory, b.Directory))
}

func (c *Cache) describe(b *cached, u use) Blob {
	out := Blob{
		ID: b.id, Directory: b.dir.path, Host: b.dir.host, Repository: b.dir.repository,
		Usage: b.usage(), Chunks: int(u.chunks), LastUse: c.lastUse(b).UTC(), Written: b.written().UTC(),
	}
	out.Images, out.Instances = u.names()
	return out
}

// count learns how many chunks are there.
func (b *Blob) count() {
	m, err := chunkmap.Open(b.Directory, b.ID, uint32(b.Chunks))
	if err != nil {
		b.Fault = err.Error()
		return
	}
	b.Ready = m.Ready()
}
