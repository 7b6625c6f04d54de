package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

// defaultStartTimeout bounds a daemon's start when the spec does not.
const defaultStartTimeout = 10 * time.Second

// defaultHangTimeout is how long an instance that serves others may take to answer
// when the spec does not say. Its threads may all be waiting for a slow registry.
const defaultHangTimeout = 10 * time.Second

// retireWait is how long a daemon whose last mount is just going away may take
// until a successor that cannot share its cache directory gives up waiting.
const retireWait = 2 * time.Second

// Spec says which image is wanted and how to serve it.
type Spec struct {
	// Key is mountspec.InstanceKey of the four below.
	Key                                         string
	BootstrapDigest, Host, Repository, CacheDir string
	// Image is for people.
	Image string
	// Bootstrap is the image's metadata file. When it lies beneath Root it is
	// reached through no symbolic link from there on.
	Bootstrap string
	// Config is nydusd's complete configuration: a secret.
	Config string
	// env is the environment of the daemon that it replaces, nil for none; restarts
	// counts those.
	env      []string
	restarts int
	// held says that it is for a Hold.
	held bool
	// Root receives the log and the link to the bootstrap, RunDir the rest.
	Root, RunDir string
	// Driver says whether the kernel may serve the image by itself, if its blobs are
	// proven to be complete. An instance that serves stays as it is.
	Driver mountspec.Driver
	// IDMapped says that the image's filesystem is to be id-mapped, which the kernel's
	// own can be alone. An instance that is served by a nydusd goes on for those who
	// use it, and another generation is made.
	IDMapped bool
	Daemon   mountspec.Daemon
	// Starting, when set, is called when a daemon has to be started, and ends
	// with stop when that is done: ctx should end when the caller is told to, so
	// that what was begun is undone. Finding an instance that serves is too
	// short to need it.
	Starting func(context.Context) (ctx context.Context, stop context.CancelFunc)
	// Alone says that no snapshotter will release the instance: the caller lets
	// it go with Detach as soon as its mount is made.
	Alone bool
}

// Ensure makes the image's filesystem exist and returns its instance, locked;
// the caller mounts what it wants on it and closes it. An instance that serves
// is used as it is. On error everything that was begun is undone.
func Ensure(ctx context.Context, s Spec) (*Instance, error) {
	if s.Daemon.StartTimeout <= 0 {
		s.Daemon.StartTimeout = defaultStartTimeout
	}
	if s.Daemon.HangTimeout <= 0 {
		s.Daemon.HangTimeout = defaultHangTimeout
	}
	if err := SetupRunDir(s.RunDir); err != nil {
		return nil, err
	}
	// Others that mount the same image hold the lock for at most one question and
	// one start each.
	i, err := open(ctx, dirOf(s.RunDir, s.Key), openCreate, s.Daemon.StartTimeout+retireWait+s.Daemon.HangTimeout)
	if err != nil {
		return nil, err
	}
	i.hang = s.Daemon.HangTimeout
	if err := i.ensure(ctx, s); err != nil {
		return nil, errors.Join(fmt.Errorf("image %s (instance %s): %w", s.Image, s.Key, advise(err, s.Root)), i.Close())
	}
	return i, nil
}

func (i *Instance) ensure(ctx context.Context, s Spec) error {
	serves, err := i.serves(ctx)
	if err == nil && serves && s.IDMapped && !i.rec.Current.Daemonless() {
		serves, err = false, i.mappable(s)
	}
	if err != nil || serves {
		return err
	}
	if err := i.retire(); err != nil {
		return err
	}
	i.started = true
	if err := i.sweep(); err != nil {
		// What earlier daemons left must not keep the image from being mounted.
		i.note("clean up: %v", err)
	}
	if !s.IDMapped { // what is brought back is nydusd's
		if ok, err := i.reattach(ctx); err != nil || ok {
			return err
		}
	}
	err = i.start(ctx, s)
	if err != nil {
		// Nothing may be left of an instance that never served.
		_, cleanup := i.removeIfEmpty(i.removeBootstrap)
		return errors.Join(err, cleanup)
	}
	return nil
}

// note writes a line into the daemon's log, where a person looks first. It is
// not worth failing for.
func (i *Instance) note(format string, args ...any) {
	if i.rec.Root == "" {
		return
	}
	if f, err := appendLog(diskDirOf(i.rec.Root, i.rec.Key).log()); err == nil {
		fmt.Fprintf(f, "[%s] mount helper: %s\n", time.Now().UTC().Format(time.RFC3339), fmt.Sprintf(format, args...))
		f.Close()
	}
}

// serves tells whether the current generation can take a new mount. One that
// fails, or that was stopped, is marked as failed: what lies on it stays, and
// hangs or fails, but nothing new is mounted on it. One that is only busy, as
// with a registry that does not answer, gets no successor, which would soon be as
// busy: this mount fails.
func (i *Instance) serves(ctx context.Context) (bool, error) {
	g := i.rec.Current
	if g == nil || !g.Ready || g.Failed {
		return false, nil
	}
	err := within(ctx, i.hang, func() error { return empty(func() error { return answers(g) }) })
	switch {
	case err == nil:
		readMetadataAhead(g)
		return true, nil
	case ctx.Err() != nil:
		return false, err
	case errors.Is(err, errUnmounted):
		return false, nil
	case g.Daemonless():
		g.Failed = true
		i.note("the filesystem without a daemon does not answer and is replaced: %v", err)
		return false, nil
	}
	p, found := i.dir.daemon(g)
	if found != nil || p == nil {
		return false, found
	}
	defer p.Close()
	if errors.Is(err, errNoAnswer) && !p.Stopped() {
		return false, fmt.Errorf("nydusd %d is busy: %w; is its registry reachable? See %s", p.PID, err, i.logOf(g))
	}
	g.Failed = true
	i.note("nydusd %d does not answer and is replaced: %v", p.PID, err)
	return false, nil
}

