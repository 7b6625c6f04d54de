package instance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Use runs mount, which makes an overlay on target with the instance as a lower
// directory, and writes down that target uses the instance. upper is the
// overlay's upper directory or empty. Killed in between, it leaves a user that
// is pending: the mount table tells whether the mount was made.
func (i *Instance) Use(ctx context.Context, target, upper string, mount func() error) error {
	u := User{Target: target, Generation: i.rec.Current.Number, Upper: upper}
	if err := i.writeUser(u); err != nil {
		return err
	}
	// The kernel asks each layer's filesystem when it mounts an overlay.
	if err := within(ctx, i.hang, mount); errors.Is(err, errNoAnswer) {
		return fmt.Errorf("mount on %s: %w; it may be made yet", target, err) // so the user stays
	} else if err != nil {
		return errors.Join(err, i.dropUser(target))
	}
	st := new(unix.Stat_t) // its own, should the call be left behind
	if err := within(ctx, i.hang, func() error { return unix.Stat(target, st) }); err != nil {
		err = fmt.Errorf("check the new root filesystem: %w", &os.PathError{Op: "stat", Path: target, Err: err})
		return errors.Join(err, rootfs.Detach(target), i.dropUser(target))
	}
	u.Dev = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	var err error
	if upper == "" {
		var m rootfs.Mount
		m, _, err = rootfs.Lookup(target)
		u.Options = m.Options
	}
	if err == nil {
		err = i.writeUser(u)
	}
	if err != nil {
		return errors.Join(err, rootfs.Detach(target), i.dropUser(target))
	}
	return nil
}

func (i *Instance) writeUser(u User) error {
	text, err := json.Marshal(u)
	if err == nil {
		err = writeFile(i.dir.user(u.Target), text)
	}
	if err != nil {
		return fmt.Errorf("write down who uses the instance: %w", err)
	}
	return nil
}

func (i *Instance) dropUser(target string) error {
	if err := os.Remove(i.dir.user(target)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mountIndex is the mount table with a way to find mounts by device number.
type mountIndex struct {
	rootfs.Table
	byDev map[string]rootfs.Table
}

func readMounts() (*mountIndex, error) {
	table, err := rootfs.ReadTable()
	if err != nil {
		return nil, err
	}
	return indexOf(table), nil
}

func indexOf(table rootfs.Table) *mountIndex {
	x := &mountIndex{Table: table, byDev: map[string]rootfs.Table{}}
	for _, m := range table {
		x.byDev[m.Dev] = append(x.byDev[m.Dev], m)
	}
	return x
}

// users lists the mounts that use a generation, which may be nil for none, by
// their targets, and the files of users that are gone. A pool is also used by the
// instances that have a berth in it, which are listed by their keys.
func users(d dir, g *Generation, x *mountIndex) (targets, gone []string, err error) {
	if g != nil && g.Dev != "" {
		for _, m := range x.byDev[g.Dev] {
			if g.holds(m) && !isMountpoint(m.Target, g) {
				targets = append(targets, m.Target)
			}
		}
	}
	if g != nil && g.Shared {
		keys, err := aboard(d, g)
		if err != nil {
			return nil, nil, err
		}
		targets = append(targets, keys...)
	}
	entries, err := os.ReadDir(d.users())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list users of instance %s: %w", d, err)
	}
	for _, e := range entries {
		path := filepath.Join(d.users(), e.Name())
		u, err := readUser(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // forgotten meanwhile, by whoever has the lock
		}
		if err != nil {
			return nil, nil, err
		}
		var mounts []string
		if u != nil {
			mounts = u.mounts(x)
		}
		switch {
		case len(mounts) == 0:
			gone = append(gone, path)
		case g != nil && u.Generation == g.Number:
			targets = append(targets, mounts...)
		}
	}
	return targets, gone, nil
}

// isMountpoint tells whether target is the generation's own mountpoint, or that
// in a copy of the run directory: a recursive bind of /run, for a chroot say, uses
// no image.
func isMountpoint(target string, g *Generation) bool {
	instance := filepath.Dir(filepath.Dir(g.Mountpoint))
	return strings.HasSuffix(target, strings.TrimPrefix(g.Mountpoint, filepath.Dir(filepath.Dir(instance))))
}

// usedBy is users for the holder of the lock, who also forgets those that are
// gone. The mount table must have been read under the lock.
func (i *Instance) usedBy(x *mountIndex) ([]string, error) {
	targets, gone, err := users(i.dir, i.rec.Current, x)
	if err != nil {
		return nil, err
	}
	for _, path := range gone {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("forget a user of instance %s: %w", i.rec.Key, err)
		}
	}
	return targets, nil
}

// readUser returns nil for what a killed writer left.
func readUser(path string) (*User, error) {
	if strings.HasPrefix(filepath.Base(path), ".new-") {
		return nil, nil
	}
	text, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return nil, fmt.Errorf("read user of an instance: %w", err)
	}
	var u User
	if err := json.Unmarshal(text, &u); err != nil {
		return nil, fmt.Errorf("read user of an instance: %s: %w", path, err)
	}
	return &u, nil
}

// mounts lists where the user's overlay is mounted now. That need not be its
// target: containerd mounts a snapshot briefly elsewhere just before the
// container's own mount of it, which gets the same device number again.
func (u *User) mounts(x *mountIndex) []string {
	candidates := x.byDev[u.Dev]
	if u.Dev == "" { // pending
		candidates = x.Table
	}
	var targets []string
	for _, m := range candidates {
		if m.Type == "overlay" && u.made(m) {
			targets = append(targets, m.Target)
		}
	}
	return targets
}

// made tells whether an overlay of the right device number is the user's.
func (u *User) made(m rootfs.Mount) bool {
	if u.Dev == "" && m.Target != u.Target {
		return false
	}
	if upper, _ := m.Option("upperdir"); upper != u.Upper {
		return false
	}
	return u.Options == "" || u.Options == m.Options
}
