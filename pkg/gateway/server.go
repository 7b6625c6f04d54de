package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Blob is what is asked of a Source.
type Blob struct {
	// Instance is that of the image for which it is asked.
	Instance             string
	Registry, Repository string
	Digest               digest.Digest
}

// Content is a part of a blob.
type Content interface {
	io.ReadCloser
	// Size is that of the whole blob, Left what there is to read.
	Size() int64
	Left() int64
}

// Errors of a Source, to be wrapped.
var (
	// ErrNoBlob says that nobody has the blob, ErrRange that it is shorter.
	ErrNoBlob = errors.New("no such blob")
	ErrRange  = errors.New("the blob is shorter")
)

// ErrNotMounted says that there is no such instance.
var ErrNotMounted = errors.New("not mounted")

// Source gives out blobs.
type Source interface {
	// Open returns length bytes from offset on, all there are when length is
	// negative.
	Open(ctx context.Context, b Blob, offset, length int64) (Content, error)
	// Size returns how long a blob is.
	Size(ctx context.Context, b Blob) (int64, error)
}

// Images knows the images that are mounted.
type Images interface {
	// Has tells whether the image of a living instance consists of that blob, among
	// others. The error wraps ErrNotMounted when there is no such instance, and says
	// otherwise why that cannot be known.
	Has(instance string, blob digest.Digest) (bool, error)
}

// Config is what a Server needs.
type Config struct {
	Key    Key
	Images Images
	Source Source
	// Patience is how long a client may take to receive what there is; 30 seconds
	// when it is 0.
	Patience time.Duration
	Log      *slog.Logger
}

// Server answers nydusd. Use New.
type Server struct {
	cfg     Config
	buffers sync.Pool
}

// New returns a Server, an http.Handler.
func New(cfg Config) *Server {
	if cfg.Patience == 0 {
		cfg.Patience = 30 * time.Second
	}
	return &Server{cfg: cfg, buffers: sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}}
}

// HTTP returns an http.Server with the bounds that the Server wants for its
// connections.
func (s *Server) HTTP() *http.Server {
	return &http.Server{
		Handler: s, ReadHeaderTimeout: s.cfg.Patience, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
}

// refusal is an answer that is an error.
type refusal struct {
	status int
	// why is for the log, what for the client.
	why, what string
}

func refuse(status int, what, format string, args ...any) *refusal {
	return &refusal{status, fmt.Sprintf(format, args...), what}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if nonce := r.Header.Get(nonceHeader); r.URL.Path == probePath && r.Method == http.MethodGet && nonce != "" && len(nonce) <= maxNonce {
		w.Header().Set(proofHeader, s.cfg.Key.Prove(nonce))
		return
	}
	grant, no := s.grant(r)
	var blob digest.Digest
	if no == nil {
		blob, no = s.blob(r, grant)
	}
	if no == nil {
		no = s.serve(w, r, grant, blob)
	}
	if no == nil {
		return
	}
	level := slog.LevelWarn
	if no.status >= http.StatusInternalServerError {
		level = slog.LevelError
	}
	s.cfg.Log.Log(r.Context(), level, "refused to serve a blob", "event", "refused", "status", no.status, "instance", grant.Instance, "image", grant.Image,
		"client", r.RemoteAddr, "method", r.Method, "path", short(r.URL.EscapedPath()), "error", no.why)
	if no.status == http.StatusUnauthorized {
		// Without a realm nydusd asks for no other credentials.
		w.Header().Set("WWW-Authenticate", `Basic realm="gateway"`)
	}
	w.Header().Set("Connection", "close")
	http.Error(w, no.what, no.status)
}

// short bounds what a client has written.
func short(text string) string {
	const most = 256
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}

// grant opens the capability that comes with a request.
func (s *Server) grant(r *http.Request) (Grant, *refusal) {
	headers := r.Header["Authorization"]
	if len(headers) != 1 {
		return Grant{}, refuse(http.StatusUnauthorized, "a capability is needed", "%d Authorization headers, want one", len(headers))
	}
	capability, ok := strings.CutPrefix(headers[0], "Bearer ")
	if !ok {
		return Grant{}, refuse(http.StatusUnauthorized, "a capability is needed", "no bearer token")
	}
	g, err := s.cfg.Key.Open(capability)
	if err != nil {
		return Grant{}, refuse(http.StatusUnauthorized, "a capability is needed", "%v", err)
	}
	return g, nil
}

// blobPath is the only path that there is: name and digest by the OCI distribution
// specification.
var blobPath = regexp.MustCompile(`^/v2/([a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)/blobs/(sha256:[0-9a-f]{64})$`)

// blob reads what is asked for, and whether it may be had.
func (s *Server) blob(r *http.Request, g Grant) (digest.Digest, *refusal) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return "", refuse(http.StatusMethodNotAllowed, "blobs can be read only", "method %q", short(r.Method))
	}
	if r.ContentLength != 0 {
		return "", refuse(http.StatusBadRequest, "a request has no body", "it has a body")
	}
	m := blobPath.FindStringSubmatch(r.URL.Path)
	if m == nil || r.URL.EscapedPath() != r.URL.Path {
		return "", refuse(http.StatusNotFound, "there are blobs only", "no path of a blob")
	}
	if m[1] != g.Repository {
		return "", refuse(http.StatusForbidden, "the capability is for another repository", "the capability is for repository %s", g.Repository)
	}
	has, err := s.cfg.Images.Has(g.Instance, digest.Digest(m[2]))
	switch {
	case errors.Is(err, ErrNotMounted):
		return "", refuse(http.StatusForbidden, "the capability is for an image that is not mounted", "%v", err)
	case err != nil:
		return "", refuse(http.StatusServiceUnavailable, "what is mounted cannot be read; the gateway's log says why", "%v", err)
	}
	if !has {
		return "", refuse(http.StatusForbidden, "the capability is for another image", "the image has no such blob")
	}
	return digest.Digest(m[2]), nil
}

