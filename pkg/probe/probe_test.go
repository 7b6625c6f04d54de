package probe_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/probe"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs/fusetest"
)

// bound is long for a filesystem that answers, soon for everything else.
const (
	bound = 300 * time.Millisecond
	soon  = 10 * time.Second
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == probe.Command {
		if err := probe.Serve(os.Stdin, os.Stdout, func() { os.Exit(0) }); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(fusetest.Main(m))
}

func prober(t testing.TB) *probe.Prober {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &probe.Prober{Program: self}
}

func TestAsk(t *testing.T) {
	serves, hangs, dead := fusetest.Mount(t), fusetest.Mount(t), fusetest.Mount(t)
	hangs.Ignore()
	if err := rootfs.AbortConnection(dead.Dev); err != nil {
		t.Fatal(err)
	}
	plain, missing := t.TempDir(), filepath.Join(t.TempDir(), "missing")
	p := prober(t)
	started := time.Now()
	got := p.Ask(t.Context(), []string{serves.Dir, hangs.Dir, dead.Dir, plain, missing, "/a\nb"}, bound)
	if took := time.Since(started); took < bound || took > bound+soon/2 {
		t.Errorf("it took %v, the bound is %v", took, bound)
	}
	for dir, want := range map[string]error{
		serves.Dir: nil, hangs.Dir: probe.ErrNoAnswer, dead.Dir: unix.ENOTCONN, plain: probe.ErrGone, missing: probe.ErrGone, "/a\nb": probe.ErrNotAsked,
	} {
		if err, ok := got[dir]; !ok || !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("%s: %v, %v; want %v", dir, err, ok, want)
		}
	}
	if n := children(t); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	// All that answer are not waited for.
	started = time.Now()
	if err := p.Ask(t.Context(), []string{serves.Dir}, time.Hour)[serves.Dir]; err != nil || time.Since(started) > soon {
		t.Errorf("%v after %v", err, time.Since(started))
	}
}

// A child whose question was taken cannot be killed. It is left behind, once, does
// not disturb others, and is reaped when it ends.
func TestChildThatCannotBeKilled(t *testing.T) {
	serves, hangs := fusetest.Mount(t), fusetest.Mount(t)
	hangs.Take()
	p := prober(t)
	for n := range 3 {
		got := p.Ask(t.Context(), []string{serves.Dir, hangs.Dir}, bound)
		if err := got[serves.Dir]; err != nil {
			t.Errorf("round %d: the one that answers: %v", n, err)
		}
		if err := got[hangs.Dir]; !errors.Is(err, probe.ErrNoAnswer) {
			t.Errorf("round %d: the one that hangs: %v", n, err)
		}
		until(t, fmt.Sprintf("round %d: only the one that cannot be killed is left", n), func() bool { return children(t) == 1 })
	}
	if err := rootfs.AbortConnection(hangs.Dev); err != nil {
		t.Fatal(err)
	}
	until(t, "the child is reaped", func() bool { return children(t) == 0 })
	until(t, "it can be asked again", func() bool {
		return errors.Is(p.Ask(t.Context(), []string{hangs.Dir}, soon)[hangs.Dir], unix.ENOTCONN)
	})
}

func TestAskEndsWithItsContext(t *testing.T) {
	hangs := fusetest.Mount(t)
	hangs.Ignore()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := prober(t).Ask(ctx, []string{hangs.Dir}, time.Hour)[hangs.Dir]; !errors.Is(err, probe.ErrNotAsked) || !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it could not be asked", err)
	}
	if n := children(t); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

func TestProgramThatDoesNotAsk(t *testing.T) {
	for _, program := range []string{"/missing", "/bin/true"} {
		err := (&probe.Prober{Program: program}).Ask(t.Context(), []string{"/"}, soon)["/"]
		if !errors.Is(err, probe.ErrNotAsked) || program == "/missing" && !strings.Contains(err.Error(), "install nydus-shim-hook") {
			t.Errorf("%s: %v", program, err)
		}
	}
}

// The child ends with whoever started it.
func TestServeEndsWithItsParent(t *testing.T) {
	hangs := fusetest.Mount(t)
	hangs.Ignore()
	in, parent, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	ended := make(chan struct{})
	go func() { _ = probe.Serve(in, os.Stderr, func() { close(ended) }) }()
	fmt.Fprintf(parent, "%s\n\n", hangs.Dir)
	parent.Close()
	select {
	case <-ended:
	case <-time.After(soon):
		t.Fatal("it goes on")
	}
}

// children counts the processes of ours that ask.
func children(t *testing.T) int {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(files) == 0 {
		t.Fatalf("list children: %v, %v", files, err)
	}
	n := 0
	for _, file := range files {
		text, _ := os.ReadFile(file)
		n += len(strings.Fields(string(text)))
	}
	return n
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond) // it makes no event
	defer tick.Stop()
	for deadline := time.Now().Add(soon); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", soon, what)
		}
	}
}
