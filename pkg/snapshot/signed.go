package snapshot

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/nydusfs/nydus-snapshotter/pkg/signature"
)

// Signatures judges whether an image was signed; see package signature.
type Signatures interface {
	// Verify takes the digest of a bootstrap's content and what the image has as its
	// signature, which is empty when it has none.
	Verify(bootstrap, signature string) error
}

// signed refuses an image whose bootstrap is not signed. It stands before every option
// that is handed out, whatever it is for, and judges the digest that goes into the option:
// whoever mounts compares that with the bootstrap, for nydusd as for the kernel.
//
// The signature is looked up in the bootstrap layer's labels each time, so that one that
// came later counts, and nothing is believed that was found out under other keys.
func (s *Snapshotter) signed(ctx context.Context, parent string, im *image) error {
	if s.o.Signatures == nil {
		return nil
	}
	labels, err := s.imageLabels(ctx, parent, len(im.above))
	if err != nil {
		return err
	}
	return s.verify(im.record.Digest, labels)
}

func (s *Snapshotter) verify(digest string, labels map[string]string) error {
	if s.o.Signatures == nil {
		return nil
	}
	if err := s.o.Signatures.Verify(digest, labels[signature.Label]); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return nil
}

// imageLabels returns the labels of the bootstrap layer, which has so many layers above
// it, of which name is the uppermost. A layer above that came with an image is refused: the
// bootstrap's signature says nothing of what it puts in place of the signed files. One that
// was committed on this node, as for a container with other user ids, was made by root.
func (s *Snapshotter) imageLabels(ctx context.Context, name string, above int) (labels map[string]string, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		for n := 0; ; n++ {
			_, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			if n == above {
				labels = info.Labels
				return nil
			}
			if layer := info.Labels[snapshots.LabelSnapshotRef]; layer != "" {
				return unsignedLayer(layer)
			}
			name = info.Parent
		}
	})
	return labels, err
}

// alone refuses a layer of an image that lies above a bootstrap, as imageLabels does, but
// before all of it is pulled.
func (s *Snapshotter) alone(ctx context.Context, key string, info snapshots.Info) error {
	layer := unpackTarget(key, info.Labels)
	if s.o.Signatures == nil || layer == "" {
		return nil
	}
	parents, err := s.parents(ctx, key)
	if err != nil {
		return err
	}
	switch im, err := s.findImage(parents); {
	case errdefs.IsFailedPrecondition(err), err == nil && im == nil:
		return nil // layers of data without a bootstrap are no image yet
	case err != nil:
		return err
	}
	return unsignedLayer(layer)
}

func unsignedLayer(layer string) error {
	return fmt.Errorf("layer %s lies above the image's nydus bootstrap and is not signed, which image.validate_signature asks for; convert the image as a whole and sign it: %w",
		layer, errdefs.ErrPermissionDenied)
}