// serve answers with a blob.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, g Grant, blob digest.Digest) *refusal {
	offset, length, no := requested(r.Header["Range"])
	if no != nil {
		return no
	}
	b := Blob{g.Instance, g.Registry, g.Repository, blob}
	h := w.Header()
	if r.Method == http.MethodHead {
		size, err := s.cfg.Source.Size(r.Context(), b)
		if err != nil {
			return failed(r.Context(), err)
		}
		describe(h, blob, size)
		return nil
	}
	content, err := s.cfg.Source.Open(r.Context(), b, offset, length)
	if errors.Is(err, ErrRange) && length > 1 {
		// Its end may lie behind the blob's, its beginning not.
		content, err = s.cfg.Source.Open(r.Context(), b, offset, -1)
	}
	if err != nil {
		return failed(r.Context(), err)
	}
	defer content.Close()
	describe(h, blob, content.Left())
	if r.Header.Get("Range") != "" {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, offset+content.Left()-1, content.Size()))
		w.WriteHeader(http.StatusPartialContent)
	}
	if err := s.pass(w, content); err != nil {
		if r.Context().Err() == nil {
			s.cfg.Log.Error("broke off a blob", "event", "broken off", "instance", g.Instance, "image", g.Image, "blob", blob, "error", err)
		}
		panic(http.ErrAbortHandler)
	}
	return nil
}

// describe sets the headers of an answer with so many bytes of a blob.
func describe(h http.Header, blob digest.Digest, length int64) {
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Docker-Content-Digest", blob.String())
	h.Set("Accept-Ranges", "bytes")
	h.Set("Content-Length", strconv.FormatInt(length, 10))
}

// failed is the answer when the source has failed.
func failed(ctx context.Context, err error) *refusal {
	switch {
	case errors.Is(err, ErrRange):
		return refuse(http.StatusRequestedRangeNotSatisfiable, "the blob is shorter", "%v", err)
	case errors.Is(err, ErrNoBlob):
		return refuse(http.StatusNotFound, "no host has the blob", "%v", err)
	case ctx.Err() != nil:
		return refuse(http.StatusRequestTimeout, "the client has gone", "%v", err)
	}
	return refuse(http.StatusBadGateway, "no host gives out the blob; the gateway's log says why", "%v", err)
}

// pass copies what there is, and bounds how long the client may take for a piece.
func (s *Server) pass(w http.ResponseWriter, content io.Reader) error {
	buf := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buf)
	control := http.NewResponseController(w)
	for {
		n, err := content.Read(*buf)
		if n > 0 {
			if err := control.SetWriteDeadline(time.Now().Add(s.cfg.Patience)); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return err
			}
			if _, err := w.Write((*buf)[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// requested reads a Range header as nydusd writes it: one range, with its beginning.
// length is negative when it has no end.
func requested(headers []string) (offset, length int64, _ *refusal) {
	if len(headers) == 0 {
		return 0, -1, nil
	}
	bad := refuse(http.StatusBadRequest, "want one range of bytes with its beginning", "Range %q", short(strings.Join(headers, " ")))
	text, ok := strings.CutPrefix(headers[0], "bytes=")
	from, to, ranged := strings.Cut(text, "-")
	if len(headers) != 1 || !ok || !ranged {
		return 0, 0, bad
	}
	first, err := strconv.ParseUint(from, 10, 62)
	if err != nil {
		return 0, 0, bad
	}
	if to == "" {
		return int64(first), -1, nil
	}
	last, err := strconv.ParseUint(to, 10, 62)
	if err != nil || last < first {
		return 0, 0, bad
	}
	return int64(first), int64(last-first) + 1, nil
}
