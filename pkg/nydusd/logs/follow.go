package logs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Origin is what is known of an instance whose log is passed on.
type Origin struct {
	Image string
	// Generation is 0 when it cannot be told which one wrote.
	Generation int
	// Secrets must not be passed on.
	Secrets []string
}

// Config is what a Follower needs.
type Config struct {
	// Dir has a directory for each instance, with its log in a file called Name.
	Dir, Name string
	// Files are further logs, which are made if they do not exist.
	Files []string
	// Limit is Cut's.
	Limit int64
	// Origin tells about the instance with this key, ok is false when there is
	// none any more. It is called for what is passed on only.
	Origin func(key string) (o Origin, ok bool)
	Log    *slog.Logger
}

// Follower follows logs. Use New.
type Follower struct {
	cfg   Config
	fd    int
	burst int // see there
	all   sync.WaitGroup
	dir   int32            // the watch of cfg.Dir
	tails map[int32]*tail  // by their watch
	byKey map[string]*tail // the last one each, which may be about to end
}

// New returns a Follower that does nothing until Run.
func New(cfg Config) *Follower {
	return &Follower{cfg: cfg, burst: burst, tails: map[int32]*tail{}, byKey: map[string]*tail{}}
}

// gather is how long events are left to gather: a daemon may write thousands of
// lines a second, one event each.
const gather = 20 * time.Millisecond

// Run works until ctx ends, and returns an error only when it cannot follow the
// directory. It may be called once.
func (f *Follower) Run(ctx context.Context) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("follow logs: inotify_init1: %w; raise the sysctl fs.inotify.max_user_instances", err)
	}
	f.fd = fd
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer f.all.Wait()
	defer cancel()
	if err := f.begin(ctx); err != nil {
		return err
	}
	// Ends the read below.
	defer context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 64<<10)
	for {
		n, err := events.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow logs: %w", err)
		}
		if err := f.handle(ctx, buf[:n]); err != nil {
			return err
		}
		timer := time.NewTimer(gather)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// begin watches what there is.
func (f *Follower) begin(ctx context.Context) error {
	if err := os.MkdirAll(f.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("follow logs: %w", err)
	}
	wd, err := unix.InotifyAddWatch(f.fd, f.cfg.Dir, unix.IN_ONLYDIR|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
	if err != nil {
		return fmt.Errorf("follow logs: %w", &os.PathError{Op: "inotify_add_watch", Path: f.cfg.Dir, Err: err})
	}
	f.dir = int32(wd)
	for _, path := range f.cfg.Files {
		file, err := os.OpenFile(filepath.Clean(path), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return fmt.Errorf("follow logs: %w", err)
		}
		file.Close()
		name := strings.TrimSuffix(filepath.Base(path), ".log")
		f.watch(ctx, path, unix.IN_MODIFY, &tail{f: f, path: path, name: name, log: f.cfg.Log})
	}
	return f.scan(ctx)
}

// scan finds instances that no event told of.
func (f *Follower) scan(ctx context.Context) error {
	entries, err := os.ReadDir(f.cfg.Dir)
	if err != nil {
		return fmt.Errorf("follow logs: %w", err)
	}
	for _, e := range entries {
		f.add(ctx, e.Name())
	}
	return nil
}

func (f *Follower) add(ctx context.Context, key string) {
	if strings.HasPrefix(key, ".") {
		return
	}
	dir := filepath.Join(f.cfg.Dir, key)
	t := &tail{f: f, key: key, path: filepath.Join(dir, f.cfg.Name), name: "nydusd", log: f.cfg.Log.With("instance", key), after: f.byKey[key]}
	if f.watch(ctx, dir, unix.IN_ONLYDIR|unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE, t) {
		f.byKey[key] = t
	}
}

// watch makes t follow what happens at path, unless it is followed already.
func (f *Follower) watch(ctx context.Context, path string, events uint32, t *tail) bool {
	wd, err := unix.InotifyAddWatch(f.fd, path, events)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return false // gone again, or nobody's
	case err != nil:
		hint := ""
		if errors.Is(err, unix.ENOSPC) {
			hint = "raise the sysctl fs.inotify.max_user_watches"
		}
		t.log.Error("cannot follow a log: it is neither passed on nor bounded", "path", path, "error", err, "hint", hint)
		return false
	}
	if known := f.tails[int32(wd)]; known != nil {
		known.poke()
		return false
	}
	t.poked, t.done = make(chan struct{}, 1), make(chan struct{})
	f.tails[int32(wd)] = t
	f.all.Go(func() { t.run(ctx) })
	t.poke() // what came before the watch
	return true
}

// handle deals with what one read returned.
func (f *Follower) handle(ctx context.Context, events []byte) error {
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		events = events[end:]
		if err := f.event(ctx, wd, mask, name); err != nil {
			return err
		}
	}
	return nil
}

func (f *Follower) event(ctx context.Context, wd int32, mask uint32, name string) error {
	switch t := f.tails[wd]; {
	case mask&unix.IN_Q_OVERFLOW != 0:
		// What was missed is unknown: look at all.
		for _, t := range f.tails {
			t.poke()
		}
		return f.scan(ctx)
	case wd == f.dir && mask&(unix.IN_IGNORED|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0:
		return fmt.Errorf("follow logs: %s was removed", f.cfg.Dir)
	case wd == f.dir && mask&unix.IN_ISDIR != 0:
		f.add(ctx, name)
	case t != nil && mask&unix.IN_IGNORED != 0:
		delete(f.tails, wd)
		close(t.poked)
		f.prune()
	case t != nil && (name == "" || name == f.cfg.Name):
		t.poke()
	}
	return nil
}

// prune forgets tails that have ended.
func (f *Follower) prune() {
	for key, t := range f.byKey {
		select {
		case <-t.done:
			delete(f.byKey, key)
		default:
		}
	}
}
