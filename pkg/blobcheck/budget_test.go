package blobcheck

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Many readers share little memory: all come to their end, whatever the size of chunks,
// and give back what they had.
func TestBudget(t *testing.T) {
	for name, size := range map[string]int{"small chunks": 4 << 10, "a chunk or two": 300 << 10, "larger than all": 3 << 20} {
		t.Run(name, func(t *testing.T) {
			table, blob := synthetic(t, 4, size, rafs.CompressorLZ4, rafs.DigesterBlake3)
			budget := NewBudget(1 << 20)
			c, err := New(table, NewPool(2), budget)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 24 {
				wg.Go(func() {
					got, _, err := read(t, c, blob, 0, len(blob), len(blob))
					if err != nil || !bytes.Equal(got, blob) {
						t.Errorf("%d of %d bytes: %v", len(got), len(blob), err)
					}
				})
			}
			wg.Wait()
			if !budget.take(budget.all) {
				t.Error("something was not given back")
			}
		})
	}
}

// A reader that is closed in the middle of a chunk gives back what it holds, and one that
// waits goes with its context.
func TestBudgetGivenUp(t *testing.T) {
	table, blob := synthetic(t, 2, 1<<20, rafs.CompressorLZ4, rafs.DigesterBlake3)
	budget := NewBudget(memoryOf(table))
	c, err := New(table, NewPool(2), budget)
	if err != nil {
		t.Fatal(err)
	}
	first, err := c.Reader(t.Context(), bytes.NewReader(blob), 0, int64(len(blob)), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, first, 1000); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	second, err := c.Reader(ctx, bytes.NewReader(blob), 0, int64(len(blob)), 0)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.Copy(io.Discard, second); !errors.Is(err, context.Canceled) {
		t.Errorf("the second reads with %v", err)
	}
	second.Close()
	if budget.take(1) {
		t.Error("the first holds nothing")
	}
	first.Close()
	if !budget.take(budget.all) {
		t.Error("something was not given back")
	}
}

// memoryOf is the memory for one chunk.
func memoryOf(table *rafs.ChunkTable) int64 {
	var b buffer
	return b.takes(int64(table.At(0).Size))
}
