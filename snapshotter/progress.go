package main

import (
	"fmt"
	"io"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
)

// progress shows how far one image is.
type progress interface {
	tell(fetch.Phase, fetch.State)
	// end takes away what should not stay.
	end()
}

// noProgress shows nothing.
type noProgress struct{}

func (noProgress) tell(fetch.Phase, fetch.State) {}
func (noProgress) end()                          {}

// speed is how fast it goes since it was first looked at.
type speed struct {
	from  int64
	since time.Time
}

func (s speed) rate(now time.Time, done int64) float64 {
	if took := now.Sub(s.since).Seconds(); took > 0 {
		return float64(done-s.from) / took
	}
	return 0
}

// left is how long the rest takes at that speed; false while nobody can tell.
func (s speed) left(now time.Time, done, all int64) (time.Duration, bool) {
	rate := s.rate(now, done)
	if rate <= 0 {
		return 0, false
	}
	return time.Duration(float64(all-done) / rate * float64(time.Second)).Round(time.Second), true
}

// lines writes a line now and then, for a log.
type lines struct {
	w     io.Writer
	image string
	now   func() time.Time
	every time.Duration

	phase fetch.Phase
	last  time.Time
	speed speed
}

// lineEvery is how often a log is told.
const lineEvery = 10 * time.Second

func (l *lines) tell(phase fetch.Phase, s fetch.State) {
	now := l.now()
	if phase == l.phase && (phase != fetch.Fetching || now.Sub(l.last) < l.every) {
		return
	}
	first := phase != l.phase
	l.phase, l.last = phase, now
	switch {
	case phase != fetch.Fetching:
		if phase == fetch.Repairing {
			fmt.Fprintf(l.w, "%s: something is wrong in the cache and is fetched again\n", l.image)
		}
	case first:
		l.speed = speed{s.Done(), now}
		if !s.Complete() {
			fmt.Fprintf(l.w, "%s: %s of %s are in the cache, fetching the rest\n", l.image, megabytes(s.Done()), megabytes(s.Size()))
		}
	default:
		line := fmt.Sprintf("%s: %s of %s, %s/s", l.image, megabytes(s.Done()), megabytes(s.Size()), megabytes(int64(l.speed.rate(now, s.Done()))))
		if left, ok := l.speed.left(now, s.Done(), s.Size()); ok {
			line += fmt.Sprintf(", %s left", left)
		}
		fmt.Fprintln(l.w, line)
	}
}

func (l *lines) end() {}

// bars draws a bar for the image and one for each blob that is being fetched.
type bars struct {
	image string
	now   func() time.Time
	all   *mpb.Progress

	total *mpb.Bar
	phase fetch.Phase
	blobs map[string]*mpb.Bar
	seen  map[string]int // chunks that were there at first
}

// maxBars is how many blobs are shown at a time: prefetching goes from one to the next.
const maxBars = 8

func newBars(w io.Writer, image string, now func() time.Time) *bars {
	return &bars{
		image: image, now: now, all: mpb.New(mpb.WithOutput(w), mpb.WithAutoRefresh()),
		blobs: map[string]*mpb.Bar{}, seen: map[string]int{},
	}
}

func (b *bars) tell(phase fetch.Phase, s fetch.State) {
	if phase != b.phase {
		b.drop()
		b.phase = phase
		if phase == fetch.Fetching && !s.Complete() {
			b.total = b.bar(b.image, s.Done(), s.Size(), false)
		} else if phase != fetch.Fetching {
			b.total = b.all.New(0, mpb.NopStyle(), mpb.BarRemoveOnComplete(), mpb.PrependDecorators(decor.Name(b.image+": "+string(phase))))
		}
	}
	if phase != fetch.Fetching {
		return
	}
	if b.total != nil {
		b.total.SetCurrent(s.Done())
	}
	for i := range s {
		b.blob(&s[i])
	}
}

func (b *bars) blob(blob *fetch.Blob) {
	first, known := b.seen[blob.ID]
	if !known {
		b.seen[blob.ID] = blob.Ready
		return
	}
	bar := b.blobs[blob.ID]
	if bar == nil && blob.Ready > first && blob.Ready < blob.Chunks && len(b.blobs) < maxBars {
		bar = b.bar("  blob "+blob.ID[:shortKey], blob.Done(), blob.Size, true)
		b.blobs[blob.ID] = bar
	}
	if bar == nil {
		return
	}
	bar.SetCurrent(blob.Done())
	if blob.Ready == blob.Chunks {
		bar.Abort(true)
		delete(b.blobs, blob.ID)
	}
}

// bar is one with bytes, rate and the time that is left.
func (b *bars) bar(name string, done, size int64, indent bool) *mpb.Bar {
	v := speed{done, b.now()}
	width := 30
	if indent {
		width = 20
	}
	bar := b.all.AddBar(max(size, 1), mpb.BarWidth(width), mpb.BarFillerTrim(),
		mpb.PrependDecorators(decor.Name(name+" ")),
		mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
			now := b.now()
			text := fmt.Sprintf(" %s of %s, %s/s", megabytes(s.Current), megabytes(size), megabytes(int64(v.rate(now, s.Current))))
			if left, ok := v.left(now, s.Current, size); ok {
				text += fmt.Sprintf(", %s left", left)
			}
			return text
		})))
	bar.SetCurrent(done)
	return bar
}

// drop takes all bars away.
func (b *bars) drop() {
	for id, bar := range b.blobs {
		bar.Abort(true)
		delete(b.blobs, id)
	}
	if b.total != nil {
		b.total.Abort(true)
		b.total = nil
	}
	clear(b.seen)
}

func (b *bars) end() {
	b.drop()
	b.all.Shutdown()
}
