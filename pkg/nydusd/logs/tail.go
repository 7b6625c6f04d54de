package logs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxBacklog is how much of a log is read at a time, the newest part. What
	// was written while nobody followed is passed on up to this much.
	maxBacklog = 1 << 20
	// burst and perSecond bound how many lines of an instance are passed on: of
	// errors and warnings, and as many of the rest.
	burst     = 100
	perSecond = 5
	// reportEvery is how often it is said that lines were not passed on.
	reportEvery = 10 * time.Second
	// cutAgain is when a log is cut again after that failed.
	cutAgain = 10 * time.Second
)

// tail follows one log.
type tail struct {
	f *Follower
	// key is the instance's, empty for other logs. name is who writes.
	key, path, name string
	log             *slog.Logger
	// after is a tail of the same log that may not have ended.
	after *tail
	// poked receives when there is something to do, and is closed at the end.
	poked chan struct{}
	done  chan struct{}

	file   *os.File
	offset int64 // read so far
	saved  int64
	// reserved is up to where there is room.
	reserved int64
	lines    splitter
	held     string     // the message that the next line may belong to
	level    slog.Level // of the line before
	origin   Origin
	hide     *Hider

	severe, other bucket
	suppressed    int
	skipped       int64
	reported      time.Time
	cutFailed     time.Time
	full          time.Time // when that was said of the disk
	cannotSave    bool
	// tidied says that what a killed Cut left is gone.
	tidied bool
	// torn says that the next line may be the end of one.
	torn bool
}

func (t *tail) poke() {
	select {
	case t.poked <- struct{}{}:
	default:
	}
}

// run returns when the log is gone, or ctx.
func (t *tail) run(ctx context.Context) {
	defer close(t.done)
	if t.after != nil {
		select {
		case <-t.after.done:
		case <-ctx.Done():
		}
		t.after = nil
	}
	t.hide = NewHider()
	report := time.NewTimer(0)
	defer report.Stop()
	for {
		select {
		case _, more := <-t.poked:
			t.look(ctx, more)
			if !more {
				t.report(ctx, true)
				// An open file keeps its directory, and with it the event that
				// ends whoever follows it.
				t.close()
				return
			}
		case <-report.C:
		case <-ctx.Done():
			t.report(context.WithoutCancel(ctx), true)
			t.close()
			return
		}
		if wait := t.report(ctx, false); wait > 0 {
			report.Reset(wait)
		}
	}
}

// look does what there is to do. There is a log only as long as more is true.
func (t *tail) look(ctx context.Context, more bool) {
	if t.file != nil && !t.current() {
		// It was removed, and perhaps another one made: read it to its end.
		t.read(ctx)
		if t.lines.pending() > 0 {
			t.line(ctx, t.lines.take())
			t.flush(ctx)
		}
		t.close()
	}
	if t.file == nil && more && !t.open() {
		return
	}
	if t.file == nil {
		return
	}
	// Writing goes on meanwhile, and what a cut drops unread is not passed on.
	for range 4 {
		if n := t.read(ctx); n < t.f.cfg.Limit/8 {
			break
		}
	}
	t.cut(ctx)
	t.reserve(ctx)
	t.save()
}

// current tells whether the open file is the log.
func (t *tail) current() bool {
	a, err := t.file.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(t.path)
	return err == nil && os.SameFile(a, b)
}

func (t *tail) open() bool {
	file, err := os.OpenFile(t.path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			t.log.Error("follow log", "error", err)
		}
		return false
	}
	t.file, t.level, t.reserved = file, slog.LevelDebug, 0
	t.offset, t.torn = t.load()
	t.saved = t.offset
	return true
}

func (t *tail) close() {
	if t.file != nil {
		t.save()
		t.file.Close()
		t.file, t.lines = nil, splitter{}
	}
}

