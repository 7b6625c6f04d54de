package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	errbolt "go.etcd.io/bbolt/errors"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// Backend is where the blobs of an image are.
type Backend struct {
	// Host and Repository are as in mountspec.Spec.
	Host, Repository string
	// CAFile is as in mountspec.Daemon.
	CAFile string
	// Config renders nydusd's configuration, without credentials.
	Config func(cacheDir string) (string, error)
	// Credentials finds what opens the backend for an instance of the image, and
	// returns nil when it is to be used without. A nil function is one that does.
	Credentials func(ctx context.Context, instance string) (*mountspec.Credentials, error)
	// ForMount returns the backend as a mount needs it now, which may depend on what
	// is not asked before; nil when it is this one.
	ForMount func(ctx context.Context) (Backend, error)
}

// Backends finds an image's backend.
type Backends interface {
	// Backend takes an image reference and the name of the backend that the image's
	// labels ask for, which is empty when they do not.
	Backend(ctx context.Context, ref, wanted string) (Backend, error)
}

// Sealer writes the option that carries a mount's description.
type Sealer interface {
	// Seal returns the whole option, name included.
	Seal(*mountspec.Spec) (string, error)
}

// Options is what a Snapshotter needs. All but Blobs, Signatures, Now and Plain are required.
type Options struct {
	// Root holds layers, database and cache. The caller makes sure that no
	// other snapshotter uses it.
	Root string
	// RunDir is where whoever mounts keeps instances.
	RunDir string
	// Managed selects two mounts, for containerd's mount manager, instead of one.
	Managed bool
	// Driver says how images' filesystems may be made; empty for mountspec.DriverFUSE.
	Driver mountspec.Driver

	// Daemon says how nydusd is to be started, anew for each mount.
	Daemon func() mountspec.Daemon
	// Backends finds where blobs are.
	Backends Backends
	// Sealer writes the option.
	Sealer Sealer
	// Blobs, when set, tells what data layers occupy.
	Blobs Blobs
	// Now is the clock; nil for the real one.
	Now func() time.Time
	// Signatures, when set, refuses images whose bootstrap is not signed.
	Signatures Signatures
	// Plain, when set, puts credentials into nydusd's configuration, where
	// everybody can read them, instead of sealing them.
	Plain func(config string, c *mountspec.Credentials) (string, error)
}

