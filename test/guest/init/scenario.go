package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/test/guest"
)

const (
	// pause is between two reads: without it nobody else would get the one CPU.
	pause = 5 * time.Millisecond
	// enough is how many reads must follow the kill.
	enough = 40
	// patience is how long a read may take at most.
	patience = 30 * time.Second
)

func digestOf(text []byte) string {
	sum := sha256.Sum256(text)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// scenario is what the guest is there for.
func scenario(ctx context.Context, r *guest.Report) error {
	if err := systemctl(ctx, "start", guest.SnapshotterUnit); err != nil {
		return err
	}
	if err := systemctl(ctx, "start", guest.EngineUnit); err != nil {
		return err
	}
	limited, _, err := find(guest.Limited)
	if err != nil {
		return err
	}
	other, _, err := find(guest.Other)
	if err != nil {
		return err
	}
	watched := []*readers{read(limited, 3), read(other, 1)}
	err = disturb(ctx, r, limited, other, watched[0])
	for _, w := range watched {
		w.end(r)
	}
	if err != nil {
		return err
	}
	if err := collect(r, limited, other); err != nil {
		return err
	}
	if err := errors.Join(limited.unmount(), other.unmount()); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_ = await(ctx, "nothing is left", func() (bool, error) { return len(leftovers()) == 0, nil })
	r.Left = leftovers()
	return nil
}

// disturb does what should disturb nobody who reads.
func disturb(ctx context.Context, r *guest.Report, limited, other *image, watched *readers) error {
	for _, m := range []*image{limited, other} {
		if err := await(ctx, "the descriptor of "+m.name+" is kept", func() (bool, error) {
			g, err := m.generation()
			return g.Kept, err
		}); err != nil {
			return err
		}
	}
	beside, err := other.generation()
	if err != nil {
		return err
	}
	r.Served = beside.PID
	// Whoever started the daemon is stopped with all that is in its cgroup.
	for _, do := range [][]string{{"stop", guest.EngineUnit}, {"restart", guest.SnapshotterUnit}, {"daemon-reload"}} {
		if err := manage(ctx, r, limited, do...); err != nil {
			return err
		}
	}
	if err := kill(ctx, r, limited, watched); err != nil {
		return err
	}
	// Now the snapshotter has started the daemon.
	for _, do := range [][]string{{"stop", guest.SnapshotterUnit}, {"daemon-reload"}, {"start", guest.SnapshotterUnit}} {
		if err := manage(ctx, r, limited, do...); err != nil {
			return err
		}
	}
	return nil
}

// manage does something to units, and writes down who serves before and after it.
func manage(ctx context.Context, r *guest.Report, m *image, args ...string) error {
	before, err := m.generation()
	if err != nil {
		return err
	}
	if err := systemctl(ctx, args...); err != nil {
		return err
	}
	after, err := m.generation()
	r.Units = append(r.Units, guest.Unit{Did: strings.Join(args, " "), Before: before.PID, After: after.PID})
	return err
}

// kill makes the limited image's daemon die, and waits for reads by its successor.
func kill(ctx context.Context, r *guest.Report, limited *image, watched *readers) error {
	before, err := limited.generation()
	if err != nil {
		return err
	}
	r.Killed = before.PID
	if err := limited.starve(ctx); err != nil {
		return err
	}
	if err := await(ctx, "there is a successor", func() (bool, error) {
		g, err := limited.generation()
		return g.Restarts > before.Restarts, err
	}); err != nil {
		return err
	}
	since := watched.reads.Load()
	// One of each reader may have begun before the kill.
	err = await(ctx, "the successor is read from", func() (bool, error) { return watched.reads.Load() > since+enough || watched.wrong.Load() > 0, nil })
	r.ReadsAfter = int(watched.reads.Load()-since) - watched.count
	return err
}

func collect(r *guest.Report, limited, other *image) (err error) {
	r.Controllers = map[string]string{}
	for _, dir := range []string{"/", "/nydus.slice", guest.CgroupParent} {
		r.Controllers[dir] = word(filepath.Join("/sys/fs/cgroup", dir, "cgroup.subtree_control"))
	}
	r.MemoryMax, r.CPUMax = word(filepath.Join(limited.cgroup(), "memory.max")), word(filepath.Join(limited.cgroup(), "cpu.max"))
	if r.Born, err = limited.born(); err != nil {
		return err
	}
	if r.OtherBorn, err = other.born(); err != nil {
		return err
	}
	r.Kills = map[string]int{}
	for _, m := range []*image{limited, other} {
		g, err := m.generation()
		if err != nil {
			return err
		}
		if r.Kills[m.name], err = instance.OOMKills(m.key, g); err != nil {
			return err
		}
		if m == limited {
			r.Succeeded, r.Restarts = g.PID, g.Restarts
		} else {
			r.Serves = g.PID
		}
	}
	return nil
}

// readers read an image's files again and again, past the page cache.
type readers struct {
	image        *image
	count        int
	stop         chan struct{}
	all          sync.WaitGroup
	reads, wrong atomic.Int64

	mu      sync.Mutex
	fault   error
	slowest time.Duration
}

func read(m *image, n int) *readers {
	r := &readers{image: m, count: n, stop: make(chan struct{})}
	for range n {
		r.all.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for {
				for name, sum := range m.files {
					select {
					case <-r.stop:
						return
					case <-tick.C:
					}
					r.one(filepath.Join(m.target, name), sum)
				}
			}
		})
	}
	return r
}

func (r *readers) one(path, sum string) {
	began := time.Now()
	err := check(path, sum)
	took := time.Since(began)
	r.reads.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slowest = max(r.slowest, took)
	if err != nil {
		r.wrong.Add(1)
		if r.fault == nil {
			r.fault = err
		}
	}
}

func check(path, sum string) error {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return fmt.Errorf("%s: content is %s, want %s", path, got, sum)
	}
	return nil
}

func (r *readers) end(report *guest.Report) {
	close(r.stop)
	done := make(chan struct{})
	go func() {
		r.all.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		r.wrong.Add(1)
		r.mu.Lock()
		r.fault = errors.Join(r.fault, fmt.Errorf("readers of %s hang", r.image.name))
		r.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if report.Reads == nil {
		report.Reads, report.Wrong, report.Slowest = map[string]int{}, map[string]int{}, map[string]int{}
	}
	report.Reads[r.image.name], report.Wrong[r.image.name] = int(r.reads.Load()), int(r.wrong.Load())
	report.Slowest[r.image.name] = int(r.slowest.Milliseconds())
	if r.fault != nil && report.FirstFault == "" {
		report.FirstFault = r.fault.Error()
	}
}
