package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// lookUpCommand makes this program ask a filesystem, see ask.
const lookUpCommand = "look-up"

// ask makes the image beneath rootfs answer, in a child process: a daemon that
// hangs would keep the asking thread for ever.
func ask(ctx context.Context, rootfs string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// Not os/exec: it would wait for a child that cannot be killed.
	child, err := os.StartProcess("/proc/self/exe", []string{"nydus-shim-hook", lookUpCommand, rootfs},
		&os.ProcAttr{Files: []*os.File{null, null, null}, Env: []string{}})
	if err != nil {
		return fmt.Errorf("start the probe: %w", err)
	}
	start, err := nydusd.StartTime(child.Pid)
	if err == nil {
		var p *nydusd.Process
		if p, err = nydusd.Find(child.Pid, start); err == nil && p != nil {
			defer p.Close()
			deadline, _ := ctx.Deadline()
			if !p.Wait(deadline) {
				return errors.Join(errors.New("no answer in time"), child.Kill())
			}
		}
	}
	// It has ended: this does not block.
	state, err := child.Wait()
	if err != nil {
		return fmt.Errorf("wait for the probe: %w", err)
	}
	if state.ExitCode() == 0 {
		return nil
	}
	if state.ExitCode() < 0 {
		return fmt.Errorf("the probe ended with %s", state)
	}
	return unix.Errno(state.ExitCode())
}

// lookUp looks up a name that nobody has asked for before, so that no cache can
// answer: the lookup reaches every layer, the image's daemon last. It returns
// the exit status: 0, or the error number.
func lookUp(rootfs string) int {
	name := filepath.Join(rootfs, fmt.Sprintf(".nydus-probe-%s-%d", rand.Text(), time.Now().UnixNano()))
	var st unix.Stat_t
	err := unix.Lstat(name, &st)
	var errno unix.Errno
	if err == nil || errors.Is(err, unix.ENOENT) || !errors.As(err, &errno) {
		return 0
	}
	return int(errno) & 0xff
}
