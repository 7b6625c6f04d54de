package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/hashicorp/go-retryablehttp"
)

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
	bound  *bound
	closed sync.Once
	stall  time.Duration
	// waited is how long the last bytes have taken, of which there are got.
	waited time.Duration
	got    int
}

// enough is how much has to come within the stall timeout: a host that gives out less
// is as good as none.
const enough = 64 << 10

// Read implements io.Reader. The time in which nobody reads is not the host's.
func (a *answer) Read(buf []byte) (int, error) {
	if most := a.bound.rate.Burst(); most > 0 && len(buf) > most {
		buf = buf[:most]
	}
	late := fmt.Errorf("nothing came for %s", a.stall)
	if a.got > 0 {
		late = fmt.Errorf("only %d bytes came within %s", a.got, a.stall)
	}
	begun := time.Now()
	timer := time.AfterFunc(a.stall-a.waited, func() { a.cancel(late) })
	n, err := a.body.Read(buf)
	timer.Stop()
	a.waited, a.got = a.waited+time.Since(begun), a.got+n
	if a.got >= enough {
		a.waited, a.got = 0, 0
	}
	if err != nil && !errors.Is(err, io.EOF) && a.ctx.Err() != nil {
		err = context.Cause(a.ctx)
	}
	if n > 0 {
		// Its bytes are there; what is waited for is the right to the next ones.
		if slow := a.bound.rate.WaitN(a.ctx, n); slow != nil && err == nil {
			err = context.Cause(a.ctx)
		}
	}
	return n, err
}

// Close ends the connection, unless all was read.
func (a *answer) Close() error {
	err := a.body.Close()
	a.cancel(nil)
	a.closed.Do(func() { a.bound.streams.Release(1) })
	return err
}

// askHost asks one host for what is left when it is its turn, and waits for it no
// longer than its share.
func (p *Part) askHost(host Endpoint, share time.Duration) (*answer, error) {
	b, begun := p.f.bound(host), time.Now()
	if err := b.streams.Acquire(p.ctx, 1); err != nil {
		return nil, context.Cause(p.ctx)
	}
	p.moved = p.moved.Add(time.Since(begun))
	a, err := p.answerOf(host, b, share)
	if err != nil {
		b.streams.Release(1)
	}
	return a, err
}

