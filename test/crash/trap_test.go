package crash_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// traps know of each start of the project's short-lived programs, and kill one at
// some moment of its life.
type traps struct {
	bin string // the programs, the short-lived ones behind a script that says so

	mu   sync.Mutex
	trap *trap
}

// trap kills the next program of a name, in whose arguments arg is the first.
type trap struct {
	program, arg string
	after        time.Duration
	done         chan struct{}
	hit          bool // it was still there to be killed
}

// newTraps makes a directory of programs for kit.NodeConfig.Bin.
func newTraps(t *testing.T) *traps {
	t.Helper()
	names := []string{"nydus-snapshotter", "nydus-overlayfs", "nydus-shim-hook"}
	built := kit.Binaries(t, names...)
	c := &traps{bin: t.TempDir()}
	fifo := filepath.Join(t.TempDir(), "calls")
	must(t, unix.Mkfifo(fifo, 0o600))
	// Open for writing too: it has no end, and no program waits for a reader.
	calls, err := os.OpenFile(fifo, os.O_RDWR, 0)
	must(t, err)
	must(t, os.Symlink(filepath.Join(built, names[0]), filepath.Join(c.bin, names[0])))
	for _, name := range names[1:] {
		text := fmt.Sprintf("#!/bin/sh\necho \"%s $$ $1\" > '%s'\nexec '%s' \"$@\"\n", name, fifo, filepath.Join(built, name))
		must(t, os.WriteFile(filepath.Join(c.bin, name), []byte(text), 0o755))
	}
	go c.listen(bufio.NewScanner(calls))
	t.Cleanup(func() { calls.Close() })
	return c
}

func (c *traps) listen(calls *bufio.Scanner) {
	for calls.Scan() {
		var program, arg string
		var pid int
		if n, _ := fmt.Sscan(calls.Text(), &program, &pid, &arg); n < 2 {
			continue
		}
		c.mu.Lock()
		if t := c.trap; t != nil && t.program == program && strings.HasPrefix(arg, t.arg) {
			c.trap = nil
			go t.spring(pid)
		}
		c.mu.Unlock()
	}
}

// arm sets a trap for the next program.
func (c *traps) arm(program, arg string, after time.Duration) *trap {
	t := &trap{program: program, arg: arg, after: after, done: make(chan struct{})}
	c.mu.Lock()
	c.trap = t
	c.mu.Unlock()
	return t
}

// disarm takes the trap back, and tells whether it has killed something.
func (c *traps) disarm(t *trap) bool {
	c.mu.Lock()
	waiting := c.trap == t
	c.trap = nil
	c.mu.Unlock()
	if waiting {
		return false
	}
	<-t.done
	return t.hit
}

func (t *trap) spring(pid int) {
	defer close(t.done)
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it has ended
	}
	defer unix.Close(fd)
	ends := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(ends, int(t.after.Milliseconds())); n != 0 || err != nil {
		return
	}
	t.hit = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}
