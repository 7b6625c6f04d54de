package credentials

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// clock is one that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Unix(1e9, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.mu.Unlock()
}

// oracle answers with how often it was asked.
type oracle struct {
	asked   atomic.Int32
	expires func() time.Time
	err     atomic.Pointer[error]
	nothing atomic.Bool
	// answered gets a value after each answer was given.
	answered chan int32
}

func (o *oracle) ask(context.Context) (Answer[int32], error) {
	n := o.asked.Add(1)
	if o.answered != nil {
		defer func() { o.answered <- n }()
	}
	if err := o.err.Load(); err != nil {
		return Answer[int32]{}, *err
	}
	a := Answer[int32]{Value: n, Nothing: o.nothing.Load()}
	if o.expires != nil {
		a.Expires = o.expires()
	}
	return a, nil
}

func want(t *testing.T, m *Memo[int32], o *oracle, value int32, fails bool) {
	t.Helper()
	got, err := m.Get(t.Context(), []string{"k"}, o.ask)
	if (err != nil) != fails || !fails && got != value {
		t.Fatalf("got %d, %v; want %d, failure %v", got, err, value, fails)
	}
}

func TestMemoKeeps(t *testing.T) {
	failed := errors.New("failed")
	for name, c := range map[string]struct {
		prepare func(*oracle, *clock)
		lasts   time.Duration
		fails   bool
	}{
		"without an end":     {func(*oracle, *clock) {}, 150 * time.Second, false}, // half of 5 minutes less what would renew
		"that it fails":      {func(o *oracle, _ *clock) { o.err.Store(&failed) }, 5 * time.Second, true},
		"that it is unknown": {func(o *oracle, _ *clock) { o.nothing.Store(true) }, 10 * time.Second, false},
	} {
		t.Run(name, func(t *testing.T) {
			clock, o := newClock(), &oracle{}
			m := NewMemo[int32](MemoConfig{Now: clock.Now})
			c.prepare(o, clock)
			want(t, m, o, 1, c.fails)
			clock.move(c.lasts - time.Second)
			want(t, m, o, 1, c.fails)
			if o.asked.Load() != 1 {
				t.Fatalf("asked %d times", o.asked.Load())
			}
			clock.move(6 * time.Minute)
			want(t, m, o, 2, c.fails)
		})
	}
}

// An answer is renewed before its end, while it is still used; when that fails it is
// used until its end.
func TestMemoRenews(t *testing.T) {
	clock := newClock()
	o := &oracle{answered: make(chan int32, 10), expires: func() time.Time { return clock.Now().Add(10 * time.Minute) }}
	m := NewMemo[int32](MemoConfig{Now: clock.Now})
	want(t, m, o, 1, false)
	<-o.answered
	clock.move(8*time.Minute + 59*time.Second)
	want(t, m, o, 1, false)
	clock.move(time.Second)
	want(t, m, o, 1, false) // the old one, at once
	<-o.answered
	settle(t, m)
	want(t, m, o, 2, false)

	failed := errors.New("failed")
	o.err.Store(&failed)
	clock.move(9 * time.Minute)
	want(t, m, o, 2, false)
	<-o.answered
	settle(t, m)
	want(t, m, o, 2, false) // still good, and not asked again at once
	if n := o.asked.Load(); n != 3 {
		t.Fatalf("asked %d times, want 3", n)
	}
	clock.move(time.Minute)
	want(t, m, o, 0, true)
}

// settle waits until no lookup runs.
func settle(t *testing.T, m *Memo[int32]) {
	t.Helper()
	// Whoever joins a lookup that runs gets its result; otherwise this is one.
	if r := <-m.one.DoChan("k", func() (any, error) { return int32(0), nil }); r.Err != nil && r.Val == nil {
		t.Fatal(r.Err)
	}
}

// However many want it, one lookup runs, also when the first of them goes away.
func TestMemoAsksOnce(t *testing.T) {
	m := NewMemo[int32](MemoConfig{})
	var asked atomic.Int32
	begun, go_ := make(chan struct{}), make(chan struct{})
	ask := func(ctx context.Context) (Answer[int32], error) {
		if asked.Add(1) == 1 {
			close(begun)
		}
		select {
		case <-go_:
			return Answer[int32]{Value: 7}, nil
		case <-ctx.Done():
			return Answer[int32]{}, ctx.Err()
		}
	}
	first, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := m.Get(first, []string{"k"}, ask)
		left <- err
	}()
	<-begun
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Fatalf("who went away got %v", err)
	}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if v, err := m.Get(t.Context(), []string{"k"}, ask); v != 7 || err != nil {
				t.Errorf("%d, %v", v, err)
			}
		})
	}
	close(go_)
	all.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// A lookup that hangs ends, and its failure says so.
