package show

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// ErrInterrupted is Run's error after SIGINT, SIGTERM or SIGHUP.
var ErrInterrupted = errors.New("interrupted")

// again is how much later than the first a signal means "now": one Ctrl-C
// reaches the program several times, from the terminal and through the kit's
// other stages.
const again = time.Second

// Run calls f with a TB of the kit and runs its clean-up. The TB's context ends
// with a signal; another one ends the program at once. Everything that went
// wrong is written to log, with the ends of the servers' logs; the error is the
// first of it. Run must be called inside of kit.Enter.
func Run(log io.Writer, name string, f func(kit.TB) error) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	defer onSignal(func() { cancel(ErrInterrupted) })()
	first := &reason{}
	ok := kit.RunTB(log, name, func(t kit.TB) {
		s := &session{TB: t, ctx: ctx, first: first}
		if err := f(s); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			s.Fatalf("%v", err)
		}
	})
	switch {
	case errors.Is(context.Cause(ctx), ErrInterrupted):
		return ErrInterrupted
	case !ok:
		return first.err
	}
	return nil
}

// onSignal calls f at the first signal that asks to end and ends the program
// with the next one.
func onSignal(f func()) (stop func()) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		var since time.Time
		for range signals {
			if since.IsZero() {
				since = time.Now()
				f()
			} else if time.Since(since) > again {
				os.Exit(130)
			}
		}
	}()
	return func() { signal.Stop(signals); close(signals) }
}

// session is a TB that ends with a signal and keeps the first failure.
type session struct {
	kit.TB
	ctx   context.Context
	first *reason
}

// reason is shared by the goroutines of a session.
type reason struct {
	mu  sync.Mutex
	err error
}

func (r *reason) set(format string, args []any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		// The log has the whole text.
		line, _, _ := strings.Cut(fmt.Sprintf(format, args...), "\n")
		r.err = errors.New(line)
	}
}

func (s *session) Context() context.Context { return s.ctx }

func (s *session) Errorf(format string, args ...any) {
	s.first.set(format, args)
	s.TB.Errorf(format, args...)
}

func (s *session) Fatalf(format string, args ...any) {
	s.first.set(format, args)
	s.TB.Fatalf(format, args...)
}

// MainImage is kit.MainImage, but a signal is answered while it builds.
func MainImage(t kit.TB) (plain, nydus *kit.Image, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done) // also when the kit gives up
		plain, nydus = kit.MainImage(t, kit.NydusOptions{})
	}()
	select {
	case <-done:
	case <-t.Context().Done():
		return nil, nil, context.Cause(t.Context())
	}
	if nydus == nil {
		return nil, nil, errors.New("the example image could not be made")
	}
	return plain, nydus, nil
}
