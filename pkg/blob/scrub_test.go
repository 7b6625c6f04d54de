package blob

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// logged collects what is logged.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// scrubbing is a Scrub that runs.
type scrubbing struct {
	*bed
	log  *logged
	stop func()
}

// quick is a scrub that does not wait.
func quick() Scrubbing {
	return Scrubbing{Interval: time.Hour, Again: 10 * time.Millisecond, Settle: time.Millisecond}
}

func (b *bed) scrub(how Scrubbing) *scrubbing {
	b.t.Helper()
	s := &scrubbing{bed: b, log: &logged{}}
	o := b.options()
	o.Now, o.Log = time.Now, slog.New(slog.NewJSONHandler(s.log, nil))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- New(o).Scrub(ctx, how) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			b.t.Errorf("the scrub ended with %v", err)
		}
	})
	b.t.Cleanup(s.stop)
	return s
}

// await waits for what no event tells.
func (s *scrubbing) await(what string, ok func() bool) {
	s.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	over := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-over:
			state, err := ReadScrubState(s.root)
			s.t.Fatalf("%s: not within a minute; state %+v (%v), log:\n%s", what, state, err, s.log)
		}
	}
}

// until waits until what is written down is so.
func (s *scrubbing) until(what string, ok func(ScrubState) bool) (state ScrubState) {
	s.t.Helper()
	s.await(what, func() bool {
		var err error
		state, err = ReadScrubState(s.root)
		s.must(err)
		return ok(state)
	})
	return state
}

func passed(s ScrubState) bool { return s.Last != nil && s.Pass == nil }

// pass scrubs once.
func (b *bed) pass() (ScrubState, string) {
	b.t.Helper()
	s := b.scrub(quick())
	state := s.until("a pass", passed)
	s.stop()
	return state, s.log.String()
}

func TestScrubFindsNothing(t *testing.T) {
	for _, name := range []string{"v6-none-4k", "v6-lz4_block-4k", "v6-zstd-0x10000", "v6-merged", "v6-chunk-dict", "v6-inline"} {
		b := newBed(t)
		dir := b.dir("one")
		boot, tables := b.fetched(dir, name)
		b.image("one", boot)
		b.image("one", append(boot, make([]byte, 4096)...)) // the same blobs, once more
		all := b.verify()
		proven := b.prove(dir, 1, tables[0].Blob.ID)
		state, log := b.pass()
		checked := 0
		for i := range all {
			checked += all[i].Checked
		}
		if p := state.Last; p.Blobs != len(tables) || p.Checked != checked || p.Unchecked+p.Removed+p.Damaged+p.Failed != 0 || len(state.Damaged) > 0 {
			t.Errorf("%s: %+v, want %d chunks in %d blobs", name, p, checked, len(tables))
		}
		if !exists(proven) {
			t.Errorf("%s: the proof is gone", name)
		}
		if strings.Contains(log, `"event":"damaged"`) || !strings.Contains(log, `"event":"scrubbed"`) {
			t.Errorf("%s: %s", name, log)
		}
	}
}

// What nobody uses is removed; what is right stays.
func TestScrubRemoves(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-merged")
	b.image("one", boot)
	bad, c := tables[0].Blob.ID, tables[0].At(tables[0].Len()-1)
	good := tables[1].Blob.ID
	b.flip(filepath.Join(dir, bad+".blob.data"), int64(c.RawOffset+uint64(c.RawSize)-1))
	both, other := b.prove(dir, 1, good, bad), b.prove(dir, 2, good)
	state, log := b.pass()
	if state.Last.Removed != 1 || state.Last.Damaged != 0 || len(state.Damaged) > 0 {
		t.Errorf("%+v", state)
	}
	if b.has(dir, bad) != "" || b.has(dir, good) == "" || exists(both) || !exists(other) {
		t.Errorf("left are %q and %q, proofs %v and %v", b.has(dir, bad), b.has(dir, good), exists(both), exists(other))
	}
	for _, want := range []string{`"level":"WARN"`, `"event":"damaged"`, bad, `"images":["one"]`, "1 of ", "fetched again"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %s:\n%s", want, log)
		}
	}
}