// Snapshotter implements containerd's Snapshotter and Cleaner.
type Snapshotter struct {
	snapshots.Snapshotter // overlay; Walk is its own

	o       Options
	store   *storage.MetaStore
	overlay []string // options of every overlay mount, the wrapped one's too
	ignored ignored
	owners  owners
	told    told
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// lockTimeout bounds the wait for the database's lock.
const lockTimeout = 2 * time.Second

// New opens the snapshotter in o.Root and creates it when needed. The context is for
// that alone.
func New(ctx context.Context, o Options) (*Snapshotter, error) {
	if o.Driver == "" {
		o.Driver = mountspec.DriverFUSE
	}
	if err := os.MkdirAll(o.Root, 0o700); err != nil {
		return nil, fmt.Errorf("create root: %w", err)
	}
	store, err := openStore(ctx, filepath.Join(o.Root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	options := overlayOptions(ctx, o.Root)
	inner, err := overlay.NewSnapshotter(o.Root, overlay.WithMetaStore(store), overlay.WithMountOptions(options))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open layers in %s: %w", o.Root, err), store.Close())
	}
	return &Snapshotter{Snapshotter: inner, o: o, store: store, overlay: options}, nil
}

// openStore opens the database at once: a fault shows at start, not at the
// first pull.
func openStore(ctx context.Context, path string) (*storage.MetaStore, error) {
	store, err := storage.NewMetaStore(path, func(b *bolt.Options) error {
		b.Timeout = lockTimeout
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	_, tx, err := store.TransactionContext(ctx, false)
	if errors.Is(err, errbolt.ErrTimeout) {
		return nil, fmt.Errorf("open database %s: another process has it open; does another nydus-snapshotter run with this root? (%w)", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	if err := tx.Rollback(); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", path, err), store.Close())
	}
	return store, nil
}

// overlayOptions are the options that overlayfs's snapshotter would use here.
// They are found here and handed to it, so that a nydus root filesystem has the
// same.
func overlayOptions(ctx context.Context, root string) []string {
	options := []string{}
	userxattr, err := overlayutils.NeedsUserXAttr(root)
	if err != nil {
		log.G(ctx).WithError(err).Warnf("cannot find out whether overlay needs userxattr, taking it as %v", userxattr)
	}
	if userxattr {
		options = append(options, "userxattr")
	}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		options = append(options, "index=off")
	}
	return options
}

// Prepare implements snapshots.Snapshotter. For a nydus data layer that
// containerd unpacks it returns ErrAlreadyExists, and the layer exists.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	s.ignored.warn(ctx, labels)
	labels, opts = cleaned(labels), withoutSecrets(opts)
	kind, err := classify(key, parent, labels)
	if err != nil {
		return nil, fmt.Errorf("prepare %s%s: %w", key, ofImage(labels[labelImage]), err)
	}
	if kind == layerData || kind == layerBootstrap {
		// What cannot be mounted is not to be pulled.
		if _, err := s.o.Backends.Backend(ctx, labels[labelImage], labels[LabelBackend]); err != nil {
			return nil, fmt.Errorf("prepare nydus layer %s: %w: %w", key, err, errdefs.ErrInvalidArgument)
		}
	}
	switch kind {
	case layerData:
		return nil, s.commitData(ctx, key, parent, labels)
	case layerNone:
		mounts, err := s.Snapshotter.Prepare(ctx, key, parent, opts...)
		return s.extendNew(ctx, key, mounts, err)
	default:
		return s.Snapshotter.Prepare(ctx, key, parent, opts...)
	}
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.Snapshotter.View(ctx, key, parent, withoutSecrets(opts)...)
	return s.extendNew(ctx, key, mounts, err)
}

// extendNew extends the mounts of a snapshot that was just made, and removes it
// when that fails.
func (s *Snapshotter) extendNew(ctx context.Context, key string, mounts []mount.Mount, err error) ([]mount.Mount, error) {
	if err != nil {
		return nil, err
	}
	extended, err := s.extend(ctx, key, mounts)
	if err != nil {
		return nil, errors.Join(err, s.undo(ctx, key))
	}
	return extended, nil
}

// undo removes a snapshot also when the caller has given up.
func (s *Snapshotter) undo(ctx context.Context, key string) error {
	if err := s.Remove(context.WithoutCancel(ctx), key); err != nil {
		return fmt.Errorf("undo %s: %w", key, err)
	}
	return nil
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := s.Snapshotter.Mounts(ctx, key)
	if err != nil {
		return nil, err
	}
	return s.extend(ctx, key, mounts)
}

// commitData makes a data layer exist and says so.
func (s *Snapshotter) commitData(ctx context.Context, key, parent string, labels map[string]string) error {
	target := labels[snapshots.LabelSnapshotRef]
	name := dataName(parent, target)
	exists := fmt.Errorf("nydus data layer %s: %w", target, errdefs.ErrAlreadyExists)
	if _, _, err := s.info(ctx, name); err == nil {
		return exists
	} else if !errdefs.IsNotFound(err) {
		return fmt.Errorf("prepare nydus data layer %s: %w", target, err)
	}
	if err := s.makeData(ctx, key, parent, name, labels); err != nil {
		return fmt.Errorf("prepare nydus data layer %s%s: %w", target, ofImage(labels[labelImage]), err)
	}
	return exists
}

func (s *Snapshotter) makeData(ctx context.Context, key, parent, name string, labels map[string]string) error {
	_, err := s.Snapshotter.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		// The key, not the layer: containerd must not take one for the other.
		return fmt.Errorf("snapshot %s is in the way: %w", key, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return err
	}
	err = s.recordAndCommit(ctx, key, name, labels)
	if err == nil {
		return nil
	}
	if undone := s.undo(ctx, key); undone != nil {
		return errors.Join(err, undone)
	}
	if errdefs.IsAlreadyExists(err) {
		return nil // another Prepare was faster
	}
	return err
}

func (s *Snapshotter) recordAndCommit(ctx context.Context, key, name string, labels map[string]string) error {
	id, _, err := s.info(ctx, key)
	if err != nil {
		return err
	}
	r := record{Kind: kindData, Image: labels[labelImage], Backend: labels[LabelBackend], Blob: blobOf(labels)}
	if err := writeRecord(s.dir(id), r); err != nil {
		return err
	}
	s.owners.add(r.Blob, id)
	return s.Snapshotter.Commit(ctx, name, key, snapshots.WithLabels(labels))
}

// Commit implements snapshots.Snapshotter. It refuses a bootstrap layer whose
// bootstrap cannot be used.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	id, info, err := s.info(ctx, key)
	if err != nil {
		return err
	}
	if info.Kind == snapshots.KindActive {
		if err := s.admit(ctx, id, key, info); err != nil {
			return err
		}
	}
	return s.Snapshotter.Commit(ctx, name, key, withoutSecrets(opts)...)
}

// admit writes the record of a bootstrap layer before it is committed.
func (s *Snapshotter) admit(ctx context.Context, id, key string, info snapshots.Info) error {
	if unpackTarget(key, info.Labels) == "" || info.Labels[labelBootstrap] != "true" {
		if err := errors.Join(dropRecord(s.dir(id)), s.alone(ctx, key, info)); err != nil {
			return fmt.Errorf("commit %s%s: %w", key, ofImage(info.Labels[labelImage]), err)
		}
		return nil
	}
	r, err := inspect(s.fs(id))
	if err == nil {
		err = s.onlyBootstrap(ctx, key)
	}
	if err == nil {
		err = s.verify(r.Digest, info.Labels)
	}
	if err != nil {
		return fmt.Errorf("commit nydus bootstrap layer %s%s: the image is refused: %w", key, ofImage(info.Labels[labelImage]), err)
	}
	r.Image, r.Backend, r.Download = info.Labels[labelImage], info.Labels[LabelBackend], downloadOf(info.Labels)
	return writeRecord(s.dir(id), r)
}

// onlyBootstrap refuses a second bootstrap in one image: the files that are in the
// lower one alone would silently be missing.
func (s *Snapshotter) onlyBootstrap(ctx context.Context, key string) error {
	parents, err := s.parents(ctx, key)
	if err != nil {
		return err
	}
	for i, id := range parents {
		r, err := readRecord(s.dir(id))
		if err != nil {
			return err
		}
		if r != nil && r.Kind == kindBootstrap {
			return fmt.Errorf("layer %d of %d is another nydus bootstrap, and an image has one: the last layer, made of all others",
				len(parents)-i, len(parents)+1)
		}
	}
	return nil
}

// Cleanup implements snapshots.Cleaner: it deletes what a crash left of removed
// snapshots.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	cleaner, ok := s.Snapshotter.(snapshots.Cleaner)
	if !ok {
		return fmt.Errorf("clean up: %w", errdefs.ErrNotImplemented)
	}
	return cleaner.Cleanup(ctx)
}

func (s *Snapshotter) info(ctx context.Context, key string) (id string, info snapshots.Info, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return id, info, err
}

// parents returns the ids of the layers below a snapshot, uppermost first.
func (s *Snapshotter) parents(ctx context.Context, key string) (ids []string, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		snap, err := storage.GetSnapshot(ctx, key)
		ids = snap.ParentIDs
		return err
	})
	return ids, err
}

// dir is a snapshot's directory.
func (s *Snapshotter) dir(id string) string { return filepath.Join(s.o.Root, "snapshots", id) }

// fs is the content of a snapshot, or its upper directory.
func (s *Snapshotter) fs(id string) string { return filepath.Join(s.dir(id), "fs") }

func (s *Snapshotter) work(id string) string { return filepath.Join(s.dir(id), "work") }

func ofImage(ref string) string {
	if ref == "" {
		return ""
	}
	return fmt.Sprintf(" of image %q", ref)
}
