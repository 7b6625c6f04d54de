package logs

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	soon  = 20 * time.Second
	stamp = "[2024-05-06 07:08:09.123456 +00:00] "
	key   = "0123456789abcdef0123456789abcdef"
)

// book is what a Follower logs.
type book struct {
	mu      sync.Mutex
	all     []entry
	changed chan struct{}
}

// entry is one line of it.
type entry struct {
	Level, Msg, Instance, Image, At, Log string
	Generation, Lines                    int
	Skipped                              int64 `json:"skipped_bytes"`
}

func (b *book) Write(p []byte) (int, error) {
	var e entry
	if err := json.Unmarshal(p, &e); err != nil {
		return 0, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, e)
	select {
	case b.changed <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (b *book) entries() []entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all
}

// last is the last entry, or an empty one.
func last(all []entry) entry {
	if len(all) == 0 {
		return entry{}
	}
	return all[len(all)-1]
}

// has tells whether a message was logged.
func has(all []entry, msg string) bool {
	return slices.ContainsFunc(all, func(e entry) bool { return e.Msg == msg })
}

// node is a root directory whose logs are followed.
type node struct {
	t      *testing.T
	dir    string
	level  slog.Level
	burst  int
	book   *book
	origin func(string) (Origin, bool)
	limit  int64
	stop   func()
}

func newNode(t *testing.T) *node {
	return &node{t: t, dir: filepath.Join(t.TempDir(), "instances"), level: slog.LevelDebug, burst: burst, limit: limit,
		book: &book{changed: make(chan struct{}, 1)},
		origin: func(string) (Origin, bool) {
			return Origin{Image: "r/app:1", Generation: 2, Secrets: []string{"canary-pw"}}, true
		}}
}

func (n *node) config() Config {
	return Config{Dir: n.dir, Name: "nydusd.log", Files: []string{filepath.Join(n.dir, "..", "holder.log")}, Limit: n.limit, Origin: n.origin,
		Log: slog.New(slog.NewJSONHandler(n.book, &slog.HandlerOptions{Level: n.level}))}
}

// start follows until stop, which is also the end of the test.
func (n *node) start() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error, 1)
	f := New(n.config())
	f.burst = n.burst
	go func() { done <- f.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				n.t.Error(err)
			}
		case <-time.After(soon):
			n.t.Error("the follower does not end")
		}
	})
	n.t.Cleanup(n.stop)
}

func (n *node) log(key string) string {
	n.t.Helper()
	must(n.t, os.MkdirAll(filepath.Join(n.dir, key), 0o700))
	return filepath.Join(n.dir, key, "nydusd.log")
}

func (n *node) append(path, text string) {
	n.t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(n.t, err)
	defer f.Close()
	_, err = f.WriteString(text)
	must(n.t, err)
}

// await waits until what was logged is as ok wants it.
func (n *node) await(what string, ok func([]entry) bool) []entry {
	n.t.Helper()
	timer := time.NewTimer(soon)
	defer timer.Stop()
	for {
		all := n.book.entries()
		if ok(all) {
			return all
		}
		select {
		case <-n.book.changed:
		case <-timer.C:
			n.t.Fatalf("not within %v: %s; logged was %+v", soon, what, all)
		}
	}
}

// logs waits until exactly these messages have been logged.
func (n *node) logs(want ...string) []entry {
	n.t.Helper()
	all := n.await(strings.Join(want, ", "), func(all []entry) bool { return len(all) >= len(want) })
	for i, e := range all {
		if i >= len(want) || e.Msg != want[i] {
			n.t.Fatalf("logged was %+v, want %q", all, want)
		}
	}
	return all
}

func TestFollow(t *testing.T) {
	n := newNode(t)
	n.append(n.log(key), stamp+"INFO before\n")
	n.start()
	n.logs("nydusd: before")
	n.append(n.log(key), stamp+"ERROR [a:1] can")
	n.append(n.log(key), "ary canary-pw\nthread 'x' panicked at 'oh'\nnote: run\n"+stamp+"WARN slow\n")
	other := strings.Repeat("b", 32)
	all := n.logs("nydusd: before", "nydusd: [a:1] canary [hidden]", "nydusd: thread 'x' panicked at 'oh'", "nydusd: note: run", "nydusd: slow")
	want := entry{Level: "ERROR", Msg: "nydusd: [a:1] canary [hidden]", Instance: key, Image: "r/app:1", Generation: 2, At: stamp[1 : len(stamp)-2]}
	if all[1] != want {
		t.Errorf("logged was %+v, want %+v", all[1], want)
	}
	for i, level := range []string{"DEBUG", "ERROR", "ERROR", "ERROR", "WARN"} {
		if all[i].Level != level {
			t.Errorf("%q has level %s, want %s", all[i].Msg, all[i].Level, level)
		}
	}
	n.append(n.log(other), stamp+"WARN new\n")
	if all := n.logs("nydusd: before", all[1].Msg, all[2].Msg, all[3].Msg, all[4].Msg, "nydusd: new"); all[5].Instance != other {
		t.Errorf("a new instance's line: %+v", all[5])
	}
	n.append(n.log(other), stamp+"ERROR [b:2] Error:\n\t\"no\"\n\tat c:3\n\n"+stamp+"INFO next\n")
	n.await("a message of several lines", func(all []entry) bool {
		return len(all) > 7 && all[6].Msg == `nydusd: [b:2] Error: "no" at c:3` && all[7].Msg == "nydusd: next"
	})
	n.append(filepath.Join(n.dir, "..", "holder.log"), "panic: oh\n")
	n.await("the holder's line", func(all []entry) bool { return has(all, "holder: panic: oh") })
}

