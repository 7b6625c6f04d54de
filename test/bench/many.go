package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	manyName = "Prepare with many snapshots"
	// What the snapshotter holds when it is asked, and how often it is.
	manyFew, manySnapshots, manyTries = 10, 10_000, 500
	// manyLimit is the greatest ratio.
	manyLimit = 2.0
)

// many asks a snapshotter over its own socket for containers' snapshots: when it has few,
// and when it has many.
func (l *lab) many(t kit.TB) error {
	l.progress.Start("%s: starting", manyName)
	registry := kit.NewRegistry(t, kit.RegistryOptions{})
	node := kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Config: map[string]any{"log.level": "info"}})
	image := kit.SmallImage(t, "many").MustNydus(t, kit.NydusOptions{})
	if _, err := node.Pull(t.Context(), registry.MustPush(t, image, "bench/many:v1"), kit.PullOptions{}); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+node.SnapshotterAddress(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connect to the snapshotter: %w", err)
	}
	defer conn.Close()
	ctx := namespaces.WithNamespace(t.Context(), kit.Namespace)
	m := &manyOf{Snapshotter: proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "nydus")}
	if err := m.find(ctx); err != nil {
		return err
	}
	var took [2][]float64
	for i, want := range []int{manyFew, manySnapshots} {
		for m.have < want {
			if m.have%100 == 0 {
				l.progress.Set("%s: %d of %d", manyName, m.have, want)
			}
			if _, err := m.prepare(ctx); err != nil {
				return err
			}
		}
		l.progress.Set("%s: asking one that has %d", manyName, m.have)
		if took[i], err = m.sample(ctx); err != nil {
			return err
		}
	}
	few, full := quantile(took[0], 0.99), quantile(took[1], 0.99)
	l.report.figure(figure{
		Name: fmt.Sprintf("Prepare with %d snapshots", manySnapshots), Samples: took[1],
		What: fmt.Sprintf("a container's snapshot of a nydus image, asked for over the snapshotter's own socket, its mounts with it; %d times, "+
			"each removed again, with %d snapshots and, before, with %d", manyTries, manySnapshots, manyFew),
		Text: fmt.Sprintf("p99 %.1f ms, %.2f × of %.1f ms with %d (medians %.1f and %.1f ms)", full*1e3, full/few, few*1e3, manyFew,
			quantile(took[1], 0.5)*1e3, quantile(took[0], 0.5)*1e3),
		Target: fmt.Sprintf("p99 ≤ %.0f ×", manyLimit), Met: full <= manyLimit*few,
	})
	return nil
}

// manyOf is a snapshotter with many snapshots of one image.
type manyOf struct {
	snapshots.Snapshotter
	parent     string
	have, made int
}

// find looks for the image's last layer, and counts what there is.
func (m *manyOf) find(ctx context.Context) error {
	err := m.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		m.have++
		if info.Kind == snapshots.KindCommitted && info.Labels["containerd.io/snapshot/nydus-bootstrap"] == "true" {
			m.parent = info.Name
		}
		return nil
	})
	if err == nil && m.parent == "" {
		err = errors.New("the image has no bootstrap layer")
	}
	return err
}

// prepare adds a snapshot and returns its key.
func (m *manyOf) prepare(ctx context.Context) (string, error) {
	m.made++
	key := fmt.Sprintf("many-%d", m.made)
	_, err := m.Prepare(ctx, key, m.parent)
	m.have++
	return key, err
}

// sample measures how long each of many takes, in seconds.
func (m *manyOf) sample(ctx context.Context) ([]float64, error) {
	var took []float64
	for range manyTries {
		began := time.Now()
		key, err := m.prepare(ctx)
		took = append(took, time.Since(began).Seconds())
		if err == nil {
			err = m.Remove(ctx, key)
		}
		if err != nil {
			return nil, err
		}
		m.have--
	}
	return took, nil
}
