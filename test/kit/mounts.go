package kit

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func mountFlags(fd int) (mount, super string, err error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return "", "", fmt.Errorf("statx: %w", err)
	}
	list, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return uint64(m.ID) != st.Mnt_id, false })
	if err != nil {
		return "", "", err
	}
	if len(list) != 1 {
		return "", "", fmt.Errorf("mount %d is not in mountinfo", st.Mnt_id)
	}
	return list[0].Options, list[0].VFSOptions, nil
}

// Mounts lists the mounts of the program's namespace with the given file system
// type; all of them without.
func Mounts(t TB, fstype string) []*mountinfo.Info {
	t.Helper()
	list, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return fstype != "" && m.FSType != fstype, false
	})
	if err != nil {
		t.Fatalf("read mounts: %v", err)
	}
	return list
}

// InstallMountNydus puts the project's helper where mount(8) finds it for the
// type nydus, within the program's own mounts: /sbin/mount.nydus.
func InstallMountNydus(t TB) {
	t.Helper()
	if err := inside(); err != nil {
		t.Fatalf("install mount.nydus: %v", err)
	}
	if err := os.Symlink(filepath.Join(Binaries(t, "nydus-overlayfs"), "nydus-overlayfs"), "/sbin/mount.nydus"); err != nil {
		t.Fatalf("install mount.nydus: %v", err)
	}
	t.Cleanup(func() { _ = os.Remove("/sbin/mount.nydus") })
}
