package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// What an image costs that is complete in the cache, through the kernel's EROFS and through
// nydusd, against overlayfs.

const (
	completeName = "a running container of a complete image"
	// perl is the fixture's other program that reads many small files: it has no dpkg.
	perl = "use CPAN::Meta; use Math::BigFloat; use File::Temp; use HTTP::Tiny; use Pod::Simple; use Tie::File; use IO::Socket; use File::Find"
)

// programs are done in a root directory. The drivers are tried with each.
var programs = []struct {
	name, what string
	args       []string
	hot        bool
	target     float64 // for EROFS
}{
	{"python, cold page cache", "python with json, ssl, sqlite3, decimal and http.client, from exec to exit", kit.MainCommand, false, 1.2},
	{"perl, cold page cache", "perl with eight modules, from exec to exit, in place of a dpkg that the image does not have", []string{"/usr/bin/perl", "-e", perl}, false, 1.2},
	{"find over 10,000 files, cold page cache", "find that looks at the size of 10,000 files", []string{"/usr/bin/find", "/odd/many", "-size", "+1000k"}, false, 0.5},
	{"reading everything, cold page cache", "find and cat of all files", readAll, false, 0.6},
	{"reading everything, hot page cache", "the same, done once before", readAll, true, 1.1},
}

var readAll = []string{"/usr/bin/find", "/", "-xdev", "-type", "f", "-exec", "/usr/bin/cat", "{}", "+"}

// completeWorks are done on a node of their own.
func completeWorks() []work {
	var list []work
	for _, p := range programs {
		state := "before each round the page cache is dropped, then the container's root filesystem is mounted, unmeasured"
		if p.hot {
			state = "the root filesystem is mounted before each round, unmeasured"
		}
		for _, d := range []struct {
			name   string
			erofs  bool
			target float64
		}{{"EROFS", true, p.target}, {"nydusd", false, 0}} {
			list = append(list, work{
				name: p.name + ", " + d.name, target: d.target,
				ours: fmt.Sprintf("%s, in the image through %s; %s", p.what, d.name, state), peer: "the same on overlayfs",
				set: func(l *lab, ctx context.Context) (*contest, error) {
					return l.inRoot(ctx, d.erofs, p.hot, p.args)
				},
			})
		}
	}
	return append(list, work{
		name: "warm run of a complete image, EROFS", target: 1.05,
		ours: "create and start the task, run the same python program to its exit; another container of the image runs meanwhile, and the program has been run before",
		peer: "the same on overlayfs, another container of the plain image running meanwhile",
		set: func(l *lab, ctx context.Context) (*contest, error) {
			if err := l.serveBy(ctx, true); err != nil {
				return nil, err
			}
			return l.warmRun(ctx, kit.MainCommand)
		},
	})
}

// complete measures on a node that has all of the image.
func (l *lab) complete(t kit.TB) error {
	works := completeWorks()
	if err := l.setUpComplete(t); err != nil {
		return err
	}
	l.rounds = progressOf{}
	l.rounds.count(l.options, works)
	for _, w := range works {
		if !l.options.wants(w.name) {
			continue
		}
		if err := l.measure(t.Context(), w); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	if l.options.wants(completeName) {
		return l.runningComplete(t.Context())
	}
	return nil
}

// wantsComplete tells whether anything is wanted of a complete image.
func (o options) wantsComplete() bool {
	return o.wants(completeName) || slices.ContainsFunc(completeWorks(), func(w work) bool { return o.wants(w.name) })
}

// setUpComplete runs the image until the snapshotter has found all of it right.
func (l *lab) setUpComplete(t kit.TB) error {
	l.t, l.nydus, l.plain = t, side{}, side{}
	l.progress.Start("making the example image (once; takes a minute or two)")
	plain, nydus, err := show.MainImage(t)
	if err != nil {
		return err
	}
	l.progress.Start("completing the image")
	l.registry = kit.NewRegistry(t, kit.RegistryOptions{})
	l.nydus = side{snapshotter: "nydus", image: nydus, ref: l.registry.MustPush(t, nydus, "bench/image:nydus")}
	l.plain = side{snapshotter: "overlayfs", image: plain, ref: l.registry.MustPush(t, plain, "bench/image:plain")}
	template, daemon := filepath.Join(t.TempDir(), "template.json"), filepath.Join(t.TempDir(), "nydusd")
	const prefetch = `{"fs_prefetch": {"enable": true, "threads_count": 4, "merging_size": 1048576, "prefetch_all": true}}`
	// One that is built from its crate does not know its version.
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] && exec echo 'Version: v2.4.0'\nexec %s \"$@\"\n", kit.MustTools(t).Nydusd)
	err = errors.Join(os.WriteFile(template, []byte(prefetch), 0o600), os.WriteFile(daemon, []byte(script), 0o755))
	if err != nil {
		return err
	}
	l.node = kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Config: map[string]any{
		"log.level": "info", "mount.idle_linger": "100ms", "mount.driver": "auto",
		"daemon.config_template": template, "daemon.nydusd_path": daemon,
	}})
	l.usePath()
	if err := l.pull(t.Context()); err != nil {
		return err
	}
	c, err := l.node.Run(t.Context(), l.nydus.pulled, "completing", kit.RunOptions{})
	if err != nil {
		return err
	}
	return errors.Join(l.awaitProof(t.Context()), c.Remove(t.Context()), l.idle())
}

