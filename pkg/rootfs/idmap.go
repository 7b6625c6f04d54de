package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mount"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

// IDMap says which ids on the host stand for those in an image, for a container in a user
// namespace.
//
// containerd's core/mount has GetUsernsFD and IDMapMount for the like. They are not used since
// that package brings protobuf, logrus and net into the mount helper, which is to start
// quickly.
type IDMap struct {
	UIDs, GIDs []syscall.SysProcIDMap
}

// maxIDMappings is how many the kernel takes (user_namespaces(7)).
const maxIDMappings = 340

// ParseIDMap reads two mappings as containerd's labels and mount options have them:
// "container:host:size", several with commas between them.
func ParseIDMap(uids, gids string) (*IDMap, error) {
	m := &IDMap{}
	var err error
	if m.UIDs, err = parseMappings(uids); err != nil {
		return nil, fmt.Errorf("uid mapping: %w", err)
	}
	if m.GIDs, err = parseMappings(gids); err != nil {
		return nil, fmt.Errorf("gid mapping: %w", err)
	}
	return m, nil
}

func parseMappings(text string) ([]syscall.SysProcIDMap, error) {
	var list []syscall.SysProcIDMap
	for entry := range strings.SplitSeq(text, ",") {
		var n []int
		for part := range strings.SplitSeq(entry, ":") {
			id, err := strconv.ParseUint(part, 10, 32)
			if err != nil {
				break
			}
			n = append(n, int(id))
		}
		if len(n) != 3 || strings.Count(entry, ":") != 2 || n[2] == 0 {
			return nil, fmt.Errorf("%.80q is not container:host:size", entry)
		}
		list = append(list, syscall.SysProcIDMap{ContainerID: n[0], HostID: n[1], Size: n[2]})
	}
	if len(list) > maxIDMappings {
		return nil, fmt.Errorf("%d entries, the kernel takes %d", len(list), maxIDMappings)
	}
	return list, nil
}

// namespace makes a user namespace with the mapping. It has no process: its descriptor alone
// keeps it, and what is mounted with it.
func (m *IDMap) namespace() (*os.File, error) {
	// Only a process of its own can enter a new one. This one never runs a single
	// instruction of the program: it is traced, and so stops as soon as it has it.
	p, err := os.StartProcess("/proc/self/exe", []string{"nydus-userns"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: m.UIDs, GidMappings: m.GIDs,
		Ptrace: true, Pdeathsig: unix.SIGKILL,
	}})
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("%w; see sysctl user.max_user_namespaces", err)
	}
	if err != nil {
		return nil, fmt.Errorf("make a user namespace: %w", err)
	}
	// Until it is waited for its number belongs to nobody else.
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid))
	ended := p.Kill()
	if ended == nil {
		_, ended = p.Wait()
	}
	if err = errors.Join(err, ended); err != nil {
		if f != nil {
			f.Close()
		}
		return nil, fmt.Errorf("make a user namespace: %w", err)
	}
	return f, nil
}

// idMapped returns a copy of the mount at path, attached nowhere, through which files belong
// to the ids of a user namespace, if one is given. It shows nothing that is mounted beneath.
func idMapped(path string, userns *os.File) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("id-map: %w", &os.PathError{Op: "open_tree", Path: path, Err: err})
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE}
	if userns != nil {
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(userns.Fd())
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("id-map: %w%s", &os.PathError{Op: "mount_setattr", Path: path, Err: err}, idMapHint(err))
	}
	return fd, nil
}

func idMapHint(err error) string {
	if errors.Is(err, unix.EINVAL) {
		return "; the filesystem there cannot be id-mapped (FUSE cannot, tmpfs can from Linux 6.3 on), or the mapping is refused"
	}
	return ""
}

// bindMapped is Bind, read-only and id-mapped.
func bindMapped(source, target string, options []string, m *IDMap) error {
	userns, err := m.namespace()
	if err != nil {
		return err
	}
	defer userns.Close()
	fd, err := idMapped(source, userns)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := attach(fd, target); err != nil {
		return err
	}
	return finish(target, append([]string{"ro"}, options...))
}

// attach puts a mount that is attached nowhere on target.
func attach(fd int, target string) error {
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach the mount: %w", &os.PathError{Op: "move_mount", Path: target, Err: err})
	}
	return nil
}

// mountMapped mounts the overlay with all lower directories id-mapped.
func (o Overlay) mountMapped(target string) error {
	userns, err := o.IDMap.namespace()
	if err != nil {
		return err
	}
	defer userns.Close()
	fd, err := elsewhere(func() (int, error) { return o.assemble(target, userns) })
	if err != nil {
		return fmt.Errorf("mount id-mapped overlay: %w", err)
	}
	defer unix.Close(fd)
	return attach(fd, target)
}

// assemble returns the overlay, attached nowhere. The kernel takes layers by the paths of
// mounts that are attached (one that is not, from Linux 6.15 on), so the caller is in a mount
// namespace that goes with it: whenever this process is killed, none of them is left.
func (o Overlay) assemble(target string, userns *os.File) (int, error) {
	var lower []int
	defer func() {
		for _, fd := range lower {
			unix.Close(fd)
		}
	}()
	for i, path := range o.Lower {
		ids := userns
		if i < o.Unmapped {
			ids = nil
		}
		fd, err := idMapped(path, ids)
		if err != nil {
			return -1, err
		}
		lower = append(lower, fd)
	}
	if err := unix.Mount("nydus", target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return -1, &os.PathError{Op: "mount tmpfs", Path: target, Err: err}
	}
	// The thread may end later than somebody unmounts the overlay.
	defer Detach(target) //nolint:errcheck // it goes with the namespace
	names := make([]string, len(lower))
	for i, fd := range lower {
		names[i] = strconv.Itoa(i)
		dir := filepath.Join(target, names[i])
		if err := os.Mkdir(dir, 0o700); err != nil {
			return -1, err
		}
		if err := attach(fd, dir); err != nil {
			return -1, err
		}
	}
	merged := filepath.Join(target, "merged")
	if err := os.Mkdir(merged, 0o700); err != nil {
		return -1, err
	}
	data := o.data(names)
	if len(data) > maxData() {
		return -1, tooLong(target, len(names), len(data))
	}
	if err := unix.Chdir(target); err != nil {
		return -1, &os.PathError{Op: "chdir", Path: target, Err: err}
	}
	if err := mount.Mount("overlay", merged, "overlay", data); err != nil {
		return -1, fmt.Errorf("%w%s", err, hint(err))
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, merged, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: merged, Err: err}
	}
	return fd, nil
}

// elsewhere runs fn in a copy of the mount namespace, on a thread of its own that ends with
// it. What is unmounted outside goes there too, and what is mounted there stays there.
func elsewhere(fn func() (int, error)) (int, error) {
	fd, err := -1, error(nil)
	thread.Throwaway(func() {
		if err = unix.Unshare(unix.CLONE_NEWNS); err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "")
		}
		if err != nil {
			err = fmt.Errorf("make a mount namespace: %w", err)
			return
		}
		fd, err = fn()
	})
	return fd, err
}
