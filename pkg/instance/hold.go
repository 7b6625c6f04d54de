package instance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// Hold is an image's daemon that serves nobody: it is there for what it does beside, to
// fetch what the cache lacks. It is an instance of its own, beside the one that containers
// use, and shares the cache directory with it.
//
// Its lock is held for as long as it is wanted, so that nobody releases it for being idle.
// With the process that holds it goes the lock: what a killed one leaves is an idle
// instance, which the reconciler, or the next Hold, ends.
type Hold struct {
	inst *Instance
	proc *nydusd.Process
	log  string
	from int64 // what stands before it in the log is not this daemon's
}

// ErrHeld says that another process has the same Hold.
var ErrHeld = errors.New("another process is at it")

// HoldKey is the key of the instance in which an image is held for a purpose.
func HoldKey(purpose, image string) string {
	sum := sha256.Sum256([]byte("hold " + purpose + "\x00" + image))
	return hex.EncodeToString(sum[:16])
}

// StageDir is where a held daemon finds the files that NewHold is given.
func StageDir(root, key string) string {
	// It goes as what pools have there: whatever is killed, removeBerths removes it.
	return filepath.Join(string(diskDirOf(root, key)), "g0")
}

// NewHold starts the daemon of s, whose key is of HoldKey. What an earlier one left under
// the same key goes first. The daemon finds the files, of which there may be none, under
// their names in StageDir. The error wraps ErrHeld when another process has it.
func NewHold(ctx context.Context, s Spec, files map[string]string) (*Hold, error) {
	if s.Daemon.StartTimeout <= 0 {
		s.Daemon.StartTimeout = defaultStartTimeout
	}
	s.Driver, s.Daemon.Mode, s.held = mountspec.DriverFUSE, mountspec.ModeDedicated, true
	if err := SetupRunDir(s.RunDir); err != nil {
		return nil, err
	}
	i, err := open(ctx, dirOf(s.RunDir, s.Key), openCreate, holdWait)
	if errors.Is(err, errLocked) {
		return nil, fmt.Errorf("image %s (instance %s): %w: %w", s.Image, s.Key, ErrHeld, err)
	}
	if err != nil {
		return nil, err
	}
	h := &Hold{inst: i, log: diskDirOf(s.Root, s.Key).log()}
	if err := h.begin(ctx, s, files); err != nil {
		onDisk := i.removeBootstrap // the log is for whoever looks into the failure
		if ctx.Err() != nil {
			onDisk = i.removeDisk // nobody wants it any more: there is none
		}
		_, cleanup := i.removeIfEmpty(onDisk)
		return nil, errors.Join(fmt.Errorf("image %s (instance %s): %w", s.Image, s.Key, err), cleanup, i.Close())
	}
	return h, nil
}

const (
	// holdWait is how long others may take that only look at an instance, or clean up.
	holdWait = 5 * time.Second
	// drainEvery is how often it is looked whether a daemon has ended that was let go.
	drainEvery = 50 * time.Millisecond
)

func (h *Hold) begin(ctx context.Context, s Spec, files map[string]string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.Daemon.StartTimeout, fmt.Errorf("not within %s", s.Daemon.StartTimeout))
	defer cancel()
	if err := h.inst.retire(); err != nil {
		return err
	}
	if err := h.drain(ctx); err != nil {
		return err
	}
	h.inst.describe(s)
	if err := stage(StageDir(s.Root, s.Key), files); err != nil {
		return err
	}
	h.from = sizeOf(h.log)
	boot := &bootstrap{}
	defer boot.close()
	l := &launch{spec: s, inst: h.inst, boot: boot}
	if err := l.bringUp(ctx); err != nil {
		return err
	}
	if err := h.adopt(h.inst.rec.Current); err != nil {
		return errors.Join(err, h.inst.retire(), h.drain(ctx))
	}
	return nil
}

// adopt takes the process of a generation that was just started. One that has just ended
// holds nothing, though it is a zombie of ours until it is reaped, which nobody else does.
func (h *Hold) adopt(g *Generation) error {
	var err error
	if h.proc, err = nydusd.Find(g.PID, g.StartTime); err == nil && h.proc == nil {
		nydusd.Reap(g.PID, g.StartTime)
	}
	return err
}

// stage makes the directory with links to files.
func stage(dir string, files map[string]string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("give nydusd the files: %w", err)
	}
	if len(files) == 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("give nydusd the files: %w", err)
	}
	for name, path := range files {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("give nydusd the files: %w", err)
		}
	}
	return nil
}

// drain waits until nothing is left of what was retired.
func (h *Hold) drain(ctx context.Context) error {
	// A daemon whose filesystem is gone makes an event when it ends, its mount and its
	// cgroup make none.
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	for {
		if h.proc != nil && h.proc.Wait(time.Now()) {
			h.proc.Exit() // we are its parent
		}
		err := h.inst.sweep()
		if len(h.inst.rec.Retired) == 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(err, fmt.Errorf("end nydusd %d: it is still there: %w", h.inst.rec.Retired[0].PID, context.Cause(ctx)))
		}
	}
}

// Ended tells whether the daemon is there no more.
func (h *Hold) Ended() bool { return h.proc == nil || h.proc.Wait(time.Now()) }

// Turns is nydusd.Process.Turns: while it stays the same, the daemon does nothing.
func (h *Hold) Turns() (uint64, error) {
	if h.proc == nil {
		return 0, nil
	}
	return h.proc.Turns()
}

// Generation is the one that the daemon is.
func (h *Hold) Generation() Generation {
	if g := h.inst.rec.Current; g != nil {
		return *g
	}
	return Generation{}
}

// Log is where the daemon's log is.
func (h *Hold) Log() string { return h.log }

// Said returns the last lines that the daemon has written to its log.
func (h *Hold) Said() string {
	config := ""
	if g := h.inst.rec.Current; g != nil {
		text, _ := readFile(ConfigPath(*g)) // without it nothing can be hidden
		config = string(text)
	}
	if config == "" {
		return ""
	}
	return nydusd.Tail(h.log, h.from, saidLines, nydusd.Secrets(config)...)
}

// saidLines is how much of a log helps.
const saidLines = 5

// Stop ends the daemon and leaves nothing of it, unless it does not end before ctx does:
// then the reconciler finishes it.
func (h *Hold) Stop(ctx context.Context) error {
	err := h.inst.retire()
	if err == nil {
		err = h.drain(ctx)
	}
	if err == nil {
		_, err = h.inst.removeIfEmpty(h.inst.removeDisk)
	}
	if h.proc != nil {
		h.proc.Exit()
		err = errors.Join(err, h.proc.Close())
	}
	if err = errors.Join(err, h.inst.Close()); err != nil {
		return fmt.Errorf("let instance %s go: %w", h.inst.rec.Key, err)
	}
	return nil
}