func (l *lab) awaitProof(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		found, err := filepath.Glob(filepath.Join(l.node.SnapshotterRoot(), "cache", "*", "*.proven"))
		if err != nil || len(found) > 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.New("the image does not become complete")
		}
	}
}

// serveBy chooses the driver of the mounts that the snapshotter gives out from now on.
func (l *lab) serveBy(ctx context.Context, erofs bool) error {
	driver := "fuse"
	if erofs {
		driver = "auto"
	}
	l.node.Configure("mount.driver", driver)
	return l.node.RestartSnapshotter(ctx)
}

// daemonsBy makes sure that the driver is the one that was chosen.
func (l *lab) daemonsBy(erofs bool) error {
	want := 1
	if erofs {
		want = 0
	}
	if n := len(l.node.Daemons()); n != want {
		return fmt.Errorf("%d nydusd run, expected %d", n, want)
	}
	return nil
}

// inRoot runs a program in a container's root filesystem, without a runtime around it.
func (l *lab) inRoot(ctx context.Context, erofs, hot bool, args []string) (*contest, error) {
	if err := l.serveBy(ctx, erofs); err != nil {
		return nil, err
	}
	m, done, err := l.snapshotMount(ctx)
	if err != nil {
		return nil, err
	}
	plain, undone, err := l.plainMount(ctx)
	if err != nil {
		return nil, errors.Join(err, done(ctx))
	}
	target := l.t.TempDir()
	c := &contest{done: func(ctx context.Context) error { return errors.Join(done(ctx), undone(ctx)) }}
	c.ours = func(ctx context.Context) (took time.Duration, err error) {
		if err := errors.Join(l.idle(), dropUnless(hot)); err != nil {
			return 0, err
		}
		if _, err := m.make(ctx); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, m.undo()) }()
		if err := l.daemonsBy(erofs); err != nil {
			return 0, err
		}
		return runIn(ctx, m.target, hot, args)
	}
	c.peer = func(ctx context.Context) (took time.Duration, err error) {
		if err := errors.Join(l.idle(), dropUnless(hot)); err != nil {
			return 0, err
		}
		if err := mount.All(plain, target); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, unix.Unmount(target, 0)) }()
		return runIn(ctx, target, hot, args)
	}
	return c, nil
}

// plainMount asks overlayfs for a container's mount.
func (l *lab) plainMount(ctx context.Context) ([]mount.Mount, func(context.Context) error, error) {
	ctx, release, err := l.node.Client().WithLease(ctx)
	if err != nil {
		return nil, nil, err
	}
	ids, err := l.plain.pulled.RootFS(ctx)
	if err != nil {
		return nil, nil, errors.Join(err, release(ctx))
	}
	service := l.node.Client().SnapshotService(l.plain.snapshotter)
	const key = "bench-plain"
	mounts, err := service.Prepare(ctx, key, identity.ChainID(ids).String())
	if err != nil {
		return nil, nil, errors.Join(err, release(ctx))
	}
	return mounts, func(ctx context.Context) error { return errors.Join(service.Remove(ctx, key), release(ctx)) }, nil
}

// dropUnless drops the page cache, with the kernel's inodes and directory entries.
func dropUnless(hot bool) error {
	if hot {
		return nil
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache: %w", err)
	}
	return nil
}

// runIn runs a program of a root filesystem, from exec to exit; if hot, once more before.
func runIn(ctx context.Context, root string, hot bool, args []string) (time.Duration, error) {
	if hot {
		if _, err := runIn(ctx, root, false, args); err != nil {
			return 0, err
		}
	}
	// As a runtime makes it; perl does not start without.
	if err := unix.Mknod(filepath.Join(root, "dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil && !errors.Is(err, unix.EEXIST) {
		return 0, fmt.Errorf("make /dev/null in %s: %w", root, err)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/bin", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	if err != nil {
		return took, fmt.Errorf("%s in the image: %w", args[0], err)
	}
	return took, nil
}

// runningComplete tells what a container adds to a node while it runs.
func (l *lab) runningComplete(ctx context.Context) error {
	l.progress.Start("%s: running", completeName)
	f := &figure{
		Name: completeName, Target: "0 nydusd",
		What: "nydusd and their RSS while one container has the image mounted, through EROFS and through nydusd, after python was run in it",
	}
	for _, erofs := range []bool{true, false} {
		if err := errors.Join(l.idle(), l.serveBy(ctx, erofs)); err != nil {
			return err
		}
		c, err := l.runTo(ctx, &l.nydus, fmt.Sprintf("running-%t", erofs), kit.MainCommand)
		if err != nil {
			return err
		}
		daemons, rss := l.node.Daemons(), int64(0)
		for _, d := range daemons {
			n, err := kilobytes(d.PID, "status", "VmRSS:")
			if err != nil {
				return err
			}
			rss += n
		}
		if erofs {
			f.Met = len(daemons) == 0
			f.Text = fmt.Sprintf("EROFS: %d nydusd, %.1f MiB", len(daemons), mebi(rss))
		} else {
			f.Text += fmt.Sprintf("; nydusd: %d, %.1f MiB", len(daemons), mebi(rss))
		}
		if err := c.Remove(ctx); err != nil {
			return err
		}
	}
	l.report.Figures = append(l.report.Figures, f)
	return nil
}
