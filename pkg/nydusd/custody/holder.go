package custody

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Holder is a second keeper: a process that does nothing else, so that it is there
// when the first one and a daemon end together. It serves a unix seqpacket socket,
// one message a request and one an answer, each a JSON object, a line break and a
// state, with the descriptor beside it. Only its own user is answered.
//
// It keeps what is alive, and Serve returns once nothing is left to keep and nobody
// is connected.
type Holder struct {
	mu   sync.Mutex
	kept map[string]*Custody
	// wake interrupts the wait for descriptors to die when there are others.
	wake *os.File
	// users counts connections.
	users int
	quiet func()
}

type message struct {
	Op    string   `json:"op,omitempty"` // put, get, drop, list
	Name  string   `json:"name,omitempty"`
	Names []string `json:"names,omitempty"`
	Fault string   `json:"fault,omitempty"`
}

// firstUse is how long a Holder waits for its first connection.
const firstUse = 10 * time.Second

// maxMessage is a state with its header.
const maxMessage = MaxState + 16<<10

// Serve answers on l until nothing is left to keep and nobody is connected, or ctx
// ends. It closes l, and what it kept.
func (h *Holder) Serve(ctx context.Context, l *net.UnixListener) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	h.kept, h.wake = map[string]*Custody{}, w
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h.quiet = cancel
	context.AfterFunc(ctx, func() { l.Close() })
	// Whoever started it may have ended before it connected.
	first := time.AfterFunc(firstUse, func() { h.count(0) })
	defer first.Stop()
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { h.follow(ctx, r) })
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			return errors.Join(h.wakeUp(), h.closeAll())
		}
		if err != nil {
			cancel()
			return errors.Join(fmt.Errorf("holder: %w", err), h.wakeUp(), h.closeAll())
		}
		h.count(1)
		all.Go(func() {
			defer h.count(-1)
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			h.talk(conn)
		})
	}
}

func (h *Holder) wakeUp() error {
	_, err := h.wake.Write([]byte{0})
	return err
}

func (h *Holder) closeAll() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for name, c := range h.kept {
		errs = append(errs, c.Close())
		delete(h.kept, name)
	}
	return errors.Join(errs...)
}

func (h *Holder) count(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.users += n
	h.end()
}

// end ends Serve when there is nothing to do any more.
func (h *Holder) end() {
	if h.users == 0 && len(h.kept) == 0 {
		h.quiet()
	}
}

// follow lets descriptors go whose filesystem is gone.
func (h *Holder) follow(ctx context.Context, wake *os.File) {
	for ctx.Err() == nil {
		polls := []unix.PollFd{{Fd: int32(wake.Fd()), Events: unix.POLLIN}}
		h.mu.Lock()
		for _, c := range h.kept {
			polls = append(polls, unix.PollFd{Fd: int32(c.fuse.Fd())}) // POLLERR comes unasked
		}
		h.mu.Unlock()
		if _, err := unix.Poll(polls, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if polls[0].Revents != 0 {
			_, _ = wake.Read(make([]byte, 64))
		}
		h.mu.Lock()
		for name, c := range h.kept {
			if !c.Alive() {
				c.Close()
				delete(h.kept, name)
			}
		}
		h.end()
		h.mu.Unlock()
	}
}

func (h *Holder) talk(conn *net.UnixConn) {
	if !ours(conn) {
		return
	}
	for {
		m, state, fuse, err := receive(conn)
		if err != nil {
			return
		}
		if err := h.answer(conn, m, state, fuse); err != nil {
			return
		}
	}
}

// answer keeps the lock until the answer is sent: what it holds may be let go
// otherwise.
func (h *Holder) answer(conn *net.UnixConn, m message, state []byte, fuse *os.File) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	answer, state, fuse := h.do(m, state, fuse)
	return transmit(conn, answer, state, fuse)
}