// read passes on what was written, and returns how much that was.
func (t *tail) read(ctx context.Context) int64 {
	info, err := t.file.Stat()
	if err != nil {
		t.log.Error("follow log", "error", err)
		return 0
	}
	size := info.Size()
	if size < t.offset {
		// Somebody else has emptied it.
		t.skipped += int64(t.lines.pending())
		t.offset, t.lines = 0, splitter{}
	}
	if size-t.offset > maxBacklog {
		from := lineAt(t.file, size-maxBacklog)
		t.skipped += from - t.offset + int64(t.lines.pending())
		t.offset, t.lines = from, splitter{}
	}
	n := t.passAll(ctx, t.file, t.offset, size)
	t.offset += n
	return n
}

// passAll passes on what stands in a file between two offsets, and returns how much
// that was.
func (t *tail) passAll(ctx context.Context, file io.ReaderAt, from, to int64) (n int64) {
	t.describe(from, to)
	buf := make([]byte, min(64<<10, max(0, to-from)))
	for from+n < to {
		got, err := file.ReadAt(buf[:min(int64(len(buf)), to-from-n)], from+n)
		n += int64(got)
		t.lines.feed(string(buf[:got]), func(line string) { t.line(ctx, line) })
		if got == 0 {
			if err != nil && !errors.Is(err, io.EOF) {
				t.log.Error("follow log", "error", err)
			}
			break
		}
	}
	t.flush(ctx)
	return n
}

// line takes a line. One that is indented goes on with the message before it: nydusd
// writes an error, its place and what to do about it in four, at once.
func (t *tail) line(ctx context.Context, raw string) {
	if rest := strings.TrimLeft(raw, " \t"); len(rest) < len(raw) && t.held != "" && len(t.held)+len(rest) < maxLine {
		t.held += " " + rest
		return
	}
	t.flush(ctx)
	t.held = raw
}

// flush passes on what line holds.
func (t *tail) flush(ctx context.Context) {
	if t.held != "" {
		t.pass(ctx, t.held)
		t.held = ""
	}
}

// describe learns about the instance, when there is something to be passed on.
func (t *tail) describe(from, to int64) {
	if t.key == "" || from >= to {
		return
	}
	if o, ok := t.f.cfg.Origin(t.key); ok {
		t.origin = o
		t.hide.Know(o.Secrets...)
	}
}

// pass passes a message on, or counts it.
func (t *tail) pass(ctx context.Context, raw string) {
	if _, _, _, whole := split(Clean(raw[:min(len(raw), 128)])); t.torn && !whole {
		t.torn = false
		t.skipped += int64(len(raw)) + 1
		return
	}
	t.torn = false
	before, level := t.level, Level(raw, t.level)
	t.level = level
	if !t.log.Enabled(ctx, level) {
		return
	}
	bucket := &t.other
	if level >= slog.LevelWarn {
		bucket = &t.severe
	}
	if !bucket.take(time.Now(), t.f.burst) {
		t.suppressed++
		return
	}
	line := Parse(raw, before, t.hide)
	t.log.Log(ctx, level, t.name+": "+line.Text, t.attrs(line.Time)...)
}

// attrs are the instance's fields that the logger does not have yet.
func (t *tail) attrs(when string) (a []any) {
	if t.origin.Generation > 0 {
		a = append(a, "generation", t.origin.Generation)
	}
	if t.origin.Image != "" {
		a = append(a, "image", t.origin.Image)
	}
	if when != "" {
		a = append(a, "at", when)
	}
	return a
}

// report says what was not passed on, at most every reportEvery unless it is the
// last time, and returns when it wants to be called again.
func (t *tail) report(ctx context.Context, last bool) time.Duration {
	if t.suppressed == 0 && t.skipped == 0 {
		return 0
	}
	now := time.Now()
	if left := reportEvery - now.Sub(t.reported); left > 0 && !last {
		return left
	}
	t.log.Log(ctx, slog.LevelWarn, t.name+" logs more than is passed on; its log has the rest",
		append([]any{"lines", t.suppressed, "skipped_bytes", t.skipped, "log", t.path}, t.attrs("")...)...)
	t.suppressed, t.skipped, t.reported = 0, 0, now
	return 0
}

