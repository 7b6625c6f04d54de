package credentials

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// MemoConfig says how long answers are kept. A duration or number of 0 is its
// default.
type MemoConfig struct {
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Margin is how long before its end an answer is renewed, half of its life at
	// most; 1 minute.
	Margin time.Duration
	// Keep is how long an answer without an end is kept; 5 minutes.
	Keep time.Duration
	// Nothing is how long it is kept that there is nothing, Failure a failure; 10
	// seconds and 5.
	Nothing, Failure time.Duration
	// Timeout bounds one lookup, whoever waits for it; 30 seconds.
	Timeout time.Duration
	// Trust is how old an answer has to be to be forgotten: a younger one would be
	// the same; 10 seconds.
	Trust time.Duration
	// Max bounds how many answers are kept; 1024. The one that was not used for the
	// longest time goes.
	Max int
}

func (c *MemoConfig) fill() {
	if c.Now == nil {
		c.Now = time.Now
	}
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{
		{&c.Margin, time.Minute}, {&c.Keep, 5 * time.Minute}, {&c.Nothing, 10 * time.Second}, {&c.Failure, 5 * time.Second},
		{&c.Timeout, 30 * time.Second}, {&c.Trust, 10 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.or
		}
	}
	if c.Max == 0 {
		c.Max = 1024
	}
}

// Answer is what a source said.
type Answer[V any] struct {
	Value V
	// Nothing says that the source has nothing, and Value is empty.
	Nothing bool
	// Key is what the answer is kept under: one of those that were asked for, or ""
	// for the first of them.
	Key string
	// Expires is until when it may be kept; zero when the source knows of no end.
	Expires time.Time
}

// Memo keeps answers. It may be used by several goroutines.
type Memo[V any] struct {
	cfg MemoConfig
	one singleflight.Group

	mu   sync.Mutex
	kept map[string]*kept[V]
}

// kept is an answer, or a failure.
type kept[V any] struct {
	value V
	err   error
	// plain says that it is neither a failure nor nothing.
	plain       bool
	asked, used time.Time
	// renew is when it is to be renewed, end until when it may be used.
	renew, end time.Time
}

// NewMemo returns a Memo.
func NewMemo[V any](cfg MemoConfig) *Memo[V] {
	cfg.fill()
	return &Memo[V]{cfg: cfg, kept: map[string]*kept[V]{}}
}

// Get returns the answer that is kept under one of the keys, the first first and
// failures last, and asks when there is none. One lookup for a first key runs at a time; all who want it
// wait for it, each as long as its own context lasts. The lookup goes on without
// them.
//
// An answer that is about to end is returned, and renewed meanwhile.
func (m *Memo[V]) Get(ctx context.Context, keys []string, ask func(context.Context) (Answer[V], error)) (V, error) {
	now := m.cfg.Now()
	m.mu.Lock()
	k := m.find(keys, now)
	if k != nil {
		k.used = now
		value, err, renew := k.value, k.err, !now.Before(k.renew)
		if renew {
			k.renew = now.Add(m.cfg.Failure) // should this one fail
		}
		m.mu.Unlock()
		if renew {
			m.start(ctx, keys, ask)
		}
		return value, err
	}
	m.mu.Unlock()
	select {
	case r := <-m.start(ctx, keys, ask):
		if r.Err != nil {
			var none V
			return none, r.Err
		}
		value, _ := r.Val.(V) // of an interface type it may be nil
		return value, nil
	case <-ctx.Done():
		var none V
		return none, fmt.Errorf("wait for credentials: %w", context.Cause(ctx))
	}
}

// find returns what is kept and not at its end: rather an answer than that there is
// none. The caller holds the lock.
func (m *Memo[V]) find(keys []string, now time.Time) (found *kept[V]) {
	for _, key := range keys {
		k := m.kept[key]
		switch {
		case k == nil || !now.Before(k.end):
		case k.plain:
			return k
		case found == nil:
			found = k
		}
	}
	return found
}

// start asks, unless that is being done.
func (m *Memo[V]) start(ctx context.Context, keys []string, ask func(context.Context) (Answer[V], error)) <-chan singleflight.Result {
	return m.one.DoChan(keys[0], func() (any, error) {
		ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), m.cfg.Timeout, fmt.Errorf("no answer within %s", m.cfg.Timeout))
		defer cancel()
		answer, err := ask(ctx)
		m.keep(keys, answer, err)
		return answer.Value, err
	})
}

// keep keeps an answer or a failure, but no failure beside an answer that counts for
// one of the keys.
func (m *Memo[V]) keep(keys []string, answer Answer[V], err error) {
	now := m.cfg.Now()
	k := &kept[V]{value: answer.Value, err: err, asked: now, used: now, plain: err == nil && !answer.Nothing}
	switch {
	case err != nil:
		k.end = now.Add(m.cfg.Failure)
	case answer.Nothing:
		k.end = now.Add(m.cfg.Nothing)
	case answer.Expires.IsZero():
		k.end = now.Add(m.cfg.Keep)
	default:
		k.end = answer.Expires
	}
	k.renew = k.end
	if k.plain {
		k.renew = k.end.Add(-min(m.cfg.Margin, k.end.Sub(now)/2))
	}
	key := keys[0]
	if answer.Key != "" {
		key = answer.Key
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if old := m.find(keys, now); err != nil && old != nil && old.plain {
		return // what could not be renewed is still good
	}
	if !now.Before(k.end) {
		delete(m.kept, key)
		return
	}
	if _, have := m.kept[key]; !have {
		m.makeRoom(now)
	}
	m.kept[key] = k
}

// makeRoom forgets what is at its end, and then what was not used for the longest
// time. The caller holds the lock.
func (m *Memo[V]) makeRoom(now time.Time) {
	if len(m.kept) < m.cfg.Max {
		return
	}
	oldest := ""
	for key, k := range m.kept {
		if !now.Before(k.end) {
			delete(m.kept, key)
		} else if oldest == "" || k.used.Before(m.kept[oldest].used) {
			oldest = key
		}
	}
	if len(m.kept) >= m.cfg.Max {
		delete(m.kept, oldest)
	}
}

// Forget forgets the answers for which is returns true, and that are old enough for
// the source to say something else by now.
func (m *Memo[V]) Forget(is func(V) bool) {
	now := m.cfg.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, k := range m.kept {
		if k.plain && now.Sub(k.asked) >= m.cfg.Trust && is(k.value) {
			delete(m.kept, key)
		}
	}
}

// unique returns a list without what is in it twice, in its order.
func unique[V any](list []V, same func(a, b V) bool) (out []V) {
	for _, v := range list {
		if !slices.ContainsFunc(out, func(have V) bool { return same(have, v) }) {
			out = append(out, v)
		}
	}
	return out
}
