package fetch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
)

// Phase is what is being done with an image.
type Phase string

// The phases.
const (
	Fetching  Phase = "fetching"
	Comparing Phase = "comparing"
	Repairing Phase = "repairing"
)

// Result is what became of an image.
type Result struct {
	// State is what the cache has of it.
	State State
	// Fetched is how many bytes were fetched: an estimate, as Blob.Done.
	Fetched int64
	// Proven says that what is there was compared, now or earlier, and is right: the
	// kernel can serve the image without a daemon. Unproven is why it cannot, of an
	// image that is complete all the same.
	Proven   bool
	Unproven string
	// Repaired are the blobs that were wrong in the cache and fetched again.
	Repaired []string
}

// Completer fetches what is missing of an image, and proves it.
type Completer struct {
	Fetcher Fetcher
	// Prover compares what is there. With its Again set that is done also with what was
	// proven earlier.
	Prover prove.Prover
	// Evict removes wrong blobs from a cache directory, unless somebody uses them. nil:
	// wrong blobs are an error, and stay.
	Evict func(ctx context.Context, dir string, blobs ...string) error
	// Settle bounds how long it is waited until nobody writes to the blobs any more; 0
	// for the default.
	Settle time.Duration
}

const (
	defaultSettle = time.Minute
	settleEvery   = 500 * time.Millisecond
)

// Complete completes an image. tell, when set, is told about what is done and what is
// there; each phase begins with it. The error is a *DamagedError for what is wrong and was
// not repaired, and wraps ErrStalled when not all can be had.
func (c Completer) Complete(ctx context.Context, im Image, tell func(Phase, State)) (Result, error) {
	if tell == nil {
		tell = func(Phase, State) {}
	}
	var res Result
	for {
		err := c.once(ctx, im, tell, &res)
		var bad *DamagedError
		if !errors.As(err, &bad) || c.Evict == nil || slices.Contains(res.Repaired, bad.Blob) {
			return res, err
		}
		tell(Repairing, res.State)
		if no := c.Evict(ctx, im.CacheDir, bad.Blob); no != nil {
			return res, errors.Join(err, no)
		}
		res.Repaired = append(res.Repaired, bad.Blob)
	}
}

func (c Completer) once(ctx context.Context, im Image, tell func(Phase, State), res *Result) error {
	first := int64(-1)
	state, err := c.Fetcher.Fetch(ctx, im, func(s State) {
		if first < 0 {
			first = s.Done()
		}
		tell(Fetching, s)
	})
	if state != nil {
		res.State = state
		res.Fetched += state.Done() - max(first, 0)
	}
	if err != nil {
		return err
	}
	tell(Comparing, state)
	err = c.prove(ctx, im)
	switch {
	case err == nil:
		res.Proven, res.Unproven = true, ""
		return nil
	case errors.Is(err, proof.ErrNotProven):
		res.Unproven = err.Error()
		return nil
	case errors.Is(err, prove.ErrWrong):
		var of *prove.BlobError
		if errors.As(err, &of) {
			return &DamagedError{of.Blob, err}
		}
	}
	return err
}

// prove proves the image as soon as what was just written has settled.
func (c Completer) prove(ctx context.Context, im Image) error {
	settle := c.Settle
	if settle <= 0 {
		settle = defaultSettle
	}
	late, cancel := context.WithTimeoutCause(ctx, settle, fmt.Errorf("not within %s", settle))
	defer cancel()
	// That time goes by makes no event.
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		// To compare may take long: that is not bounded.
		_, err := c.Prover.Prove(ctx, im.CacheDir, im.Bootstrap, im.Digest)
		if !errors.Is(err, prove.ErrIncomplete) {
			return err
		}
		select {
		case <-tick.C:
		case <-late.Done():
			return errors.Join(err, context.Cause(late))
		}
	}
}
