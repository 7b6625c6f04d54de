package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

// Part is a part of a blob that is being read.
type Part struct {
	f      *Fetcher
	ctx    context.Context
	cancel context.CancelFunc
	blob   Blob
	// offset is where the next byte is, left how many there are; size is that of the
	// blob.
	offset, left, size int64
	// moved is when there was progress for the last time.
	moved time.Time
	// from is the host that gives it out now, stretches are those from which it came.
	from      *answer
	stretches []stretch
}

// stretch is where a host begins.
type stretch struct {
	offset int64
	host   Endpoint
}

// Size is that of the whole blob, Left what is to be read.
func (p *Part) Size() int64 { return p.size }

// Left is how many bytes are still to be read.
func (p *Part) Left() int64 { return p.left }

// Host names the host that gives it out now.
func (p *Part) Host() string { return p.from.host.Host }

// Read implements io.Reader.
func (p *Part) Read(buf []byte) (int, error) {
	p.moved = time.Now() // a pause of the reader is no fault of the hosts
	for p.left > 0 {
		n, err := p.from.Read(buf[:min(int64(len(buf)), p.left)])
		if n > 0 {
			p.offset, p.left, p.moved = p.offset+int64(n), p.left-int64(n), time.Now()
			if p.left == 0 {
				p.f.fine(p.from.host)
			}
			return n, nil
		}
		if err == nil {
			continue
		}
		if p.ctx.Err() != nil {
			return 0, context.Cause(p.ctx) // nobody wants it any more
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		was := p.from
		p.f.avoid(nameOf(was.host), stumbled, p.f.cfg.Avoid)
		_ = was.Close()
		if again := p.open(); again != nil {
			return 0, fmt.Errorf("fetch %s: %w", p.blob, errors.Join(fmt.Errorf("%s breaks off: %w", was.host.Host, plain(err)), again))
		}
	}
	return 0, io.EOF
}

// Distrust says that size bytes at an offset of the blob are not its content. Whoever
// reads the blob again gets it from another host, if there is one. Of several hosts that
// have given them out it is the first one, which then also broke off.
func (p *Part) Distrust(offset, size int64) {
	at := 0
	for i, s := range p.stretches {
		if s.offset <= offset {
			at = i
		}
	}
	p.f.avoid(blobAt(p.stretches[at].host, p.blob), wrong, avoidWrong)
}

// Close ends the reading.
func (p *Part) Close() error {
	defer p.cancel()
	return p.from.Close()
}

// open asks the hosts until one answers.
func (p *Part) open() error {
	var earlier error
	begun := time.Now()
	gone, hasty, done := p.f.isGone(p.blob.Registry)
	defer done()
	for round := 0; ; round++ {
		answer, wanted, err := p.ask(hasty)
		if err == nil {
			p.f.served(p.blob.Registry)
			p.from, p.stretches = answer, append(p.stretches, stretch{p.offset, answer.host})
			return nil
		}
		if isTransient(err) && p.ctx.Err() == nil {
			p.f.failed(p.blob.Registry, begun)
		}
		if gone {
			return err
		}
		if earlier != nil && time.Since(p.moved) >= p.f.cfg.GiveUp {
			return earlier // a wait that was cut short says nothing of its host
		}
		earlier = err
		pause := retryablehttp.DefaultBackoff(firstPause, maxPause, round, nil)
		pause = max(wanted, pause/2+rand.N(pause/2+1))
		if !isTransient(err) || pause >= p.f.cfg.GiveUp-time.Since(p.moved) {
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-p.ctx.Done():
			timer.Stop()
			return errors.Join(err, context.Cause(p.ctx))
		}
	}
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 3 * time.Second
)

// transient marks an error after which asking again may help.
type transient struct{ error }

// Unwrap returns the error.
func (t transient) Unwrap() error { return t.error }

// isTransient tells whether asking again may help.
func isTransient(err error) bool {
	var t transient
	return errors.As(err, &t)
}

// ask asks each host once, for a short time only when it is to be hasty. wanted is the
// pause that all want who may answer later.
func (p *Part) ask(hasty bool) (_ *answer, wanted time.Duration, _ error) {
	hosts, err := p.f.hosts(p.ctx, p.blob)
	if err != nil {
		return nil, 0, err
	}
	var errs []error
	wanted = -1
	for _, host := range hosts {
		// Each gets its share of the time, or the last one none.
		share := p.f.cfg.GiveUp / time.Duration(len(hosts))
		if hasty {
			share = min(share, goneTimeout)
		}
		a, err := p.askHost(host, share)
		if err == nil {
			return a, 0, nil
		}
		if p.ctx.Err() != nil {
			return nil, 0, err
		}
		if errors.Is(err, ErrNoBlob) && len(hosts) > 1 {
			p.f.avoid(blobAt(host, p.blob), stumbled, avoidMissing)
		}
		if isTransient(err) {
			p.f.avoid(nameOf(host), stumbled, p.f.cfg.Avoid)
			if pause := retryAfter(err); wanted < 0 || pause < wanted {
				wanted = pause
			}
		}
		errs = append(errs, err)
	}
	return nil, max(wanted, 0), joined(errs)
}

// retryAfter is the pause that a host asks for.
func retryAfter(err error) time.Duration {
	var s *statusError
	if !errors.As(err, &s) || s.header.Get("Retry-After") == "" {
		return 0
	}
	// Its own backoff is never more than the least.
	return max(0, retryablehttp.DefaultBackoff(0, 0, 0, &http.Response{StatusCode: http.StatusServiceUnavailable, Header: s.header}))
}

// joined joins what hosts have said. What is final is so only when all say it.
func joined(errs []error) error {
	err := errors.Join(errs...)
	for _, final := range []error{ErrNoBlob, ErrRange, ErrRefused} {
		all := true
		for _, one := range errs {
			all = all && errors.Is(one, final)
		}
		if all {
			return err
		}
	}
	return mixed{err, isTransient(err)}
}

// mixed is an error whose parts do not count for the whole.
type mixed struct {
	error
	transient bool
}

// As implements errors.As.
func (m mixed) As(target any) bool {
	t, isTransient := target.(*transient)
	if isTransient && m.transient {
		*t = transient{m.error}
		return true
	}
	return false
}
