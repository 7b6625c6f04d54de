package instance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/logs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

func sizeOf(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// slot gives a pool whose daemon cannot share a cache directory a name that none
// other that lives has, see Generation.Private.
func (l *launch) slot(ctx context.Context) error {
	shares, err := sharesCache(ctx, l.spec.RunDir, l.spec.Daemon.Path)
	if err != nil || shares {
		return err
	}
	for n := 0; ; n++ {
		lock, err := os.OpenFile(filepath.Join(string(l.disk), fmt.Sprintf("slot%d.lock", n)), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return fmt.Errorf("lock cache directories: %w", err)
		}
		err = flock(lock, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			l.cacheLock, l.gen.Private = lock, fmt.Sprintf("%s.%d", l.inst.rec.Key, n)
			return nil
		}
		lock.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("lock cache directories %s: %w", lock.Name(), err)
		}
	}
}

// listens waits until the daemon can be given images: it mounts first.
func (l *launch) listens(ctx context.Context) error {
	deadline, _ := ctx.Deadline()
	if err := l.proc.WaitFile(l.gen.Socket, deadline); err != nil {
		return err
	}
	// Nothing tells when it listens on the socket that it has made.
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		err := nydusd.Listens(ctx, l.gen.Socket)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return l.failed("does not listen: " + err.Error())
		case l.proc.Wait(time.Now()):
			return l.failed("ended before it listened: " + l.proc.Exit())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// bringUp starts the daemon, or leaves nothing.
func (l *launch) bringUp(ctx context.Context) error {
	if err := l.prepare(ctx); err != nil {
		return errors.Join(err, l.undo())
	}
	if err := l.run(ctx); err != nil {
		return errors.Join(err, l.undo())
	}
	l.release()
	return nil
}

// launch is one start of a daemon, with what must be undone when it fails.
type launch struct {
	spec      Spec
	inst      *Instance
	shared    bool // the daemon starts without an image, and gets many
	gen       Generation
	dir       genDir
	disk      diskDir
	boot      *bootstrap // nil for a shared one
	cacheDir  string     // where the daemon keeps what it fetches
	cacheLock *os.File
	log       *os.File
	logStart  int64 // what stands before it in the log is not this daemon's
	proc      *nydusd.Process
	watch     *rootfs.Watch
}

// prepare does everything up to the start of the process.
func (l *launch) prepare(ctx context.Context) error {
	l.next()
	config, err := l.furnish(ctx)
	if err != nil {
		return err
	}
	if l.log, err = openLog(l.disk.log(), l.spec.Daemon.LogMaxSize); err != nil {
		return err
	}
	if info, err := l.log.Stat(); err == nil {
		l.logStart = info.Size()
	}
	if err := l.begin(config); err != nil {
		return err
	}
	if !l.shared { // whose images pass one by one
		if err := l.trustCache(ctx); err != nil {
			return err
		}
		if err := l.passCache(ctx); err != nil {
			return err
		}
		if err := l.reserve(l.cacheDir); err != nil {
			return err
		}
	}
	if _, err := os.Stat(fuseDevice); err != nil {
		return fmt.Errorf("no FUSE on this node: %w; load the module (modprobe fuse)", err)
	}
	l.watch, err = rootfs.NewWatch()
	return err
}

// furnish provides what the daemon works with, and returns its configuration: none
// for one that starts without an image.
func (l *launch) furnish(ctx context.Context) (string, error) {
	if l.shared {
		if err := l.makeDisk(); err != nil {
			return "", err
		}
		return "", l.slot(ctx)
	}
	if err := l.image(); err != nil {
		return "", err
	}
	var err error
	if l.cacheDir, err = l.cache(ctx); err != nil {
		return "", err
	}
	return nydusd.SetCacheDir(l.spec.Config, l.cacheDir)
}

func (l *launch) makeDisk() error {
	l.disk = diskDirOf(l.spec.Root, l.spec.Key)
	if err := os.MkdirAll(string(l.disk), 0o700); err != nil {
		return fmt.Errorf("create instance directory: %w", err)
	}
	return nil
}

// image looks at what the image is made of.
func (l *launch) image() error {
	err := l.makeDisk()
	if err == nil {
		err = l.boot.link(l.spec, l.disk.bootstrap())
	}
	if err != nil {
		return err
	}
	return findBlobs(l.spec)
}

// next describes the generation that is to be.
func (l *launch) next() {
	s, n := l.spec, l.inst.rec.Last+1
	dir := l.inst.dir.gen(n)
	l.gen = Generation{
		Number: n, Mountpoint: dir.mountpoint(), Socket: dir.socket(), Supervisor: dir.supervisor(),
		Threads: s.Daemon.Threads, LogLevel: s.Daemon.LogLevel, LogMaxSize: s.Daemon.LogMaxSize, OOMScoreAdj: s.Daemon.OOMScoreAdj,
		Nydusd: s.Daemon.Path, Cgroup: s.Daemon.CgroupParent, MemoryLimit: s.Daemon.MemoryLimit, CPULimit: s.Daemon.CPULimit,
		Started: time.Now().UTC(), Alone: s.Alone, Shared: l.shared, Restarts: s.restarts, Held: s.held,
	}
	if s.held {
		l.gen.Supervisor = "" // nobody would miss it
	}
}

// begin makes the generation the instance's, not ready yet. From here on a killed
// helper leaves something in the run directory: the record names it first.
func (l *launch) begin(config string) error {
	i := l.inst
	l.dir = i.dir.gen(l.gen.Number)
	i.rec.Last, i.rec.Current = l.gen.Number, &l.gen
	if err := i.write(); err != nil {
		return err
	}
	if err := os.MkdirAll(l.dir.mountpoint(), 0o700); err != nil {
		return fmt.Errorf("create mountpoint: %w", err)
	}
	if err := l.writeEnv(); err != nil {
		return fmt.Errorf("write nydusd's environment: %w", err)
	}
	if config == "" {
		return nil
	}
	if err := writeFile(l.dir.config(), []byte(config)); err != nil {
		return fmt.Errorf("write nydusd's configuration: %w", err)
	}
	return nil
}

// env is the environment of the daemon: that of whoever mounts, or of its
// predecessor's.
func (l *launch) env() []string {
	if l.spec.env != nil {
		return l.spec.env
	}
	return nydusd.Environment(os.Environ(), l.spec.Daemon.CAFile)
}

// writeEnv keeps it for successors. An image without a daemon of its own has none.
func (l *launch) writeEnv() error {
	env := l.env()
	if len(env) == 0 || l.gen.Berth != nil || l.gen.Daemonless() {
		return nil
	}
	text, err := json.Marshal(env)
	if err != nil {
		return err
	}
	return writeFile(l.dir.env(), text)
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
		return fmt.Errorf("find the image's blobs: %w; correct the dir of its [[backend]]", err)
	}
	return nil
}

