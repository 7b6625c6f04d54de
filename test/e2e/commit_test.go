package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// diff makes a layer of what a container changed. A lease in ctx keeps it.
func diff(ctx context.Context, n *kit.Node, c *kit.Container) (ocispec.Descriptor, error) {
	return rootfs.CreateDiff(ctx, c.ID(), n.Client().SnapshotService(n.SnapshotterName()), n.Client().DiffService())
}

// commit pushes what a container is now as an image of its own, as nerdctl
// commit and nerdctl push do.
func commit(t *testing.T, n *kit.Node, c *kit.Container, base containerd.Image, ref string) string {
	t.Helper()
	client := n.Client()
	ctx, done, err := client.WithLease(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done(ctx)
	layer, err := diff(ctx, n, c)
	if err != nil {
		t.Fatalf("commit: %v", err)
	}
	cs := client.ContentStore()
	diffID, err := images.GetDiffID(ctx, cs, layer)
	if err != nil {
		t.Fatal(err)
	}
	var manifest ocispec.Manifest
	var config ocispec.Image
	read := func(d ocispec.Descriptor, to any) {
		text, err := content.ReadBlob(ctx, cs, d)
		if err == nil {
			err = json.Unmarshal(text, to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(d *ocispec.Descriptor, from any) {
		text, err := json.Marshal(from)
		if err != nil {
			t.Fatal(err)
		}
		d.Digest, d.Size = digest.FromBytes(text), int64(len(text))
		if err := content.WriteBlob(ctx, cs, d.Digest.String(), bytes.NewReader(text), *d); err != nil {
			t.Fatal(err)
		}
	}
	target := base.Target()
	read(target, &manifest)
	read(manifest.Config, &config)
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	write(&manifest.Config, config)
	manifest.Layers = append(manifest.Layers, layer)
	write(&target, manifest)

	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
	})
	if err := client.Push(ctx, ref, target, containerd.WithResolver(resolver)); err != nil {
		t.Fatalf("push %s: %v", ref, err)
	}
	return ref
}

// forget removes an image from a node.
func forget(t *testing.T, n *kit.Node, ref string) {
	t.Helper()
	if err := n.RemoveImage(t.Context(), ref); err != nil {
		t.Error(err)
	}
}
