package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// No more parts are under way at a host than may be, and all come.
func TestStreams(t *testing.T) {
	const most, all = 2, 8
	s := newSource(t)
	e, _ := setup(t, "", s)
	var now, peak atomic.Int64
	s.fail(func(w http.ResponseWriter, r *http.Request) {
		n := now.Add(1)
		defer now.Add(-1)
		for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
		}
		serve(w, r)
	})
	f := NewFetcher(FetcherConfig{Finder: e, Streams: most})
	// Those that have a place keep it until all others wait.
	var first []*Part
	for range most {
		p, err := f.Open(t.Context(), blob(), 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		first = append(first, p)
	}
	var wg sync.WaitGroup
	for range all {
		wg.Go(func() {
			if got, err := read(t, f, 0, -1); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	for _, p := range first {
		if _, err := io.Copy(io.Discard, p); err != nil {
			t.Error(err)
		}
		p.Close()
	}
	wg.Wait()
	if got := peak.Load(); got < 1 || got > most {
		t.Errorf("%d requests at once, want %d at most", got, most)
	}
	if got := s.asked.Load(); got != most+all {
		t.Errorf("%d requests, want %d", got, most+all)
	}
}

// Whoever waits for its turn may go, and takes nobody's place.
func TestStreamsGivenUp(t *testing.T) {
	s := newSource(t)
	e, _ := setup(t, "", s)
	f := NewFetcher(FetcherConfig{Finder: e, Streams: 1})
	p, err := f.Open(t.Context(), blob(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Open(ctx, blob(), 0, 1); err == nil {
		t.Error("a second part was opened")
	}
	p.Close()
	p.Close() // which is one place
	mustRead(t, f, 0, 1)
	if got := s.asked.Load(); got != 2 {
		t.Errorf("%d requests, want 2", got)
	}
}

// A host's bytes come no faster than they may.
func TestRate(t *testing.T) {
	s := newSource(t)
	e, _ := setup(t, "", s)
	f := NewFetcher(FetcherConfig{Finder: e, Rate: 2 << 20})
	begun := time.Now()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if got, err := read(t, f, 0, -1); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	// Twice 3 MiB, without the first burst.
	if took := time.Since(begun); took < 2500*time.Millisecond {
		t.Errorf("6 MiB at 2 MiB a second took %v", took)
	}
}

// A host from which next to nothing comes is given up, although something does.
func TestTrickle(t *testing.T) {
	slow, good := newSource(t), newSource(t)
	e, _ := setup(t, "", slow, good)
	slow.fail(func(w http.ResponseWriter, r *http.Request) {
		serve(&trickle{ResponseWriter: w, stop: r.Context().Done()}, r)
	})
	f := quick(e)
	mustRead(t, f, 0, 1<<20)
	if slow.asked.Load() != 1 || good.asked.Load() != 1 {
		t.Errorf("the slow host was asked %d times, the other %d", slow.asked.Load(), good.asked.Load())
	}
}

// Of several hosts like that none is asked again and again before one that is well.
func TestManyTrickle(t *testing.T) {
	one, two, three, good := newSource(t), newSource(t), newSource(t), newSource(t)
	e, _ := setup(t, "", one, two, three, good)
	for _, s := range []*source{one, two, three} {
		s.fail(func(w http.ResponseWriter, r *http.Request) {
			serve(&trickle{ResponseWriter: w, stop: r.Context().Done()}, r)
		})
	}
	const slow = 300 * time.Millisecond
	f := NewFetcher(FetcherConfig{Finder: e, AnswerTimeout: 5 * time.Second, StallTimeout: slow, Avoid: slow})
	mustRead(t, f, 0, 1<<20)
	for _, s := range []*source{one, two, three} {
		if n := s.asked.Load(); n > 4 {
			t.Errorf("a slow host was asked %d times", n)
		}
	}
}

// trickle writes a hundred bytes at a time.
type trickle struct {
	http.ResponseWriter
	stop <-chan struct{}
}

func (s *trickle) Write(p []byte) (n int, err error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for n < len(p) && err == nil {
		var k int
		k, err = s.ResponseWriter.Write(p[n:min(n+100, len(p))])
		s.ResponseWriter.(http.Flusher).Flush()
		n += k
		select {
		case <-tick.C:
		case <-s.stop:
			return n, io.ErrClosedPipe
		}
	}
	return n, err
}

// A mirror that does not have a blob is not asked for each part of it, but for others.
func TestMissingIsRemembered(t *testing.T) {
	stale, good := newSource(t), newSource(t)
	e, _ := setup(t, "", stale, good)
	stale.fail(hostFaults["404"])
	f := quick(e)
	for range 3 {
		mustRead(t, f, 7, 100)
	}
	if got := stale.asked.Load(); got != 1 {
		t.Errorf("it was asked %d times", got)
	}
	other := blob()
	other.Digest = digest.FromString("another")
	if _, err := f.Open(t.Context(), other, 0, 1); !errors.Is(err, ErrNoBlob) {
		t.Errorf("another blob: %v", err)
	}
	if got := stale.asked.Load(); got != 2 {
		t.Errorf("for another blob it was asked %d times", got-1)
	}
}

// A host whose blob is shorter than it can be is passed over, also for a part that it has.
func TestShortBlob(t *testing.T) {
	short, good := newSource(t), newSource(t)
	e, _ := setup(t, "", short, good)
	short.fail(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content[:1000]))
	})
	b := blob()
	b.Size, b.AtLeast = 0, int64(len(content))-5
	p, err := quick(e).Open(t.Context(), b, 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Host() != good.host() || p.Size() != int64(len(content)) || short.asked.Load() != 1 {
		t.Errorf("it comes from %s and has %d bytes; the other was asked %d times", p.Host(), p.Size(), short.asked.Load())
	}
}

// Nobody waits again for a registry of which nothing was to be had for so long, until
// something is.
func TestGone(t *testing.T) {
	one, two := newSource(t), newSource(t)
	e, _ := setup(t, "", one, two)
	one.fail(hostFaults["502"])
	two.fail(hostFaults["reset"])
	f := NewFetcher(FetcherConfig{Finder: e, GiveUp: time.Second})
	if _, err := read(t, f, 0, 10); err == nil || one.asked.Load() < 2 {
		t.Fatalf("%v after %d requests", err, one.asked.Load())
	}
	// The first one may have given up a pause before its time.
	for f.gone["registry.test"].since.After(time.Now().Add(-time.Second)) {
		if _, err := read(t, f, 0, 10); err == nil {
			t.Fatal("it was read")
		}
	}
	for range 3 {
		before := one.asked.Load()
		if _, err := read(t, f, 0, 10); err == nil || !strings.Contains(err.Error(), one.host()) || !strings.Contains(err.Error(), two.host()) {
			t.Errorf("%v", err)
		}
		if n := one.asked.Load() - before; n != 1 {
			t.Errorf("it was asked %d times again", n)
		}
	}
	two.fault.Store(nil)
	mustRead(t, f, 0, 10)
	two.fail(hostFaults["502"])
	before := one.asked.Load()
	if _, err := read(t, f, 0, 10); err == nil || one.asked.Load() < before+2 {
		t.Errorf("after it had come back: %v, asked %d times", err, one.asked.Load()-before)
	}
}

// Whose content was wrong is asked later for that blob, but before nobody.
func TestDistrust(t *testing.T) {
	liar, good := newSource(t), newSource(t)
	e, _ := setup(t, "", liar, good)
	f := quick(e)
	p, err := f.Open(t.Context(), blob(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	if p.Host() != liar.host() {
		t.Fatalf("it comes from %s", p.Host())
	}
	p.Distrust(0, 10)
	p.Close()
	mustRead(t, f, 0, 10)
	if liar.asked.Load() != 1 || good.asked.Load() != 1 {
		t.Errorf("it was asked %d times, the other %d", liar.asked.Load(), good.asked.Load())
	}
	good.Close()
	mustRead(t, f, 0, 10)
	if liar.asked.Load() != 2 {
		t.Errorf("it was asked %d times when nobody else was there", liar.asked.Load())
	}
}
