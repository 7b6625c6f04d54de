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

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
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
	kept map[string]*keep
	// wake interrupts the wait for descriptors to die when there are others.
	wake *os.File
	// users counts connections.
	users int
	quiet func()
}

// keep is what a Holder keeps under one name.
type keep struct {
	*Custody
	// daemon is who serves the filesystem, nil once it has ended. As long as it
	// lives its end is waited for: it ends with its filesystem, while who waits
	// on a FUSE descriptor is woken by each request.
	daemon *nydusd.Process
}

func (k *keep) close() error { return errors.Join(k.release(), k.Close()) }

func (k *keep) release() error {
	if k.daemon == nil {
		return nil
	}
	err := k.daemon.Close()
	k.daemon = nil
	return err
}

// poll is what to wait for.
func (k *keep) poll() unix.PollFd {
	if k.daemon != nil {
		return unix.PollFd{Fd: int32(k.daemon.FD), Events: unix.POLLIN}
	}
	return unix.PollFd{Fd: int32(k.fuse)} // POLLERR comes unasked
}

type message struct {
	Op   string `json:"op,omitempty"` // put, get, drop, list
	Name string `json:"name,omitempty"`
	// PID and Start name the daemon that serves what is put.
	PID   int      `json:"pid,omitempty"`
	Start uint64   `json:"start,omitempty"`
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
	h.kept, h.wake = map[string]*keep{}, w
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
	for name, k := range h.kept {
		errs = append(errs, k.close())
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
		for _, k := range h.kept {
			polls = append(polls, k.poll())
		}
		h.mu.Unlock()
		if _, err := unix.Poll(polls, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if polls[0].Revents != 0 {
			_, _ = wake.Read(make([]byte, 64))
		}
		h.mu.Lock()
		for name, k := range h.kept {
			if k.daemon != nil && k.daemon.Wait(time.Now()) {
				_ = k.release()
			}
			if k.daemon == nil && !k.Alive() {
				_ = k.close()
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
func (h *Holder) answer(conn *net.UnixConn, m message, state []byte, fuse int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	answer, state, fuse := h.do(m, state, fuse)
	return transmit(conn, answer, state, fuse)
}

func (h *Holder) do(m message, state []byte, fuse int) (answer message, outState []byte, out int) {
	if m.Op != "put" && fuse >= 0 {
		unix.Close(fuse)
	}
	old := h.kept[m.Name]
	switch m.Op {
	case "put":
		answer.Fault = h.put(m, state, fuse)
	case "get":
		if old == nil {
			return message{Fault: "not kept"}, nil, -1
		}
		return message{}, old.State, old.fuse
	case "drop":
		if old != nil {
			_ = old.close()
			delete(h.kept, m.Name)
			_ = h.wakeUp()
		}
	case "list":
		for name := range h.kept {
			answer.Names = append(answer.Names, name)
		}
	default:
		answer.Fault = "unknown request " + m.Op
	}
	return answer, nil, -1
}

func (h *Holder) put(m message, state []byte, fuse int) (fault string) {
	if fuse < 0 || m.Name == "" || len(state) == 0 {
		if fuse >= 0 {
			unix.Close(fuse)
		}
		return "put needs a name, a state and a descriptor"
	}
	k := &keep{Custody: New(bytes.Clone(state), fuse)}
	if m.PID > 0 {
		// One that cannot be found has ended, or its filesystem is watched instead.
		k.daemon, _ = nydusd.Find(m.PID, m.Start)
	}
	if old := h.kept[m.Name]; old != nil {
		_ = old.close()
	}
	h.kept[m.Name] = k
	_ = h.wakeUp()
	return ""
}

// ours tells whether the other side is of this user.
func ours(conn *net.UnixConn) bool {
	cred, err := peer(conn)
	return err == nil && int(cred.Uid) == os.Geteuid()
}

func peer(conn *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var got error
	err = raw.Control(func(fd uintptr) { cred, got = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(err, got)
}

func transmit(conn *net.UnixConn, m message, state []byte, fuse int) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if fuse >= 0 {
		oob = unix.UnixRights(fuse)
	}
	_, _, err = conn.WriteMsgUnix(append(append(text, '\n'), state...), oob, nil)
	return err
}

// receive returns -1 for no descriptor.
func receive(conn *net.UnixConn) (m message, state []byte, fuse int, err error) {
	fuse = -1
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return m, nil, -1, err
	}
	for _, fd := range descriptors(oob[:oobn]) {
		if fuse < 0 {
			fuse = fd
			continue
		}
		unix.Close(fd)
	}
	text, state, _ := bytes.Cut(buf[:n], []byte("\n"))
	switch {
	case n == 0:
		err = io.EOF
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("message is too long")
	default:
		err = json.Unmarshal(text, &m)
	}
	if err != nil && fuse >= 0 {
		unix.Close(fuse)
		fuse = -1
	}
	return m, state, fuse, err
}

// Spare is a connection to a Holder. Its calls may be made by several goroutines,
// and none takes longer than SpareTimeout.
type Spare struct {
	mu   sync.Mutex
	conn *net.UnixConn
	pid  int
}

// SpareTimeout bounds a question to a Holder, which answers within a millisecond
// unless it was stopped.
const SpareTimeout = 3 * time.Second

// Connect connects to the Holder that listens on path.
func Connect(path string) (*Spare, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("connect to holder: %w", err)
	}
	s := &Spare{conn: conn}
	if cred, err := peer(conn); err == nil {
		s.pid = int(cred.Pid)
	}
	return s, nil
}

// PID is the holder's process, 0 when that cannot be known.
func (s *Spare) PID() int { return s.pid }

// Close ends the connection; what is kept stays kept.
func (s *Spare) Close() error {
	// Wakes Gone, which holds the descriptor.
	return errors.Join(s.conn.CloseRead(), s.conn.CloseWrite(), s.conn.Close())
}

// Put gives a copy of c to the holder, under a name. pid and start name the daemon
// that serves it now, zeros for none.
func (s *Spare) Put(name string, c *Custody, pid int, start uint64) error {
	_, _, _, err := s.ask(message{Op: "put", Name: name, PID: pid, Start: start}, c.State, c.fuse)
	return err
}

// Get returns a copy of what is kept under a name.
func (s *Spare) Get(name string) (*Custody, error) {
	_, state, fuse, err := s.ask(message{Op: "get", Name: name}, nil, -1)
	if err == nil && fuse < 0 {
		err = fmt.Errorf("holder: get %s: no descriptor came", name)
	}
	if err != nil {
		return nil, err
	}
	return New(state, fuse), nil
}

// Drop makes the holder let go of a name; one that it does not have is no error.
func (s *Spare) Drop(name string) error {
	_, _, _, err := s.ask(message{Op: "drop", Name: name}, nil, -1)
	return err
}

// Names lists what is kept.
func (s *Spare) Names() ([]string, error) {
	m, _, _, err := s.ask(message{Op: "list"}, nil, -1)
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

// ask returns -1 for no descriptor. After an error the connection is of no use: an
// answer that comes late would be taken for the next one's.
func (s *Spare) ask(m message, state []byte, fuse int) (answer message, got []byte, fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd = -1
	if err = s.conn.SetDeadline(time.Now().Add(SpareTimeout)); err == nil {
		err = transmit(s.conn, m, state, fuse)
	}
	if err == nil {
		answer, got, fd, err = receive(s.conn)
	}
	if err != nil {
		err = errors.Join(err, s.conn.CloseRead(), s.conn.CloseWrite())
	} else if answer.Fault != "" {
		err = errors.New(answer.Fault)
	}
	if err != nil {
		return answer, nil, -1, fmt.Errorf("holder: %s %s: %w", m.Op, m.Name, err)
	}
	return answer, got, fd, nil
}
