package fetch

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

const many = 1 << 20

func TestLook(t *testing.T) {
	s := newStore(t, "v6-merged")
	st := s.state()
	if len(st) != len(s.Head.Blobs) || st.Ready() != 0 || st.Complete() || st.Done() != 0 || st.Missing() == 0 {
		t.Errorf("nothing is there: %+v", st)
	}
	for i := range s.Head.Blobs {
		s.put(i, 1)
	}
	st = s.state()
	if st.Ready() != len(st) || st.Complete() || st.Done() == 0 || st.Done() >= st.Size() {
		t.Errorf("a chunk of each is there: %+v", st)
	}
	for i := range s.Head.Blobs {
		s.put(i, many)
	}
	if st = s.state(); !st.Complete() || st.Done() != st.Size() || st.Missing() != 0 {
		t.Errorf("all is there: %+v", st)
	}
}

func TestLookDamaged(t *testing.T) {
	for _, c := range []struct {
		name, want string
		do         func(t *testing.T, s *store)
	}{
		{"no data", "there is no data", func(t *testing.T, s *store) { must(t, os.Remove(s.Data(0))) }},
		{"short data", "the data has 1 bytes", func(t *testing.T, s *store) { must(t, os.Truncate(s.Data(0), 1)) }},
		{"wrong map", "chunk map is invalid", func(t *testing.T, s *store) { must(t, os.Truncate(s.Map(0), 5)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newStore(t, "v6-none-4k")
			s.put(0, 2)
			c.do(t, s)
			_, err := s.fetcher(&daemon{}).Fetch(t.Context(), s.im, nil)
			var bad *DamagedError
			if !errors.As(err, &bad) || bad.Blob != s.Head.Blobs[0].ID || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			s.gone(0) // no daemon may see that
		})
	}
	// A map without a chunk says nothing about data.
	s := newStore(t, "v6-none-4k")
	s.put(0, 0)
	must(t, os.Remove(s.Data(0)))
	if st := s.state(); st.Ready() != 0 {
		t.Errorf("%+v", st)
	}
	s.im.Bootstrap += ".gone"
	if _, err := Look(s.im); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a bootstrap: %v", err)
	}
	s = newStore(t, "v6-none-4k")
	must(t, os.WriteFile(s.Bootstrap, []byte("x"), 0o600))
	if _, err := Look(s.im); !errors.Is(err, rafs.ErrNotRAFS) && !errors.Is(err, rafs.ErrTruncated) {
		t.Errorf("with a broken bootstrap: %v", err)
	}
}

func TestFetch(t *testing.T) {
	s := newStore(t, "v6-none-4k")
	chunks := int(s.Head.Blobs[0].ChunkCount)
	if chunks < 4 {
		t.Fatalf("%d chunks are too few for this test", chunks)
	}
	// The first daemon ends half way, the second does nothing any more.
	first := &daemon{look: func(n int) bool {
		s.put(0, uint32(min(n, chunks/2)))
		return n > chunks
	}}
	second := &daemon{idle: true, look: func(n int) bool {
		s.put(0, uint32(min(chunks/2+n, chunks-1)))
		return false
	}}
	third := &daemon{look: func(int) bool { s.put(0, many); return false }}
	var told []int
	st, err := s.fetcher(first, second, third).Fetch(t.Context(), s.im, func(s State) { told = append(told, s.Ready()) })
	if err != nil || !st.Complete() {
		t.Fatalf("%+v, %v", st, err)
	}
	s.gone(3)
	if told[0] != 0 || told[len(told)-1] != chunks {
		t.Errorf("told %v", told)
	}
	for i := range told[1:] {
		if told[i+1] < told[i] {
			t.Errorf("told %v", told)
		}
	}
	// What is there is not fetched.
	st, err = s.fetcher(&daemon{}).Fetch(t.Context(), s.im, nil)
	if err != nil || !st.Complete() {
		t.Fatalf("%+v, %v", st, err)
	}
	s.gone(3)
}

