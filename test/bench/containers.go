package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// firstRun pulls an image onto an empty node and runs a program in it. The registry is
// behind a link meanwhile, if there is one.
func (l *lab) firstRun(link func() kit.Hook) *contest {
	run := func(s *side) once {
		return func(ctx context.Context) (time.Duration, error) {
			if err := l.empty(ctx); err != nil {
				return 0, err
			}
			if link != nil {
				l.registry.SetHook(link())
				defer l.registry.SetHook(nil)
			}
			start := time.Now()
			var err error
			if s.pulled, err = l.node.Pull(ctx, s.ref, kit.PullOptions{Snapshotter: s.snapshotter}); err != nil {
				return 0, err
			}
			c, err := l.runTo(ctx, s, "first", kit.MainCommand)
			took := time.Since(start)
			if err != nil {
				return 0, err
			}
			return took, c.Remove(ctx)
		}
	}
	return &contest{ours: run(&l.nydus), peer: run(&l.plain)}
}

// runTo runs a container of s to its program's exit.
func (l *lab) runTo(ctx context.Context, s *side, id string, args []string) (*kit.Container, error) {
	c, err := l.node.Run(ctx, s.pulled, id, kit.RunOptions{Args: args, Snapshotter: s.snapshotter})
	if err != nil {
		return nil, err
	}
	return c, finished(ctx, c)
}

// finished waits for a container's program to succeed.
func finished(ctx context.Context, c *kit.Container) error {
	code, err := c.Wait(ctx)
	if err == nil && code != 0 {
		err = fmt.Errorf("the program in %s ended with %d: %s", c.ID(), code, c.Output())
	}
	return err
}

// linkRate is the registry's throughput in bytes per second when it is limited.
const linkRate = 50e6

// slowLink is a hook that limits all answers together.
func slowLink() kit.Hook {
	limiter := rate.NewLimiter(linkRate, 64<<10)
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&slowWriter{w, r.Context(), limiter}, r)
	}
}

// slowWriter shares a link with all answers that are given at the same time.
type slowWriter struct {
	http.ResponseWriter
	ctx     context.Context
	limiter *rate.Limiter
}

func (w *slowWriter) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		piece := p[:min(len(p), w.limiter.Burst())]
		if err := w.limiter.WaitN(w.ctx, len(piece)); err != nil {
			return total, err
		}
		n, err := w.ResponseWriter.Write(piece)
		total += n
		if err != nil {
			return total, err
		}
		p = p[n:]
	}
	return total, nil
}

func (w *slowWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// warmRun starts a task again and again beside one that keeps the image in use.
func (l *lab) warmRun(ctx context.Context, args []string) (*contest, error) {
	if err := l.pull(ctx); err != nil {
		return nil, err
	}
	c := &contest{}
	var made []*kit.Container
	c.done = func(ctx context.Context) error { return removeAll(ctx, made) }
	for _, s := range []*side{&l.nydus, &l.plain} {
		holder, err := l.node.Run(ctx, s.pulled, "holder-"+s.snapshotter, kit.RunOptions{Snapshotter: s.snapshotter})
		if err != nil {
			return nil, errors.Join(err, c.done(ctx))
		}
		made = append(made, holder)
		again, err := l.runTo(ctx, s, "again-"+s.snapshotter, args)
		if again != nil {
			made = append(made, again)
		}
		if err == nil {
			err = again.DeleteTask(ctx)
		}
		if err != nil {
			return nil, errors.Join(err, c.done(ctx))
		}
	}
	c.ours, c.peer = runAgain(made[1]), runAgain(made[3])
	return c, nil
}

func runAgain(c *kit.Container) once {
	return func(ctx context.Context) (time.Duration, error) {
		start := time.Now()
		if err := c.Start(ctx); err != nil {
			return 0, err
		}
		err := finished(ctx, c)
		took := time.Since(start)
		return took, errors.Join(err, c.DeleteTask(ctx))
	}
}

// crowdSize is how many containers start at once.
const crowdSize = 64

// crowd starts many containers of one image at the same time.
func (l *lab) crowd(ctx context.Context) (*contest, error) {
	if err := l.pull(ctx); err != nil {
		return nil, err
	}
	round := func(s *side) once {
		return func(ctx context.Context) (time.Duration, error) {
			if err := l.idle(); err != nil {
				return 0, err
			}
			start := time.Now()
			made, err := l.startAll(ctx, s)
			took := time.Since(start)
			if err == nil && s == &l.nydus && len(l.node.Daemons()) != 1 {
				err = fmt.Errorf("%d nydusd serve %d containers of one image", len(l.node.Daemons()), crowdSize)
			}
			return took, errors.Join(err, removeAll(context.WithoutCancel(ctx), made))
		}
	}
	return &contest{ours: round(&l.nydus), peer: round(&l.plain)}, nil
}

func (l *lab) startAll(ctx context.Context, s *side) ([]*kit.Container, error) {
	made, errs := make([]*kit.Container, crowdSize), make([]error, crowdSize)
	var wg sync.WaitGroup
	for n := range crowdSize {
		wg.Go(func() {
			id := fmt.Sprintf("%s-%d", strings.ToLower(s.snapshotter), n)
			made[n], errs[n] = l.node.Run(ctx, s.pulled, id, kit.RunOptions{Snapshotter: s.snapshotter})
		})
	}
	wg.Wait()
	return made, errors.Join(errs...)
}

// removeAll removes containers, several at a time. Nil ones are left out.
func removeAll(ctx context.Context, made []*kit.Container) error {
	errs := make([]error, len(made))
	var wg sync.WaitGroup
	for n, c := range made {
		if c != nil {
			wg.Go(func() { errs[n] = c.Remove(ctx) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}