// An instance ends and comes again: the rest of the old log is passed on, the new
// one from its beginning.
func TestFollowRemoved(t *testing.T) {
	n := newNode(t)
	n.start()
	for round := range 20 {
		text := fmt.Sprintf("round %d", round)
		n.append(n.log(key), "WARN "+text+"\n"+text+" ends")
		must(t, os.Remove(n.log(key)))
		if round%2 == 0 {
			must(t, os.Remove(filepath.Join(n.dir, key)))
		}
		n.append(n.log(key), "again "+text+"\n")
		must(t, os.RemoveAll(filepath.Join(n.dir, key)))
	}
	// How much is seen of what exists for a moment only is chance, but nothing twice.
	n.append(n.log(key), "last\n")
	all := n.await("the last line", func(all []entry) bool { return has(all, "nydusd: last") })
	seen := map[string]bool{}
	for _, e := range all {
		if seen[e.Msg] {
			t.Errorf("twice: %s", e.Msg)
		}
		seen[e.Msg] = true
	}
	// One that was there for a while leaves nothing out.
	gone := strings.Repeat("c", 32)
	n.append(n.log(gone), "no end")
	n.append(n.log(gone), "\nno end, and gone")
	n.await("a line", func(all []entry) bool { return has(all, "nydusd: no end") })
	must(t, os.RemoveAll(filepath.Join(n.dir, gone)))
	n.await("the rest of a log that is gone", func(all []entry) bool { return has(all, "nydusd: no end, and gone") })
}

// What is written while nobody follows is passed on later, and nothing twice.
func TestFollowRestarted(t *testing.T) {
	n := newNode(t)
	n.append(n.log(key), "one\n")
	n.start()
	n.logs("nydusd: one")
	n.append(n.log(key), "two\nthr")
	n.logs("nydusd: one", "nydusd: two")
	n.stop()
	n.append(n.log(key), "ee\nfour\n")
	n.start()
	n.logs("nydusd: one", "nydusd: two", "nydusd: three", "nydusd: four")
	n.stop()
	// Emptied and written anew, longer than before.
	must(t, os.Truncate(n.log(key), 0))
	n.append(n.log(key), "a completely other text that is longer\nfive\n")
	n.start()
	n.logs("nydusd: one", "nydusd: two", "nydusd: three", "nydusd: four", "nydusd: a completely other text that is longer", "nydusd: five")
	// And while it is followed.
	must(t, os.Truncate(n.log(key), 0))
	n.append(n.log(key), "six\n")
	n.await("a line of an emptied log", func(all []entry) bool { return has(all, "nydusd: six") })
}

// Of a long history only the newest part is passed on, from the beginning of a line.
func TestFollowBacklog(t *testing.T) {
	n := newNode(t)
	n.limit, n.burst = 8*maxBacklog, 1<<30
	w := newWriter(t, n.log(key))
	w.write(3 * maxBacklog / 64)
	n.start()
	n.passedOn(n.log(key))
	n.stop()
	all := n.book.entries()
	if passed := len(all) - 1; passed > maxBacklog/64 || passed < maxBacklog/64-1 || last(all).Skipped != int64(64*(w.next-passed)) {
		t.Errorf("%d lines of %d passed on, at the end %+v", passed, w.next, last(all))
	}
}

// A log is cut and goes on, and is as far passed on as before, in bytes: that is
// another place in it, and must be saved again.
func TestFollowCutToTheSamePlace(t *testing.T) {
	n := newNode(t)
	n.burst = 1 << 30
	w := newWriter(t, n.log(key))
	w.write(5)
	for range 3 {
		w.write(4096 / 64 * int(n.limit/4096+1))
		n.start()
		n.passedOn(n.log(key))
		n.stop()
	}
	passed := 0
	for _, e := range n.book.entries() {
		if strings.HasPrefix(e.Msg, "nydusd: ") {
			passed++
		}
	}
	if passed != w.next {
		t.Errorf("of %d lines %d passed on", w.next, passed)
	}
}

