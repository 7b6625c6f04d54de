package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// fuseMount is one mount through mount.fuse3, as containerd makes it.
type fuseMount struct {
	program        string // mount.fuse3
	env            []string
	kind           string // the helper's name
	source, target string
	options        []string
}

// make mounts, from exec to exit.
func (m *fuseMount) make(ctx context.Context) (time.Duration, error) {
	args := []string{m.source, m.target}
	for _, o := range m.options {
		args = append(args, "-o", o)
	}
	cmd := exec.CommandContext(ctx, m.program, append(args, "-t", m.kind)...)
	cmd.Env = m.env
	start := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(start)
	if err != nil {
		return took, fmt.Errorf("mount.fuse3 -t %s: %w: %s", m.kind, err, out)
	}
	return took, nil
}

func (m *fuseMount) undo() error {
	if err := unix.Unmount(m.target, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", m.target, err)
	}
	return nil
}

// snapshotMount asks the snapshotter for a container's mount, keeping it from
// containerd's garbage collection until done is called.
func (l *lab) snapshotMount(ctx context.Context) (m *fuseMount, done func(context.Context) error, err error) {
	ctx, release, err := l.node.Client().WithLease(ctx)
	if err != nil {
		return nil, nil, err
	}
	ids, err := l.nydus.pulled.RootFS(ctx)
	if err != nil {
		return nil, nil, errors.Join(err, release(ctx))
	}
	service := l.node.Client().SnapshotService("nydus")
	const key = "bench-mount"
	mounts, err := service.Prepare(ctx, key, identity.ChainID(ids).String())
	if err != nil {
		return nil, nil, errors.Join(err, release(ctx))
	}
	done = func(ctx context.Context) error { return errors.Join(service.Remove(ctx, key), release(ctx)) }
	m, err = l.asFuse(mounts)
	if err != nil {
		err = errors.Join(err, done(ctx))
	}
	return m, done, err
}

func (l *lab) asFuse(mounts []mount.Mount) (*fuseMount, error) {
	kind, ok := "", len(mounts) == 1
	if ok {
		kind, ok = strings.CutPrefix(mounts[0].Type, "fuse.")
	}
	if !ok {
		return nil, fmt.Errorf("the snapshotter returned %d mounts, or none of type fuse.…", len(mounts))
	}
	return &fuseMount{
		program: kit.MustTools(l.t).MountFuse, env: l.node.Env(), kind: kind, source: mounts[0].Source,
		target: l.t.TempDir(), options: mounts[0].Options,
	}, nil
}

// coldMount compares a mount that starts nydusd with nydusd alone.
func (l *lab) coldMount(ctx context.Context) (*contest, error) {
	if err := l.pull(ctx); err != nil {
		return nil, err
	}
	m, done, err := l.snapshotMount(ctx)
	if err != nil {
		return nil, err
	}
	c := &contest{done: done}
	c.ours = func(ctx context.Context) (time.Duration, error) {
		if err := l.idle(); err != nil {
			return 0, err
		}
		took, err := m.make(ctx)
		if err != nil {
			return 0, err
		}
		return took, m.undo()
	}
	bare, err := l.bareLike(ctx, m)
	if err != nil {
		return nil, errors.Join(err, done(ctx))
	}
	c.peer = func(ctx context.Context) (time.Duration, error) {
		if err := l.idle(); err != nil {
			return 0, err
		}
		return bare.run(ctx)
	}
	return c, nil
}

// bareDaemon is a nydusd without anything around it.
type bareDaemon struct {
	args       []string
	log        string
	mountpoint string
	socket     string
}

// bareLike warms the blob cache and takes from the nydusd that m starts how to
// start one like it.
func (l *lab) bareLike(ctx context.Context, m *fuseMount) (*bareDaemon, error) {
	c, err := l.runTo(ctx, &l.nydus, "warmer", kit.MainCommand)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Remove(context.WithoutCancel(ctx)) }()
	if _, err := m.make(ctx); err != nil {
		return nil, err
	}
	running := l.node.Daemons()
	if len(running) != 1 {
		return nil, errors.Join(fmt.Errorf("%d nydusd run, expected one", len(running)), m.undo())
	}
	dir := l.t.TempDir()
	b := &bareDaemon{
		log: filepath.Join(dir, "nydusd.log"), mountpoint: filepath.Join(dir, "mnt"), socket: filepath.Join(kit.RunRoot, "bare.sock"),
		args: append([]string{}, running[0].Cmdline...),
	}
	b.args[0] = running[0].Exe
	err = os.Mkdir(b.mountpoint, 0o755)
	for i, arg := range b.args[:len(b.args)-1] {
		switch arg {
		case "--mountpoint":
			b.args[i+1] = b.mountpoint
		case "--apisock":
			b.args[i+1] = b.socket
		case "--config", "--bootstrap":
			// Both go with the instance.
			copied := filepath.Join(dir, strings.TrimPrefix(arg, "--"))
			err = errors.Join(err, copyFile(copied, b.args[i+1]))
			b.args[i+1] = copied
		}
	}
	return b, errors.Join(err, m.undo())
}

func copyFile(dst, src string) error {
	data, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	return os.WriteFile(dst, data, 0o600)
}

