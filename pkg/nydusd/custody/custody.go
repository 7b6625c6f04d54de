// Package custody keeps a daemon's FUSE descriptor and state, with which a
// successor goes on serving what its predecessor left, and passes both on.
//
// The descriptor keeps neither the filesystem nor its mounts: when the last of
// these goes, it is dead (see Alive). The state holds nydusd's configuration,
// credentials included: it is a secret, and stays in memory.
//
// The protocol is upstream's (nydus-service's upgrade manager): the daemon connects
// to the unix socket of its --supervisor, whether it is to send or to receive. Only
// who listens knows which, so each exchange listens for itself, once.
package custody

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// MaxState is how long a state may be: a successor reads it at once, into a
// buffer of this size.
const MaxState = 32 << 10

// Custody is what a successor needs. It is closed once.
type Custody struct {
	// State is opaque, and a secret.
	State []byte
	// fuse is a plain number, and not an os.File: the daemon made the descriptor
	// non-blocking, so Go would hand it to its poller, which then wakes with each
	// request to the filesystem.
	fuse int
}

// New makes a Custody of a descriptor that it owns from now on.
func New(state []byte, fuse int) *Custody { return &Custody{State: state, fuse: fuse} }

// String keeps the state out of logs.
func (*Custody) String() string { return "[custody]" }

// GoString does so for %#v.
func (*Custody) GoString() string { return "[custody]" }

// Close lets the descriptor go.
func (c *Custody) Close() error { return unix.Close(c.fuse) }

// Alive tells whether the filesystem still exists. While nothing but the
// Custody has the descriptor, its users wait.
func (c *Custody) Alive() bool {
	polls := []unix.PollFd{{Fd: int32(c.fuse)}}
	for {
		_, err := unix.Poll(polls, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && polls[0].Revents&unix.POLLERR == 0
		}
	}
}

// notifyResend is FUSE_NOTIFY_RESEND of the kernel's fuse.h.
const notifyResend = 7

// Resends tells whether the kernel can do what Resend wants, from Linux 6.9 on. To try
// it takes a filesystem that nobody serves.
func Resends() bool {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false
	}
	return resends(unix.ByteSliceToString(name.Release[:]))
}

func resends(release string) bool {
	var major, minor int
	n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor)
	return n == 2 && (major > 6 || major == 6 && minor >= 9)
}

// Resend makes the kernel ask again what the dead daemon had read and not
// answered. It must not be called while a daemon serves: that would take its next
// answer for the end of the filesystem. Before Linux 6.9 it returns EINVAL, and
// such requests hang until they are aborted.
func (c *Custody) Resend() error {
	message := make([]byte, 16)
	binary.NativeEndian.PutUint32(message, uint32(len(message)))
	binary.NativeEndian.PutUint32(message[4:], notifyResend)
	for {
		_, err := unix.Write(c.fuse, message)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("make the kernel send requests again (Linux 6.9 and newer can): %w", err)
		}
		return nil
	}
}

// ErrUnable says that a daemon answers as if it had sent and sends nothing:
// before 2.3 that is all it can do.
var ErrUnable = errors.New("nydusd cannot hand its filesystem over")

// settle is how long a daemon may take to connect after it said that it has sent.
const settle = 500 * time.Millisecond

// Receive listens on path, makes the daemon send by calling send, and returns what
// came, also when the daemon has ended before it answered send. The error is
// ErrUnable for a daemon that cannot. ctx must have a deadline: a daemon may stop in
// the middle.
func Receive(ctx context.Context, path string, send func(context.Context) error) (*Custody, error) {
	var c *Custody
	err := exchange(ctx, path, send, func(conn *net.UnixConn) (err error) {
		c, err = read(conn)
		return err
	})
	if c != nil {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("take FUSE descriptor and state: %w", err)
	}
	return c, nil
}

// Give listens on path, makes the successor take by calling take, and sends c,
// which stays the caller's.
func Give(ctx context.Context, path string, c *Custody, take func(context.Context) error) error {
	if len(c.State) > MaxState {
		return fmt.Errorf("hand FUSE descriptor and state over: the state has %d bytes, a successor reads %d", len(c.State), MaxState)
	}
	err := exchange(ctx, path, take, func(conn *net.UnixConn) error {
		// In one message: the successor reads once.
		_, _, err := conn.WriteMsgUnix(c.State, unix.UnixRights(c.fuse), nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("hand FUSE descriptor and state over: %w", err)
	}
	return nil
}

// exchange listens, triggers the daemon and serves its one connection.
func exchange(ctx context.Context, path string, trigger func(context.Context) error, serve func(*net.UnixConn) error) (err error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}) // its file goes with it
	if err != nil {
		return err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	served := make(chan error, 1)
	go func() {
		conn, err := l.AcceptUnix()
		if err == nil {
			if deadline, ok := ctx.Deadline(); ok {
				err = conn.SetDeadline(deadline)
			}
			err = errors.Join(err, serve(conn), conn.Close())
		}
		served <- err
	}()
	if err := trigger(ctx); err != nil {
		// It may have connected before, and not be accepted yet.
		return errors.Join(err, l.SetDeadline(time.Now().Add(grace)), ignoreNobody(<-served))
	}
	select {
	case err := <-served:
		return err
	case <-time.After(settle):
	case <-ctx.Done():
	}
	// A connection that was accepted is served to its end.
	l.Close()
	err = <-served
	switch {
	case errors.Is(err, net.ErrClosed) && ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, net.ErrClosed):
		return ErrUnable
	}
	return err
}

// grace is how long one that connected is waited for after the call has failed.
const grace = 50 * time.Millisecond

// ignoreNobody is nil for the error that nobody has connected.
func ignoreNobody(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// read reads a state to its end, and the descriptor beside it.
func read(conn *net.UnixConn) (*Custody, error) {
	var state []byte
	fuse := -1
	buf, oob := make([]byte, MaxState), make([]byte, unix.CmsgSpace(4*4))
	for {
		n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
		if n > 0 {
			state = append(state, buf[:n]...)
		}
		if fds := descriptors(oob[:oobn]); len(fds) > 0 {
			for _, fd := range fds[1:] {
				unix.Close(fd)
			}
			if fuse >= 0 {
				unix.Close(fds[0])
			} else {
				fuse = fds[0]
			}
		}
		switch {
		case errors.Is(err, io.EOF) || err == nil && n == 0 && oobn == 0:
			if fuse < 0 || len(state) == 0 {
				err = fmt.Errorf("%d bytes of state came, with a descriptor: %v", len(state), fuse >= 0)
				break
			}
			return New(state, fuse), nil
		case err == nil && len(state) <= 64*MaxState:
			continue
		case err == nil:
			err = errors.New("the state has no end")
		}
		if fuse >= 0 {
			unix.Close(fuse)
		}
		return nil, err
	}
}

func descriptors(oob []byte) []int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var fds []int
	for _, m := range messages {
		if rights, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, rights...)
		}
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds
}
