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
	if !custody.Resends() {
		return nil, errors.New("replacing a serving nydusd needs Linux 6.9 or newer: on this kernel requests in flight would be lost")
	}
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
	if _, err := s.EndOthers(); err != nil {
		return nil, fmt.Errorf("instance %s: end a successor that was left half way: %w", key, err)
	}
	if err := s.Hold(ctx, u.RunDir); err != nil {
		return nil, err
	}
	done, err := u.replace(ctx, s, old)
	if err != nil {
		return nil, fmt.Errorf("instance %s: replace nydusd %d: %w", key, g.PID, err)
	}
	return done, nil
}

func (u Upgrade) replace(ctx context.Context, s *instance.Succession, old *nydusd.Process) (*Upgraded, error) {
	g := s.Generation
	api := client.New(g.Socket)
	c, err := receive(ctx, g)
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
	record, err := n.take(ctx, c)
	if err != nil {
		return nil, u.goBack(ctx, s, c, err)
	}
	return &Upgraded{Before: g.PID, After: after, Stall: time.Since(stopped)}, u.write(ctx, s, record)
}

// receive takes what a successor needs from a living daemon.
func receive(ctx context.Context, g instance.Generation) (*custody.Custody, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, client.Timeout, fmt.Errorf("not within %s", client.Timeout))
	defer cancel()
	return custody.Receive(ctx, g.Supervisor, client.New(g.Socket).SendFD)
}

func (u Upgrade) write(ctx context.Context, s *instance.Succession, record func(*instance.Generation)) error {
	return s.Change(ctx, u.RunDir, record)
}

func (u Upgrade) path(g instance.Generation) string {
	if u.Nydusd != "" {
		return u.Nydusd
	}
	return g.Nydusd
}

// leave makes the old daemon end and leave its filesystem to another.
func leave(ctx context.Context, api *client.Client, old *nydusd.Process, timeout time.Duration) error {
	err := api.Exit(ctx)
	if old.Wait(time.Now().Add(timeout)) {
		old.Exit() // we may be its parent
		return nil // it may have ended before it answered
	}
	if err != nil {
		return err
	}
	// It has agreed to end, so nobody may count on it any more.
	return old.End()
}

// goBack lets the old executable go on where a new one has failed.
func (u Upgrade) goBack(ctx context.Context, s *instance.Succession, c *custody.Custody, cause error) error {
	n, err := begin(ctx, s, s.Generation.Nydusd, u.StartTimeout)
	var record func(*instance.Generation)
	if err == nil {
		record, err = n.take(ctx, c)
	}
	if err == nil {
		err = u.write(ctx, s, record)
	}
	if err != nil {
		return errors.Join(cause, fmt.Errorf("go back to %s: %w; the snapshotter's recovery goes on, its users wait for it", s.Generation.Nydusd, err))
	}
	return fmt.Errorf("%w; went back to %s, which serves", cause, s.Generation.Nydusd)
}
