package hostile_test

import (
	"context"
	"encoding/json"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

type snapshotInfo = snapshots.Info

// walk calls f for every snapshot of the kit's namespace.
func walk(t *testing.T, n *kit.Node, f func(snapshotInfo)) {
	t.Helper()
	err := n.Client().SnapshotService("nydus").Walk(t.Context(), func(_ context.Context, info snapshotInfo) error {
		f(info)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// diffOf is the digest of a layer's uncompressed form, as the image has it.
func diffOf(t *testing.T, img *kit.Image, layer int) digest.Digest {
	t.Helper()
	text, err := os.ReadFile(img.Config.Path)
	if err != nil {
		t.Fatal(err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	return config.RootFS.DiffIDs[layer]
}
