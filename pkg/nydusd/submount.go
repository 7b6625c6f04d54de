package nydusd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Submount is an image that a daemon is to serve beside others.
type Submount struct {
	// Name is the directory of the daemon's mountpoint where the image appears.
	Name string
	// Bootstrap is the image's metadata file.
	Bootstrap string
	// Config is the image's configuration, a secret.
	Config string
}

// RefusedError is a daemon's answer that it does not serve the image. It goes on
// serving the others.
type RefusedError struct {
	// Status is HTTP's.
	Status int
	// Message is nydusd's.
	Message string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("status %d: %s", e.Status, e.Message)
}

// AddSubmount makes the daemon that listens on socket, and was started without an
// image, serve one more. Unless the error is a RefusedError it is not known what
// the daemon made of it. This is HTTP as nydusd speaks it, and no more: the mount
// helper links no HTTP client, nor Go's network.
func AddSubmount(ctx context.Context, socket string, m Submount) error {
	err := addSubmount(ctx, socket, m)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("POST /api/v1/mount of %s at %s: %w", m.Name, socket, err)
}

func addSubmount(ctx context.Context, socket string, m Submount) error {
	body, err := json.Marshal(map[string]any{
		"source": m.Bootstrap, "fs_type": "rafs", "config": m.Config, "prefetch_files": []string{},
	})
	if err != nil {
		return err
	}
	c, err := dialAPI(ctx, socket)
	if err != nil {
		return err
	}
	defer c.close()
	head := fmt.Sprintf("POST /api/v1/mount?mountpoint=/%s HTTP/1.1\r\nHost: nydusd\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", m.Name, len(body))
	if err := c.write(append([]byte(head), body...)); err != nil {
		return err
	}
	status, answer, err := c.answer()
	if err != nil || status < 300 {
		return err
	}
	return &RefusedError{status, refusal(answer)}
}

// Listens tells whether a daemon accepts connections on socket.
func Listens(ctx context.Context, socket string) error {
	c, err := dialAPI(ctx, socket)
	if err == nil {
		c.close()
	}
	return err
}

// refusal is what nydusd says, without what is JSON about it.
func refusal(answer []byte) string {
	var e struct{ Code, Message string }
	if json.Unmarshal(answer, &e) != nil || e.Code+e.Message == "" {
		return strings.TrimSpace(string(answer))
	}
	return strings.TrimSpace(e.Code + " " + e.Message)
}

// apiConn is a connection to a daemon's API. It is no os.File: that would be
// polled, and this one is blocked in.
type apiConn struct {
	fd   int
	stop func() bool
	over chan struct{}
	rest []byte
}

// apiTimeout bounds a call whose context has no deadline.
const apiTimeout = time.Minute

// maxAnswer bounds a daemon's answer in bytes.
const maxAnswer = 64 << 10

// dialAPI connects. The end of ctx ends whatever waits on the connection.
func dialAPI(ctx context.Context, socket string) (*apiConn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	left := apiTimeout
	if d, ok := ctx.Deadline(); ok {
		// Somewhat later than ctx, whose end says why.
		left = max(0, time.Until(d)) + time.Second
	}
	// A daemon that accepts nobody keeps whoever connects waiting.
	limit := unix.NsecToTimeval(int64(left))
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit))
	if err == nil {
		err = retry(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: socket}) })
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect: %w", err), unix.Close(fd))
	}
	c := &apiConn{fd: fd, over: make(chan struct{})}
	c.stop = context.AfterFunc(ctx, func() {
		defer close(c.over)
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // the peer may have gone first
	})
	return c, nil
}

func (c *apiConn) close() {
	if !c.stop() {
		<-c.over // or it would shut another one's descriptor down
	}
	unix.Close(c.fd)
}

// retry makes a call again that a signal interrupted: with a timeout set the
// kernel does not.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (c *apiConn) write(p []byte) error {
	for len(p) > 0 {
		err := retry(func() error {
			n, err := unix.SendmsgN(c.fd, p, nil, nil, unix.MSG_NOSIGNAL)
			p = p[max(n, 0):]
			return err
		})
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// more reads what comes next.
func (c *apiConn) more() error {
	buf := make([]byte, 4096)
	var n int
	err := retry(func() (err error) {
		n, err = unix.Read(c.fd, buf)
		return err
	})
	switch {
	case errors.Is(err, unix.EAGAIN):
		return errors.New("no answer in time")
	case err != nil:
		return fmt.Errorf("receive: %w", err)
	case n == 0:
		return io.ErrUnexpectedEOF
	case len(c.rest)+n > maxAnswer:
		return fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	c.rest = append(c.rest, buf[:n]...)
	return nil
}

// answer reads one answer, which has a length or no body.
func (c *apiConn) answer() (status int, body []byte, err error) {
	var head []byte
	for found := false; !found; {
		if head, body, found = bytes.Cut(c.rest, []byte("\r\n\r\n")); !found {
			if err := c.more(); err != nil {
				return 0, nil, err
			}
		}
	}
	lines := strings.Split(string(head), "\r\n")
	if n, _ := fmt.Sscanf(lines[0], "HTTP/1.1 %d", &status); n != 1 {
		return 0, nil, fmt.Errorf("the answer begins with %q", lines[0])
	}
	length := 0
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, ":")
		if !strings.EqualFold(name, "Content-Length") {
			continue
		}
		if length, err = strconv.Atoi(strings.TrimSpace(value)); err != nil || length < 0 || length > maxAnswer {
			return 0, nil, fmt.Errorf("the answer has the length %q", strings.TrimSpace(value))
		}
	}
	for len(body) < length {
		if err := c.more(); err != nil {
			return 0, nil, err
		}
		body = c.rest[len(head)+4:]
	}
	return status, body[:length], nil
}
