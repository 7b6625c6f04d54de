package kit

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// TB is the part of testing.TB that the kit needs, so that programs such as the
// demo can use it too: see RunTB.
type TB interface {
	Helper()
	Name() string
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(func())
	TempDir() string
	Context() context.Context
}

// RunTB calls f with a TB that writes to w, then runs its cleanups, last first.
// It reports whether nothing failed.
func RunTB(w io.Writer, name string, f func(TB)) bool {
	ctx, cancel := context.WithCancel(context.Background())
	t := &program{name: name, w: w, ctx: ctx}
	run := func(f func()) {
		done := make(chan struct{})
		go func() { // Fatalf ends its goroutine alone
			defer close(done)
			f()
		}()
		<-done
	}
	run(func() { f(t) })
	cancel()
	for c := t.pop(); c != nil; c = t.pop() {
		run(c)
	}
	return !t.Failed()
}

type program struct {
	name string
	w    io.Writer
	ctx  context.Context

	mu       sync.Mutex
	failed   bool
	cleanups []func()
	dirs     int
}

func (p *program) Helper()                  {}
func (p *program) Name() string             { return p.name }
func (p *program) Context() context.Context { return p.ctx }

func (p *program) Logf(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.w, format+"\n", args...)
}

func (p *program) Errorf(format string, args ...any) {
	p.Logf(format, args...)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed = true
}

func (p *program) Fatalf(format string, args ...any) {
	p.Errorf(format, args...)
	runtime.Goexit()
}

func (p *program) Failed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed
}

func (p *program) Cleanup(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cleanups = append(p.cleanups, f)
}

func (p *program) pop() func() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.cleanups) == 0 {
		return nil
	}
	last := len(p.cleanups) - 1
	f := p.cleanups[last]
	p.cleanups = p.cleanups[:last]
	return f
}

func (p *program) TempDir() string {
	p.mu.Lock()
	p.dirs++
	dir := filepath.Join(Scratch(), fmt.Sprintf("%s-%d", p.name, p.dirs))
	p.mu.Unlock()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.Fatalf("temp dir: %v", err)
	}
	return dir
}