// A flood is counted, and hides no error.
func TestFollowFlood(t *testing.T) {
	n := newNode(t)
	n.level = slog.LevelInfo
	n.append(n.log(key), strings.Repeat(stamp+"INFO flood\n", 5000)+stamp+"ERROR one\n")
	n.start()
	n.logs("nydusd: one")
	n.stop()

	n.level = slog.LevelDebug
	n.append(n.log(key), strings.Repeat(stamp+"INFO flood\n", 5000)+stamp+"ERROR two\n")
	n.start()
	all := n.await("a report", func(all []entry) bool { return strings.Contains(last(all).Msg, "more than is passed on") })
	if e := all[len(all)-2]; e.Msg != "nydusd: two" || len(all) > 1+burst+perSecond*5+2 {
		t.Errorf("%d lines, the last but one %+v", len(all), e)
	}
	report := last(all)
	if report.Lines != 5000-(len(all)-3) || report.Instance != key || report.Image == "" || report.Log != n.log(key) || report.Level != "WARN" {
		t.Errorf("%d entries, the report %+v", len(all), report)
	}
}

// The queue of events overflows: all logs are looked at.
func TestFollowOverflow(t *testing.T) {
	n := newNode(t)
	known := n.log(key)
	f := New(n.config())
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	f.fd = fd
	ctx, cancel := context.WithCancel(t.Context())
	defer f.all.Wait()
	defer cancel()
	must(t, f.begin(ctx))
	n.append(known, "one\n")
	n.append(n.log("other"), "two\n")
	must(t, f.event(ctx, -1, unix.IN_Q_OVERFLOW, ""))
	n.await("both lines", func(all []entry) bool { return len(all) == 2 })
	// The directory goes: an error, so that it is begun anew.
	if err := f.event(ctx, f.dir, unix.IN_DELETE_SELF, ""); err == nil || !strings.Contains(err.Error(), n.dir) {
		t.Errorf("the directory is gone: %v", err)
	}
}

// A daemon writes as fast as it can while its log is cut again and again, and the
// follower is restarted: the disk is bounded, no line is lost uncounted, torn or
// passed on twice, and they come in order.
func TestFollowWhileCut(t *testing.T) {
	for name, burst := range map[string]int{"all is passed on": 1 << 30, "as ever": burst} {
		t.Run(name, func(t *testing.T) { followWhileCut(t, burst) })
	}
}

func followWhileCut(t *testing.T, burst int) {
	n := newNode(t)
	n.burst = burst
	path := n.log(key)
	w := newWriter(t, path)
	const perRound, rounds = 20_000, 4
	most := int64(0)
	for range rounds {
		n.start()
		stopAt := rand.IntN(perRound)
		for i := range perRound {
			w.write(1)
			if i%16 == 0 {
				most = max(most, taken(t, path))
			}
			if i == stopAt {
				n.stop()
				n.start()
			}
		}
		n.stop()
	}
	n.start()
	n.passedOn(path)
	n.stop()
	before, lines, skipped := -1, 0, int64(0)
	for _, e := range n.book.entries() {
		skipped += e.Skipped + 64*int64(e.Lines)
		text, ok := strings.CutPrefix(e.Msg, "nydusd: ")
		if !ok {
			continue
		}
		number, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || number <= before {
			t.Fatalf("after line %d comes %q", before, text)
		}
		before, lines = number, lines+1
	}
	lost := w.next - lines - int(skipped/64)
	t.Logf("of %d lines %d passed on, %d skipped, %d lost; at most %d bytes on disk", w.next, lines, skipped/64, lost, most)
	if collapses(t) && lost != 0 {
		t.Errorf("of %d lines %d were lost", w.next, lost)
	}
	if most > 2*limit+2*maxBacklog {
		t.Errorf("the log took %d", most)
	}
	if taken(t, path) > 2*limit {
		t.Errorf("in the end the log takes %d", taken(t, path))
	}
}

// passedOn waits until a log says that all of it was passed on. It makes no event.
func (n *node) passedOn(path string) {
	n.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(soon); ; <-tick.C {
		f, err := os.Open(path)
		must(n.t, err)
		at, _ := (&tail{path: path, file: f}).load()
		info, err := f.Stat()
		f.Close()
		must(n.t, err)
		if at == info.Size() && taken(n.t, path) <= 2*n.limit {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("of %d bytes %d are passed on, the log takes %d", info.Size(), at, taken(n.t, path))
		}
	}
}

// collapses tells whether the temporary directory's filesystem can take off the front
// of a file. Where it cannot, a flood loses lines.
func collapses(t *testing.T) bool {
	f, err := os.Create(filepath.Join(t.TempDir(), "probe"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(1<<20))
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, 1<<19) == nil
}

// The rest of a line that a cut tore is not passed on when nobody knows any more how
// far the log was.
func TestFollowTorn(t *testing.T) {
	n := newNode(t)
	n.append(Old(n.log(key)), stamp+"ERROR the beg")
	n.append(n.log(key), "inning\n"+stamp+"WARN whole\n")
	n.append(n.log("other"), "whole without a time\n")
	n.start()
	all := n.await("the whole lines", func(all []entry) bool { return len(all) >= 2 })
	for _, e := range all {
		if e.Instance == key && e.Msg != "nydusd: whole" && e.Skipped != int64(len("inning\n")) || strings.Contains(e.Msg, "inning") {
			t.Errorf("passed on: %+v", e)
		}
	}
}