// run starts the daemon, tells how long it took to serve, and ends it.
func (b *bareDaemon) run(ctx context.Context) (took time.Duration, err error) {
	log, err := os.OpenFile(b.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	watch, err := rootfs.NewWatch()
	if err != nil {
		return 0, err
	}
	defer watch.Close()
	cmd := exec.Command(b.args[0], b.args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer unix.Close(pidfd)
	err = b.serves(ctx, watch, pidfd)
	took = time.Since(start)
	if err != nil {
		_ = cmd.Process.Kill()
	}
	// The last unmount ends it.
	err = errors.Join(err, rootfs.Detach(b.mountpoint))
	if wait := cmd.Wait(); err == nil {
		err = wait
	}
	os.Remove(b.socket)
	return took, err
}

// serves waits until the daemon's filesystem is mounted and answers.
func (b *bareDaemon) serves(ctx context.Context, watch *rootfs.Watch, pidfd int) error {
	deadline := time.Now().Add(within)
	for ctx.Err() == nil {
		_, mounted, err := rootfs.Lookup(b.mountpoint)
		if err != nil {
			return err
		}
		if mounted {
			var st unix.Statfs_t
			return unix.Statfs(b.mountpoint, &st)
		}
		changed, err := watch.Wait(deadline, pidfd)
		if err != nil {
			return err
		}
		if !changed {
			return errors.New("nydusd ended before it mounted; see " + b.log)
		}
	}
	return ctx.Err()
}

// overlaySource is the least helper there can be.
//
//go:embed peer/overlay.c
var overlaySource []byte

// buildPeer compiles it into a directory.
func buildPeer(ctx context.Context, dir, goTool string) error {
	source := filepath.Join(dir, "overlay.c")
	if err := os.WriteFile(source, overlaySource, 0o644); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "gcc", "-O2", "-Wall", "-static", "-o", filepath.Join(dir, "bench-overlay"), source).CombinedOutput()
	if err != nil {
		return fmt.Errorf("compile the peer (apt install gcc libc6-dev): %w: %s", err, out)
	}
	cmd := exec.CommandContext(ctx, goTool, "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, "bench-overlay-go"),
		"github.com/nydusfs/nydus-snapshotter/test/bench/peer/overlay")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the peer in Go: %w: %s", err, out)
	}
	return nil
}

// warmMount compares a mount on a running instance with a bare overlay mount
// on the same lower directory.
func (l *lab) warmMount(ctx context.Context) (*contest, error) {
	if err := l.pull(ctx); err != nil {
		return nil, err
	}
	holder, err := l.node.Run(ctx, l.nydus.pulled, "holder", kit.RunOptions{Snapshotter: "nydus"})
	if err != nil {
		return nil, err
	}
	m, release, err := l.snapshotMount(ctx)
	if err != nil {
		return nil, errors.Join(err, holder.Remove(ctx))
	}
	done := func(ctx context.Context) error { return errors.Join(release(ctx), holder.Remove(ctx)) }
	peer, err := l.overlayLike(ctx, holder)
	if err != nil {
		return nil, errors.Join(err, done(ctx))
	}
	return &contest{ours: m.round, peer: peer.round, done: done}, nil
}

// leastMount compares the least helper in Go with that in C.
func (l *lab) leastMount(ctx context.Context) (*contest, error) {
	if err := l.pull(ctx); err != nil {
		return nil, err
	}
	holder, err := l.node.Run(ctx, l.nydus.pulled, "holder", kit.RunOptions{Snapshotter: "nydus"})
	if err != nil {
		return nil, err
	}
	peer, err := l.overlayLike(ctx, holder)
	if err != nil {
		return nil, errors.Join(err, holder.Remove(ctx))
	}
	inGo := *peer
	inGo.kind += "-go"
	return &contest{ours: inGo.round, peer: peer.round, done: holder.Remove}, nil
}

// round mounts, measured, and unmounts.
func (m *fuseMount) round(ctx context.Context) (time.Duration, error) {
	took, err := m.make(ctx)
	if err != nil {
		return 0, err
	}
	return took, m.undo()
}

// overlayLike is the mount of an overlay like that of a running container.
func (l *lab) overlayLike(ctx context.Context, c *kit.Container) (*fuseMount, error) {
	on, found, err := rootfs.Lookup(c.Rootfs())
	if err != nil || !found {
		return nil, errors.Join(fmt.Errorf("find the mount of %s", c.ID()), err)
	}
	lower, ok := on.Option("lowerdir")
	if !ok {
		return nil, fmt.Errorf("the root filesystem of %s is no overlay: %s", c.ID(), on.Type)
	}
	dir := l.t.TempDir()
	for _, d := range []string{"upper", "work", "mnt"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := buildPeer(ctx, dir, l.goTool); err != nil {
		return nil, err
	}
	env := l.node.Env()
	env[0] = strings.Replace(env[0], "PATH=", "PATH="+dir+":", 1)
	return &fuseMount{
		program: kit.MustTools(l.t).MountFuse, env: env, kind: "bench-overlay", source: "overlay", target: filepath.Join(dir, "mnt"),
		options: []string{"lowerdir=" + lower + ",upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")},
	}, nil
}
