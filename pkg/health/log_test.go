package health

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What nydusd 2.2.0 and 2.4 write.
var (
	blob  = strings.Repeat("4b", 32)
	other = strings.Repeat("d9", 32)
	start = "[2026-11-28 02:24:41.754764 +00:00] INFO Program Version: unknown, Git Commit: \"unknown\"\n"
	tryOf = func(b string) string {
		return "\t\"failed to read metadata for blob " + b + " from backend, Request(ErrorWithMsg(\\\"\\\"))\"\n"
	}
	ours      = "[2026-11-28T03:15:00Z] INFO mount helper: starts nydusd of generation 1: /usr/local/bin/nydusd\n"
	another   = "[2026-11-28T03:15:00Z] INFO mount helper: starts nydusd of generation 11: /usr/local/bin/nydusd\n"
	try24     = "[2026-11-28 03:15:10.404621 +00:00] WARN [nydus_storage::meta:775] failed to read metadata for blob " + blob + " from backend, Request(ErrorWithMsg(\"\")), retry read metadata\n"
	end24     = "[2026-11-28 03:15:51.000000 +00:00] WARN [nydus_storage::cache::cachedfile:106] failed to get blob.meta\n"
	temporary = "[2026-11-28 02:24:43.351588 +00:00] INFO temporarily failed to get blob.meta, Input/output error (os error 5)\n"
	end       = "[\x1b[1;38;5;208m2026-11-28 02:25:01.764806 +00:00\x1b[0m] WARN [/nydus-storage-0.6.2/src/cache/cachedfile.rs:103] \x1b[1;38;5;208mfailed to get blob.meta\x1b[0m\n"
	noise     = strings.Repeat("[2026-11-28 02:24:41.860711 +00:00] INFO Rafs filesystem mounted at /\n", 20)
)

type logFile struct {
	t    *testing.T
	path string
}

func newLog(t *testing.T) *logFile {
	return &logFile{t, filepath.Join(t.TempDir(), "nydusd.log")}
}

func (f *logFile) write(text string) {
	f.t.Helper()
	w, err := os.OpenFile(f.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err == nil {
		_, err = w.WriteString(text)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		f.t.Fatal(err)
	}
}

func (f *logFile) want(l *Log, when string, broken bool, blobs ...string) {
	f.t.Helper()
	fault, err := l.Broken()
	if err != nil || (fault != nil) != broken {
		f.t.Fatalf("%s: %v, %v; want broken %v", when, fault, err, broken)
	}
	if fault != nil && !slices.Equal(fault.Blobs, blobs) {
		f.t.Errorf("%s: blobs %q, want %q", when, fault.Blobs, blobs)
	}
}

func TestBroken(t *testing.T) {
	f := newLog(t)
	l := Follow(f.path, 1, 0)
	f.want(l, "no log", false)
	f.write(ours + start + noise)
	f.want(l, "a start", false)
	f.write(tryOf(blob) + temporary + tryOf(other) + temporary)
	f.want(l, "tries that may succeed yet", false)
	f.write(end[:60])
	f.want(l, "half a line", false)
	f.write(end[60:])
	f.want(l, "the end of the tries", true, blob, other)
	f.want(l, "nothing new", true, blob, other)
	f.write(noise + tryOf("../../etc/passwd") + end)
	f.want(l, "another end, and no blob", true, blob, other)
	f.write(another + start)
	f.want(l, "a daemon of another generation", true, blob, other)
	f.write(ours + start)
	f.want(l, "another daemon", false)
	f.write(end)
	f.want(l, "an end that names none", true)
	f.write(ours)
	f.want(l, "another daemon, of any log level", false)
	f.write(try24 + end24)
	f.want(l, "its end", true, blob)
}

// What stands before the daemon's own output is not its own.
func TestBrokenBehindAnOffset(t *testing.T) {
	f := newLog(t)
	f.write(start + tryOf(blob) + end)
	l := Follow(f.path, 1, End(f.path))
	f.want(l, "an earlier daemon's fault", false)
	f.write(tryOf(other) + end)
	f.want(l, "its own", true, other)
	if n := End(filepath.Join(t.TempDir(), "missing")); n != 0 {
		t.Errorf("the end of no log is %d", n)
	}
}

// However much there is, the end of it counts: an earlier daemon's fault is over.
func TestBrokenInALongLog(t *testing.T) {
	f := newLog(t)
	f.write(ours + tryOf(blob) + end + strings.Repeat(noise, 3*maxRead/len(noise)) + ours)
	f.want(Follow(f.path, 1, 0), "a fault far back", false)
	f.write(strings.Repeat(noise, 3*maxRead/len(noise)) + end24)
	f.want(Follow(f.path, 1, 0), "a fault far behind", true)
}

// A log that is cut, or set aside, is read on from its new beginning.
func TestBrokenInALogThatIsCut(t *testing.T) {
	for name, cut := range map[string]func(f *logFile){
		"cut":                func(f *logFile) { f.must(os.Truncate(f.path, 0)) },
		"cut and grown":      func(f *logFile) { f.must(os.Truncate(f.path, 0)); f.write(strings.Repeat(temporary, 400)) },
		"set aside":          func(f *logFile) { f.must(os.Rename(f.path, f.path+".1")) },
		"set aside and full": func(f *logFile) { f.must(os.Rename(f.path, f.path+".1")); f.write(strings.Repeat(temporary, 400)) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newLog(t)
			l := Follow(f.path, 1, 0)
			f.write(noise + tryOf(blob))
			f.want(l, "before", false)
			cut(f)
			f.write(tryOf(other) + end)
			f.want(l, "after", true, blob, other)
		})
	}
}

func (f *logFile) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// A line without an end keeps nobody from what follows, nor takes all memory.
func TestBrokenBehindAnEndlessLine(t *testing.T) {
	f := newLog(t)
	l := Follow(f.path, 1, 0)
	f.write(strings.Repeat("x", 2*maxRead+5))
	f.want(l, "an endless line", false)
	f.write("\n" + end)
	f.want(l, "behind it", true)
}
