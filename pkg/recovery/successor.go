package recovery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// successor is a daemon that listens and serves nothing yet.
type successor struct {
	s       *instance.Succession
	p       *nydusd.Process
	path    string
	socket  string
	timeout time.Duration
}

// begin starts a successor. It is ended by end, or serves once take has returned.
func begin(ctx context.Context, s *instance.Succession, path string, timeout time.Duration) (*successor, error) {
	p, socket, err := s.Start(path)
	if err != nil {
		return nil, err
	}
	n := &successor{s: s, p: p, path: path, socket: socket, timeout: timeout}
	ctx, cancel := n.bounded(ctx)
	defer cancel()
	if err := awaitSocket(ctx, p, socket); err != nil {
		return nil, errors.Join(err, end(p))
	}
	return n, nil
}

func (n *successor) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, n.timeout, fmt.Errorf("not within %s", n.timeout))
}

// take makes it go on where its predecessor, which must have ended, has stopped, and
// returns what is to be written down of it. After an error it is gone.
func (n *successor) take(ctx context.Context, c *custody.Custody) (record func(*instance.Generation), err error) {
	ctx, cancel := n.bounded(ctx)
	defer cancel()
	if err := n.handOver(ctx, c); err != nil {
		if n.p.Wait(time.Now().Add(deathWait)) {
			err = fmt.Errorf("%w; nydusd %d %w", err, n.p.PID, ended(n.p))
		}
		return nil, errors.Join(err, end(n.p))
	}
	return func(g *instance.Generation) {
		g.PID, g.StartTime, g.Socket, g.Nydusd, g.Unmet = n.p.PID, n.p.StartTime, n.socket, n.path, n.p.Unmet
		g.Restarts++
	}, n.p.Close()
}

func (n *successor) handOver(ctx context.Context, c *custody.Custody) error {
	// What the predecessor had read and not answered is asked again.
	if err := c.Resend(); err != nil && n.waiting() {
		return fmt.Errorf("%w: %w", errLost, err)
	}
	api := client.New(n.socket)
	err := custody.Give(ctx, n.s.Generation.Supervisor, c, api.Takeover)
	if err == nil {
		err = api.Start(ctx)
	}
	return err
}

// errLost says that requests that the predecessor had taken may be lost: whoever
// waits for them would hang, and could not be killed.
var errLost = errors.New("requests in flight cannot be asked again")

// waiting tells whether somebody waits for an answer, also when that cannot be known.
func (n *successor) waiting() bool {
	c, err := rootfs.OpenConnections()
	if err != nil {
		return true
	}
	waiting, err := c.Waiting(n.s.Generation.Dev)
	return errors.Join(err, c.Close()) != nil || waiting > 0
}

// awaitSocket waits until a daemon listens: bind tells by the file, listen by
// nothing, so it is asked.
func awaitSocket(ctx context.Context, p *nydusd.Process, socket string) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := client.New(socket).Info(ctx); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("nydusd %d does not listen on %s: %w", p.PID, socket, context.Cause(ctx))
		}
		if p.Wait(time.Now()) {
			return fmt.Errorf("nydusd %d %w before it listened", p.PID, ended(p))
		}
	}
}

// errKilled says that somebody has killed a daemon.
var errKilled = errors.New("was killed by " + unix.SignalName(unix.SIGKILL))

// deathWait is how long the end of a process may come after that of its connections.
const deathWait = 50 * time.Millisecond

// ended says how a process has ended.
func ended(p *nydusd.Process) error {
	how := p.Exit()
	if how == sigkill {
		return errKilled
	}
	return fmt.Errorf("ended (%s)", how)
}

// end ends a successor that came to nothing.
func end(p *nydusd.Process) error { return errors.Join(p.End(), p.Close()) }
