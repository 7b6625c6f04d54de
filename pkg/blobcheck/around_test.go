package blobcheck

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Whatever is asked for, what lies around it can be checked as a whole, and is no more
// than what it cuts.
func TestAround(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, im := range images(t) {
		for i := range im.tables {
			blob := im.blobs[i]
			c, size := checker(t, &im.tables[i]), int64(len(blob))
			if size == 0 {
				continue
			}
			for range 50 {
				offset := random.Int64N(size)
				length := 1 + random.Int64N(size-offset)
				first, all := c.Around(offset, length, size)
				if first < 0 || first > offset || first+all < offset+length || first+all > size {
					t.Fatalf("%s: around %d at %d of %d: %d at %d", im.name, length, offset, size, all, first)
				}
				got, _, err := read(t, c, blob, int(first), int(all), int(size))
				if err != nil || !bytes.Equal(got, blob[first:first+all]) {
					t.Fatalf("%s: %d at %d of %d: %v", im.name, all, first, size, err)
				}
				if again, n := c.Around(first, all, size); again != first || n != all {
					t.Fatalf("%s: around %d at %d: %d at %d", im.name, all, first, n, again)
				}
			}
		}
	}
}