// What is there in part is compared as far, and no further.
func TestScrubPart(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-zstd-4k")
	b.image("one", boot)
	id, last := tables[0].Blob.ID, tables[0].Len()-1
	absent, there := tables[0].At(0), tables[0].At(last)
	path := filepath.Join(dir, id+".chunk_map")
	bits, err := os.ReadFile(path)
	b.must(err)
	bits[4096+absent.Index/8] &^= 0x80 >> (absent.Index % 8)
	b.write(path, bits)
	b.flip(filepath.Join(dir, id+".blob.data"), int64(absent.RawOffset))
	if state, _ := b.pass(); state.Last.Checked != last || state.Last.Removed != 0 {
		t.Errorf("%+v", state.Last)
	}
	b.must(os.Remove(filepath.Join(b.root, scrubName)))
	b.flip(filepath.Join(dir, id+".blob.data"), int64(there.RawOffset))
	if state, _ := b.pass(); state.Last.Removed != 1 {
		t.Errorf("%+v", state.Last)
	}
}

// What is in use stays, is told of, and goes with its last user. The next start is not by
// the kernel.
func TestScrubInUse(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-zstd-4k")
	b.image("one", boot)
	key := b.instance("one", boot)
	id := tables[0].Blob.ID
	proven := b.prove(dir, 1, id)
	b.flip(filepath.Join(dir, id+".blob.data"), int64(tables[0].At(0).RawOffset))
	s := b.scrub(quick())
	state := s.until("a pass", passed)
	if state.Last.Damaged != 1 || len(state.Damaged) != 1 || state.Damaged[0].Blob != id || state.Damaged[0].Directory != dir || !strings.Contains(state.Damaged[0].Problem, "1 of ") {
		t.Errorf("%+v", state)
	}
	if b.has(dir, id) == "" || exists(proven) {
		t.Errorf("in use: left is %q, the proof %v", b.has(dir, id), exists(proven))
	}
	list, _, err := b.cache().List(t.Context())
	if err != nil || len(list) != 1 || list[0].Damage == "" {
		t.Errorf("the list says %+v (%v)", list, err)
	}
	for _, want := range []string{`"level":"ERROR"`, `"event":"damaged"`, id, `"images":["one"]`, key} {
		if !strings.Contains(s.log.String(), want) {
			t.Errorf("the log lacks %s:\n%s", want, s.log)
		}
	}
	b.must(os.RemoveAll(filepath.Join(b.run, "i", key)))
	s.until("it is not in use any more", func(s ScrubState) bool { return len(s.Damaged) == 0 })
	if b.has(dir, id) != "" {
		t.Errorf("not in use any more: left is %q", b.has(dir, id))
	}
	if n := strings.Count(s.log.String(), `"level":"ERROR"`); n != 1 {
		t.Errorf("it was told %d times:\n%s", n, s.log)
	}
}

// TestScrubStuck: what is wrong, and held by somebody who is not known, is not read again and
// again for that, and goes when it is let go.
func TestScrubStuck(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-zstd-4k")
	b.image("one", boot)
	id := tables[0].Blob.ID
	data := filepath.Join(dir, id+".blob.data")
	b.flip(data, int64(tables[0].At(0).RawOffset))
	holder, err := os.Open(data)
	b.must(err)
	defer holder.Close()

	o, how := b.options(), quick()
	o.Now, how.Again = time.Now, time.Nanosecond
	how.Rate = rate.NewLimiter(rate.Every(24*365*time.Hour), 1<<30) // which counts
	s, err := New(o).newScrubber(how)
	b.must(err)
	defer s.close()
	s.pass(t.Context())
	if len(s.state.Damaged) != 1 || b.has(dir, id) == "" {
		t.Fatalf("it is held: %+v, left is %q", s.state, b.has(dir, id))
	}
	s.again(t.Context())
	left := int(how.Rate.Tokens())
	for range 3 {
		s.again(t.Context())
	}
	if now := int(how.Rate.Tokens()); now != left {
		t.Errorf("%d bytes were read again", left-now)
	}
	if len(s.state.Damaged) != 1 || b.has(dir, id) == "" {
		t.Fatalf("it is held: %+v, left is %q", s.state, b.has(dir, id))
	}
	b.must(holder.Close())
	s.again(t.Context())
	if len(s.state.Damaged) != 0 || b.has(dir, id) != "" {
		t.Errorf("it was let go: %+v, left is %q", s.state, b.has(dir, id))
	}
}

