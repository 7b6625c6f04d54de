package fetch

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Server is a nydusd that serves an image.
type Server struct {
	// Instance is the key of the image's instance.
	Instance  string
	PID       int
	StartTime uint64
}

// demand knows when something was last fetched because somebody reads it. What a nydusd
// fetches it writes to the cache, and the kernel counts what a process makes dirty
// (write_bytes in proc_pid_io(5)): so it is seen without asking the daemon, which may be
// busy, and what is read from the cache does not count.
type demand struct {
	proc string // where /proc is
	seen map[Server]int64
	// last is when it was for any image, of for one.
	last time.Time
	of   map[string]time.Time
}

func newDemand(proc string) *demand {
	return &demand{proc: proc, seen: map[Server]int64{}, of: map[string]time.Time{}}
}

// leastWritten is what counts, in bytes between two looks: daemons write logs, too.
const leastWritten = 64 << 10

// look looks at all that serve. One that is new is about to be read from.
func (d *demand) look(now time.Time, servers []Server) {
	seen, of := make(map[Server]int64, len(servers)), make(map[string]time.Time, len(servers))
	for _, s := range servers {
		written, err := d.written(s.PID)
		if err != nil {
			continue // it has just ended, or this kernel does not count
		}
		before, known := d.seen[s]
		if !known || written-before >= leastWritten {
			of[s.Instance], d.last = now, now
		} else if of[s.Instance].Before(d.of[s.Instance]) {
			of[s.Instance] = d.of[s.Instance]
		}
		seen[s] = written
	}
	d.seen, d.of = seen, of
}

func (d *demand) written(pid int) (int64, error) {
	text, err := os.ReadFile(filepath.Join(d.proc, strconv.Itoa(pid), "io"))
	if err != nil {
		return 0, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "write_bytes: "); ok {
			return strconv.ParseInt(value, 10, 64)
		}
	}
	return 0, fmt.Errorf("the kernel does not count what process %d writes", pid)
}
