package nydusd

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Ping asks a daemon over its API socket whether it is there at all, and waits
// no longer than timeout. Unlike a call to its filesystem this can always be
// given up: a thread that waits for an answer from a filesystem cannot be killed
// once the daemon has read the question. What the answer says does not matter.
func Ping(socket string, timeout time.Duration) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ask nydusd: %w", err)
	}
	defer unix.Close(fd)
	if err := ping(fd, socket, unix.NsecToTimeval(timeout.Nanoseconds())); err != nil {
		if errors.Is(err, unix.EAGAIN) {
			err = fmt.Errorf("no answer within %s", timeout)
		}
		return fmt.Errorf("ask nydusd at its API: %w", &os.PathError{Op: "GET", Path: socket, Err: err})
	}
	return nil
}

func ping(fd int, socket string, timeout unix.Timeval) error {
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &timeout); err != nil {
			return err
		}
	}
	err := again(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: socket}) })
	if err != nil {
		return err
	}
	err = again(func() error {
		_, err := unix.Write(fd, []byte("GET /api/v1/daemon HTTP/1.1\r\nHost: nydusd\r\n\r\n"))
		return err
	})
	if err != nil {
		return err
	}
	n := 0
	err = again(func() (err error) {
		n, err = unix.Read(fd, make([]byte, 16))
		return err
	})
	if err == nil && n == 0 {
		err = errors.New("it hung up")
	}
	return err
}

// again repeats a call that a signal has interrupted: calls with a time limit
// are not restarted by the kernel.
func again(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
