package health

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Log follows what a daemon writes. It is not for use by several goroutines at
// once.
type Log struct {
	path string
	// starts is in the line before the daemon's own.
	starts string
	// offset is how much of the file, inode, has been read; last are the bytes before
	// it, which are others when the file was cut and has grown again.
	offset int64
	inode  uint64
	last   []byte
	// tries are the blobs whose metadata could not be fetched so far, broken those
	// among which the one is that was given up.
	tries, broken []string
	given         bool
}

// Fault says that a blob's metadata could not be fetched.
type Fault struct {
	// Blobs are the ids of those that failed; the log does not say which of them was
	// given up. May be empty.
	Blobs []string
}

// Error implements error.
func (f *Fault) Error() string {
	return fmt.Sprintf("nydusd could not fetch the metadata of a blob and has given up: reads fail until it is replaced (blobs %q)", f.Blobs)
}

// End is where the next daemon's output will begin: take it before that is started.
func End(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// Follow begins to follow the log of a generation's daemon whose output stands behind
// offset, see End. With 0, for a daemon whose start nobody has seen, what earlier ones
// wrote counts up to the line with which its own begins. What the daemon of another
// generation writes meanwhile cannot be told from it.
func Follow(path string, generation int, offset int64) *Log {
	return &Log{path: path, starts: nydusd.Starts(generation), offset: offset}
}

// maxRead bounds what is read at a time.
const maxRead = 4 << 20

// The lines that tell: a try that failed, and the end of all tries. The text is that of
// nydus-storage 0.6 and 0.7 (nydusd 2.2 to 2.4).
const (
	tried    = "failed to read metadata for blob "
	givenUp  = "failed to get blob.meta"
	notAtEnd = "temporarily failed to get blob.meta"
)

// Broken reads what was written since the last time and returns the fault once
// there is one, also the next times: it lasts as long as the daemon. A log that does
// not exist has none.
func (l *Log) Broken() (*Fault, error) {
	// To its end: what a fault was may stand behind it, as that another daemon began.
	for more := true; more; {
		var err error
		if more, err = l.read(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read nydusd's log: %w", err)
		}
	}
	if !l.given {
		return nil, nil
	}
	return &Fault{Blobs: slices.Clone(l.broken)}, nil
}

// read reads on, and tells whether there is more.
func (l *Log) read() (more bool, err error) {
	f, err := os.Open(filepath.Clean(l.path))
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if l.moved(f, info) {
		l.offset, l.last = 0, nil
	}
	buf, err := io.ReadAll(io.NewSectionReader(f, l.offset, maxRead))
	if err != nil {
		return false, err
	}
	// A line that is being written is left for the next time, unless it is endless.
	end := bytes.LastIndexByte(buf, '\n') + 1
	if end == 0 && len(buf) == maxRead {
		end = maxRead
	}
	for line := range bytes.Lines(buf[:end]) {
		l.take(string(line))
	}
	l.offset += int64(end)
	if end > 0 {
		l.last = slices.Clone(buf[max(0, end-lastBytes):end])
	}
	return len(buf) == maxRead, nil
}

// lastBytes is how much is remembered of what was read: lines begin with the time.
const lastBytes = 256

// moved tells whether the file is another one than before, or was cut.
func (l *Log) moved(f *os.File, info os.FileInfo) bool {
	inode := l.inode
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		l.inode = st.Ino
	}
	if inode != 0 && inode != l.inode || info.Size() < l.offset {
		return true
	}
	now := make([]byte, len(l.last))
	_, err := f.ReadAt(now, l.offset-int64(len(l.last)))
	return err != nil || !bytes.Equal(now, l.last)
}

func (l *Log) take(line string) {
	switch {
	case l.begins(line):
		l.tries, l.broken, l.given = nil, nil, false
	case strings.Contains(line, tried):
		_, rest, _ := strings.Cut(line, tried)
		blob, _, _ := strings.Cut(rest, " ")
		// What stands in a log may be an image's doing.
		if rafs.IsID(blob) && !slices.Contains(l.tries, blob) {
			l.tries = append(l.tries, blob)
		}
	case strings.Contains(line, givenUp) && !strings.Contains(line, notAtEnd):
		l.given = true
		l.broken = slices.Clone(l.tries)
	}
}

// begins tells whether the daemon's output begins behind a line, which is ours and not
// one of a daemon that quotes it.
func (l *Log) begins(line string) bool {
	_, text, _ := strings.Cut(line, "] INFO ")
	return strings.HasPrefix(line, "[") && strings.HasPrefix(text, l.starts)
}
