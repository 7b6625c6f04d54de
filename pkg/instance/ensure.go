package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// DefaultStartTimeout bounds a daemon's start when the spec does not.
const DefaultStartTimeout = 10 * time.Second

// DefaultHangTimeout is how long an instance that serves others may take to answer
// when the spec does not say. Its threads may all be waiting for a slow registry.
const DefaultHangTimeout = 10 * time.Second

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
	// Root receives the log and the link to the bootstrap, RunDir the rest.
	Root, RunDir string
	Driver       mountspec.Driver
	Daemon       mountspec.Daemon
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
		s.Daemon.StartTimeout = DefaultStartTimeout
	}
	if s.Daemon.HangTimeout <= 0 {
		s.Daemon.HangTimeout = DefaultHangTimeout
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
		return nil, errors.Join(fmt.Errorf("image %s (instance %s): %w", s.Image, s.Key, err), i.Close())
	}
	return i, nil
}

func (i *Instance) ensure(ctx context.Context, s Spec) error {
	serves, err := i.serves(ctx)
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
	if ok, err := i.reattach(ctx); err != nil || ok {
		return err
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
	if f, err := openLog(diskDirOf(i.rec.Root, i.rec.Key).log()); err == nil {
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
	err := within(ctx, i.hang, func() error { return answers(g) })
	switch {
	case err == nil:
		return true, nil
	case ctx.Err() != nil:
		return false, err
	case errors.Is(err, errUnmounted):
		return false, nil
	}
	p, found := nydusd.Find(g.PID, g.StartTime)
	if found != nil || p == nil {
		return false, found
	}
	defer p.Close()
	if errors.Is(err, errNoAnswer) && !p.Stopped() {
		return false, fmt.Errorf("nydusd %d is busy: %w; is its registry reachable? See %s", g.PID, err, diskDirOf(i.rec.Root, i.rec.Key).log())
	}
	g.Failed = true
	i.note("nydusd %d does not answer and is replaced: %v", g.PID, err)
	return false, nil
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

// Dev is the device number of the image's filesystem, "major:minor".
func (i *Instance) Dev() string { return i.rec.Current.Dev }

// start brings up the next generation.
func (i *Instance) start(ctx context.Context, s Spec) (err error) {
	if s.Starting != nil {
		var stop context.CancelFunc
		ctx, stop = s.Starting(ctx)
		defer stop()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.Daemon.StartTimeout, fmt.Errorf("not within %s", s.Daemon.StartTimeout))
	defer cancel()
	i.describe(s)
	l := &launch{spec: s, inst: i}
	if err := l.prepare(ctx); err != nil {
		return errors.Join(err, l.undo())
	}
	if err := l.run(ctx); err != nil {
		return errors.Join(err, l.undo())
	}
	l.release()
	return nil
}

// describe takes what the spec says about the image into the record.
func (i *Instance) describe(s Spec) {
	r := &i.rec
	r.Image, r.Host, r.Repository, r.BootstrapDigest = s.Image, s.Host, s.Repository, s.BootstrapDigest
	r.CacheDir, r.Root, r.Driver = s.CacheDir, s.Root, mountspec.DriverFUSE
}

// launch is one start of a daemon, with what must be undone when it fails.
type launch struct {
	spec      Spec
	inst      *Instance
	gen       Generation
	dir       genDir
	disk      diskDir
	digest    <-chan error
	cacheLock *os.File
	log       *os.File
	logStart  int64 // what stands before it in the log is not this daemon's
	proc      *nydusd.Process
	watch     *rootfs.Watch
}

// prepare does everything up to the start of the process.
func (l *launch) prepare(ctx context.Context) error {
	s, i := l.spec, l.inst
	l.disk = diskDirOf(s.Root, s.Key)
	if err := os.MkdirAll(string(l.disk), 0o700); err != nil {
		return fmt.Errorf("create instance directory: %w", err)
	}
	var err error
	if l.digest, err = linkBootstrap(s, l.disk.bootstrap()); err != nil {
		return err
	}
	if err := findBlobs(s); err != nil {
		return err
	}
	cacheDir, err := l.cache(ctx)
	if err != nil {
		return err
	}
	config, err := nydusd.SetCacheDir(s.Config, cacheDir)
	if err != nil {
		return err
	}
	if l.log, err = openLog(l.disk.log()); err != nil {
		return err
	}
	if info, err := l.log.Stat(); err == nil {
		l.logStart = info.Size()
	}
	// From here on a killed helper leaves something in the run directory: the
	// record names it first.
	l.dir = i.dir.gen(i.rec.Last + 1)
	l.gen = Generation{
		Number: i.rec.Last + 1, Mountpoint: l.dir.mountpoint(), Socket: l.dir.socket(), Supervisor: l.dir.supervisor(),
		Threads: s.Daemon.Threads, LogLevel: s.Daemon.LogLevel, OOMScoreAdj: s.Daemon.OOMScoreAdj,
		Nydusd: s.Daemon.Path, Cgroup: s.Daemon.CgroupParent, MemoryLimit: s.Daemon.MemoryLimit, CPULimit: s.Daemon.CPULimit,
		Started: time.Now().UTC(), Alone: s.Alone,
	}
	i.rec.Last, i.rec.Current = l.gen.Number, &l.gen
	if err := i.write(); err != nil {
		return err
	}
	if err := os.MkdirAll(l.dir.mountpoint(), 0o700); err != nil {
		return fmt.Errorf("create mountpoint: %w", err)
	}
	if err := writeFile(l.dir.config(), []byte(config)); err != nil {
		return fmt.Errorf("write nydusd's configuration: %w", err)
	}
	if _, err := os.Stat(fuseDevice); err != nil {
		return fmt.Errorf("no FUSE on this node: %w; load the module (modprobe fuse)", err)
	}
	l.watch, err = rootfs.NewWatch()
	return err
}

// fuseDevice is where nydusd looks for the kernel's FUSE.
const fuseDevice = "/dev/fuse"

// findBlobs looks for the directory of the blobs, when they are in one: nydusd
// only says that something went wrong.
func findBlobs(s Spec) error {
	if s.Host != "" || !filepath.IsAbs(s.Repository) {
		return nil
	}
	if _, err := os.Stat(s.Repository); err != nil {
		return fmt.Errorf("find the image's blobs: %w; correct [remote] localfs_dir", err)
	}
	return nil
}

// run starts the daemon and waits until its filesystem answers.
func (l *launch) run(ctx context.Context) error {
	s := l.spec
	var err error
	l.proc, err = nydusd.Start(nydusd.Command{
		Path: s.Daemon.Path, Config: l.dir.config(), Bootstrap: l.disk.bootstrap(), Mountpoint: l.dir.mountpoint(),
		Socket: l.dir.socket(), Supervisor: l.dir.supervisor(), ID: cgroupOf(s.Key, l.gen).Name, Log: l.log, LogLevel: s.Daemon.LogLevel, Threads: s.Daemon.Threads,
		OOMScoreAdj: s.Daemon.OOMScoreAdj, Cgroup: cgroupOf(s.Key, l.gen), CacheLock: l.cacheLock,
	})
	if err != nil {
		return err
	}
	warn(l.log, l.proc)
	l.gen.Unmet = l.proc.Unmet
	m, err := l.mounted(ctx)
	if err != nil {
		return err
	}
	if err := l.answers(ctx); err != nil {
		return err
	}
	// Beneath the run directory it was born shared.
	if err := rootfs.Private(l.gen.Mountpoint); err != nil {
		return err
	}
	select {
	case err := <-l.digest:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return fmt.Errorf("check bootstrap: %w", context.Cause(ctx))
	}
	l.gen.PID, l.gen.StartTime, l.gen.Dev, l.gen.Ready = l.proc.PID, l.proc.StartTime, m.Dev, true
	return l.inst.write()
}

// mounted waits for the daemon's mount to appear.
func (l *launch) mounted(ctx context.Context) (rootfs.Mount, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return rootfs.Mount{}, err
	}
	defer r.Close()
	defer w.Close()
	// The end of ctx closes the pipe and so ends the wait; a second close is
	// harmless.
	defer context.AfterFunc(ctx, func() { w.Close() })()
	for woken := false; ; {
		m, ok, err := rootfs.Lookup(l.gen.Mountpoint)
		switch {
		case err != nil:
			return m, err
		case ctx.Err() != nil:
			return m, l.failed("did not mount: " + context.Cause(ctx).Error())
		case woken:
			return m, l.failed("ended before it served: " + l.proc.Exit())
		case ok:
			return m, nil
		}
		changed, err := l.watch.Wait(time.Time{}, l.proc.FD, int(r.Fd()))
		if err != nil {
			return m, err
		}
		woken = !changed
	}
}

// answers makes the filesystem answer.
func (l *launch) answers(ctx context.Context) error {
	if err := askWithin(ctx, l.gen.Mountpoint, 0); err != nil {
		return l.failed("mounted but does not serve: " + err.Error())
	}
	return nil
}

// errNoAnswer says that a filesystem did not answer in time.
var errNoAnswer = errors.New("no answer")

// askWithin asks no longer than ctx and, unless that is 0, timeout. A call that
// hangs is left behind: a daemon that was stopped or is busy has not read the
// question, so the kernel takes it back when this process ends. (Only one that
// was stopped between reading and answering keeps this process with it.)
func askWithin(ctx context.Context, mountpoint string, timeout time.Duration) error {
	return within(ctx, timeout, func() error { return ask(mountpoint) })
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

// failed is an error about the daemon, with what it said last.
func (l *launch) failed(what string) error {
	msg := fmt.Sprintf("nydusd %s %s", l.spec.Daemon.Path, what)
	if kills, err := OOMKills(l.spec.Key, l.gen); err == nil && kills > 0 {
		msg += fmt.Sprintf("; the kernel killed it for memory, of which it may use %d bytes: raise [cgroup] memory", l.gen.MemoryLimit)
	}
	if tail := nydusd.Tail(l.disk.log(), l.logStart, 5); tail != "" {
		msg += fmt.Sprintf("; the end of %s: %s", l.disk.log(), tail)
	}
	return errors.New(msg)
}

// undo takes back what was begun. The daemon has served nobody, so it is killed.
func (l *launch) undo() error {
	defer l.release()
	var errs []error
	if l.proc != nil {
		errs = append(errs, l.proc.Kill(l.gen.Mountpoint))
		l.proc.Exit() // reap it
	}
	l.inst.rec.Current = nil
	if l.dir != "" {
		errs = append(errs, removeGeneration(l.inst.rec.Key, l.gen), l.inst.write())
	}
	return errors.Join(append(errs, l.inst.removeBootstrap())...)
}

// release closes what the launch holds; the daemon has its own copies.
func (l *launch) release() {
	for _, f := range []*os.File{l.cacheLock, l.log} {
		if f != nil {
			f.Close()
		}
	}
	if l.watch != nil {
		l.watch.Close()
	}
	if l.proc != nil {
		l.proc.Close()
	}
}

func cgroupOf(key string, g Generation) nydusd.Cgroup {
	return nydusd.Cgroup{Parent: g.Cgroup, Name: fmt.Sprintf("%s.g%d", key, g.Number), Memory: g.MemoryLimit, CPU: g.CPULimit}
}

// OOMKills counts the daemons of a generation that the kernel has killed for
// memory, predecessors included; see nydusd.Cgroup.OOMKills.
func OOMKills(key string, g Generation) (int, error) { return cgroupOf(key, g).OOMKills() }

// warn writes into a daemon's log what could not be arranged for it.
func warn(log *os.File, p *nydusd.Process) {
	for _, w := range p.Warnings {
		fmt.Fprintf(log, "start of nydusd %d: warning: %s\n", p.PID, w)
	}
}

// maxLog is the size at which a log is set aside when its daemon is started
// anew.
const maxLog = 16 << 20

// openLog opens the log to append to it, as the daemon must too.
func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("rotate log: %w", err)
		}
	}
	f, err := os.OpenFile(filepath.Clean(path), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}
