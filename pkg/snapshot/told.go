package snapshot

import (
	"context"
	"math/bits"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// Stat implements snapshots.Snapshotter. The kind of a data layer is that of a view every
// other time that what its blob occupies has changed.
//
// CRI asks for the usage of a snapshot that is not active once, when it comes to see it or when
// its kind is another one than before (internal/cri/server/images/snapshots.go), and adds that up for
// kubelet. A data layer has nothing then: what it has comes as containers read. Its kind is
// of no other use: it has no content of its own, nobody mounts it, and whether it can be a
// parent is read from the database, as Walk does, by which containerd finds it.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	id, info, err := s.info(ctx, key)
	if err != nil || s.o.Blobs == nil || info.Kind != snapshots.KindCommitted || info.Labels[labelData] != "true" {
		return info, err
	}
	if s.told.due(id, s.now()) {
		// What cannot be told now is told when it is asked for.
		if n, err := s.dataUsage(ctx, id); err == nil {
			s.told.compare(id, n, s.now())
		}
	}
	info.Kind = s.told.kind(id)
	return info, nil
}

func (s *Snapshotter) now() time.Time {
	if s.o.Now == nil {
		return time.Now()
	}
	return s.o.Now()
}

const (
	// firstLook is when it is looked again at what a blob occupies that has not changed;
	// that doubles up to lastLook. CRI asks every ten seconds.
	firstLook = 5 * time.Second
	lastLook  = 2 * time.Minute
)

// told is what containerd was told about data layers, by their ids.
type told struct {
	mu sync.Mutex
	of map[string]*tale
}

// tale is what it was told about one.
type tale struct {
	usage int64
	asked bool // usage was told
	stale bool // and is no longer true
	view  bool // the kind that was told last
	// settled is the kind with which usage was told, looks how often one was told since
	// it is not true.
	settled bool
	looks   uint64
	next    time.Time
	delay   time.Duration
}

func (t *told) get(id string) *tale {
	if t.of == nil {
		t.of = map[string]*tale{}
	}
	if t.of[id] == nil {
		t.of[id] = &tale{}
	}
	return t.of[id]
}

// usage notes what it is told, together with the kind.
func (t *told) usage(id string, n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.get(id)
	if o.settled, o.stale = o.view, false; o.usage != n {
		o.next, o.delay = time.Time{}, 0
	}
	o.usage, o.asked = n, true
}

// due tells whether it is time to look.
func (t *told) due(id string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.get(id)
	return o.asked && !o.stale && !now.Before(o.next)
}

// compare takes in what a blob occupies now.
func (t *told) compare(id string, n int64, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.get(id)
	if o.asked && n != o.usage {
		o.stale, o.looks = true, 1 // with another kind at once
		return
	}
	o.delay = min(max(2*o.delay, firstLook), lastLook)
	o.next = now.Add(o.delay)
}

// kind is what it is told now. What an earlier process told is not known, and others than CRI
// look, too. So until somebody asks the kinds follow the Thue-Morse sequence: of the first two
// one is another, and who sees but each n-th of them, whatever n is, never sees one kind only
// (Gelfond 1968), as it would if they took turns.
func (t *told) kind(id string) snapshots.Kind {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.get(id)
	if !o.asked || o.stale {
		o.view = o.settled != (bits.OnesCount64(o.looks)%2 == 1)
		o.looks++
	}
	if o.view {
		return snapshots.KindView
	}
	return snapshots.KindCommitted
}

func (t *told) forget(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.of, id)
}
