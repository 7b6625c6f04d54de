package fetch

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prooftest"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
)

const testdata = "../blobcheck/testdata"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// store is an image of a registry, and a cache directory that a daemon fills from it.
type store struct {
	*prooftest.Image
	t    testing.TB
	full string // the complete cache
	im   Image

	mu      sync.Mutex
	started int
	stopped int
}

func newStore(t testing.TB, name string) *store {
	t.Helper()
	dir := t.TempDir()
	s := &store{Image: prooftest.New(t, testdata, name, dir), t: t}
	s.full = filepath.Join(dir, "full")
	must(t, os.Rename(s.CacheDir, s.full))
	must(t, os.Mkdir(s.CacheDir, 0o700))
	s.im = Image{Name: name, CacheDir: s.CacheDir, Bootstrap: s.Bootstrap, Digest: s.Digest}
	return s
}

// put makes so many chunks of a blob be there, and its data; it may go on with more.
func (s *store) put(blob int, chunks uint32) {
	s.t.Helper()
	b := &s.Head.Blobs[blob]
	chunks = min(chunks, b.ChunkCount)
	data, err := os.ReadFile(filepath.Join(s.full, filepath.Base(s.Data(blob))))
	must(s.t, err)
	if _, err := os.Stat(s.Data(blob)); err != nil {
		must(s.t, os.WriteFile(s.Data(blob), data, 0o600))
	}
	m := prooftest.ChunkMap(b.ChunkCount)
	for n := chunks; n < b.ChunkCount; n++ {
		m[4096+n/8] &^= 0x80 >> (n % 8)
	}
	// As through a mapping: whoever reads it never finds half a file.
	tmp := s.Map(blob) + ".new"
	must(s.t, os.WriteFile(tmp, m, 0o600))
	must(s.t, os.Rename(tmp, s.Map(blob)))
}

func (s *store) state() State {
	s.t.Helper()
	st, err := Look(s.im)
	must(s.t, err)
	return st
}

// daemon is a nydusd that does what it is told at each look at it.
type daemon struct {
	s *store
	// look is called with the number of the look, and tells whether it is over.
	look  func(n int) bool
	ask   error
	stop  error
	looks int
	turns uint64
	// idle keeps it from having turns.
	idle bool
}

func (d *daemon) Over() bool {
	d.looks++
	return d.look != nil && d.look(d.looks)
}

func (d *daemon) Turns() (uint64, error) {
	if !d.idle {
		d.turns += fewTurns + 1
	}
	return d.turns, nil
}

func (d *daemon) Ask(context.Context, []string) error { return d.ask }
func (d *daemon) Said() string                        { return "its last words" }

func (d *daemon) Stop(ctx context.Context) error {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	d.s.stopped++
	return errors.Join(d.stop, ctx.Err())
}

// fetcher starts one daemon after the other; the last one again and again.
func (s *store) fetcher(daemons ...*daemon) Fetcher {
	return Fetcher{
		Poll: time.Millisecond, Quiet: 30 * time.Millisecond, Stall: 200 * time.Millisecond, StopWait: time.Minute,
		Start: func(context.Context, Image) (Daemon, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			d := daemons[min(s.started, len(daemons)-1)]
			s.started++
			d.s = s
			return d, nil
		},
	}
}

// gone checks that every daemon that was started was stopped.
func (s *store) gone(started int) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started != s.stopped || started >= 0 && s.started != started {
		s.t.Errorf("%d daemons were started and %d stopped, want %d", s.started, s.stopped, started)
	}
}

// completer compares by a clock by which everything has settled.
func completer(f Fetcher) Completer {
	return Completer{Fetcher: f, Prover: prove.Prover{Now: prooftest.Later}}
}
