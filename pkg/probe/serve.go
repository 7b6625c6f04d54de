package probe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Command is the argument by which a program runs Serve.
const Command = "probe"

// The child reads one path in a line, an empty line, and then nothing until its
// parent is done with it. It writes a line for each answer: the path's number and an
// error number, 0 for none, or notMounted.
const notMounted = -1

// fuseMagic is the type of a FUSE filesystem in statfs.
const fuseMagic = 0x65735546

// Serve is the child. It returns when everything has answered; when in ends before
// that, whoever asked has no use for more, and it calls end.
func Serve(in io.Reader, out io.Writer, end func()) error {
	lines := bufio.NewReader(in)
	var paths []string
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return fmt.Errorf("read what to ask: %w", err)
		}
		if line == "\n" {
			break
		}
		paths = append(paths, line[:len(line)-1])
	}
	go func() {
		_, _ = lines.ReadByte()
		end()
	}()
	var all sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for n, path := range paths {
		all.Go(func() {
			code := ask(path)
			mu.Lock()
			defer mu.Unlock()
			if _, err := fmt.Fprintf(out, "%d %d\n", n, code); err != nil {
				failed = err
			}
		})
	}
	all.Wait()
	return failed
}

// ask may hang.
func ask(path string) int {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	var errno unix.Errno
	switch {
	case err == nil && st.Type != fuseMagic, errors.Is(err, os.ErrNotExist):
		return notMounted
	case err == nil:
		return 0
	case errors.As(err, &errno):
		return int(errno)
	}
	return int(unix.EIO)
}
