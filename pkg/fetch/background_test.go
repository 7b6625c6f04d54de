package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// watched is a Background with a clock, and processes, of its own.
type watched struct {
	*Background
	t       *testing.T
	now     time.Time
	images  []Candidate
	servers []Server
	room    int64
	log     bytes.Buffer
	// begun are the names of the images that were begun; each is let end by a value.
	begun chan string
	end   chan outcome
}

func newWatched(t *testing.T, images ...Candidate) *watched {
	w := &watched{t: t, now: time.Now(), images: images, room: 1 << 40, begun: make(chan string, 10), end: make(chan outcome)}
	w.Background = &Background{
		Images:  func() ([]Candidate, error) { return append([]Candidate{}, w.images...), nil },
		Servers: func() ([]Server, error) { return w.servers, nil },
		Room:    func() (int64, error) { return w.room, nil },
		Complete: func(ctx context.Context, c Candidate) (Result, error) {
			w.begun <- c.Name
			select {
			case out := <-w.end:
				return out.Result, out.err
			case <-ctx.Done():
				return Result{}, fmt.Errorf("interrupted: %w", context.Cause(ctx))
			}
		},
		Log: slog.New(slog.NewTextHandler(&w.log, nil)), Proc: t.TempDir(), Now: func() time.Time { return w.now },
	}
	w.prepare()
	t.Cleanup(w.stop)
	return w
}

// after lets time go by and looks.
func (w *watched) after(d time.Duration) {
	w.now = w.now.Add(d)
	w.step(w.t.Context())
}

// wants checks what is being completed.
func (w *watched) wants(name string) {
	w.t.Helper()
	got := ""
	if w.running != nil {
		got = w.running.Name
	}
	if got != name {
		w.t.Errorf("%q is being completed, want %q", got, name)
	}
}

// ends ends what is running.
func (w *watched) ends(out outcome) {
	w.t.Helper()
	w.end <- out
	w.finish(w.t.Context(), <-w.running.done)
}

// serves makes a process serve an image that has fetched so many bytes.
func (w *watched) serves(key string, pid int, written int64) {
	w.t.Helper()
	dir := filepath.Join(w.Proc, strconv.Itoa(pid))
	must(w.t, os.MkdirAll(dir, 0o700))
	must(w.t, os.WriteFile(filepath.Join(dir, "io"), fmt.Appendf(nil, "rchar: 1\nwrite_bytes: %d\ncancelled_write_bytes: 0\n", written), 0o600))
	for _, s := range w.servers {
		if s.PID == pid {
			return
		}
	}
	w.servers = append(w.servers, Server{key, pid, 1})
}

func candidate(t *testing.T, policy Policy, chunks uint32) Candidate {
	s := newStore(t, "v6-none-4k")
	if chunks > 0 {
		s.put(0, chunks)
	}
	return Candidate{Image: s.im, Policy: policy, Instance: s.Bootstrap}
}

func named(c Candidate, name string) Candidate {
	c.Name = name
	return c
}

func TestBackgroundPolicies(t *testing.T) {
	never, always := named(candidate(t, Never, 1), "never"), named(candidate(t, Always, 0), "always")
	fresh, idle := named(candidate(t, Idle, 0), "fresh"), named(candidate(t, Idle, 1), "idle")
	strange := named(candidate(t, "often", 1), "strange")
	w := newWatched(t, never, fresh, strange, always, idle)
	w.after(0)
	w.wants("always")
	w.after(time.Hour) // one at a time
	w.wants("always")
	w.ends(outcome{Result: Result{Proven: true, Fetched: 5}})
	if !strings.Contains(w.log.String(), "event=completed") {
		t.Errorf("log: %s", &w.log)
	}
	w.after(0)
	w.wants("idle")
	w.ends(outcome{Result: Result{Proven: true}})
	w.after(5 * time.Second)
	w.wants("")
	w.after(again) // it may have been evicted
	w.wants("always")
	for _, want := range []string{"always", "idle", "always"} {
		if got := <-w.begun; got != want {
			t.Errorf("%q was begun, want %q", got, want)
		}
	}
}

func TestBackgroundSleeps(t *testing.T) {
	w := newWatched(t, candidate(t, Never, 1))
	if got := w.step(t.Context()); got != defaultSleep {
		t.Errorf("with nothing to do it looks again after %s", got)
	}
	w.images = append(w.images, named(candidate(t, Always, 0), "new"))
	w.after(defaultSleep)
	w.wants("new")
}

