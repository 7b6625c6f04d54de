package snapshot

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// extend returns the mounts of a snapshot, given those that overlayfs would
// have.
func (s *Snapshotter) extend(ctx context.Context, key string, plain []mount.Mount) ([]mount.Mount, error) {
	var snap storage.Snapshot
	var info snapshots.Info
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("mounts of %s: %w", key, err)
	}
	if snap.Kind == snapshots.KindActive && unpackTarget(key, info.Labels) != "" {
		// A layer above the image is applied to its upper directory alone.
		return plain, nil
	}
	image, err := s.findImage(snap.ParentIDs)
	if err != nil {
		return nil, fmt.Errorf("mounts of %s: %w", key, err)
	}
	var mapping []string
	if len(snap.ParentIDs) > 0 { // an empty directory has the right owner already
		if mapping, err = idMapOptions(info.Labels, s.fs(snap.ParentIDs[0])); err != nil {
			return nil, fmt.Errorf("mounts of %s: %w", key, err)
		}
	}
	if image == nil {
		return idMapped(plain, mapping), nil
	}
	mounts, err := s.mounts(ctx, snap, info, mapping, image)
	if err != nil {
		return nil, fmt.Errorf("mounts of %s%s: %w", key, ofImage(image.record.Image), err)
	}
	return mounts, nil
}

// image is a nydus image among the parents of a snapshot.
type image struct {
	record *record
	// id is the bootstrap layer's, above those of the layers on top of it,
	// uppermost first.
	id    string
	above []string
}

// findImage looks for the uppermost bootstrap among parents, uppermost first. It
// returns nil when no parent is a nydus layer.
func (s *Snapshotter) findImage(parents []string) (*image, error) {
	for i, id := range parents {
		r, err := readRecord(s.dir(id))
		if err != nil {
			return nil, err
		}
		switch {
		case r == nil:
			continue
		case r.Kind == kindBootstrap:
			return &image{record: r, id: id, above: parents[:i]}, nil
		default:
			// Its content is nowhere else, so the root filesystem would
			// silently lack it.
			return nil, fmt.Errorf("layer %d of %d holds data of the nydus image %q, but no layer above it holds that image's bootstrap: "+
				"the image is not a complete nydus image, or image %[3]q declared a layer of another one as its own; remove both and pull again: %w",
				len(parents)-i, len(parents), r.Image, errdefs.ErrFailedPrecondition)
		}
	}
	return nil, nil
}

func (s *Snapshotter) mounts(ctx context.Context, snap storage.Snapshot, info snapshots.Info, mapping []string, im *image) ([]mount.Mount, error) {
	if len(mapping) > 0 && s.o.Driver == mountspec.DriverFUSE {
		return nil, fmt.Errorf("a nydus image that nydusd serves cannot be id-mapped into a user namespace (%s); "+
			"with [mount] driver = \"auto\" one that is complete in the cache can, "+
			"and without \"remap-ids\" in the capabilities of this snapshotter's proxy plugin containerd changes the owners itself: %w",
			strings.Join(mapping, ", "), errdefs.ErrFailedPrecondition)
	}
	if err := s.signed(ctx, info.Parent, im); err != nil {
		return nil, err
	}
	spec, err := s.spec(ctx, snap.ID, im)
	if err != nil {
		return nil, err
	}
	spec.ReadOnly = snap.Kind == snapshots.KindView
	if s.o.Managed && len(mapping) == 0 {
		return s.managed(snap, spec)
	}
	// containerd id-maps the directory that all lower ones have in common, with all that
	// is mounted beneath. There may be none but /, so the helper does it, one by one.
	mounts, err := s.sealed(spec)
	if err == nil {
		mounts[0].Options = append(mounts[0].Options, quoted(mapping)...)
	}
	return mounts, err
}

// managed returns the mounts for containerd's mount manager. It is not needed
// for a view, whose filesystem the mount helper makes in one piece.
func (s *Snapshotter) managed(snap storage.Snapshot, spec *mountspec.Spec) ([]mount.Mount, error) {
	lower := spec.Lower
	if spec.ReadOnly && len(lower) > 0 {
		return s.sealed(spec)
	}
	writable := !spec.ReadOnly
	spec.Kind, spec.ReadOnly, spec.Lower, spec.OverlayOptions = mountspec.KindImage, true, nil, nil
	mounts, err := s.sealed(spec)
	if err != nil || !writable {
		return mounts, err
	}
	// The template is the mount manager's: where it mounted the first of these.
	lower = append(lower, "{{ mount 0 }}")
	options := []string{
		"workdir=" + s.work(snap.ID),
		"upperdir=" + s.fs(snap.ID),
		"lowerdir=" + strings.Join(lower, ":"),
	}
	return append(mounts, mount.Mount{
		Type: "format/overlay", Source: "overlay", Options: append(options, s.overlay...),
	}), nil
}

// sealed returns the mount that the mount helper makes.
func (s *Snapshotter) sealed(spec *mountspec.Spec) ([]mount.Mount, error) {
	option, err := s.o.Sealer.Seal(spec)
	if err != nil {
		return nil, err
	}
	// Kata resolves the source as a path.
	return []mount.Mount{{Type: mountspec.MountType, Source: spec.SnapshotDir, Options: []string{option}}}, nil
}

// spec describes the whole root filesystem of a snapshot.
func (s *Snapshotter) spec(ctx context.Context, id string, im *image) (*mountspec.Spec, error) {
	r := im.record
	backend, err := s.o.Backends.Backend(ctx, r.Image, r.Backend)
	if err == nil && backend.ForMount != nil {
		backend, err = backend.ForMount(ctx)
	}
	if err != nil {
		return nil, err
	}
	cache := mountspec.CacheDir(s.o.Root, backend.Host, backend.Repository)
	config, err := backend.Config(cache)
	if err != nil {
		return nil, err
	}
	spec := &mountspec.Spec{
		Bootstrap:       filepath.Join(s.fs(im.id), r.Path),
		BootstrapDigest: r.Digest,
		FSVersion:       r.FSVersion,
		Config:          config,
		SnapshotDir:     s.dir(id),
		Kind:            mountspec.KindRootfs,
		OverlayOptions:  s.overlay,
		Instance:        mountspec.InstanceKey(r.Digest, backend.Host, backend.Repository, cache),
		Image:           r.Image,
		Host:            backend.Host,
		Repository:      backend.Repository,
		Root:            s.o.Root,
		RunDir:          s.o.RunDir,
		CacheDir:        cache,
		Driver:          s.o.Driver,
		Daemon:          s.o.Daemon(),
	}
	spec.Daemon.CAFile = backend.CAFile
	for _, layer := range im.above {
		spec.Lower = append(spec.Lower, s.fs(layer))
	}
	return spec, s.addCredentials(ctx, spec, backend)
}

func (s *Snapshotter) addCredentials(ctx context.Context, spec *mountspec.Spec, b Backend) error {
	if b.Credentials == nil {
		return nil
	}
	c, err := b.Credentials(ctx, spec.Instance)
	if err != nil || c == nil {
		return err
	}
	if s.o.Plain == nil {
		spec.Credentials = c
		return nil
	}
	spec.Config, err = s.o.Plain(spec.Config, c)
	return err
}
