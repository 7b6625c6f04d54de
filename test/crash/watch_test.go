package crash_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// watch is the test's side of the reader process.
type watch struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser

	mu      sync.Mutex
	active  map[string]bool // ids that are being read
	beats   map[string]beat // of those, by id and way
	past    score           // of the others
	faults  []fault
	heard   time.Time
	changed chan struct{} // closed at each report
	ended   bool
	err     error
}

// newWatch starts the reader process. It ends with the test.
func newWatch(t *testing.T) *watch {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	w := &watch{t: t, cmd: exec.Command(self), active: map[string]bool{}, beats: map[string]beat{}, heard: time.Now(), changed: make(chan struct{})}
	w.cmd.Env = append(os.Environ(), readerVar+"=1")
	w.cmd.Stderr = os.Stderr
	w.stdin, err = w.cmd.StdinPipe()
	must(t, err)
	out, err := w.cmd.StdoutPipe()
	must(t, err)
	must(t, w.cmd.Start())
	go w.listen(out)
	done := make(chan struct{})
	go w.guard(done)
	t.Cleanup(func() {
		w.stdin.Close()
		w.await("the reader process ends", func() bool { return w.ended })
		close(done)
		_ = w.cmd.Process.Kill()
		_ = w.cmd.Wait()
	})
	return w
}

func (w *watch) listen(out io.Reader) {
	for reports := json.NewDecoder(out); ; {
		var r report
		err := reports.Decode(&r)
		w.mu.Lock()
		w.heard = time.Now()
		for _, b := range r.Beats {
			if w.active[b.ID] { // one that was on its way at a stop is old
				w.beats[b.ID+" "+b.Way] = b
			}
		}
		if r.Fault != nil {
			w.faults = append(w.faults, *r.Fault)
		}
		if r.Stopped != "" {
			w.forget(r.Stopped)
		}
		if err != nil {
			w.ended = true
			if !errors.Is(err, io.EOF) {
				w.err = err
			}
		}
		close(w.changed)
		w.changed = make(chan struct{})
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// forget adds up the readers of an id that have stopped.
func (w *watch) forget(id string) {
	delete(w.active, id)
	for key, b := range w.beats {
		if b.ID == id {
			w.past.add(b)
			delete(w.beats, key)
		}
	}
}

// guard notices what hangs, and ends it.
func (w *watch) guard(done <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		if f := w.hung(); f != nil {
			w.mu.Lock()
			w.faults = append(w.faults, *f)
			w.mu.Unlock()
			w.t.Logf("%v\n%s", f, abortAll())
			return
		}
	}
}

func (w *watch) hung() *fault {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	for _, b := range w.beats {
		if began := time.Unix(0, b.Began); b.Began != 0 && now.Sub(began) > hangs {
			return &fault{ID: b.ID, Way: b.Way, Kind: hung, What: b.What, Error: fmt.Sprintf("not done after %v", now.Sub(began)), Time: now}
		}
	}
	if quiet := now.Sub(w.heard); quiet > hangs && !w.ended {
		return &fault{ID: "any", Way: "any", Kind: hung, What: "anything", Error: fmt.Sprintf("the reader process says nothing for %v", quiet), Time: now}
	}
	return nil
}

// await waits until ok, which is called with the lock held. It tells whether that
// came within patience.
func (w *watch) await(what string, ok func() bool) bool {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		w.mu.Lock()
		good, changed, ended := ok(), w.changed, w.ended
		w.mu.Unlock()
		if good {
			return true
		}
		if ended {
			w.t.Errorf("%s: the reader process has ended", what)
			return false
		}
		select {
		case <-changed:
		case <-timer.C:
			w.t.Errorf("%s: not within %v\n%s", what, patience, abortAll())
			return false
		}
	}
}

func (w *watch) order(o order) {
	w.t.Helper()
	if err := json.NewEncoder(w.stdin).Encode(o); err != nil {
		w.t.Fatalf("speak to the reader process: %v", err)
	}
}

// start begins to read below root.
func (w *watch) start(id, root, source string, ways ...string) {
	w.t.Helper()
	w.mu.Lock()
	for _, name := range ways {
		w.beats[id+" "+name] = beat{ID: id, Way: name}
	}
	w.active[id] = true
	w.mu.Unlock()
	w.order(order{ID: id, Root: root, Source: source, Ways: ways})
}

// stop returns when nobody reads there any more.
func (w *watch) stop(id string) {
	w.t.Helper()
	w.order(order{ID: id, Stop: true})
	w.await("readers of "+id+" stop", func() bool { return !w.active[id] })
}

// served waits until each reader of id has had a read that began after now and
// went well, or there is a fault.
func (w *watch) served(id string) {
	w.t.Helper()
	since := time.Now().UnixNano()
	w.await("all readers of "+id+" read on", func() bool {
		if len(w.faults) > 0 {
			return true
		}
		for _, b := range w.beats {
			if b.ID == id && b.Good < since {
				return false
			}
		}
		return true
	})
}

// faulty tells whether something went wrong.
func (w *watch) faulty() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.faults) > 0
}

// score is what readers have met.
type score struct {
	reads               int64
	failed, wrong, hung int
	slowest             time.Duration
}

func (s *score) add(b beat) {
	s.reads += b.Reads
	s.slowest = max(s.slowest, b.Slowest)
}

func (w *watch) score() score {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.past
	for b := range maps.Values(w.beats) {
		s.add(b)
	}
	for _, f := range w.faults {
		switch f.Kind {
		case failed:
			s.failed++
		case wrong:
			s.wrong++
		case hung:
			s.hung++
		}
	}
	return s
}

// verdict fails the test for each fault.
func (w *watch) verdict() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.faults {
		w.t.Error(f)
	}
	if w.err != nil {
		w.t.Errorf("the reader process: %v", w.err)
	}
}

// abortAll ends all requests of the test's FUSE filesystems: what hangs on them
// fails then. It tells what it did.
func abortAll() string {
	ctl := filepath.Join(kit.Scratch(), "fusectl") // the machine may not have it mounted
	_ = os.Mkdir(ctl, 0o755)
	if err := unix.Mount("fusectl", ctl, "fusectl", 0, ""); err != nil {
		return fmt.Sprintf("cannot abort anything: mount fusectl: %v", err)
	}
	defer func() { _ = unix.Unmount(ctl, unix.MNT_DETACH) }()
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return err.Error()
	}
	var said []string
	done := map[int]bool{}
	for _, m := range mounts {
		ours := strings.HasPrefix(m.Mountpoint, "/run/") || strings.HasPrefix(m.Mountpoint, kit.Scratch()+"/")
		if !ours || m.FSType != "fuse" && !strings.HasPrefix(m.FSType, "fuse.") || done[m.Minor] {
			continue
		}
		done[m.Minor] = true
		waiting, _ := os.ReadFile(filepath.Join(ctl, strconv.Itoa(m.Minor), "waiting"))
		err := os.WriteFile(filepath.Join(ctl, strconv.Itoa(m.Minor), "abort"), []byte("1"), 0)
		said = append(said, fmt.Sprintf("aborted the FUSE connection %d of %s, %s requests waited (%v)", m.Minor, m.Mountpoint, strings.TrimSpace(string(waiting)), err))
	}
	return strings.Join(said, "\n")
}
