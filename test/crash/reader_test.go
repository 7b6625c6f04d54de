package crash_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is the reader process: it reads what it is ordered to, compares it with
// a source directory, and says how it goes.

// readerVar makes the test program a reader.
const readerVar = "CRASH_READER"

const (
	// pause lies between two reads: without, nobody else gets the processor.
	pause = 10 * time.Millisecond
	// beatEvery is how often the process reports.
	beatEvery = 200 * time.Millisecond
	// dropEvery is how often the page cache is dropped.
	dropEvery = 300 * time.Millisecond
	// maxFaults of one reader are enough.
	maxFaults = 5
)

// order is what the test says to the reader process: read below Root in the given
// ways until told to stop.
type order struct {
	Stop   bool     `json:"stop,omitempty"`
	ID     string   `json:"id"`
	Root   string   `json:"root,omitempty"`
	Source string   `json:"source,omitempty"`
	Ways   []string `json:"ways,omitempty"`
}

// report is what the reader process says.
type report struct {
	Beats   []beat `json:"beats,omitempty"`
	Fault   *fault `json:"fault,omitempty"`
	Stopped string `json:"stopped,omitempty"` // the ID of an order
}

// beat is how one reader is doing. Times are in nanoseconds since 1970.
type beat struct {
	ID  string `json:"id"`
	Way string `json:"way"`
	// Reads is how many there were, Slowest how long one took.
	Reads   int64         `json:"reads"`
	Slowest time.Duration `json:"slowest"`
	// Began is when the one under way did, What is its path.
	Began int64  `json:"began"`
	What  string `json:"what"`
	// Good is when the last one that went well began.
	Good int64 `json:"good"`
}

// fault is a read that went wrong.
type fault struct {
	ID    string    `json:"id"`
	Way   string    `json:"way"`
	Kind  string    `json:"kind"` // failed, wrong or hung
	What  string    `json:"what"`
	Error string    `json:"error"`
	Time  time.Time `json:"time"`
}

func (f fault) String() string {
	return fmt.Sprintf("%s %s: %s read of %s through %s: %s", f.Time.Format("15:04:05.000"), f.Kind, f.Way, f.What, f.ID, f.Error)
}

// The kinds of faults.
const (
	failed = "failed"
	wrong  = "wrong"
	hung   = "hung"
)

var errWrong = errors.New("it differs from the source")

// way reads below a root once. kept is the reader's own, from one call to the next.
type way func(r *reader, pick *rand.Rand) error

// ways are all there are. The cold one reads what no other does, in order, so
// that there is always something to fetch.
func ways() map[string]way {
	return map[string]way{
		"buffered": (*reader).buffered, "direct": (*reader).direct, "mmap": (*reader).mapped, "exec": (*reader).exec,
		"readdir": (*reader).list, "kept-file": (*reader).keptFile, "kept-dir": (*reader).keptDir, "cold": (*reader).cold,
	}
}

// wayNames are their names in order.
func wayNames() []string {
	var names []string
	for name := range ways() {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// serveOrders is the reader process.
func serveOrders(in io.Reader, out io.Writer) int {
	s := &server{out: json.NewEncoder(out), running: map[string]*group{}}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go s.beat(ctx)
	go dropCaches(ctx)
	for orders := json.NewDecoder(in); ; {
		var o order
		if err := orders.Decode(&o); err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, "reader:", err)
				return 1
			}
			return 0
		}
		if err := s.do(o); err != nil {
			fmt.Fprintln(os.Stderr, "reader:", err)
			return 1
		}
	}
}

type server struct {
	mu      sync.Mutex
	out     *json.Encoder
	running map[string]*group
}

// group is the readers of one order.
type group struct {
	stop    context.CancelFunc
	all     sync.WaitGroup
	readers []*reader
}

func (s *server) say(r report) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.out.Encode(r); err != nil {
		os.Exit(1) // the test has ended
	}
}

func (s *server) do(o order) error {
	s.mu.Lock()
	g := s.running[o.ID]
	s.mu.Unlock()
	switch {
	case o.Stop && g == nil:
		return fmt.Errorf("stop %s: nothing reads there", o.ID)
	case o.Stop:
		g.stop()
		go func() { // other orders do not wait for one that hangs
			g.all.Wait()
			s.mu.Lock()
			delete(s.running, o.ID)
			s.mu.Unlock()
			s.say(report{Beats: g.beats(), Stopped: o.ID})
		}()
		return nil
	case g != nil:
		return fmt.Errorf("start %s: it is being read", o.ID)
	}
	src, err := loadSource(o.Source)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	g = &group{stop: cancel}
	for n, name := range o.Ways {
		do := ways()[name]
		if do == nil {
			return fmt.Errorf("start %s: no way to read is called %s", o.ID, name)
		}
		r := &reader{id: o.ID, way: name, root: o.Root, src: src}
		g.readers = append(g.readers, r)
		g.all.Go(func() { r.run(ctx, do, rand.New(rand.NewPCG(uint64(n), 1)), s.say) })
	}
	s.mu.Lock()
	s.running[o.ID] = g
	s.mu.Unlock()
	return nil
}

