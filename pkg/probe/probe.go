package probe

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

var (
	// ErrNoAnswer says that a filesystem did not answer within the bound.
	ErrNoAnswer = errors.New("no answer")
	// ErrGone says that no FUSE filesystem is mounted there.
	ErrGone = errors.New("not mounted")
	// ErrNotAsked says that nothing is known, because nobody could ask.
	ErrNotAsked = errors.New("could not be asked")
)

// maxLeft bounds the children that are left behind.
const maxLeft = 16

// Prober asks. It may be used by several goroutines at once.
type Prober struct {
	// Program is an executable that runs Serve when its only argument is Command:
	// nydus-shim-hook.
	Program string

	mu sync.Mutex
	// left are the children that do not end, and the mountpoints that keep them.
	left map[*child][]string
}

// Ask asks the filesystems mounted at mountpoints, all at once, and returns
// when bound is over or ctx ends at the latest, or a moment later. The result has an entry for each: nil when
// it answered, otherwise an error that wraps ErrNoAnswer, ErrGone, ErrNotAsked, or
// the error that it answered with (unix.ENOTCONN when nobody serves it).
func (p *Prober) Ask(ctx context.Context, mountpoints []string, bound time.Duration) map[string]error {
	answers := make(map[string]error, len(mountpoints))
	asked := p.exclude(mountpoints, answers)
	if len(asked) == 0 {
		return answers
	}
	c, err := p.start(asked)
	if err != nil {
		for _, m := range asked {
			answers[m] = fmt.Errorf("%w: %w", ErrNotAsked, err)
		}
		return answers
	}
	timer := time.NewTimer(bound)
	defer timer.Stop()
	cause := fmt.Errorf("%w within %s", ErrNoAnswer, bound)
	select {
	case <-c.done:
	case <-timer.C:
	case <-ctx.Done():
		cause = fmt.Errorf("%w: %w", ErrNotAsked, context.Cause(ctx))
	}
	silent := c.collect(asked, answers, cause)
	p.end(c, silent)
	return answers
}

// exclude returns what can be asked. What keeps an earlier child is not: its
// daemon still does not answer.
func (p *Prober) exclude(mountpoints []string, answers map[string]error) (asked []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range mountpoints {
		switch {
		case p.keeps(m):
			answers[m] = fmt.Errorf("%w, still, to the one who asked before", ErrNoAnswer)
		case strings.ContainsAny(m, "\n"):
			answers[m] = fmt.Errorf("%w: the path has a line break", ErrNotAsked)
		default:
			asked = append(asked, m)
		}
	}
	if len(asked) > 0 && len(p.left) >= maxLeft {
		for _, m := range asked {
			answers[m] = fmt.Errorf("%w: %d processes that asked before cannot be ended", ErrNotAsked, len(p.left))
		}
		return nil
	}
	return asked
}

func (p *Prober) keeps(mountpoint string) bool {
	for _, of := range p.left {
		if slices.Contains(of, mountpoint) {
			return true
		}
	}
	return false
}

// end ends a child; silent are the mountpoints that have not answered it.
func (p *Prober) end(c *child, silent []string) {
	if len(silent) > 0 {
		p.mu.Lock()
		if p.left == nil {
			p.left = map[*child][]string{}
		}
		p.left[c] = silent
		p.mu.Unlock()
		_ = c.process.Kill()
	}
	_ = c.in.Close()
	go func() {
		_, _ = c.process.Wait() // reap it, whenever that is
		_ = c.out.Close()
		p.mu.Lock()
		delete(p.left, c)
		p.mu.Unlock()
		close(c.reaped)
	}()
	// One that has told everything, or can be killed, is gone in a moment. The next
	// Ask is not to take it for one that cannot.
	grace := time.NewTimer(killWait)
	defer grace.Stop()
	select {
	case <-c.reaped:
	case <-grace.C:
	}
}

// killWait is how long a child that was killed may take to end.
const killWait = 500 * time.Millisecond

// child is a process that asks.
type child struct {
	process *os.Process
	in, out *os.File
	// done is closed when it has told everything.
	done, reaped chan struct{}

	mu    sync.Mutex
	codes map[int]int
}

// start starts a child that asks.
func (p *Prober) start(mountpoints []string) (*child, error) {
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirIn.Close()
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	defer theirOut.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	defer null.Close()
	// Not os/exec: it would wait for a child that cannot be killed.
	process, err := os.StartProcess(p.Program, []string{p.Program, Command}, &os.ProcAttr{
		Dir: "/", Files: []*os.File{theirIn, theirOut, null},
		// One thread that runs Go is enough: the others wait for answers.
		Env: []string{"GOMAXPROCS=1", "GOGC=off"},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w; install nydus-shim-hook beside nydus-snapshotter", err), in.Close(), out.Close())
	}
	c := &child{process: process, in: in, out: out, done: make(chan struct{}), reaped: make(chan struct{}), codes: map[int]int{}}
	go c.read()
	// It may end early, and then says nothing.
	go func() { _, _ = io.WriteString(in, strings.Join(mountpoints, "\n")+"\n\n") }()
	return c, nil
}

// read takes the answers in until there are no more.
func (c *child) read() {
	defer close(c.done)
	lines := bufio.NewScanner(c.out)
	for lines.Scan() {
		var n, code int
		if got, err := fmt.Sscanf(lines.Text(), "%d %d", &n, &code); err == nil && got == 2 {
			c.mu.Lock()
			c.codes[n] = code
			c.mu.Unlock()
		}
	}
}

// collect adds the child's answers, and returns who gave none, for which cause is
// the reason unless the child itself has failed.
func (c *child) collect(asked []string, answers map[string]error, cause error) (silent []string) {
	select {
	case <-c.done:
		cause = fmt.Errorf("%w: the process that asks has ended", ErrNotAsked)
	default:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, m := range asked {
		code, ok := c.codes[n]
		if !ok {
			answers[m] = cause
			silent = append(silent, m)
			continue
		}
		answers[m] = answer(code)
	}
	return silent
}