func (h *Holder) do(m message, state []byte, fuse *os.File) (answer message, outState []byte, out *os.File) {
	if m.Op != "put" && fuse != nil {
		fuse.Close()
	}
	old := h.kept[m.Name]
	switch m.Op {
	case "put":
		if fuse == nil || m.Name == "" || len(state) == 0 {
			return message{Fault: "put needs a name, a state and a descriptor"}, nil, nil
		}
		h.kept[m.Name] = New(bytes.Clone(state), fuse)
		if old != nil {
			old.Close()
		}
		_ = h.wakeUp()
	case "get":
		if old == nil {
			return message{Fault: "not kept"}, nil, nil
		}
		return message{}, old.State, old.fuse
	case "drop":
		if old != nil {
			old.Close()
			delete(h.kept, m.Name)
			_ = h.wakeUp()
		}
	case "list":
		for name := range h.kept {
			answer.Names = append(answer.Names, name)
		}
	default:
		return message{Fault: "unknown request " + m.Op}, nil, nil
	}
	return answer, nil, nil
}

// ours tells whether the other side is of this user.
func ours(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var got error
	err = raw.Control(func(fd uintptr) { cred, got = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return err == nil && got == nil && int(cred.Uid) == os.Geteuid()
}

func transmit(conn *net.UnixConn, m message, state []byte, fuse *os.File) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if fuse != nil {
		oob = unix.UnixRights(int(fuse.Fd()))
	}
	_, _, err = conn.WriteMsgUnix(append(append(text, '\n'), state...), oob, nil)
	return err
}

func receive(conn *net.UnixConn) (m message, state []byte, fuse *os.File, err error) {
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	fds := descriptors(oob[:oobn])
	for _, fd := range fds {
		if fuse == nil {
			fuse = os.NewFile(uintptr(fd), "/dev/fuse")
			continue
		}
		unix.Close(fd)
	}
	text, state, _ := bytes.Cut(buf[:n], []byte("\n"))
	switch {
	case err == nil && n == 0:
		err = io.EOF
	case err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("message is too long")
	case err == nil:
		err = json.Unmarshal(text, &m)
	}
	if err != nil && fuse != nil {
		fuse.Close()
		fuse = nil
	}
	return m, state, fuse, err
}

// Spare is a connection to a Holder. Its calls may be made by several goroutines.
type Spare struct {
	mu   sync.Mutex
	conn *net.UnixConn
}

// Connect connects to the Holder that listens on path.
func Connect(path string) (*Spare, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("connect to holder: %w", err)
	}
	return &Spare{conn: conn}, nil
}

// Close ends the connection; what is kept stays kept.
func (s *Spare) Close() error {
	// Wakes Gone, which holds the descriptor.
	return errors.Join(s.conn.CloseRead(), s.conn.CloseWrite(), s.conn.Close())
}

// Put gives a copy of c to the holder, under a name.
func (s *Spare) Put(name string, c *Custody) error {
	_, _, _, err := s.ask(message{Op: "put", Name: name}, c.State, c.fuse)
	return err
}

// Get returns a copy of what is kept under a name.
func (s *Spare) Get(name string) (*Custody, error) {
	_, state, fuse, err := s.ask(message{Op: "get", Name: name}, nil, nil)
	if err == nil && fuse == nil {
		err = fmt.Errorf("holder: get %s: no descriptor came", name)
	}
	if err != nil {
		return nil, err
	}
	return New(state, fuse), nil
}

// Drop makes the holder let go of a name; one that it does not have is no error.
func (s *Spare) Drop(name string) error {
	_, _, _, err := s.ask(message{Op: "drop", Name: name}, nil, nil)
	return err
}

// Names lists what is kept.
func (s *Spare) Names() ([]string, error) {
	m, _, _, err := s.ask(message{Op: "list"}, nil, nil)
	return m.Names, err
}

// Gone waits until the holder has ended, or the connection was closed.
func (s *Spare) Gone() {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for {
			// Only what cannot be read means the end: answers are read elsewhere.
			polls := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			_, err := unix.Poll(polls, -1)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
}

func (s *Spare) ask(m message, state []byte, fuse *os.File) (answer message, got []byte, f *os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err = transmit(s.conn, m, state, fuse); err == nil {
		answer, got, f, err = receive(s.conn)
	}
	if err == nil && answer.Fault != "" {
		err = errors.New(answer.Fault)
	}
	if err != nil {
		return answer, nil, nil, fmt.Errorf("holder: %s %s: %w", m.Op, m.Name, err)
	}
	return answer, got, f, nil
}