// nydusd may have repaired it by then, and what no image has any more is not scrubbed.
func TestScrubForgets(t *testing.T) {
	for what, end := range map[string]func(b *bed, dir, id string, at int64, image string){
		"repaired": func(b *bed, dir, id string, at int64, _ string) {
			b.flip(filepath.Join(dir, id+".blob.data"), at)
		},
		"swept": func(b *bed, dir, id string, _ int64, image string) {
			b.must(os.RemoveAll(image))
		},
	} {
		t.Run(what, func(t *testing.T) {
			b := newBed(t)
			dir := b.dir("one")
			boot, tables := b.fetched(dir, "v6-zstd-4k")
			image, key := b.image("one", boot), b.instance("one", boot)
			id, at := tables[0].Blob.ID, int64(tables[0].At(0).RawOffset)
			b.flip(filepath.Join(dir, id+".blob.data"), at)
			s := b.scrub(quick())
			s.until("damage", func(s ScrubState) bool { return len(s.Damaged) == 1 && s.Last != nil })
			end(b, dir, id, at, image)
			b.must(os.RemoveAll(filepath.Join(b.run, "i", key)))
			s.until("no damage", func(s ScrubState) bool { return len(s.Damaged) == 0 })
			s.stop()
			if b.has(dir, id) == "" {
				t.Error("it was removed")
			}
		})
	}
}

// A process that ends leaves where it was, and the next one goes on there.
func TestScrubGoesOn(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, tables := b.fetched(dir, "v6-merged")
	b.image("one", boot)
	if len(tables) < 2 {
		t.Fatal("one blob is too few")
	}
	// Enough for the first blob, and then for nothing within days.
	first := b.verify()[0]
	bytes := 0
	for i := range tables {
		if tables[i].Blob.ID == first.ID {
			for n := range tables[i].Len() {
				bytes += int(tables[i].At(n).RawSize)
			}
		}
	}
	how := quick()
	how.Rate = rate.NewLimiter(1, max(bytes, rafs.MaxChunkSize))
	how.Rate.AllowN(time.Now(), max(bytes, rafs.MaxChunkSize)-bytes)
	s := b.scrub(how)
	begun := s.until("it has begun", func(s ScrubState) bool { return s.Pass != nil })
	// It is in the second blob as soon as more is wanted than there is.
	s.until("the second blob", func(ScrubState) bool { return how.Rate.TokensAt(time.Now()) < 0 })
	s.stop()
	state, err := ReadScrubState(b.root)
	b.must(err)
	if state.Pass == nil || state.Pass.Blob != first.ID || state.Pass.Blobs != 1 || state.Pass.Failed != 0 {
		t.Fatalf("after it was stopped: %+v, want that %s was done", state.Pass, first.ID)
	}
	// It is not read again.
	b.flip(filepath.Join(dir, first.ID+".blob.data"), int64(tables[0].At(0).RawOffset))
	state, _ = b.pass()
	if p := state.Last; p.Blobs != len(tables) || p.Removed != 0 || !p.Started.Equal(begun.Pass.Started) || !state.Next.Equal(begun.Next) {
		t.Errorf("%+v, next %s: want %d blobs, begun %s, next %s", p, state.Next, len(tables), begun.Pass.Started, begun.Next)
	}
	// The next pass does.
	state.Next = time.Now().Add(-time.Second)
	b.must(state.write(b.root))
	s = b.scrub(quick())
	s.until("the next pass", func(s ScrubState) bool { return passed(s) && s.Last.Removed == 1 })
}

