package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/opencontainers/go-digest"
)

// Blob is one of a repository's blobs.
type Blob struct {
	// Registry is as in references: host or host:port.
	Registry, Repository string
	Digest               digest.Digest
	// Size is the blob's, 0 when it is not known: then the first host that answers
	// says it. AtLeast is what it has at least.
	Size, AtLeast int64
}

func (b Blob) String() string { return b.Registry + "/" + b.Repository + "@" + b.Digest.String() }

// Finder finds a registry's hosts. Endpoints is one.
type Finder interface {
	For(ctx context.Context, registry string) ([]Endpoint, error)
}

// FetcherConfig is what a Fetcher needs. A duration of 0 is its default.
type FetcherConfig struct {
	Finder Finder
	// AnswerTimeout bounds the wait for the beginning of an answer, StallTimeout that
	// for more of it. The defaults are 10 seconds.
	AnswerTimeout, StallTimeout time.Duration
	// GiveUp bounds the time without any progress, whatever is tried; 25 seconds,
	// which is less than nydusd waits.
	GiveUp time.Duration
	// Avoid is how long a host that failed is asked after the others; 10 seconds.
	Avoid time.Duration
}

// Fetcher reads parts of blobs from whichever host of their registry gives them out.
//
// A host that fails, also in the middle of a blob, is replaced by the next one, which
// goes on where it stopped; the hosts are asked again, with growing pauses or those
// that they ask for, until GiveUp. It may be used by several goroutines.
//
// Content is not checked against digests, which parts do not have: only its length.
type Fetcher struct {
	cfg FetcherConfig

	mu sync.Mutex
	// avoided is until when a host, by scheme and name, is asked after the others.
	avoided map[string]time.Time
	// sessions are those with hosts, for a repository each.
	sessions map[string]*session
}

// session is what a host has issued for a repository.
type session struct {
	host       *http.Client // whose configuration it is of
	authorizer docker.Authorizer
}

// NewFetcher returns a Fetcher.
func NewFetcher(cfg FetcherConfig) *Fetcher {
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{
		{&cfg.AnswerTimeout, 10 * time.Second}, {&cfg.StallTimeout, 10 * time.Second}, {&cfg.GiveUp, 25 * time.Second}, {&cfg.Avoid, 10 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.or
		}
	}
	return &Fetcher{cfg: cfg, avoided: map[string]time.Time{}, sessions: map[string]*session{}}
}

// Errors of Open.
var (
	// ErrRange says that a blob does not have the part that was asked for, ErrNoBlob
	// that it is not there, ErrRefused that the credentials do not open it: each of all
	// hosts.
	ErrRange   = errors.New("the blob is shorter")
	ErrNoBlob  = errors.New("there is no such blob")
	ErrRefused = errors.New("access is refused")
)

// Open returns length bytes of a blob from offset on; what there is when length is
// negative. It is never 0. The error names each host and what is wrong with it.
//
// The returned Part ends with ctx.
func (f *Fetcher) Open(ctx context.Context, b Blob, offset, length int64) (*Part, error) {
	if err := b.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", b, err)
	}
	if offset < 0 || length == 0 {
		return nil, fmt.Errorf("fetch %s: %d bytes from %d on", b, length, offset)
	}
	ctx, cancel := context.WithCancel(silent(docker.WithScope(ctx, "repository:"+b.Repository+":pull")))
	p := &Part{f: f, ctx: ctx, cancel: cancel, blob: b, offset: offset, left: length, size: b.Size, moved: time.Now()}
	if err := p.open(); err != nil {
		cancel()
		return nil, fmt.Errorf("fetch %s: %w", b, err)
	}
	return p, nil
}

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
	// from is the host that gives it out now.
	from *answer
}

// Size is that of the whole blob, Left what is to be read.
func (p *Part) Size() int64 { return p.size }

// Left is how many bytes are still to be read.
func (p *Part) Left() int64 { return p.left }

// Host names the host that gives it out now.
func (p *Part) Host() string { return p.from.host.Host }