// TestBackgroundQuiet has an image that is read from.
func TestBackgroundQuiet(t *testing.T) {
	c := named(candidate(t, Idle, 1), "read")
	w := newWatched(t, c)
	w.serves(c.Instance, 7, 100)
	w.after(0)
	w.wants("") // it was just mounted
	for n := range int64(5) {
		w.serves(c.Instance, 7, 100+(n+1)<<20)
		w.after(10 * time.Second)
		w.wants("")
	}
	w.after(20 * time.Second)
	w.wants("")
	w.serves(c.Instance, 7, 100+5<<20+leastWritten-1) // it has written its log
	w.after(9 * time.Second)
	w.wants("")
	w.after(2 * time.Second)
	w.wants("read")
}

// TestBackgroundYields has containers that read what is not cached.
func TestBackgroundYields(t *testing.T) {
	c := named(candidate(t, Always, 0), "big")
	w := newWatched(t, c)
	w.after(0)
	w.wants("big")
	<-w.begun
	w.serves("another", 7, 0)
	w.after(2 * time.Second)
	out := <-w.running.done
	w.finish(t.Context(), out)
	if !errors.Is(out.err, errYield) {
		t.Fatalf("%v", out.err)
	}
	if got := w.step(t.Context()); got != defaultLook {
		t.Errorf("it looks again after %s", got)
	}
	w.wants("")
	w.serves("another", 7, leastWritten)
	w.after(4 * time.Second)
	w.wants("")
	w.after(4 * time.Second)
	w.wants("")
	w.after(2 * time.Second)
	w.wants("big")
	// One that ends is nobody's demand.
	must(t, os.RemoveAll(filepath.Join(w.Proc, "7")))
	w.after(2 * time.Second)
	w.wants("big")
	if strings.Contains(w.log.String(), "WARN") {
		t.Errorf("log: %s", &w.log)
	}
}

func TestBackgroundRoom(t *testing.T) {
	c := named(candidate(t, Always, 0), "big")
	full := named(candidate(t, Always, many), "there")
	w := newWatched(t, c, named(candidate(t, Always, 0), "big, too"), full)
	asked, room := 0, w.Room
	w.Room = func() (int64, error) { asked++; return room() }
	w.room = -1
	w.after(0)
	w.wants("there") // which takes none
	if asked != 1 {
		t.Errorf("it is asked %d times at once how much room there is", asked)
	}
	w.ends(outcome{})
	w.after(time.Minute)
	w.wants("")
	if strings.Count(w.log.String(), "no room") != 2 {
		t.Errorf("log: %s", &w.log)
	}
	w.room = 1 << 40
	w.after(time.Minute)
	w.wants("big")
}

func TestBackgroundFails(t *testing.T) {
	c := named(candidate(t, Always, 0), "away")
	w := newWatched(t, c)
	away := errors.New("its registry is away")
	for _, pause := range []time.Duration{firstRetry, 2 * firstRetry, 4 * firstRetry} {
		w.after(0)
		w.wants("away")
		w.ends(outcome{err: away})
		w.after(pause - time.Second)
		w.wants("")
		w.after(time.Second)
		w.wants("away")
		w.ends(outcome{err: away})
		w.later[c.key()] = later{at: w.now, delay: pause, why: away.Error()}
	}
	if n := strings.Count(w.log.String(), "its registry is away"); n != 1 {
		t.Errorf("it is told %d times: %s", n, &w.log)
	}
	// An image that is removed is forgotten.
	w.images = nil
	w.after(time.Minute)
	if len(w.later) > 0 {
		t.Errorf("%+v", w.later)
	}
}

func TestBackgroundMountedFirst(t *testing.T) {
	a, b := named(candidate(t, Always, 0), "a"), named(candidate(t, Always, 0), "b")
	w := newWatched(t, a, b)
	w.serves(b.Instance, 9, 0)
	w.after(0)
	w.wants("")
	w.after(10 * time.Second)
	w.wants("b")
}

// TestBackgroundRun runs, and ends in the middle.
func TestBackgroundRun(t *testing.T) {
	c := named(candidate(t, Always, 0), "one")
	w := newWatched(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	if got := <-w.begun; got != "one" {
		t.Errorf("%q", got)
	}
	cancel()
	must(t, <-done)
	if w.running != nil {
		t.Error("something goes on")
	}
}

// TestBackgroundTellsOnce lists again and again what cannot be read.
func TestBackgroundTellsOnce(t *testing.T) {
	w := newWatched(t, named(candidate(t, Always, 0), "a"))
	fault := errors.New("a layer is broken")
	list := w.Images
	w.Images = func() ([]Candidate, error) { all, _ := list(); return all, fault }
	w.after(0)
	w.wants("a")
	w.after(time.Hour)
	if n := strings.Count(w.log.String(), "a layer is broken"); n != 1 {
		t.Errorf("it is told %d times: %s", n, &w.log)
	}
	fault = nil
	w.after(time.Hour)
	fault = errors.New("a layer is broken")
	w.after(time.Hour)
	if n := strings.Count(w.log.String(), "a layer is broken"); n != 2 {
		t.Errorf("after it was mended it is told %d times: %s", n, &w.log)
	}
}