// While a blob is read slowly nobody else waits.
func TestScrubKeepsNobodyWaiting(t *testing.T) {
	b := newBed(t)
	dir := b.dir("one")
	boot, _ := b.fetched(dir, "v6-zstd-4k")
	b.image("one", boot)
	o := b.options()
	o.Now = time.Now
	c, how := New(o), quick()
	how.Rate = rate.NewLimiter(1, rafs.MaxChunkSize)
	how.Rate.AllowN(time.Now(), rafs.MaxChunkSize)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- c.Scrub(ctx, how) }()
	// It wants more than there is as soon as it reads, and does not get it within hours.
	(&scrubbing{bed: b, log: &logged{}}).await("it reads", func() bool { return how.Rate.TokensAt(time.Now()) < 0 })
	swept := make(chan error, 1)
	go func() {
		_, err := c.Sweep(t.Context(), false)
		swept <- err
	}()
	select {
	case err := <-swept:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("the sweep waits for the scrub")
	}
	if how.Rate.TokensAt(time.Now()) >= 0 {
		t.Error("the scrub read all meanwhile: this test tests nothing")
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestScrubTimes(t *testing.T) {
	const hour = time.Hour
	half := func(most time.Duration) time.Duration { return most / 2 }
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for what, c := range map[string]struct {
		state ScrubState
		want  time.Duration
	}{
		"the first":        {ScrubState{}, 12 * hour},
		"as planned":       {ScrubState{Next: now.Add(5 * hour)}, 5 * hour},
		"late":             {ScrubState{Next: now.Add(-5 * hour)}, -5 * hour},
		"a tenth later":    {ScrubState{Next: now.Add(26 * hour)}, 26 * hour},
		"interval shorter": {ScrubState{Next: now.Add(100 * hour)}, 12 * hour},
	} {
		b := newBed(t)
		c.state.Version = scrubVersion
		b.must(c.state.write(b.root))
		o := b.options()
		o.Now = func() time.Time { return now }
		s, err := New(o).newScrubber(Scrubbing{Interval: 24 * hour, Jitter: half})
		b.must(err)
		if got := s.state.Next.Sub(now); got != c.want || s.due() != (c.want <= 0) {
			t.Errorf("%s: next in %s, due %v, want %s", what, got, s.due(), c.want)
		}
		if s.due() {
			s.pass(t.Context())
			if got := s.state.Next.Sub(now); got != 24*hour {
				t.Errorf("%s: after that in %s", what, got)
			}
		}
		written, err := ReadScrubState(b.root)
		if err != nil || !written.Next.Equal(s.state.Next) {
			t.Errorf("%s: written is %s (%v), not %s", what, written.Next, err, s.state.Next)
		}
		s.close()
	}
}

// A state that cannot be read costs a pass. What a killed process left of one goes.
func TestScrubStateBroken(t *testing.T) {
	for _, text := range []string{"", "{", `{"version":7}`} {
		b := newBed(t)
		b.write(filepath.Join(b.root, scrubName), []byte(text))
		b.write(filepath.Join(b.root, scrubTemporary+"1"), nil)
		s := b.scrub(quick())
		// The broken one is no state to wait for.
		s.await("a pass", func() bool {
			state, err := ReadScrubState(b.root)
			return err == nil && passed(state)
		})
		s.stop()
		if !strings.Contains(s.log.String(), "begins anew") || exists(filepath.Join(b.root, scrubTemporary+"1")) {
			t.Errorf("%q: %s", text, s.log)
		}
	}
}
