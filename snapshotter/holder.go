package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
)

// holderStart bounds the start of a holder.
const holderStart = 5 * time.Second

// holder finds the node's holder, or starts one.
type holder struct {
	runDir, root string
	// program is nydus-shim-hook.
	program string
}

func holderOf(cfg config.Config) (holder, error) {
	self, err := os.Executable()
	if err != nil {
		return holder{}, fmt.Errorf("find nydus-shim-hook: %w", err)
	}
	return holder{runDir: cfg.RunDir, root: cfg.Root, program: filepath.Join(filepath.Dir(self), "nydus-shim-hook")}, nil
}

func (h holder) socket() string { return filepath.Join(h.runDir, "holder.sock") }

// log is where the holder writes what it has to say.
func (h holder) log() string { return filepath.Join(h.root, "holder.log") }

// connect is a recovery.Connector.
func (h holder) connect(_ context.Context, start bool) (recovery.Spare, error) {
	s, err := h.find()
	if err == nil {
		return s, nil
	}
	if !start {
		return nil, fmt.Errorf("%w: %w", recovery.ErrNoSpare, err)
	}
	if err := h.start(); err != nil {
		return nil, err
	}
	if s, err = h.find(); err != nil {
		return nil, err
	}
	return s, nil
}

// find connects to the holder that runs. One that does not answer, because it was
// stopped, is ended: it is of no use.
func (h holder) find() (*custody.Spare, error) {
	s, err := custody.Connect(h.socket())
	if err != nil {
		return nil, err
	}
	_, err = s.Names()
	if err == nil {
		return s, nil
	}
	if pid := s.PID(); pid > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		err = errors.Join(err, unix.Kill(pid, unix.SIGKILL))
	}
	return nil, errors.Join(err, s.Close())
}

// sweep removes the sockets of holders that were killed before theirs had its name.
func (h holder) sweep() error {
	left, err := filepath.Glob(h.socket() + ".*")
	errs := []error{err}
	for _, path := range left {
		pid, err := strconv.Atoi(strings.TrimPrefix(path, h.socket()+"."))
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue // not ours, or about to get its name
		}
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (h holder) start() (err error) {
	if err := os.Remove(h.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("start holder: %w", err)
	}
	if err := h.sweep(); err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	log, err := os.OpenFile(h.log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	defer log.Close()
	p, err := nydusd.Start(nydusd.Command{Path: h.program, Args: []string{"holder", h.socket()}, Log: log})
	if err != nil {
		return fmt.Errorf("start holder: %w; install nydus-shim-hook beside nydus-snapshotter", err)
	}
	go func() {
		p.Wait(time.Time{})
		p.Exit() // reap it
		_ = p.Close()
	}()
	return p.WaitFile(h.socket(), time.Now().Add(holderStart))
}
