package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// dialTimeout bounds the question whether somebody listens on a socket.
const dialTimeout = 2 * time.Second

// socket is a listener on a unix socket with a name of its own choice.
type socket struct {
	net.Listener
	path string
	made os.FileInfo
}

// remove removes the socket's name, unless it has become another one's.
func (s *socket) remove() error {
	if now, err := os.Lstat(s.path); err != nil || !os.SameFile(now, s.made) {
		return nil
	}
	return os.Remove(s.path)
}

// listen makes the socket, mode 0600. It takes the place of one that nobody
// listens on. Under its name the socket appears whole: listening, with its mode.
func listen(ctx context.Context, path string) (*socket, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("create directory of socket: %w", err)
	}
	if err := vacant(ctx, path); err != nil {
		return nil, err
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // its name will be another one
	made, err := os.Lstat(tmp)
	if err := errors.Join(err, os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		return nil, errors.Join(fmt.Errorf("make socket: %w", err), l.Close(), os.Remove(tmp))
	}
	return &socket{Listener: l, path: path, made: made}, nil
}

// vacant reports an error when path is no socket or somebody listens on it.
func vacant(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket; remove it or set another address", path)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("another process already listens on %s; stop it or set another address", path)
	}
	return fmt.Errorf("find out whether somebody listens on %s: %w", path, err)
}

// lockRoot keeps a second snapshotter off the same root for as long as the file
// is open.
func lockRoot(root string) (*os.File, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("create root: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock root: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another nydus-snapshotter runs with root %s; stop it or set another root", root)
	} else if err != nil {
		err = fmt.Errorf("lock root %s: %w", root, err)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
