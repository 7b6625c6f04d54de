package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

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

// spare is recovery.Config's.
func (h holder) spare(context.Context) (recovery.Spare, func(), error) {
	socket := filepath.Join(h.runDir, "holder.sock")
	s, err := custody.Connect(socket)
	if err != nil {
		if err := h.start(socket); err != nil {
			return nil, nil, err
		}
		s, err = custody.Connect(socket)
	}
	if err != nil {
		return nil, nil, err
	}
	return s, s.Gone, nil
}

func (h holder) start(socket string) (err error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("start holder: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(h.root, "holder.log"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	defer log.Close()
	p, err := nydusd.Start(nydusd.Command{Path: h.program, Args: []string{"holder", socket}, Log: log})
	if err != nil {
		return fmt.Errorf("start holder: %w; install nydus-shim-hook beside nydus-snapshotter", err)
	}
	go func() {
		p.Wait(time.Time{})
		p.Exit() // reap it
		_ = p.Close()
	}()
	return p.WaitFile(socket, time.Now().Add(holderStart))
}