// answerOf asks one host for what is left.
func (p *Part) answerOf(host Endpoint, b *bound, share time.Duration) (*answer, error) {
	ctx, cancel := context.WithCancelCause(p.ctx)
	timeout := min(p.f.cfg.AnswerTimeout, max(time.Millisecond, min(share, p.f.cfg.GiveUp-time.Since(p.moved))))
	timer := time.AfterFunc(timeout, func() { cancel(fmt.Errorf("no answer within %s", timeout.Round(time.Millisecond))) })
	// Also for the bodies of answers that are not taken.
	defer timer.Stop()
	resp, err := p.do(ctx, host)
	if err == nil {
		a := &answer{host: host, body: resp.Body, cancel: cancel, ctx: ctx, bound: b, stall: p.f.cfg.StallTimeout}
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
	s := p.f.session(p.blob, host, nil)
	for tries := 1; ; tries++ {
		resp, err := p.challenge(ctx, host, s)
		if tries > maxLogins || !s.again(ctx, resp, err, tries == 1) {
			if isRefusedLogin(err) {
				p.f.forget(p.blob, host, s)
			}
			return resp, err
		}
		if resp != nil {
			discard(resp)
		}
		s = p.f.session(p.blob, host, s)
	}
}

// isRefusedLogin tells whether an error is about credentials, or about their absence.
func isRefusedLogin(err error) bool {
	return errors.Is(err, ErrRefused) && (errors.Is(err, errAuthorize) || errors.Is(err, docker.ErrInvalidAuthorization))
}

// again tells whether a request may succeed with a session that follows this one.
func (s *session) again(ctx context.Context, resp *http.Response, err error, first bool) bool {
	switch {
	case isRefusedLogin(err):
		return s.hasOther(ctx)
	case err != nil:
		return first && errors.Is(err, errAuthorize)
	case resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden:
		return false
	case resp.Request.Response != nil || resp.Request.Header.Get("Authorization") == "":
		return false // it is about a redirect, or there is nothing to renew
	case first:
		return true // a token that has expired; some say 403 then
	}
	// It is new, so that this is about the credentials that it came from.
	s.refused()
	return s.hasOther(ctx)
}

// maxLogins bounds how many credentials are tried for one request.
const maxLogins = 4

// errAuthorize says that the token server did not do its part.
var errAuthorize = errors.New("authorize")

// challenge sends the request, and what is wanted when that was refused.
func (p *Part) challenge(ctx context.Context, host Endpoint, s *session) (*http.Response, error) {
	for met := false; ; met = true {
		req, err := p.request(ctx, host)
		if err != nil {
			return nil, err
		}
		challenges, err := s.authorize(ctx, req)
		if err != nil {
			return nil, unauthorized(ctx, host, err)
		}
		resp, err := host.Client.Do(req)
		if err != nil {
			return nil, unanswered(ctx, host, err)
		}
		if resp.StatusCode != http.StatusUnauthorized || resp.Request.Response != nil || met {
			return resp, nil
		}
		discard(resp)
		if err := s.meet(ctx, resp, challenges); err != nil {
			if errors.Is(err, docker.ErrInvalidAuthorization) || errdefs.IsNotImplemented(err) {
				return nil, fmt.Errorf("%w: %w: %w", &statusError{host.Host, resp.StatusCode, resp.Header}, ErrRefused, plain(err))
			}
			return nil, unauthorized(ctx, host, err)
		}
	}
}

// unauthorized is the error for a token that was not to be had. A token server that
// refuses our login does so tomorrow, too.
func unauthorized(ctx context.Context, host Endpoint, err error) error {
	text := fmt.Errorf("%s: %w: %w", host.Host, errAuthorize, plain(err))
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) {
		return transient{text}
	}
	again, _ := retryablehttp.DefaultRetryPolicy(context.WithoutCancel(ctx), &http.Response{StatusCode: status.StatusCode}, nil)
	if again {
		return transient{text}
	}
	return fmt.Errorf("%w: %w", text, ErrRefused)
}

// unanswered is the error for a request that has no answer.
func unanswered(ctx context.Context, host Endpoint, err error) error {
	again, _ := retryablehttp.DefaultRetryPolicy(ctx, nil, err)
	refused := refusedCertificate(err)
	err = fmt.Errorf("%s: %w", host.Host, plain(err))
	switch {
	case refused:
		return fmt.Errorf("%w (the certificate that hosts.toml names as client, or none): %w", err, ErrRefused)
	case again:
		return transient{err}
	}
	return err
}

// refusedCertificate tells whether the other side does not want our client certificate,
// or wants one. Its alerts have no type of their own.
func refusedCertificate(err error) bool {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return false
	}
	text := op.Err.Error()
	return strings.Contains(text, "certificate") || strings.Contains(text, "access denied")
}

// plain takes addresses out of an error: that of a redirect may open what it leads to.
func plain(err error) error {
	var u *url.Error
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.As(err, &status):
		return fmt.Errorf("the token server answers %d %s", status.StatusCode, http.StatusText(status.StatusCode))
	case errors.As(err, &u):
		if text := u.Err.Error(); strings.Contains(text, "://") || strings.Contains(text, "Location") {
			return errors.New("a redirect that cannot be followed")
		}
		return u.Err
	}
	return withoutUserinfo(err)
}

// isOwn tells whether a host is the registry's own. Others are told whose blob it is.
func isOwn(registry, host string) bool {
	return host == registry || registry == dockerDomain && host == dockerHost
}

func (p *Part) request(ctx context.Context, host Endpoint) (*http.Request, error) {
	at := url.URL{Scheme: host.Scheme, Host: host.Host, Path: host.Path + "/" + p.blob.Repository + "/blobs/" + p.blob.Digest.String()}
	if !isOwn(p.blob.Registry, host.Host) {
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
