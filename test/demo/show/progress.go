package show

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// How often a terminal's line is drawn, and a log gets a new one.
const (
	redraw  = 100 * time.Millisecond
	logLine = 15 * time.Second
)

// Progress shows what long work is at: one line that changes on a terminal, a
// line now and then elsewhere. Work that is done soon leaves no trace.
type Progress struct {
	w        io.Writer
	terminal bool

	mu    sync.Mutex
	label string
	shown time.Time // when the label was last written to what is no terminal
	since time.Time
	stop  chan struct{}
	done  chan struct{}
}

// NewProgress writes to f, usually os.Stderr.
func NewProgress(f *os.File) *Progress {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &Progress{w: f, terminal: err == nil}
}

// Start shows label with the time since, until Stop or the next Start.
func (p *Progress) Start(format string, args ...any) {
	p.Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.label, p.since, p.shown = fmt.Sprintf(format, args...), time.Now(), time.Now()
	p.stop, p.done = make(chan struct{}), make(chan struct{})
	go p.run(p.stop, p.done)
}

// Set changes the label and leaves the time.
func (p *Progress) Set(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.label = fmt.Sprintf(format, args...)
}

// Stop takes the line away. It does nothing when none is shown.
func (p *Progress) Stop() {
	p.mu.Lock()
	stop, done := p.stop, p.done
	p.stop = nil
	p.mu.Unlock()
	if stop != nil {
		close(stop)
		<-done
	}
}

func (p *Progress) run(stop, done chan struct{}) {
	defer close(done)
	tick := time.NewTicker(redraw)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.draw()
		case <-stop:
			if p.terminal {
				fmt.Fprint(p.w, "\r\033[K")
			}
			return
		}
	}
}

func (p *Progress) draw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	elapsed := time.Since(p.since).Round(time.Second)
	if p.terminal {
		fmt.Fprintf(p.w, "\r\033[K… %s (%v)", p.label, elapsed)
		return
	}
	if time.Since(p.shown) >= logLine {
		fmt.Fprintf(p.w, "… %s (%v)\n", p.label, elapsed)
		p.shown = time.Now()
	}
}