func (s *server) beat(ctx context.Context) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		s.mu.Lock()
		var groups []*group
		for _, g := range s.running {
			groups = append(groups, g)
		}
		s.mu.Unlock()
		beats := []beat{}
		for _, g := range groups {
			beats = append(beats, g.beats()...)
		}
		s.say(report{Beats: beats})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (g *group) beats() []beat {
	var list []beat
	for _, r := range g.readers {
		list = append(list, r.now())
	}
	return list
}

// dropCaches makes readers ask the daemon again.
func dropCaches(ctx context.Context) {
	tick := time.NewTicker(dropEvery)
	defer tick.Stop()
	for {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			fmt.Fprintln(os.Stderr, "reader:", err)
			os.Exit(1)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// source is what must be read: contents by path, names by directory.
type source struct {
	files map[string][]byte
	dirs  map[string][]string
	hot   []string // the files that everybody reads
	cold  []string // those that the cold way reads
	names []string // the directories
}

func loadSource(dir string) (*source, error) {
	s := &source{files: map[string][]byte{}, dirs: map[string][]string{}}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "." {
			return err
		}
		if d.IsDir() {
			s.names = append(s.names, rel)
			entries, err := os.ReadDir(path)
			for _, e := range entries {
				s.dirs[rel] = append(s.dirs[rel], e.Name())
			}
			return err
		}
		if s.files[rel], err = os.ReadFile(path); err != nil {
			return err
		}
		if filepath.Dir(rel) == coldDir {
			s.cold = append(s.cold, rel)
		} else {
			s.hot = append(s.hot, rel)
		}
		return nil
	})
	if err == nil && (len(s.hot) == 0 || len(s.cold) == 0) {
		err = fmt.Errorf("source %s has %d hot and %d cold files", dir, len(s.hot), len(s.cold))
	}
	return s, err
}

// reader reads in one way again and again.
type reader struct {
	id, way, root string
	src           *source

	mu    sync.Mutex
	state beat

	next int      // of the cold files
	kept *os.File // of the kept ways
	name string   // its path
}

func (r *reader) now() beat {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.state
	b.ID, b.Way = r.id, r.way
	return b
}

