package registry

import (
	"context"
	"errors"
	"net/http"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// noticing is an authorizer that tells the keychain which credentials are refused.
type noticing struct {
	docker.Authorizer
	find             func(ctx context.Context, host, repository string) (*Credentials, error)
	keychain         Keychain
	host, repository string

	mu   sync.Mutex
	used *Credentials // what the host got last
}

// credentials finds what opens a host, and remembers it.
func (n *noticing) credentials(ctx context.Context, host string) (*Credentials, error) {
	c, err := n.find(ctx, host, n.repository)
	if host == n.host && err == nil {
		n.mu.Lock()
		n.used = c
		n.mu.Unlock()
	}
	return c, err
}

// Authorize implements docker.Authorizer.
func (n *noticing) Authorize(ctx context.Context, r *http.Request) error {
	err := n.Authorizer.Authorize(ctx, r)
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden) {
		n.refused() // by the token server
	}
	return err
}

// AddResponses implements docker.Authorizer.
func (n *noticing) AddResponses(ctx context.Context, responses []*http.Response) error {
	err := n.Authorizer.AddResponses(ctx, responses)
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		n.refused()
	}
	return err
}

// refused tells the keychain what was refused.
func (n *noticing) refused() {
	if k, ok := n.keychain.(Refuser); ok && n.last() != nil {
		k.Refused(n.host, n.repository, n.last())
	}
}

func (n *noticing) last() *Credentials {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.used
}

// noticing is the authorizer of a session, nil while there is none.
func (s *session) noticing() *noticing {
	if a := s.authorizer.Load(); a != nil {
		n, _ := (*a).(*noticing)
		return n
	}
	return nil
}

// refused says that a host refused what it has only just issued itself.
func (s *session) refused() {
	if n := s.noticing(); n != nil {
		n.refused()
	}
}

// hasOther tells whether there are other credentials to try than those of the session.
func (s *session) hasOther(ctx context.Context) bool {
	n := s.noticing()
	return n != nil && n.hasOther(ctx)
}

// hasOther tells whether there are other credentials than those that were used last.
func (n *noticing) hasOther(ctx context.Context) bool {
	used := n.last()
	other, err := n.find(ctx, n.host, n.repository)
	switch {
	case err != nil:
		return false
	case used == nil:
		return other != nil // there was none before
	}
	return !other.Opens(used)
}
