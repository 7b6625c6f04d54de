package custody

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pipe stands for a FUSE descriptor: when its other end goes, poll reports an error
// on it too.
func pipe(t *testing.T) (keep, other *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return w, r
}

func sameFD(t *testing.T, fd int, file *os.File) {
	t.Helper()
	var x, y unix.Stat_t
	must(t, unix.Fstat(fd, &x))
	must(t, unix.Fstat(int(file.Fd()), &y))
	if x.Dev != y.Dev || x.Ino != y.Ino {
		t.Error("another descriptor came")
	}
}

// As nydusd does it: the state in pieces, and its end is the end of the file.
func TestReceive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fuse, _ := pipe(t)
	state := bytes.Repeat([]byte("state"), 1000)
	c, err := Receive(t.Context(), path, func(context.Context) error {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		must(t, err)
		defer conn.Close()
		_, _, err = conn.WriteMsgUnix(state[:100], unix.UnixRights(int(fuse.Fd())), nil)
		must(t, err)
		_, err = conn.Write(state[100:])
		return err
	})
	must(t, err)
	defer c.Close()
	if !bytes.Equal(c.State, state) {
		t.Errorf("%d bytes of state came, want %d", len(c.State), len(state))
	}
	sameFD(t, c.fuse, fuse)
	for _, verb := range []string{"%v", "%s", "%#v"} {
		if text := fmt.Sprintf(verb, c); text != "[custody]" {
			t.Errorf("%s prints %q", verb, text)
		}
	}
}

// A daemon that dies after it has sent all, and before it has answered.
func TestReceiveFromOneThatDies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fuse, _ := pipe(t)
	c, err := Receive(t.Context(), path, func(context.Context) error {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		must(t, err)
		_, _, err = conn.WriteMsgUnix([]byte("state"), unix.UnixRights(int(fuse.Fd())), nil)
		return errors.Join(err, conn.Close(), errors.New("connection reset"))
	})
	must(t, err)
	defer c.Close()
	if string(c.State) != "state" {
		t.Errorf("the state %q came", c.State)
	}
	sameFD(t, c.fuse, fuse)
}

func TestReceiveFails(t *testing.T) {
	refusal := errors.New("refused")
	for name, c := range map[string]struct {
		send func(path string) error
		want error
	}{
		"sends nothing": {func(string) error { return nil }, ErrUnable},
		"refuses":       {func(string) error { return refusal }, refusal},
		"no descriptor": {func(path string) error {
			conn, err := net.Dial("unix", path)
			must(t, err)
			_, err = conn.Write([]byte("state"))
			return errors.Join(err, conn.Close())
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			got, err := Receive(t.Context(), path, func(context.Context) error { return c.send(path) })
			if err == nil || got != nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v, %v; want %v", got, err, c.want)
			}
			if _, err := os.Lstat(path); err == nil {
				t.Error("the socket was left")
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := Receive(ctx, filepath.Join(t.TempDir(), "s"), func(ctx context.Context) error { return nil })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past its deadline: %v", err)
	}
}

// A successor reads once: all must come in one message.
func TestGive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fuse, _ := pipe(t)
	c := New(bytes.Repeat([]byte("x"), MaxState), int(fuse.Fd()))
	err := Give(t.Context(), path, c, func(context.Context) error {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		must(t, err)
		defer conn.Close()
		buf, oob := make([]byte, MaxState), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
		must(t, err)
		fds := descriptors(oob[:oobn])
		if n != MaxState || len(fds) != 1 {
			t.Fatalf("%d bytes and %d descriptors came at once", n, len(fds))
		}
		defer unix.Close(fds[0])
		sameFD(t, fds[0], fuse)
		return nil
	})
	must(t, err)
	c.State = append(c.State, 'x')
	if err := Give(t.Context(), path, c, func(context.Context) error { return nil }); err == nil {
		t.Error("a state that is too long was given")
	}
}

// holder serves in this process.
func holder(t *testing.T) (path string, done <-chan error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "h")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- new(Holder).Serve(t.Context(), l) }()
	return path, served
}

func TestHolder(t *testing.T) {
	path, done := holder(t)
	first, err := Connect(path)
	must(t, err)
	fuse, other := pipe(t)
	state := bytes.Repeat([]byte("s"), MaxState)
	must(t, first.Put("one", New(state, int(fuse.Fd())), 0, 0))
	must(t, first.Put("one", New(state, int(fuse.Fd())), 0, 0)) // again
	must(t, first.Close())

	second, err := Connect(path)
	must(t, err)
	if names, err := second.Names(); err != nil || len(names) != 1 || names[0] != "one" {
		t.Fatalf("kept are %q, %v; want one", names, err)
	}
	c, err := second.Get("one")
	must(t, err)
	if !bytes.Equal(c.State, state) {
		t.Errorf("another state came, of %d bytes", len(c.State))
	}
	sameFD(t, c.fuse, fuse)
	if _, err := second.Get("two"); err == nil {
		t.Error("got what nobody gave")
	}
	must(t, second.Drop("two"))
	if !c.Alive() {
		t.Error("not alive")
	}
	// What is dead goes by itself, and with the last of it and of its users the holder.
	must(t, c.Close())
	must(t, fuse.Close())
	must(t, other.Close())
	must(t, second.Close())
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(5 * time.Second):
		t.Error("the holder does not end")
	}
}

func TestSpareTellsTheEnd(t *testing.T) {
	path, done := holder(t)
	s, err := Connect(path)
	must(t, err)
	gone := make(chan struct{})
	go func() {
		s.Gone()
		close(gone)
	}()
	if _, err := s.Names(); err != nil {
		t.Error(err)
	}
	select {
	case <-gone:
		t.Error("gone, while it answers")
	default:
	}
	must(t, s.Close())
	<-gone
	must(t, <-done)
}
