package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// labelLayer is the digest of the layer in the image's manifest, which is that of a nydus
// data layer's blob. containerd sets it beside labelImage.
const labelLayer = "containerd.io/snapshot/cri.layer-digest"

// Blobs tells what blobs occupy in the cache.
type Blobs interface {
	// Place returns the cache directory of an image's backend, as the one that
	// Backends finds has it.
	Place(ctx context.Context, ref, backend string) (dir string, err error)
	// Usage returns what a blob's files occupy there in bytes, 0 when it is not
	// cached.
	Usage(dir, id string) (int64, error)
}

// Usage implements snapshots.Snapshotter. A data layer has what its blob occupies in the
// cache by now; when several have the same blob, which is cached once, the one with the
// lowest id has it. All else is overlayfs's.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	usage, err := s.Snapshotter.Usage(ctx, key)
	if err != nil || s.o.Blobs == nil {
		return usage, err
	}
	id, info, err := s.info(ctx, key)
	if err != nil {
		return usage, err
	}
	if info.Kind != snapshots.KindCommitted {
		return usage, nil
	}
	n, err := s.dataUsage(ctx, id)
	if err != nil {
		return usage, fmt.Errorf("usage of %s: %w", key, err)
	}
	if n >= 0 {
		s.told.usage(id, n)
		usage.Size += n
	}
	return usage, nil
}

// dataUsage is what the blob of a data layer occupies, and -1 for another layer.
func (s *Snapshotter) dataUsage(ctx context.Context, id string) (int64, error) {
	r, err := readRecord(s.dir(id))
	if err != nil {
		return 0, err
	}
	if r == nil || r.Kind != kindData || r.Blob == "" {
		return -1, nil
	}
	n, err := s.blobUsage(ctx, id, r)
	if err != nil {
		return 0, fmt.Errorf("nydus data layer%s: %w", ofImage(r.Image), err)
	}
	return n, nil
}

func (s *Snapshotter) blobUsage(ctx context.Context, id string, r *record) (int64, error) {
	// An image whose backend is not configured any more has nothing that counts.
	dir, err := s.o.Blobs.Place(ctx, r.Image, r.Backend)
	if err != nil {
		return 0, nil
	}
	first, err := s.owners.first(s, r.Blob, func(other *record) bool {
		at, err := s.o.Blobs.Place(ctx, other.Image, other.Backend)
		return err == nil && at == dir
	})
	if err != nil || first != id {
		return 0, err
	}
	return s.o.Blobs.Usage(dir, r.Blob)
}

// blobOf is the id of a data layer's blob, "" when containerd does not tell.
func blobOf(labels map[string]string) string {
	id, ok := strings.CutPrefix(labels[labelLayer], "sha256:")
	if !ok || !rafs.IsID(id) {
		return ""
	}
	return id
}

// owners knows which data layers have a blob. containerd asks for the usage of every
// snapshot again and again, so it is learned from the records once.
type owners struct {
	mu sync.Mutex
	of map[string]map[string]bool // by blob, the ids of the snapshots; nil before
}

// add takes in a new data layer.
func (o *owners) add(blob, id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of != nil && blob != "" {
		o.put(blob, id)
	}
}

func (o *owners) put(blob, id string) {
	if o.of[blob] == nil {
		o.of[blob] = map[string]bool{}
	}
	o.of[blob][id] = true
}

// first returns the lowest id of those that have the blob and fit. Layers that are gone
// are forgotten.
func (o *owners) first(s *Snapshotter, blob string, fits func(*record) bool) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.learn(s); err != nil {
		return "", err
	}
	ids := slices.Collect(maps.Keys(o.of[blob]))
	slices.SortFunc(ids, func(a, b string) int { return number(a) - number(b) })
	for _, id := range ids {
		r, err := readRecord(s.dir(id))
		if err != nil {
			return "", err
		}
		if r == nil || r.Kind != kindData || r.Blob != blob {
			delete(o.of[blob], id)
			continue
		}
		if fits(r) {
			return id, nil
		}
	}
	return "", nil
}

func number(id string) int {
	n, err := strconv.Atoi(id)
	if err != nil {
		return 0
	}
	return n
}

func (o *owners) learn(s *Snapshotter) error {
	if o.of != nil {
		return nil
	}
	entries, err := os.ReadDir(filepath.Join(s.o.Root, "snapshots"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list layers: %w", err)
	}
	o.of = map[string]map[string]bool{}
	for _, e := range entries {
		// One that is broken says so when it is asked for itself.
		if r, err := readRecord(s.dir(e.Name())); err == nil && r != nil && r.Kind == kindData && r.Blob != "" {
			o.put(r.Blob, e.Name())
		}
	}
	return nil
}