// cut bounds the log, and passes on what was written while it did.
func (t *tail) cut(ctx context.Context) {
	if t.tidied && t.offset <= t.f.cfg.Limit || time.Since(t.cutFailed) < cutAgain {
		return
	}
	t.tidied = true
	took, err := Cut(t.path, t.f.cfg.Limit)
	if err != nil {
		t.cutFailed = time.Now()
		t.log.Error("cannot bound a log as it should be", "error", err)
	}
	if took.To == 0 {
		return
	}
	from := max(t.offset, took.From)
	t.skipped += from - t.offset
	if from < took.To {
		old, err := os.Open(Old(t.path))
		if err != nil {
			t.log.Error("follow log", "error", err)
		} else {
			t.passAll(ctx, old, from-took.From, took.To-took.From)
			old.Close()
		}
	}
	t.forget(took)
}

// forget moves back with a log of which the front was taken off. What is saved
// holds no longer, not even when its number does.
func (t *tail) forget(took Range) {
	t.offset, t.reserved, t.saved = max(0, t.offset-took.To), 0, -1
}

// reserve makes room for what the daemon writes next, on a full disk at the cost of
// what is in the log.
func (t *tail) reserve(ctx context.Context) {
	if t.key == "" || t.offset+ahead/2 < t.reserved {
		return
	}
	err := Reserve(t.file, t.offset)
	if errors.Is(err, unix.ENOSPC) {
		took, dropped := Drop(t.path, ahead/2)
		t.forget(took)
		err = errors.Join(dropped, Reserve(t.file, t.offset))
		if time.Since(t.full) > reportEvery {
			t.full = time.Now()
			t.log.Log(ctx, slog.LevelError, "the disk is full: old lines of a log make room for new ones; a nydusd that cannot write its log may end", "log", t.path, "error", err)
		}
	}
	t.reserved = t.offset + ahead
}

// attribute is where a log itself says how far it was passed on.
const attribute = "trusted.nydus.passed"

// save remembers how far the log was passed on: up to the end of a line, and what
// stands before it, so that another file's position is not taken for this one's.
func (t *tail) save() {
	at := max(0, t.offset-int64(t.lines.pending()))
	if at == t.saved {
		return
	}
	t.saved = at
	err := unix.Fsetxattr(int(t.file.Fd()), attribute, fmt.Appendf(nil, "%d %s", at, t.mark(at)), 0)
	if err != nil && !t.cannotSave {
		t.cannotSave = true
		t.log.Warn("cannot remember how far a log was passed on: the next start repeats lines", "log", t.path, "error", err)
	}
}

// load returns where to go on, and whether a line may begin before that.
func (t *tail) load() (at int64, torn bool) {
	buf := make([]byte, 256)
	var mark string
	if n, err := unix.Fgetxattr(int(t.file.Fd()), attribute, buf); err == nil {
		if _, err := fmt.Sscanf(string(buf[:n]), "%d %s", &at, &mark); err == nil && at >= 0 && t.mark(at) == mark {
			return at, false
		}
	}
	_, err := os.Lstat(Old(t.path))
	return 0, err == nil
}

// mark is a hash of what stands before an offset; "-" when the file does not reach
// so far.
func (t *tail) mark(at int64) string {
	buf := make([]byte, min(at, 256))
	if n, _ := t.file.ReadAt(buf, at-int64(len(buf))); n < len(buf) {
		return "-"
	}
	sum := sha256.Sum256(buf)
	return hex.EncodeToString(sum[:16])
}

// bucket lets so many lines through, and perSecond more each second.
type bucket struct {
	used float64
	at   time.Time
}

func (b *bucket) take(now time.Time, most int) bool {
	b.used = max(0, b.used-now.Sub(b.at).Seconds()*perSecond)
	b.at = now
	if b.used > float64(most-1) {
		return false
	}
	b.used++
	return true
}