func TestFetchFails(t *testing.T) {
	refused := errors.New("the registry says no")
	broken := errors.New("this cannot be started")
	for _, c := range []struct {
		name    string
		daemon  daemon
		started int
		want    []string
		is      error
	}{
		{"idle", daemon{idle: true}, 3, []string{"has 1 of", "its last words"}, ErrStalled},
		{"busy, and gets nothing", daemon{}, 3, []string{"has 1 of", "its last words"}, ErrStalled},
		{"ends", daemon{look: func(int) bool { return true }}, 3, []string{"has 1 of"}, ErrStalled},
		{"refused", daemon{idle: true, ask: refused}, 1, []string{"has 1 of"}, refused},
		{"stays", daemon{look: func(int) bool { return true }, stop: broken}, 1, nil, broken},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newStore(t, "v6-none-4k")
			s.put(0, 1)
			f := s.fetcher(&c.daemon)
			if c.daemon.idle {
				f.Stall = time.Hour // it is enough that it does nothing
			} else {
				f.Quiet = time.Hour // it is enough that it gets nothing
			}
			st, err := f.Fetch(t.Context(), s.im, nil)
			if !errors.Is(err, c.is) || st.Ready() != 1 {
				t.Errorf("%+v, %v", st, err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v, want %q", err, want)
				}
			}
			s.gone(c.started)
		})
	}
	// What gets a part is tried again, as long as each gets more.
	s := newStore(t, "v6-none-4k")
	had := uint32(0)
	d := &daemon{ask: refused}
	d.look = func(int) bool {
		had = min(had+1, 3)
		s.put(0, had)
		return true
	}
	st, err := s.fetcher(d).Fetch(t.Context(), s.im, nil)
	if !errors.Is(err, refused) || !errors.Is(err, ErrStalled) || st.Ready() != 3 {
		t.Errorf("%+v, %v", st, err)
	}
	s.gone(4)

	f := s.fetcher()
	f.Start = func(context.Context, Image) (Daemon, error) { return nil, broken }
	if _, err := f.Fetch(t.Context(), s.im, nil); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}

func TestFetchInterrupted(t *testing.T) {
	s := newStore(t, "v6-none-4k")
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("somebody wants it to end")
	d := &daemon{look: func(n int) bool {
		s.put(0, uint32(n))
		if n == 2 {
			cancel(why)
		}
		return false
	}}
	st, err := s.fetcher(d).Fetch(ctx, s.im, nil)
	// The daemon was stopped with a context that had not ended.
	if !errors.Is(err, why) || errors.Is(err, context.Canceled) || st.Complete() {
		t.Errorf("%+v, %v", st, err)
	}
	s.gone(1)
}

func TestPace(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		rate, from, done int64
		after            time.Duration
		ahead            bool
		wait             time.Duration
	}{
		{0, 0, 1 << 40, 0, false, 0},
		{1 << 20, 0, 4 << 20, 0, false, 4 * time.Second},
		{1 << 20, 0, 5 << 20, 0, true, 5 * time.Second},
		{1 << 20, 0, 5 << 20, time.Second, false, 4 * time.Second},
		{1 << 20, 100 << 20, 103 << 20, 0, false, 3 * time.Second},
		{100 << 20, 0, 150 << 20, 0, false, 1500 * time.Millisecond},
		{100 << 20, 0, 350 << 20, time.Second, true, 2500 * time.Millisecond},
	} {
		p := pace{rate: c.rate, from: c.from, since: now}
		at := now.Add(c.after)
		if got := p.ahead(at, c.done) > 0; got != c.ahead {
			t.Errorf("%+v: ahead %v", c, got)
		}
		if c.rate > 0 && p.wait(at, c.done) != c.wait {
			t.Errorf("%+v: waits %s", c, p.wait(at, c.done))
		}
	}
}