// run starts the daemon and waits until its filesystem answers.
func (l *launch) run(ctx context.Context) error {
	s := l.spec
	config, bootstrap := l.dir.config(), l.disk.bootstrap()
	if l.shared {
		config, bootstrap = "", ""
	}
	var err error
	announce(l.log, l.gen.Number, s.Daemon.Path)
	l.proc, err = nydusd.Start(nydusd.Command{
		Path: s.Daemon.Path, Env: l.env(), Config: config, Bootstrap: bootstrap, Mountpoint: l.dir.mountpoint(),
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
	if l.shared {
		err = l.listens(ctx)
	} else {
		err = l.boot.check(ctx)
	}
	if err != nil {
		return err
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

// failed is an error about the daemon, with what it said last.
func (l *launch) failed(what string) error {
	msg := fmt.Sprintf("nydusd %s %s", l.spec.Daemon.Path, what)
	if kills, err := OOMKills(l.spec.Key, l.gen); err == nil && kills > 0 {
		msg += fmt.Sprintf("; the kernel killed it for memory, of which it may use %d bytes: raise [cgroup] memory", l.gen.MemoryLimit)
	}
	if tail := nydusd.Tail(l.disk.log(), l.logStart, 5, nydusd.Secrets(l.spec.Config)...); tail != "" {
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

// announce writes into a daemon's log that another one begins.
func announce(log *os.File, generation int, path string) {
	fmt.Fprintf(log, "[%s] INFO %s%s\n", time.Now().UTC().Format(time.RFC3339), nydusd.Starts(generation), path)
}

// warn writes into a daemon's log what could not be arranged for it.
func warn(log *os.File, p *nydusd.Process) {
	for _, w := range p.Warnings {
		fmt.Fprintf(log, "start of nydusd %d: warning: %s\n", p.PID, w)
	}
}

// openLog opens the log for a daemon, which appends to it. A limit of 0 is the
// default one.
func openLog(path string, limit int64) (*os.File, error) {
	if limit <= 0 {
		limit = mountspec.DefaultLogMaxSize
	}
	f, err := appendLog(path)
	if err != nil {
		return nil, err
	}
	// A running snapshotter does this all the time, but none may run.
	if _, err := logs.Cut(path, limit); err != nil {
		fmt.Fprintf(f, "mount helper: warning: %v\n", err)
	}
	if info, err := f.Stat(); err == nil {
		// Without it a full disk may end the daemon, but it has not begun yet.
		_ = logs.Reserve(f, info.Size())
	}
	return f, nil
}

func appendLog(path string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}
