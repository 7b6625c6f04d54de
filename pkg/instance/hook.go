package instance

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// ErrNotNydus says that a path is no root filesystem on an instance.
var ErrNotNydus = errors.New("not a nydus root filesystem")

// FindByTarget returns the key of the instance beneath the root filesystem at
// target, an overlay on it or the image itself, or ErrNotNydus. It reads records and the mount table only.
func FindByTarget(runDir, target string) (key string, err error) {
	x, err := readMounts()
	if err != nil {
		return "", err
	}
	if m, ok := x.At(target); !ok || m.Type != "overlay" && m.Type != rootfs.TypeEROFS && !strings.HasPrefix(m.Type, "fuse") {
		return "", ErrNotNydus
	}
	keys, err := Keys(runDir)
	if err != nil {
		return "", err
	}
	for _, key := range keys {
		if rec, err := ReadRecord(runDir, key); err == nil && generationBeneath(dirOf(runDir, key), rec, x, target) != nil {
			return key, nil
		}
	}
	return "", ErrNotNydus
}

// generationBeneath returns the generation that the overlay on target was
// mounted on, or that is mounted on it; nil for none of this instance's.
func generationBeneath(d dir, rec *Record, x *mountIndex, target string) *Generation {
	all := rec.Retired
	if rec.Current != nil {
		all = append([]Generation{*rec.Current}, all...)
	}
	u, err := readUser(d.user(target))
	made := err == nil && u != nil && slices.Contains(u.mounts(x), target)
	m, ok := x.At(target)
	if m.Type == "overlay" {
		m, ok = lowerMount(x.Table, m)
	}
	for _, g := range all {
		if g.Shared {
			continue // that is the instance of its images
		}
		if made && u.Generation == g.Number || ok && g.Dev != "" && g.holds(m) {
			return &g
		}
	}
	return nil
}

// lowerMount is the lowest layer of an overlay that containerd made on a mount of
// the image, when its text tells.
func lowerMount(table rootfs.Table, overlay rootfs.Mount) (rootfs.Mount, bool) {
	text, _ := overlay.Option("lowerdir")
	lowers := strings.Split(text, ":")
	return table.At(lowers[len(lowers)-1])
}

// Release lets the instance beneath target go if nothing but target uses it,
// although target is still mounted. The hook calls it before the runtime
// unmounts a container's root filesystem.
func Release(ctx context.Context, runDir, key, target string) error {
	return unlessGone(locked(ctx, runDir, key, func(i *Instance) error { return i.releaseUnless(ctx, target) }))
}

// releaseUnless releases the instance unless somebody beside target uses it.
func (i *Instance) releaseUnless(ctx context.Context, target string) error {
	x, err := readMounts()
	if err != nil {
		return err
	}
	users, err := i.usedBy(x)
	if err != nil {
		return err
	}
	own := []string{target}
	if m, ok := x.At(target); ok {
		text, _ := m.Option("lowerdir")
		own = append(own, strings.Split(text, ":")...)
	}
	for _, u := range users {
		if !slices.Contains(own, u) {
			return nil
		}
	}
	g := i.rec.Current
	if err := i.retire(); err != nil {
		return err
	}
	return i.releasePool(ctx, g, own)
}

// Replace takes the generation out of use that the root filesystem on target
// lies on, because it does not answer: the next mount starts a new daemon. One
// that has been replaced since is left alone.
func Replace(ctx context.Context, runDir, key, target string) error {
	return unlessGone(locked(ctx, runDir, key, func(i *Instance) error { return i.replaceBeneath(target) }))
}

func (i *Instance) replaceBeneath(target string) error {
	x, err := readMounts()
	if err != nil {
		return err
	}
	current := i.rec.Current
	if g := generationBeneath(i.dir, &i.rec, x, target); g == nil || current == nil || g.Number != current.Number {
		return nil
	}
	current.Failed = true
	i.note("nydusd does not answer the hook and is replaced")
	return i.retire()
}
