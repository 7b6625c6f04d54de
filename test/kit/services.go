package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// StartContainerd starts containerd and waits until it answers.
func (n *Node) StartContainerd(ctx context.Context) error {
	if n.Containerd.Running() {
		return errors.New("start containerd: it is running")
	}
	var err error
	n.Containerd, err = startDaemon("containerd", n.ContainerdLog(), n.Env(), []string{
		filepath.Join(n.ContainerdBin(), "containerd"), "--config", filepath.Join(n.dir, "containerd.toml")})
	if err != nil {
		return err
	}
	if err := n.Containerd.ready(ctx, n.containerdSocket()); err != nil {
		return err
	}
	if n.client == nil {
		n.client, err = containerd.New(n.containerdSocket(), containerd.WithDefaultNamespace(Namespace), containerd.WithTimeout(30*time.Second))
		if err != nil {
			return fmt.Errorf("connect to containerd: %w", err)
		}
	} else if err := n.client.Reconnect(); err != nil {
		return fmt.Errorf("reconnect to containerd: %w", err)
	}
	if err := n.answers(ctx); err != nil {
		return fmt.Errorf("containerd does not answer: %w\n%s", err, tail(n.ContainerdLog(), 20))
	}
	return n.criReady(ctx)
}

// answers waits until containerd does: the socket is there before the services are,
// and the client may have begun with that of a containerd that was killed.
func (n *Node) answers(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(settle); ; {
		_, err := n.client.Version(ctx)
		if !errdefs.IsUnavailable(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// StopContainerd stops containerd with SIGTERM; containers keep running.
func (n *Node) StopContainerd() error { return n.Containerd.end(unix.SIGTERM, 30*time.Second) }

// KillContainerd kills containerd; containers keep running.
func (n *Node) KillContainerd() error { return n.Containerd.end(unix.SIGKILL, settle) }

// RestartContainerd stops and starts containerd.
func (n *Node) RestartContainerd(ctx context.Context) error {
	return errors.Join(n.StopContainerd(), n.StartContainerd(ctx))
}

// StartSnapshotter writes the snapshotter's configuration, starts it and waits until it answers.
func (n *Node) StartSnapshotter(ctx context.Context) error {
	if n.Snapshotter.Running() {
		return errors.New("start snapshotter: it is running")
	}
	text, err := n.snapshotterConfig()
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.SnapshotterConfig(), text, 0o600); err != nil {
		return fmt.Errorf("start snapshotter: %w", err)
	}
	n.Snapshotter, err = startDaemon("nydus-snapshotter", n.SnapshotterLog(), n.Env(), []string{
		filepath.Join(n.bin, "nydus-snapshotter"), "serve", "--config", n.SnapshotterConfig()})
	if err != nil {
		return err
	}
	if err := n.Snapshotter.ready(ctx, n.snapshotterSocket()); err != nil {
		return err
	}
	return n.awaitHolder(ctx, true)
}

// StopSnapshotter stops the snapshotter with SIGTERM. Its holder stays exactly as
// long as images are mounted.
func (n *Node) StopSnapshotter() error {
	if !n.Snapshotter.Running() {
		return nil
	}
	err := n.Snapshotter.end(unix.SIGTERM, 30*time.Second)
	if err != nil || len(n.RunEntries()) > 0 {
		return err
	}
	return n.awaitHolder(context.Background(), false)
}

// HolderSocket is where the snapshotter's holder listens, with recover_policy
// "failover".
func (n *Node) HolderSocket() string { return filepath.Join(n.cfg.RunDir, "holder.sock") }

// awaitHolder waits until the holder listens, or has ended. Nothing tells of
// either: hence the ticker.
func (n *Node) awaitHolder(ctx context.Context, there bool) error {
	if policy, ok := n.cfg.Config["daemon.recover_policy"]; ok && policy != "failover" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Lstat(n.HolderSocket()); there == (err == nil) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("holder of %s: it is there: %v, want %v; %s", n.HolderSocket(), !there, there, tail(n.SnapshotterLog(), 20))
		case <-tick.C:
		}
	}
}

// KillSnapshotter kills the snapshotter.
func (n *Node) KillSnapshotter() error { return n.Snapshotter.end(unix.SIGKILL, settle) }

// RestartSnapshotter stops and starts the snapshotter, with the configuration
// as it is now: see Configure. Then containerd reaches it.
func (n *Node) RestartSnapshotter(ctx context.Context) error {
	if err := errors.Join(n.StopSnapshotter(), n.StartSnapshotter(ctx)); err != nil {
		return err
	}
	return n.awaitProxy(ctx)
}

// errReached ends a walk over snapshots at the first one.
var errReached = errors.New("reached")

// awaitProxy waits until containerd reaches the snapshotter again. Its connection fails at
// once for up to three seconds after it was refused, as when it collected garbage during a
// restart, and nothing tells that it has tried again: hence the ticker. A walk, since
// containerd knows by itself what there is not; without any snapshot nothing is asked.
// A refusal is of no kind of its own when containerd passes it on.
func (n *Node) awaitProxy(ctx context.Context) error {
	if !n.Containerd.Running() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	first := func(context.Context, snapshots.Info) error { return errReached }
	for {
		err := n.client.SnapshotService(n.SnapshotterName()).Walk(ctx, first)
		if err == nil || errors.Is(err, errReached) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("containerd does not reach the snapshotter: %w", err)
		case <-tick.C:
		}
	}
}