// logOf is where a generation's daemon writes to.
func (i *Instance) logOf(g *Generation) string {
	key := i.rec.Key
	if g.Berth != nil {
		key = g.Berth.Pool
	}
	return diskDirOf(i.rec.Root, key).log()
}

// errUnmounted says that a generation's filesystem is not on its mountpoint.
var errUnmounted = errors.New("not mounted")

// answers makes a generation answer, in the way that takes least: most mounts
// find one that does. Its device is learned without the mount table, which is long
// on a node with many containers; statfs is what no cache can answer.
func answers(g *Generation) error {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, g.Mountpoint, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if errors.Is(err, unix.ENOENT) || err == nil && fmt.Sprintf("%d:%d", st.Dev_major, st.Dev_minor) != g.Dev {
		return errUnmounted
	}
	var fs unix.Statfs_t
	if err == nil {
		err = unix.Statfs(g.Mountpoint, &fs)
	}
	return err
}

// Mountpoint is where the image's filesystem is mounted.
func (i *Instance) Mountpoint() string { return i.rec.Current.Mountpoint }

// Started tells whether this Ensure brought the instance up, rather than found
// it serving.
func (i *Instance) Started() bool { return i.started }

// Alone tells whether the instance is to be let go as soon as it is mounted.
func (i *Instance) Alone() bool { return i.rec.Current.Alone }

// Holds tells whether a mount is one of the image.
func (i *Instance) Holds(m rootfs.Mount) bool { return i.rec.Current.holds(m) }

// start brings up the next generation.
func (i *Instance) start(ctx context.Context, s Spec) error {
	if s.Starting != nil {
		var stop context.CancelFunc
		ctx, stop = s.Starting(ctx)
		defer stop()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.Daemon.StartTimeout, fmt.Errorf("not within %s", s.Daemon.StartTimeout))
	defer cancel()
	i.describe(s)
	boot := &bootstrap{}
	defer boot.close()
	if s.Driver == mountspec.DriverAuto || s.Driver == mountspec.DriverEROFS {
		err := i.daemonless(ctx, s, boot)
		if err != nil && s.IDMapped {
			return unmappable(err)
		}
		if err == nil || s.Driver == mountspec.DriverEROFS || ctx.Err() != nil {
			return err
		}
		i.rec.Driver = mountspec.DriverFUSE
		i.note("the image gets a nydusd: %v", err)
	} else if s.IDMapped {
		return unmappable(fmt.Errorf("driver %q wants a nydusd", s.Driver))
	}
	if s.shared() {
		return i.board(ctx, s, boot)
	}
	l := &launch{spec: s, inst: i, boot: boot}
	return l.bringUp(ctx)
}

// describe takes what the spec says about the image into the record.
func (i *Instance) describe(s Spec) {
	r := &i.rec
	r.Image, r.Host, r.Repository, r.BootstrapDigest = s.Image, s.Host, s.Repository, s.BootstrapDigest
	r.CacheDir, r.Root, r.Driver = s.CacheDir, s.Root, mountspec.DriverFUSE
}

// errNoAnswer says that a filesystem did not answer in time.
var errNoAnswer = errors.New("no answer")

// askWithin asks no longer than ctx and, unless that is 0, timeout. A call that
// hangs is left behind: a daemon that was stopped or is busy has not read the
// question, so the kernel takes it back when this process ends. (Only one that
// was stopped between reading and answering keeps this process with it.)
func askWithin(ctx context.Context, mountpoint string, timeout time.Duration) error {
	return within(ctx, timeout, func() error { return empty(func() error { return ask(mountpoint) }) })
}

// within makes a call that may hang, see askWithin.
func within(ctx context.Context, timeout time.Duration, call func() error) error {
	done := make(chan error, 1)
	go func() { done <- call() }()
	var over <-chan time.Time
	if timeout > 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case err := <-done:
		return err
	case <-over:
		return fmt.Errorf("%w within %s", errNoAnswer, timeout)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errNoAnswer, context.Cause(ctx))
	}
}

// empty calls call in a thread that has no files. A process that is killed while a daemon
// owes it an answer is not gone before that comes, and keeps the files of the thread that
// waits: the instance's lock among them, for which the next mount would wait in vain.
func empty(call func() error) (err error) {
	thread.Throwaway(func() {
		if unix.Unshare(unix.CLONE_FILES) == nil {
			closeFiles()
		}
		err = call()
	})
	return err
}

// closeFiles closes all files of the thread. What is no file stays: Go's scheduler wakes its
// poller from whatever thread it is on, by a descriptor that must be good.
func closeFiles() {
	const dir = "/proc/thread-self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // then it is as without: it takes a kill at this very moment to be missed
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= unix.Stderr {
			continue
		}
		if path, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && filepath.IsAbs(path) {
			unix.Close(fd)
		}
	}
}

// ask makes a filesystem answer, and look into the root directory: a bootstrap
// with a sound head and a broken root gets no further.
func ask(mountpoint string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(mountpoint, &fs); err != nil {
		return err
	}
	var st unix.Stat_t
	err := unix.Lstat(filepath.Join(mountpoint, ".nydus-probe"), &st)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
