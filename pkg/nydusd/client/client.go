// Package client speaks nydusd's API: HTTP over the daemon's unix socket, as
// upstream's nydus-api defines it. Errors name the call, the socket, the instance and
// the cause.
//
// A daemon that hangs does not answer here either: every call is bounded by its
// context, and by Timeout. Do not use it in the mount helper, which links no HTTP;
// and not to find out whether a filesystem serves: RUNNING says that the daemon
// runs, even when every read fails.
package client

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"
)

// Timeout bounds a call whose context has no earlier deadline.
const Timeout = 10 * time.Second

// maxAnswer bounds what is read of an answer; the events take up to some 100 KB.
const maxAnswer = 1 << 20

// Client is for one daemon. It is safe for use by several goroutines.
type Client struct {
	socket string
	http   http.Client
}

// New returns the client of the daemon that listens on socket.
func New(socket string) *Client {
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		// A connection that stays open would be one more descriptor per daemon.
		DisableKeepAlives: true,
	}}}
}

// State is a daemon's own word for what it does.
type State string

// The states.
const (
	StateInit    State = "INIT"
	StateReady   State = "READY"
	StateRunning State = "RUNNING"
	StateStopped State = "STOPPED"
)

// Info is what a daemon says of itself.
type Info struct {
	ID      string `json:"id"`
	State   State  `json:"state"`
	Version struct {
		Package string `json:"package_ver"`
	} `json:"version"`
}

// Info asks the daemon for its state.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var i Info
	err := c.call(ctx, http.MethodGet, "/api/v1/daemon", &i)
	return i, err
}

// Events are the last errors of a daemon's backends.
type Events struct {
	// Total counts all errors since the start.
	Total int `json:"total_errors"`
	// Errors are the last ones.
	Errors []string `json:"errors"`
}

// Events returns the daemon's last errors.
func (c *Client) Events(ctx context.Context) (Events, error) {
	var e Events
	err := c.call(ctx, http.MethodGet, "/api/v1/daemon/events", &e)
	return e, err
}

// Start makes a successor serve, after Takeover.
func (c *Client) Start(ctx context.Context) error {
	return c.call(ctx, http.MethodPut, "/api/v1/daemon/start", nil)
}

// Exit makes the daemon end and leave its mount to a successor. Without one the
// mount is dead.
func (c *Client) Exit(ctx context.Context) error {
	return c.call(ctx, http.MethodPut, "/api/v1/daemon/exit", nil)
}

// SendFD makes the daemon send descriptor and state to its supervisor's socket.
func (c *Client) SendFD(ctx context.Context) error {
	return c.call(ctx, http.MethodPut, "/api/v1/daemon/fuse/sendfd", nil)
}

// Takeover makes a successor fetch descriptor and state from its supervisor's
// socket. After an error it is spoiled, and must be killed.
func (c *Client) Takeover(ctx context.Context) error {
	return c.call(ctx, http.MethodPut, "/api/v1/daemon/fuse/takeover", nil)
}

// Error is a daemon's refusal.
type Error struct {
	// Status is HTTP's.
	Status int
	// Code and Message are nydusd's.
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string {
	text := strings.TrimSpace(e.Code + " " + e.Message)
	if text == "" {
		text = http.StatusText(e.Status)
	}
	return fmt.Sprintf("status %d: %s", e.Status, text)
}

func (c *Client) call(ctx context.Context, method, path string, answer any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Timeout, fmt.Errorf("no answer within %s", Timeout))
	defer cancel()
	if err := c.do(ctx, method, path, answer); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("%s %s at %s: %w", method, path, c.where(), err)
	}
	return nil
}

// where names the socket, and the instance whose daemon it is: their directories
// have the instances' keys for names, see package instance.
func (c *Client) where() string {
	generation := filepath.Dir(c.socket)
	key := filepath.Base(filepath.Dir(generation))
	if raw, err := hex.DecodeString(key); err != nil || len(raw) != 16 {
		return c.socket
	}
	return fmt.Sprintf("%s (instance %s, generation %s)", c.socket, key, strings.TrimPrefix(filepath.Base(generation), "g"))
}

func (c *Client) do(ctx context.Context, method, path string, answer any) (err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://nydusd"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// Without the URL, which is made up.
		for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
			err = inner
		}
		return err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		e := &Error{Status: resp.StatusCode}
		_ = json.Unmarshal(body, e) // what is no JSON tells nothing more
		return e
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}