// Read implements io.Reader.
func (p *Part) Read(buf []byte) (int, error) {
	for p.left > 0 {
		n, err := p.from.Read(buf[:min(int64(len(buf)), p.left)])
		if n > 0 {
			p.offset, p.left, p.moved = p.offset+int64(n), p.left-int64(n), time.Now()
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
		p.f.avoid(was.host)
		_ = was.Close()
		if again := p.open(); again != nil {
			return 0, fmt.Errorf("fetch %s: %w", p.blob, errors.Join(fmt.Errorf("%s breaks off: %w", was.host.Host, plain(err)), again))
		}
	}
	return 0, io.EOF
}

// Close ends the reading.
func (p *Part) Close() error {
	defer p.cancel()
	return p.from.Close()
}

// open asks the hosts until one answers.
func (p *Part) open() error {
	for round := 0; ; round++ {
		answer, wanted, err := p.ask()
		if err == nil {
			p.from = answer
			return nil
		}
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

// ask asks each host once. wanted is the pause that all want who may answer later.
func (p *Part) ask() (_ *answer, wanted time.Duration, _ error) {
	hosts, err := p.f.hosts(p.ctx, p.blob.Registry)
	if err != nil {
		return nil, 0, err
	}
	var errs []error
	wanted = -1
	for _, host := range hosts {
		// Each gets its share of the time, or the last one none.
		a, err := p.askHost(host, p.f.cfg.GiveUp/time.Duration(len(hosts)))
		if err == nil {
			return a, 0, nil
		}
		if p.ctx.Err() != nil {
			return nil, 0, err
		}
		if isTransient(err) {
			p.f.avoid(host)
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

// hosts are those that may be asked, the best first.
func (f *Fetcher) hosts(ctx context.Context, registry string) (list []Endpoint, err error) {
	all, err := f.cfg.Finder.For(ctx, registry)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	var later []Endpoint
	for _, host := range all {
		switch {
		case !host.Capabilities.Has(docker.HostCapabilityPull):
		case now.Before(f.avoided[nameOf(host)]):
			later = append(later, host)
		default:
			list = append(list, host)
		}
	}
	if list = append(list, later...); len(list) == 0 {
		return nil, fmt.Errorf("no host of registry %s may be pulled from: none has the capability \"pull\" in its hosts.toml", registry)
	}
	return list, nil
}

func nameOf(host Endpoint) string { return host.Scheme + "://" + host.Host + host.Path }

func (f *Fetcher) avoid(host Endpoint) {
	f.mu.Lock()
	f.avoided[nameOf(host)] = time.Now().Add(f.cfg.Avoid)
	f.mu.Unlock()
}

// session returns what a host has issued for a repository, without what not is or was
// of another configuration.
func (f *Fetcher) session(ctx context.Context, b Blob, host Endpoint, not *session) *session {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := nameOf(host) + " " + b.Registry + "/" + b.Repository
	s := f.sessions[key]
	if s != nil && s.host == host.Client && s != not {
		return s
	}
	if len(f.sessions) >= maxSessions {
		clear(f.sessions) // each costs a token
	}
	s = &session{host: host.Client, authorizer: host.NewAuthorizer(ctx)}
	f.sessions[key] = s
	return s
}

// maxSessions bounds how many repositories' tokens are kept.
const maxSessions = 4096

// statusError is an answer that is no content.
type statusError struct {
	host   string
	code   int
	header http.Header
}

// Error implements error. What the server says beside the number is not repeated.
func (s *statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%s answers %d %s", s.host, s.code, http.StatusText(s.code)))
}

// answer is a host's.
type answer struct {
	host   Endpoint
	body   io.ReadCloser
	cancel context.CancelCauseFunc
	ctx    context.Context
	stall  time.Duration
}

// Read implements io.Reader, with a bound for each call.
func (a *answer) Read(buf []byte) (int, error) {
	timer := time.AfterFunc(a.stall, func() { a.cancel(fmt.Errorf("nothing came for %s", a.stall)) })
	n, err := a.body.Read(buf)
	timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) && a.ctx.Err() != nil {
		err = context.Cause(a.ctx)
	}
	return n, err
}

// Close ends the connection, unless all was read.
func (a *answer) Close() error {
	err := a.body.Close()
	a.cancel(nil)
	return err
}

// askHost asks one host for what is left, and waits no longer than its share.
func (p *Part) askHost(host Endpoint, share time.Duration) (*answer, error) {
	ctx, cancel := context.WithCancelCause(p.ctx)
	timeout := min(p.f.cfg.AnswerTimeout, max(time.Millisecond, min(share, p.f.cfg.GiveUp-time.Since(p.moved))))
	timer := time.AfterFunc(timeout, func() { cancel(fmt.Errorf("no answer within %s", timeout.Round(time.Millisecond))) })
	resp, err := p.do(ctx, host)
	timer.Stop()
	if err == nil {
		a := &answer{host: host, body: resp.Body, cancel: cancel, ctx: ctx, stall: p.f.cfg.StallTimeout}
		if err = p.accept(a, resp); err == nil {
			return a, nil
		}
		discard(resp)
	}
	if ctx.Err() != nil && p.ctx.Err() == nil {
		err = transient{fmt.Errorf("%s: %w", host.Host, context.Cause(ctx))}
	}
	cancel(nil)
	return nil, err
}

// discard reads what little an error says, so that its connection can be used again.
func discard(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	_ = resp.Body.Close()
}

// do sends the request, with what its host wants for it.
func (p *Part) do(ctx context.Context, host Endpoint) (*http.Response, error) {
	s := p.f.session(ctx, p.blob, host, nil)
	for renewed := false; ; renewed = true {
		resp, err := p.challenge(ctx, host, s)
		again := err != nil && isTransient(err) && errors.Is(err, errAuthorize)
		if err == nil && (resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden) {
			// A token that has expired; some say 403 then. Not that of a redirect.
			again = resp.Request.Response == nil && resp.Request.Header.Get("Authorization") != ""
		}
		if !again || renewed {
			return resp, err
		}
		if resp != nil {
			discard(resp)
		}
		s = p.f.session(ctx, p.blob, host, s)
	}
}

// errAuthorize says that the token server did not do its part.
var errAuthorize = errors.New("authorize")

// challenge sends the request, and what is wanted when that was refused.
func (p *Part) challenge(ctx context.Context, host Endpoint, s *session) (*http.Response, error) {
	var before []*http.Response
	for {
		req, err := p.request(ctx, host)
		if err != nil {
			return nil, err
		}
		if err := s.authorizer.Authorize(ctx, req); err != nil {
			return nil, transient{fmt.Errorf("%s: %w: %w", host.Host, errAuthorize, plain(err))}
		}
		resp, err := host.Client.Do(req)
		if err != nil {
			again, _ := retryablehttp.DefaultRetryPolicy(ctx, nil, err)
			err = fmt.Errorf("%s: %w", host.Host, plain(err))
			if again {
				err = transient{err}
			}
			return nil, err
		}
		if resp.StatusCode != http.StatusUnauthorized || resp.Request.Response != nil || len(before) > 0 {
			return resp, nil
		}
		discard(resp)
		before = append(before, resp)
		if err := s.authorizer.AddResponses(ctx, before); err != nil {
			if errors.Is(err, docker.ErrInvalidAuthorization) {
				return nil, fmt.Errorf("%w: %w: %w", &statusError{host.Host, resp.StatusCode, resp.Header}, ErrRefused, plain(err))
			}
			return nil, transient{fmt.Errorf("%s: %w: %w", host.Host, errAuthorize, plain(err))}
		}
	}
}

// plain takes addresses out of an error: that of a redirect may open what it leads to.
func plain(err error) error {
	var u *url.Error
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.As(err, &status):
		return fmt.Errorf("the token server answers %d %s", status.StatusCode, http.StatusText(status.StatusCode))
	case errors.As(err, &u):
		err = u.Err
	}
	if text := err.Error(); strings.Contains(text, "://") || strings.Contains(text, "Location") {
		return errors.New("a redirect that cannot be followed")
	}
	return err
}

func (p *Part) request(ctx context.Context, host Endpoint) (*http.Request, error) {
	at := url.URL{Scheme: host.Scheme, Host: host.Host, Path: host.Path + "/" + p.blob.Repository + "/blobs/" + p.blob.Digest.String()}
	if host.Host != p.blob.Registry && (p.blob.Registry != dockerDomain || host.Host != dockerHost) {
		at.RawQuery = url.Values{"ns": {p.blob.Registry}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept-Encoding", "identity")
	if p.offset > 0 || p.left >= 0 {
		last := ""
		if p.left >= 0 {
			last = strconv.FormatInt(p.offset+p.left-1, 10)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%s", p.offset, last))
	}
	return req, nil
}

// accept checks that an answer has what was asked for, and makes its body begin with
// that.
func (p *Part) accept(a *answer, resp *http.Response) error {
	fail := func(format string, args ...any) error {
		return transient{fmt.Errorf("%s %s", a.host.Host, fmt.Sprintf(format, args...))}
	}
	var first, end, size int64
	switch resp.StatusCode {
	case http.StatusOK:
		if first, end, size = 0, resp.ContentLength, resp.ContentLength; size < 0 {
			return fail("does not tell the blob's size")
		}
	case http.StatusPartialContent:
		var err error
		if first, end, size, err = contentRange(resp.Header.Get("Content-Range")); err != nil {
			return fail("answers with %v", err)
		}
	case http.StatusRequestedRangeNotSatisfiable:
		return fmt.Errorf("%s: %w than %d bytes", a.host.Host, ErrRange, p.offset+max(p.left, 0))
	default:
		return p.refused(a.host, resp)
	}
	want := size
	if p.left >= 0 {
		want = p.offset + p.left
	}
	coding, said := resp.Header.Get("Content-Encoding"), resp.Header.Get("Docker-Content-Digest")
	switch {
	case coding != "" && coding != "identity":
		return fail("answers with content that is encoded (%.20q)", coding)
	case said != "" && said != p.blob.Digest.String():
		return fail("answers with another blob")
	case p.size > 0 && size != p.size:
		return fail("says that the blob has %d bytes, want %d", size, p.size)
	case size < p.blob.AtLeast:
		return fail("says that the blob has %d bytes, want at least %d", size, p.blob.AtLeast)
	case size < want || size <= p.offset:
		return fmt.Errorf("%s: %w than %d bytes: %d", a.host.Host, ErrRange, max(want, p.offset+1), size)
	case first > p.offset || end < want || resp.StatusCode == http.StatusPartialContent && (first != p.offset || resp.ContentLength >= 0 && resp.ContentLength != end-first):
		return fail("answers with bytes %d to %d, want %d to %d", first, end, p.offset, want)
	case p.offset-first > maxSkip:
		return fail("does not know ranges")
	}
	if _, err := io.CopyN(io.Discard, a, p.offset-first); err != nil {
		return fail("breaks off: %v", plain(err))
	}
	p.size, p.left = size, want-p.offset
	return nil
}

// maxSkip is how much is read for nothing from a host that does not know ranges.
const maxSkip = 4 << 20

// refused is the error for an answer that is no content.
func (p *Part) refused(host Endpoint, resp *http.Response) error {
	s := &statusError{host.Host, resp.StatusCode, resp.Header}
	again, _ := retryablehttp.DefaultRetryPolicy(context.WithoutCancel(p.ctx), resp, nil)
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%w: %w", s, ErrNoBlob)
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		return fmt.Errorf("%w: %w", s, ErrRefused)
	case again:
		return transient{s}
	}
	return s
}

// contentRange reads "bytes 0-9/100".
func contentRange(text string) (first, end, size int64, err error) {
	part, total, ok1 := strings.Cut(strings.TrimPrefix(text, "bytes "), "/")
	from, to, ok2 := strings.Cut(part, "-")
	var errs [3]error
	first, errs[0] = strconv.ParseInt(from, 10, 64)
	end, errs[1] = strconv.ParseInt(to, 10, 64)
	size, errs[2] = strconv.ParseInt(total, 10, 64)
	if !ok1 || !ok2 || errors.Join(errs[:]...) != nil || first < 0 || end < first || end >= size {
		return 0, 0, 0, fmt.Errorf("Content-Range %.60q", text)
	}
	return first, end + 1, size, nil
}