// TestFetchSlowly is told to be slower than it can be.
func TestFetchSlowly(t *testing.T) {
	s := newStore(t, "v6-none-4k")
	half := s.Head.Blobs[0].ChunkCount / 2
	put := half
	d := &daemon{look: func(int) bool {
		s.put(0, put)
		put = many
		return false
	}}
	r := &run{Fetcher: s.fetcher(d).withDefaults(), im: s.im, blobs: s.Head.Blobs, tell: func(State) {}, state: s.state()}
	r.pace = pace{rate: 1, since: time.Now().Add(-time.Hour), from: -leastAhead}
	why, err := r.daemon(t.Context())
	if err != nil || why != ahead {
		t.Errorf("%s, %v", why, err)
	}
	s.gone(1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.pause(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("it does not wait: %v", err)
	}
	r.pace.from = r.state.Done()
	must(t, r.pause(t.Context()))
	if why, err = r.daemon(t.Context()); err != nil || why != complete {
		t.Errorf("%s, %v", why, err)
	}
}

func TestComplete(t *testing.T) {
	s := newStore(t, "v6-merged")
	d := &daemon{look: func(int) bool {
		for i := range s.Head.Blobs {
			s.put(i, many)
		}
		return false
	}}
	var phases []Phase
	tell := func(p Phase, _ State) {
		if len(phases) == 0 || phases[len(phases)-1] != p {
			phases = append(phases, p)
		}
	}
	c := completer(s.fetcher(d))
	res, err := c.Complete(t.Context(), s.im, tell)
	if err != nil || !res.Proven || res.Fetched != res.State.Size() || res.Fetched == 0 || len(res.Repaired) > 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	if len(phases) != 2 || phases[0] != Fetching || phases[1] != Comparing {
		t.Errorf("phases %q", phases)
	}
	if _, err := os.Stat(s.Proof()); err != nil {
		t.Error(err)
	}
	res, err = c.Complete(t.Context(), s.im, nil)
	if err != nil || !res.Proven || res.Fetched != 0 {
		t.Errorf("again: %+v, %v", res, err)
	}
	s.gone(1)
}

// TestCompleteDamaged finds wrong data, and repairs it when it may.
func TestCompleteDamaged(t *testing.T) {
	damage := func(t *testing.T, s *store) {
		f, err := os.OpenFile(s.Data(0), os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt([]byte{0xa5, 0x5a, 0xa5}, 1)
		must(t, err)
		must(t, f.Close())
	}
	s := newStore(t, "v6-none-4k")
	s.put(0, many)
	damage(t, s)
	d := &daemon{look: func(int) bool { s.put(0, many); return false }}
	c := completer(s.fetcher(d))
	_, err := c.Complete(t.Context(), s.im, nil)
	var bad *DamagedError
	if !errors.As(err, &bad) || bad.Blob != s.Head.Blobs[0].ID {
		t.Fatalf("%v", err)
	}
	s.gone(0)

	evicted := 0
	c.Evict = func(_ context.Context, dir string, blobs ...string) error {
		if evicted++; dir != s.CacheDir || len(blobs) != 1 || blobs[0] != s.Head.Blobs[0].ID {
			t.Errorf("evict %q from %s", blobs, dir)
		}
		return errors.Join(os.Remove(s.Map(0)), os.Remove(s.Data(0)))
	}
	res, err := c.Complete(t.Context(), s.im, nil)
	if err != nil || !res.Proven || len(res.Repaired) != 1 || res.Fetched == 0 || evicted != 1 {
		t.Errorf("%+v, %v", res, err)
	}
	s.gone(1)

	// The registry gives out what is wrong: nobody goes round in circles.
	must(t, os.Remove(s.Proof()))
	must(t, errors.Join(os.Remove(s.Map(0)), os.Remove(s.Data(0))))
	d.look = func(int) bool {
		s.put(0, many)
		damage(t, s)
		return false
	}
	evicted = 0
	res, err = c.Complete(t.Context(), s.im, nil)
	if !errors.As(err, &bad) || res.Proven || len(res.Repaired) != 1 || evicted != 1 {
		t.Errorf("%+v, %v", res, err)
	}
	// Nor when it is in use.
	inUse := errors.New("in use")
	c.Evict = func(context.Context, string, ...string) error { return inUse }
	if _, err = c.Complete(t.Context(), s.im, nil); !errors.Is(err, inUse) || !errors.As(err, &bad) {
		t.Errorf("%v", err)
	}
}

// TestUncounted has a v5 image without an extended blob table, as older nydus-image made
// them: nobody knows when it is complete, and no daemon is started for it.
func TestUncounted(t *testing.T) {
	s := newStore(t, "v5-none-4k")
	boot, err := os.ReadFile(s.Bootstrap)
	must(t, err)
	clear(boot[68:72]) // the table's entries, in the superblock
	must(t, os.WriteFile(s.Bootstrap, boot, 0o600))
	s.put(0, many)
	if _, err := Look(s.im); !errors.Is(err, ErrUncounted) || !strings.Contains(err.Error(), s.Head.Blobs[0].ID) {
		t.Errorf("looked at: %v", err)
	}
	if res, err := completer(s.fetcher(&daemon{})).Complete(t.Context(), s.im, nil); !errors.Is(err, ErrUncounted) || res.Proven {
		t.Errorf("completed: %+v, %v", res, err)
	}
	s.gone(0)
}

// TestCompleteAgain compares what was proven, whose disk returns something else by now.
func TestCompleteAgain(t *testing.T) {
	s := newStore(t, "v6-none-4k")
	s.put(0, many)
	c := completer(s.fetcher(&daemon{}))
	if _, err := c.Complete(t.Context(), s.im, nil); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(s.Proof())
	must(t, err)
	c.Prover.Again = true
	if res, err := c.Complete(t.Context(), s.im, nil); err != nil || !res.Proven {
		t.Fatalf("%+v, %v", res, err)
	}
	if now, err := os.Stat(s.Proof()); err != nil || os.SameFile(info, now) {
		t.Errorf("it was not compared again: %v", err)
	}
	text, err := os.ReadFile(s.Data(0))
	must(t, err)
	text[7] ^= 1
	f, err := os.OpenFile(s.Data(0), os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(text, 0)
	must(t, err)
	must(t, f.Close())
	var bad *DamagedError
	if _, err := c.Complete(t.Context(), s.im, nil); !errors.As(err, &bad) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(s.Proof()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("wrong data is proven: %v", err)
	}
}

// TestCompleteUnproven has an image that the kernel cannot serve.
func TestCompleteUnproven(t *testing.T) {
	s := newStore(t, "v5-none-4k")
	s.put(0, many)
	res, err := completer(s.fetcher(&daemon{})).Complete(t.Context(), s.im, nil)
	if err != nil || res.Proven || !strings.Contains(res.Unproven, "the kernel reads v6") {
		t.Errorf("%+v, %v", res, err)
	}
}
