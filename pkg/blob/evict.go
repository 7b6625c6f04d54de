package blob

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Evict removes blobs from a cache directory that are not right, so that they are fetched
// again, however lately they were written. Those that an instance may be reading, or that
// somebody has open, stay: the error says so. One that is not there is none.
func (c *Cache) Evict(ctx context.Context, dir string, ids ...string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.look(ctx)
	if s == nil {
		return err
	}
	w := &sweep{Cache: c, state: s, report: &Report{}}
	for _, d := range s.dirs {
		if d.path != filepath.Clean(dir) {
			continue
		}
		j := &job{dir: d, young: true}
		for _, id := range ids {
			if b := d.find(id); b != nil && rafs.IsID(id) {
				j.list = append(j.list, b)
			}
		}
		w.do(ctx, j)
		if j.err == nil && len(j.gone) < len(j.list) {
			j.err = fmt.Errorf("%d of %d are in use: end the containers of its images first", len(j.list)-len(j.gone), len(j.list))
		}
		if j.err != nil {
			return fmt.Errorf("remove blobs from %s: %w", d.path, j.err)
		}
	}
	return nil
}
