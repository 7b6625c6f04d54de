package recovery

import (
	"context"
	"errors"
	"fmt"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
)

// Spare keeps a second copy of what a successor needs, in another process.
// custody.Spare is one.
type Spare interface {
	// Put gives it a copy, under a name; pid and start name who serves now.
	Put(name string, c *custody.Custody, pid int, start uint64) error
	Get(name string) (*custody.Custody, error)
	Drop(name string) error
	Names() ([]string, error)
	// Gone waits for the keeper's end.
	Gone()
	// Close ends the connection: what is kept stays kept.
	Close() error
}

// ErrNoSpare is a Connector's for a keeper that does not run.
var ErrNoSpare = errors.New("no second keeper runs")

// Connector connects to the second keeper, which is started if need be and start
// says so. A keeper that does not answer is replaced.
type Connector func(ctx context.Context, start bool) (Spare, error)

// connect gets a spare, or none. r.spare is nil then.
func (r *Recovery) connect(ctx context.Context) Spare {
	s, err := r.cfg.Spare(ctx, true)
	if err != nil {
		if ctx.Err() == nil {
			r.cfg.Log.Warn("no second keeper: when snapshotter and a daemon end together, its containers fail", "error", err)
		}
		return nil
	}
	r.mu.Lock()
	r.spare = s
	r.mu.Unlock()
	return s
}

// keepSpare replaces the second keeper when it ends, and gives it all there is. s
// is the first one, nil for none.
func (r *Recovery) keepSpare(ctx context.Context, s Spare) {
	for {
		if s != nil {
			r.useSpare(ctx, s)
		} else {
			wait(ctx, again)
		}
		if ctx.Err() != nil {
			return
		}
		s = r.connect(ctx)
	}
}

// useSpare returns when the second keeper has ended, or ctx.
func (r *Recovery) useSpare(ctx context.Context, s Spare) {
	r.mu.Lock()
	all := make([]*follower, 0, len(r.followed))
	for _, f := range r.followed {
		all = append(all, f)
	}
	r.mu.Unlock()
	for _, f := range all {
		f.share()
	}
	ended := make(chan struct{})
	go func() {
		s.Gone()
		close(ended)
	}()
	select {
	case <-ended:
		if ctx.Err() == nil {
			r.cfg.Log.Warn("the second keeper has ended or does not answer; starting another", "event", "holder lost")
		}
	case <-ctx.Done():
	}
	r.mu.Lock()
	r.spare = nil
	r.mu.Unlock()
	_ = s.Close()
	<-ended
}

func (r *Recovery) currentSpare() Spare {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.spare
}

// forgoAll makes a keeper that an earlier configuration has left let go of all it
// has, and the records say so.
func (r *Recovery) forgoAll(ctx context.Context) {
	if err := r.dropAll(ctx); err != nil {
		r.cfg.Log.Error("let go of what an earlier recover_policy has kept; containers whose nydusd dies may hang", "error", err)
	}
}

func (r *Recovery) dropAll(ctx context.Context) error {
	var errs []error
	if r.cfg.Spare != nil {
		errs = append(errs, r.dropSpares(ctx))
	}
	keys, err := instance.Keys(r.cfg.RunDir)
	errs = append(errs, err)
	for _, key := range keys {
		rec, err := instance.ReadRecord(r.cfg.RunDir, key)
		if err != nil {
			continue // gone, or damaged, which others tell
		}
		for _, g := range rec.Generations() {
			if !g.Kept {
				continue
			}
			err := instance.Change(ctx, r.cfg.RunDir, key, g.Number, func(g *instance.Generation) { g.Kept = false })
			if !errors.Is(err, instance.ErrGone) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (r *Recovery) dropSpares(ctx context.Context) error {
	s, err := r.cfg.Spare(ctx, false)
	if errors.Is(err, ErrNoSpare) {
		return nil
	}
	if err != nil {
		return err
	}
	names, err := s.Names()
	errs := []error{err}
	for _, name := range names {
		if err := s.Drop(name); err != nil {
			errs = append(errs, fmt.Errorf("drop %s: %w", name, err))
		}
	}
	return errors.Join(append(errs, s.Close())...)
}
