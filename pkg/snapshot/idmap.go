package snapshot

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// checkIDMapping refuses a root filesystem that is to be shifted into a user
// namespace by an id-mapped mount: a FUSE filesystem cannot be id-mapped.
//
// The same labels come when containerd has itself changed the owner of every
// file in a layer of its own, which it does for a snapshotter that does not
// claim the capability remap-ids. That layer is then the parent, and its root
// directory belongs to the root of the user namespace.
func checkIDMapping(labels map[string]string, parentFS string) error {
	uids, gids := labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if uids == "" && gids == "" {
		return nil
	}
	info, err := os.Stat(parentFS)
	if err != nil {
		return fmt.Errorf("look at parent layer: %w", err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if hostID(uids) == int64(st.Uid) && hostID(gids) == int64(st.Gid) {
		return nil
	}
	return fmt.Errorf("a nydus image cannot be id-mapped into a user namespace (uid mapping %q, gid mapping %q); "+
		"remove \"remap-ids\" from the capabilities of this snapshotter's proxy plugin, so that containerd changes the owners itself, "+
		"or run the container without a user namespace: %w", uids, gids, errdefs.ErrFailedPrecondition)
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
