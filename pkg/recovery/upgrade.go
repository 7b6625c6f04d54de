package recovery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
)

// Upgrade is the replacement of a serving daemon by one of another executable.
type Upgrade struct {
	RunDir string
	// Nydusd is the executable of the successor; empty for the present one's.
	Nydusd string
	// StartTimeout bounds the start of a successor.
	StartTimeout time.Duration
}

// ErrNotServing says that a generation has no daemon to replace.
var ErrNotServing = errors.New("no nydusd serves it")

// Upgraded tells what an Upgrade did.
type Upgraded struct {
	// Before and After are the processes.
	Before, After int
	// Stall is how long nobody served.
	Stall time.Duration
}

// Run replaces the daemon of one generation. Its users wait for some ten
// milliseconds. It needs no running snapshotter, and one that runs does not mistake
// it for a death. After an error the old daemon serves, or one of its executable,
// which the error says; when even that cannot be had, the snapshotter's recovery goes
// on from there.
func (u Upgrade) Run(ctx context.Context, key string, generation int) (*Upgraded, error) {
	s, err := instance.LockSuccession(ctx, u.RunDir, key, generation)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	g := s.Generation
	old, err := nydusd.Find(g.PID, g.StartTime)
	if err == nil && old == nil {
		err = ErrNotServing
	}
	if err != nil {
		return nil, fmt.Errorf("instance %s: %w", key, err)
	}
	defer old.Close()
	done, err := u.replace(ctx, s, old)
	if err != nil {
		return nil, fmt.Errorf("instance %s: replace nydusd %d: %w", key, g.PID, err)
	}
	return done, nil
}

func (u Upgrade) replace(ctx context.Context, s *instance.Succession, old *nydusd.Process) (*Upgraded, error) {
	g := s.Generation
	api := client.New(g.Socket)
	c, err := custody.Receive(ctx, g.Supervisor, api.SendFD)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if len(c.State) > custody.MaxState {
		return nil, fmt.Errorf("its state has %d bytes, and a successor takes %d", len(c.State), custody.MaxState)
	}
	// All that can fail without harm comes before the old one is told to end.
	n, err := begin(ctx, s, u.path(g), u.StartTimeout)
	if err != nil {
		return nil, fmt.Errorf("%w; the old one serves on", err)
	}
	// From here on it must be brought to an end.
	ctx = context.WithoutCancel(ctx)
	stopped := time.Now()
	if err := leave(ctx, api, old, u.StartTimeout); err != nil {
		return nil, errors.Join(fmt.Errorf("%w; it serves on", err), end(n.p))
	}
	after := n.p.PID
	change := u.recorder(ctx, s)
	if err := n.take(ctx, c, change.write); err != nil {
		return nil, u.goBack(ctx, s, c, err)
	}
	return &Upgraded{Before: g.PID, After: after, Stall: time.Since(stopped)}, change.err
}

func (u Upgrade) path(g instance.Generation) string {
	if u.Nydusd != "" {
		return u.Nydusd
	}
	return g.Nydusd
}

// leave makes the old daemon end and leave its filesystem to another.
func leave(ctx context.Context, api *client.Client, old *nydusd.Process, timeout time.Duration) error {
	defer old.Exit() // we may be its parent
	err := api.Exit(ctx)
	if old.Wait(time.Now().Add(timeout)) {
		return nil // it may have ended before it answered
	}
	if err != nil {
		return err
	}
	// It has agreed to end, so nobody may count on it any more.
	if err := old.Abandon(); err != nil {
		return err
	}
	if !old.Wait(time.Now().Add(endWait)) {
		return fmt.Errorf("it has not ended within %s of being told to, nor when killed", timeout+endWait)
	}
	return nil
}

// goBack lets the old executable go on where a new one has failed.
func (u Upgrade) goBack(ctx context.Context, s *instance.Succession, c *custody.Custody, cause error) error {
	change := u.recorder(ctx, s)
	n, err := begin(ctx, s, s.Generation.Nydusd, u.StartTimeout)
	if err == nil {
		err = n.take(ctx, c, change.write)
	}
	if err = errors.Join(err, change.err); err != nil {
		return errors.Join(cause, fmt.Errorf("go back to %s: %w; the snapshotter's recovery goes on, its users wait for it", s.Generation.Nydusd, err))
	}
	return fmt.Errorf("%w; went back to %s, which serves", cause, s.Generation.Nydusd)
}

// recorder writes a record and remembers whether that failed.
type recorder struct {
	err   error
	write func(func(*instance.Generation))
}

func (u Upgrade) recorder(ctx context.Context, s *instance.Succession) *recorder {
	r := &recorder{}
	r.write = func(change func(*instance.Generation)) {
		kept := s.Generation.Kept // by whoever keeps, which is not us
		r.err = instance.Change(ctx, u.RunDir, s.Record.Key, s.Generation.Number, func(g *instance.Generation) {
			change(g)
			g.Kept = kept
		})
	}
	return r
}