func (r *reader) run(ctx context.Context, do way, pick *rand.Rand, say func(report)) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	defer func() { r.keep(nil, "") }()
	for faults := 0; faults < maxFaults; {
		began := time.Now()
		r.begin(began)
		err := do(r, pick)
		r.done(began, err)
		if err != nil {
			faults++
			f := &fault{ID: r.id, Way: r.way, Kind: failed, What: r.now().What, Error: err.Error(), Time: time.Now()}
			if errors.Is(err, errWrong) {
				f.Kind = wrong
			}
			say(report{Fault: f})
			r.keep(nil, "")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (r *reader) begin(t time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.Began, r.state.What = t.UnixNano(), ""
}

func (r *reader) done(began time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.Began = 0
	r.state.Reads++
	r.state.Slowest = max(r.state.Slowest, time.Since(began))
	if err == nil {
		r.state.Good = began.UnixNano()
	}
}

// at notes what is being read, and is its path.
func (r *reader) at(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.What = name
	return filepath.Join(r.root, name)
}

func (r *reader) keep(f *os.File, name string) {
	if r.kept != nil {
		r.kept.Close()
	}
	r.kept, r.name = f, name
}

func (r *reader) compare(name string, got []byte) error {
	want := r.src.files[name]
	if bytes.Equal(want, got) {
		return nil
	}
	n := 0
	for n < len(want) && n < len(got) && want[n] == got[n] {
		n++
	}
	return fmt.Errorf("%w: %d bytes instead of %d, the first difference at %d", errWrong, len(got), len(want), n)
}

func oneOf(pick *rand.Rand, names []string) string { return names[pick.IntN(len(names))] }

// open opens a file and forgets what is cached of it.
func (r *reader) open(name string, flags int) (*os.File, error) {
	path := r.at(name)
	f, err := os.OpenFile(path, os.O_RDONLY|flags, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "fadvise", Path: path, Err: err}
	}
	return f, nil
}

func (r *reader) whole(name string) error {
	f, err := r.open(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	return r.compare(name, got)
}

func (r *reader) buffered(pick *rand.Rand) error { return r.whole(oneOf(pick, r.src.hot)) }

func (r *reader) cold(*rand.Rand) error {
	name := r.src.cold[r.next%len(r.src.cold)]
	r.next++
	return r.whole(name)
}

// direct reads past the page cache.
func (r *reader) direct(pick *rand.Rand) error {
	name := oneOf(pick, r.src.hot)
	f, err := r.open(name, unix.O_DIRECT)
	if err != nil {
		return err
	}
	defer f.Close()
	const block = 4096
	size := (len(r.src.files[name])/block + 2) * block
	raw := make([]byte, size+block)
	skip := block - int(uintptr(unsafe.Pointer(unsafe.SliceData(raw)))%block)
	buf := raw[skip : skip+size]
	n := 0
	for n < len(buf) {
		m, err := f.Read(buf[n:])
		n += m
		if errors.Is(err, io.EOF) || (err == nil && m%block != 0) {
			break
		}
		if err != nil {
			return err
		}
	}
	return r.compare(name, buf[:n])
}

// mapped has the kernel copy a mapping: a page that cannot be had is an error then,
// and no signal.
func (r *reader) mapped(pick *rand.Rand) error {
	name := oneOf(pick, r.src.hot)
	f, err := r.open(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return r.compare(name, nil)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return &os.PathError{Op: "mmap", Path: f.Name(), Err: err}
	}
	defer func() { _ = unix.Munmap(data) }()
	fd, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	copied := os.NewFile(uintptr(fd), "copy")
	defer copied.Close()
	if _, err := copied.Write(data); err != nil {
		return fmt.Errorf("read the mapping of %s: %w", f.Name(), err)
	}
	got := make([]byte, len(data))
	if _, err := copied.ReadAt(got, 0); err != nil {
		return err
	}
	return r.compare(name, got)
}

// exec runs a program of the image.
func (r *reader) exec(pick *rand.Rand) error {
	name := oneOf(pick, r.src.hot)
	program := filepath.Join(r.root, "usr/bin/busybox")
	got, err := exec.Command(program, "cat", r.at(name)).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%s: %w: %s", program, err, exit.Stderr)
	}
	if err != nil {
		return err
	}
	return r.compare(name, got)
}

// list reads a directory and asks for its entries.
func (r *reader) list(pick *rand.Rand) error {
	name := oneOf(pick, r.src.names)
	entries, err := os.ReadDir(r.at(name))
	if err != nil {
		return err
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
		info, err := os.Lstat(r.at(filepath.Join(name, e.Name())))
		if err != nil {
			return err
		}
		want, isFile := r.src.files[filepath.Join(name, e.Name())]
		if isFile != info.Mode().IsRegular() || (isFile && info.Size() != int64(len(want))) {
			return fmt.Errorf("%w: %s is %v with %d bytes", errWrong, e.Name(), info.Mode(), info.Size())
		}
	}
	return r.compareNames(name, got)
}

func (r *reader) compareNames(name string, got []string) error {
	slices.Sort(got)
	if !slices.Equal(r.src.dirs[name], got) {
		return fmt.Errorf("%w: the names in %s are %q, want %q", errWrong, name, got, r.src.dirs[name])
	}
	return nil
}

// keptFile reads a piece of a file that stays open.
func (r *reader) keptFile(pick *rand.Rand) error {
	if r.kept == nil {
		name := oneOf(pick, r.src.hot)
		for len(r.src.files[name]) < 1<<16 {
			name = oneOf(pick, r.src.hot)
		}
		f, err := r.open(name, 0)
		if err != nil {
			return err
		}
		r.keep(f, name)
	}
	r.at(r.name)
	if err := unix.Fadvise(int(r.kept.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	want := r.src.files[r.name]
	from := pick.IntN(len(want))
	got := make([]byte, min(len(want)-from, 1+pick.IntN(1<<16)))
	if _, err := r.kept.ReadAt(got, int64(from)); err != nil {
		return err
	}
	if !bytes.Equal(got, want[from:from+len(got)]) {
		return fmt.Errorf("%w: %d bytes at %d", errWrong, len(got), from)
	}
	return nil
}

// keptDir lists a directory that stays open.
func (r *reader) keptDir(pick *rand.Rand) error {
	if r.kept == nil {
		name := oneOf(pick, r.src.names)
		f, err := os.Open(r.at(name))
		if err != nil {
			return err
		}
		r.keep(f, name)
	}
	r.at(r.name)
	if _, err := r.kept.Seek(0, io.SeekStart); err != nil {
		return err
	}
	got, err := r.kept.Readdirnames(-1)
	if err != nil {
		return err
	}
	return r.compareNames(r.name, got)
}
