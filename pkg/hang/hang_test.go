package hang

import (
	"testing"
	"time"
)

// Time in which nobody looked does not count, and late looks do not keep a daemon from
// being dealt with.
func TestLateLooks(t *testing.T) {
	w := New(Config{Timeout: 10 * time.Second})
	begun := time.Unix(1000, 0)
	if since := w.observed(begun); !since.Equal(begun) {
		t.Errorf("at the first look a new daemon counts since %v, want %v", since, begun)
	}
	d := &daemon{}
	d.alive(begun)
	w.seen[name{key: "x"}] = d
	// In time, then 28 seconds late, of which as much counts as between two looks.
	for _, step := range []struct{ after, counts time.Duration }{{2 * time.Second, 2 * time.Second}, {3 * time.Second, 3 * time.Second}, {30 * time.Second, 2 * time.Second}} {
		before, now := d.good, w.looked.Add(step.after)
		hung := w.looked.Sub(before)
		if since := w.observed(now); now.Sub(since) != step.counts {
			t.Errorf("after %v a new daemon counts for %v, want %v", step.after, now.Sub(since), step.counts)
		}
		if got := now.Sub(d.good) - hung; got != step.counts || !d.ran.Equal(d.good) {
			t.Errorf("after %v a daemon that hangs counts for %v more, want %v", step.after, got, step.counts)
		}
	}
}
