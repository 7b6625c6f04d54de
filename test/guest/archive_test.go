package guest_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"strings"
	"testing"
	"time"
)

// archive is an initial RAM disk: a cpio of the format "newc", compressed.
type archive struct {
	buf  bytes.Buffer
	dirs map[string]bool
	has  map[string]bool
	node int
}

func newArchive() *archive { return &archive{dirs: map[string]bool{".": true}, has: map[string]bool{}} }

// add adds a file, with the directories to it.
func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	a.has[name] = true
	name = strings.TrimPrefix(name, "/")
	a.mkdir(path.Dir(name))
	a.entry(name, 0o100000|uint32(mode), data)
}

func (a *archive) copy(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	must(t, err)
	info, err := os.Stat(from)
	must(t, err)
	a.add(to, info.Mode().Perm(), data)
}

// program adds a program with the libraries that it is linked with, at the paths
// where it looks for them.
func (a *archive) program(t *testing.T, from, to string) {
	t.Helper()
	a.copy(t, from, to)
	out, err := exec.CommandContext(t.Context(), "ldd", from).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "not a dynamic executable") {
		t.Fatalf("ldd %s: %v: %s", from, err, out)
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") && !a.has[word] {
			a.copy(t, word, word)
		}
	}
}

func (a *archive) link(name, target string) {
	name = strings.TrimPrefix(name, "/")
	a.mkdir(path.Dir(name))
	a.entry(name, 0o120777, []byte(target))
}

func (a *archive) mkdir(name string) {
	if !a.dirs[name] {
		a.dirs[name] = true
		a.mkdir(path.Dir(name))
		a.entry(name, 0o040755, nil)
	}
}

func (a *archive) entry(name string, mode uint32, data []byte) {
	a.node++
	// inode, mode, uid, gid, links, mtime, size, four device numbers, length of the
	// name with its NUL, no checksum.
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", a.node, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.buf.WriteString(name + "\x00")
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) end(t *testing.T) []byte {
	t.Helper()
	a.entry("TRAILER!!!", 0, nil)
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	must(t, err)
	_, err = z.Write(a.buf.Bytes())
	must(t, err)
	must(t, z.Close())
	return out.Bytes()
}

func contextWithTimeout(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(t.Context(), d, fmt.Errorf("not within %s", d))
}
