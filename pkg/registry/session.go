package registry

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// session is what a host has issued for a repository. It asks for credentials, which may
// take long, for one at a time, and for as long as somebody waits.
type session struct {
	host *http.Client // whose configuration it is of
	born time.Time
	make func(context.Context) docker.Authorizer

	// turn holds one value while an authorizer is made or told something.
	turn       chan struct{}
	authorizer atomic.Pointer[docker.Authorizer]
	// challenges is how often it was told what is wanted. It forgets its tokens then.
	challenges atomic.Int64
}

// maxSessions bounds how many repositories' tokens are kept.
const maxSessions = 4096

func sessionKey(b Blob, host Endpoint) string {
	return nameOf(host) + " " + b.Registry + "/" + b.Repository
}

// session returns what a host has issued for a repository, without what not is or was
// of another configuration.
func (f *Fetcher) session(b Blob, host Endpoint, not *session) *session {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := sessionKey(b, host)
	s := f.sessions[key]
	if s != nil && s.host == host.Client && s != not {
		return s
	}
	if len(f.sessions) >= maxSessions {
		clear(f.sessions) // each costs a token
	}
	s = &session{host: host.Client, born: time.Now(), turn: make(chan struct{}, 1)}
	s.make = func(ctx context.Context) docker.Authorizer { return host.NewAuthorizer(ctx, b.Repository) }
	f.sessions[key] = s
	return s
}

// refusedFor is how long a session is kept that was refused: its authorizer would not ask
// the token server again.
const refusedFor = time.Second

// forget ends a session that was refused.
func (f *Fetcher) forget(b Blob, host Endpoint, s *session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if key := sessionKey(b, host); f.sessions[key] == s && time.Since(s.born) >= refusedFor {
		delete(f.sessions, key)
	}
}

// exclusively does something that may take long. Who waits goes with ctx.
func (s *session) exclusively(ctx context.Context, do func() error) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	go func() {
		done <- do()
		<-s.turn
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// authorize adds to a request what the host wants. It returns how many challenges had been
// met before.
func (s *session) authorize(ctx context.Context, r *http.Request) (met int64, err error) {
	a := s.authorizer.Load()
	if a == nil {
		err := s.exclusively(ctx, func() error {
			if s.authorizer.Load() == nil {
				made := s.make(context.WithoutCancel(ctx))
				s.authorizer.Store(&made)
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
		a = s.authorizer.Load()
	}
	met = s.challenges.Load()
	return met, (*a).Authorize(ctx, r)
}

// meet tells the authorizer what is wanted, unless somebody has since so many challenges
// had been met: those who wait for the same want one token.
func (s *session) meet(ctx context.Context, challenge *http.Response, met int64) error {
	return s.exclusively(ctx, func() error {
		if s.challenges.Load() != met {
			return nil
		}
		err := (*s.authorizer.Load()).AddResponses(context.WithoutCancel(ctx), []*http.Response{challenge})
		if err == nil {
			s.challenges.Add(1)
		}
		return err
	})
}
