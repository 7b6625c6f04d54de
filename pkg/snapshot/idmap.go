package snapshot

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// idMapOptions are what id-maps a mount into a user namespace, as overlayfs's snapshotter
// writes them: containerd performs them for an overlay, the mount helper for its own. They are
// not sealed, since containerd leaves them out where it looks into a root filesystem itself.
//
// There are none without containerd's labels, nor when it has itself changed the owner of
// every file in a layer of its own, which it does for a snapshotter that does not claim the
// capability remap-ids. That layer is then the parent, and its root directory belongs to
// the root of the user namespace.
func idMapOptions(labels map[string]string, parentFS string) ([]string, error) {
	uids, gids := labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if uids == "" && gids == "" {
		return nil, nil
	}
	info, err := os.Stat(parentFS)
	if err != nil {
		return nil, fmt.Errorf("look at parent layer: %w", err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if hostID(uids) == int64(st.Uid) && hostID(gids) == int64(st.Gid) {
		return nil, nil
	}
	return []string{"uidmap=" + uids, "gidmap=" + gids}, nil
}

// idMapped returns mounts of an ordinary image with the options.
func idMapped(mounts []mount.Mount, options []string) []mount.Mount {
	if len(options) == 0 {
		return mounts
	}
	mounts = slices.Clone(mounts)
	for i := range mounts {
		mounts[i].Options = append(slices.Clone(options), mounts[i].Options...)
	}
	return mounts
}

// quoted returns the options for the mount helper, which gets all of them joined with commas.
func quoted(options []string) []string {
	out := make([]string, 0, len(options))
	for _, o := range options {
		if name, value, _ := strings.Cut(o, "="); strings.Contains(value, ",") {
			o = name + "=" + strconv.Quote(value)
		}
		out = append(out, o)
	}
	return out
}

// hostID returns the host's id for the container's id 0 in a mapping such as
// "0:100000:65536,…", and -1 when there is none.
func hostID(mapping string) int64 {
	for entry := range strings.SplitSeq(mapping, ",") {
		parts := strings.Split(entry, ":")
		if len(parts) != 3 || parts[0] != "0" {
			continue
		}
		if id, err := strconv.ParseUint(parts[1], 10, 32); err == nil {
			return int64(id)
		}
	}
	return -1
}
