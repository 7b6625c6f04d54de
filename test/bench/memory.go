package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	memoryName  = "snapshotter's memory"
	memoryLimit = 40 << 20
	// What the node holds when memory is measured.
	memoryImages    = 20
	memorySnapshots = 200
)

// memory measures a snapshotter that holds many images.
func (l *lab) memory(t kit.TB) error {
	ctx := t.Context()
	l.progress.Start("%s: starting", memoryName)
	registry := kit.NewRegistry(t, kit.RegistryOptions{})
	node := kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Config: map[string]any{"log.level": "info"}})
	var last string
	for n := range memoryImages {
		l.progress.Set("%s: image %d of %d", memoryName, n+1, memoryImages)
		name := fmt.Sprintf("memory-%d", n)
		image := kit.SmallImage(t, name).MustNydus(t, kit.NydusOptions{})
		pulled, err := node.Pull(ctx, registry.MustPush(t, image, "bench/"+name+":v1"), kit.PullOptions{})
		if err != nil {
			return err
		}
		ids, err := pulled.RootFS(ctx)
		if err != nil {
			return err
		}
		last = chain(ids)
	}
	if err := fill(ctx, node, last, memorySnapshots); err != nil {
		return err
	}
	l.progress.Set("%s: waiting until it does nothing", memoryName)
	if err := quiet(ctx, node.Snapshotter.PID); err != nil {
		return err
	}
	m := &memory{Images: memoryImages, Snapshots: memorySnapshots, Daemons: len(node.Daemons()), Limit: memoryLimit}
	var err error
	if m.RSS, err = kilobytes(node.Snapshotter.PID, "status", "VmRSS:"); err != nil {
		return err
	}
	if m.PSS, err = kilobytes(node.Snapshotter.PID, "smaps_rollup", "Pss:"); err != nil {
		return err
	}
	l.report.Memory = m
	return nil
}

// chain is the snapshot of an image's uppermost layer.
func chain(ids []digest.Digest) string { return identity.ChainID(ids).String() }

// fill prepares containers' snapshots until there are enough of all kinds.
func fill(ctx context.Context, node *kit.Node, parent string, want int) error {
	service := node.Client().SnapshotService("nydus")
	have := 0
	if err := service.Walk(ctx, func(context.Context, snapshots.Info) error { have++; return nil }); err != nil {
		return err
	}
	if have > want {
		return fmt.Errorf("the images have %d snapshots, more than the %d to measure with", have, want)
	}
	// Containers would keep them from the garbage collection.
	keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)})
	for n := have; n < want; n++ {
		key := fmt.Sprintf("memory-%d", n)
		if _, err := service.Prepare(ctx, key, parent, keep); err != nil {
			return err
		}
		if _, err := service.Mounts(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// quiet waits until a process has used no processor time for two seconds.
func quiet(ctx context.Context, pid int) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(2 * within)
	for last, same := "", 0; same < 4; {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return err
		}
		f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if now := f[11] + "+" + f[12]; now == last { // user and system ticks
			same++
		} else {
			last, same = now, 0
		}
		if time.Now().After(deadline) {
			return errors.New("the snapshotter does not come to rest")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// kilobytes reads a size from a file of /proc/PID, in bytes.
func kilobytes(pid int, file, field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == field {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/%s has no %s", pid, file, field)
}
