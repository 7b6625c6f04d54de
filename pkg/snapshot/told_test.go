package snapshot

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// statistics adds up usages as CRI does: of what is not active it asks once for each kind.
type statistics struct {
	n     *node
	known map[string]sample
	asked int
}

type sample struct {
	kind snapshots.Kind
	size int64
}

// sync looks at all. Others look at some, and as often, before it asks.
func (s *statistics) sync(others ...string) (total int64) {
	s.n.t.Helper()
	now := map[string]sample{}
	// containerd lists the names that it has itself.
	must(s.n.t, s.n.sn.Walk(s.n.ctx, func(ctx context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, "k8s.io/") && info.Kind == snapshots.KindView {
			s.n.t.Errorf("%s is listed as a view", info.Name)
		}
		info, err := s.n.sn.Stat(ctx, info.Name)
		if err != nil {
			return err
		}
		for _, name := range others {
			if _, err := s.n.sn.Stat(ctx, name); err != nil {
				return err
			}
		}
		last, ok := s.known[info.Name]
		if !ok || last.kind != info.Kind || info.Kind == snapshots.KindActive {
			u, err := s.n.sn.Usage(ctx, info.Name)
			if err != nil {
				return err
			}
			s.asked++
			last = sample{info.Kind, u.Size}
		}
		now[info.Name] = last
		total += last.size
		return nil
	}))
	s.known = now
	return total
}

// TestUsageThatGrows is seen by who asks once: what a layer's blob occupies comes after the
// layer.
func TestUsageThatGrows(t *testing.T) {
	one, two := strings.Repeat("1", 64), strings.Repeat("2", 64)
	cached := blobsOf{}
	now := time.Now()
	n := newNode(t, func(o *Options) { o.Blobs, o.Now = cached, func() time.Time { return now } })
	data := func(blob string) layer {
		return layer{labels: map[string]string{labelData: "true", labelImage: testImage, labelLayer: "sha256:" + blob}}
	}
	chain := n.pull(data(one), data(two), n.bootstrap("v6-merged"))
	n.container(chain)
	s := &statistics{n: n}
	base := s.sync()
	expect := func(what string, want int64) {
		t.Helper()
		s.sync() // the first one may come before what has changed is looked at
		if got := s.sync() - base; got != want {
			t.Errorf("%s: %d bytes, want %d", what, got, want)
		}
	}
	other := int64(0)
	for _, size := range []int64{1_000_000, 5_000_000, 3_000_000, 0, 7_000_000} {
		cached[[2]string{testImage, one}] = size
		now = now.Add(lastLook)
		expect("one", size+other)
		other = 2 * size
		cached[[2]string{testImage, two}] = other
		now = now.Add(lastLook)
		expect("both", size+other)
	}

	// What does not change is not asked for, however long that lasts, but the container's own.
	for range 20 {
		now = now.Add(lastLook)
		before := s.asked
		s.sync()
		if s.asked > before+1 {
			t.Fatalf("%d usages were asked for again", s.asked-before)
		}
	}

	// Neither process knows what the other one was told.
	for _, size := range []int64{10_000_000, 20_000_000} {
		cached[[2]string{testImage, one}] = size
		n.restart()
		now = now.Add(lastLook)
		s.sync()
		expect("after a restart", size+other)
	}
}

// Others look as well, so often between CRI's looks: it must come to see another kind than it
// knows, whichever that is.
func TestOthersLookToo(t *testing.T) {
	for others := range 40 {
		for mine := range others + 1 {
			var told told
			sees := func(when string) {
				seen := map[snapshots.Kind]bool{}
				looks := 0
				for i := 0; len(seen) < 2 && looks < 100; i++ {
					kind := told.kind("1")
					if i%(others+1) == mine {
						seen[kind] = true
						looks++
					}
				}
				if len(seen) < 2 {
					t.Errorf("%s: of %d callers number %d saw only %v in %d looks", when, others+1, mine, seen, looks)
				}
			}
			sees("after the start")
			told.usage("1", 1)
			told.compare("1", 2, time.Time{})
			sees("when it is another")
		}
	}
}

// Who asked knows when there is something new, though others looked between its look and its
// question: it sees another kind than the one that it knows.
func TestUsageIsAskedForAgain(t *testing.T) {
	one := strings.Repeat("1", 64)
	cached := blobsOf{}
	now := time.Now()
	n := newNode(t, func(o *Options) { o.Blobs, o.Now = cached, func() time.Time { return now } })
	n.pull(layer{labels: map[string]string{labelData: "true", labelImage: testImage, labelLayer: "sha256:" + one}}, n.bootstrap("v6-merged"))
	s := &statistics{n: n}
	base := s.sync()
	var names, others []string
	must(t, n.sn.Walk(n.ctx, func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}))
	size := int64(0)
	for range 4 {
		n.restart()
		for _, name := range others {
			if _, err := n.sn.Stat(n.ctx, name); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			size += 5_000_000
			cached[[2]string{testImage, one}] = size
			now = now.Add(lastLook)
			for range 20 {
				s.sync(others...)
			}
			if got := s.sync(others...) - base; got != size {
				t.Errorf("with %d others: %d bytes, want %d", len(others)/len(names), got, size)
			}
		}
		others = append(others, names...)
	}
}