func TestMemoBoundsLookups(t *testing.T) {
	m := NewMemo[int32](MemoConfig{Timeout: 10 * time.Millisecond})
	_, err := m.Get(t.Context(), []string{"k"}, func(ctx context.Context) (Answer[int32], error) {
		<-ctx.Done()
		return Answer[int32]{}, context.Cause(ctx)
	})
	if err == nil || err.Error() != "no answer within 10ms" {
		t.Errorf("%v", err)
	}
}

func TestMemoForgets(t *testing.T) {
	clock, o := newClock(), &oracle{}
	m := NewMemo[int32](MemoConfig{Now: clock.Now})
	is := func(n int32) func(int32) bool { return func(v int32) bool { return v == n } }
	want(t, m, o, 1, false)
	m.Forget(is(1))
	want(t, m, o, 1, false) // a source that has just said it would say it again
	clock.move(10 * time.Second)
	m.Forget(is(2))
	want(t, m, o, 1, false)
	m.Forget(is(1))
	want(t, m, o, 2, false)
}

func TestMemoIsBounded(t *testing.T) {
	clock := newClock()
	m := NewMemo[int32](MemoConfig{Now: clock.Now, Max: 10})
	o := &oracle{}
	for i := range 100 {
		clock.move(time.Millisecond)
		if _, err := m.Get(t.Context(), []string{fmt.Sprint(i)}, o.ask); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Get(t.Context(), []string{"0"}, o.ask); err != nil { // in use
			t.Fatal(err)
		}
	}
	if len(m.kept) > 10 || m.kept["0"] == nil || m.kept["99"] == nil {
		t.Errorf("%d are kept; used %v, last %v", len(m.kept), m.kept["0"] != nil, m.kept["99"] != nil)
	}
	if n := o.asked.Load(); n != 100 {
		t.Errorf("asked %d times, want 100", n)
	}
}

// An answer may count for more than was asked for.
func TestMemoKeepsUnderAnotherKey(t *testing.T) {
	m := NewMemo[int32](MemoConfig{})
	var asked int32
	ask := func(context.Context) (Answer[int32], error) {
		asked++
		return Answer[int32]{Value: asked, Key: "registry"}, nil
	}
	for _, image := range []string{"a", "b"} {
		if v, err := m.Get(t.Context(), []string{image, "registry"}, ask); v != 1 || err != nil {
			t.Errorf("%s: %d, %v", image, v, err)
		}
	}
}

// A renewal that fails hides no answer that still counts, under whichever key it is,
// and neither does an older failure.
func TestMemoPrefersAnswersToFailures(t *testing.T) {
	clock := newClock()
	m := NewMemo[int32](MemoConfig{Now: clock.Now})
	failed := errors.New("failed")
	var fails atomic.Bool
	asked := make(chan struct{}, 10)
	ask := func(context.Context) (Answer[int32], error) {
		defer func() { asked <- struct{}{} }()
		if fails.Load() {
			return Answer[int32]{}, failed
		}
		return Answer[int32]{Value: 7, Key: "registry", Expires: clock.Now().Add(10 * time.Minute)}, nil
	}
	get := func(image string) error {
		t.Helper()
		v, err := m.Get(t.Context(), []string{image, "registry"}, ask)
		if err == nil && v != 7 {
			t.Fatalf("got %d", v)
		}
		return err
	}
	fails.Store(true)
	if err := get("b"); !errors.Is(err, failed) {
		t.Fatal(err)
	}
	fails.Store(false)
	if err := get("a"); err != nil {
		t.Fatal(err)
	}
	if err := get("b"); err != nil {
		t.Errorf("an old failure hides what another image brought: %v", err)
	}
	fails.Store(true)
	for range 2 {
		<-asked
	}
	clock.move(9*time.Minute + 30*time.Second)
	if err := get("a"); err != nil { // renews it
		t.Fatal(err)
	}
	<-asked
	if r := <-m.one.DoChan("a", func() (any, error) { return nil, nil }); r.Err != nil && !errors.Is(r.Err, failed) {
		t.Fatal(r.Err)
	}
	if err := get("a"); err != nil {
		t.Errorf("what could not be renewed is hidden before its end: %v", err)
	}
	m.mu.Lock()
	if m.kept["a"] != nil {
		t.Error("the failure is kept")
	}
	m.mu.Unlock()
	clock.move(31 * time.Second)
	if err := get("a"); !errors.Is(err, failed) {
		t.Errorf("after its end: %v", err)
	}
}
