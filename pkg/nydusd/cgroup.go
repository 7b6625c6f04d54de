package nydusd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Cgroup is a place of a daemon's own, so that it is neither accounted to nor
// frozen, limited and killed with the container whose mount started it. It
// exists in each cgroup hierarchy of the node, versions 1 and 2, where that makes
// a difference.
type Cgroup struct {
	// Parent is the path below which the daemons' cgroups lie, such as
	// "/nydus"; empty for no cgroup.
	Parent string
	// Name is the daemon's own.
	Name string
}

// hierarchies lists where cgroup file systems are mounted. cpuset is left out:
// a new cpuset is unusable until it is filled in.
func hierarchies() (v1, v2 []rootfs.Mount, err error) {
	table, err := rootfs.ReadTable()
	if err != nil {
		return nil, nil, err
	}
	for _, m := range table {
		switch {
		case m.Root != "/":
		case m.Type == "cgroup2":
			v2 = append(v2, m)
		case m.Type == "cgroup" && !strings.Contains(","+m.Options+",", ",cpuset,"):
			v1 = append(v1, m)
		}
	}
	return v1, v2, nil
}

// enter prepares the calling thread and attr so that what is forked next starts
// within the cgroup; done closes what that took. The thread stays where it was
// put, and must end. What cannot be had is reported, not fatal: a daemon in the
// wrong cgroup is better than none.
func (c Cgroup) enter(attr *syscall.SysProcAttr) (done func(), warnings []string) {
	done = func() {}
	if c.Parent == "" {
		return done, nil
	}
	v1, v2, err := hierarchies()
	if err != nil {
		return done, []string{err.Error()}
	}
	homes, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return done, []string{fmt.Sprintf("join cgroup: %v", err)}
	}
	for _, h := range v1 {
		if !matters(h, string(homes)) {
			continue
		}
		dir := filepath.Join(h.Target, c.Parent, c.Name)
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			err = join(dir)
		}
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("join cgroup: %v", err))
		}
	}
	for _, h := range v2 { // a node has one
		dir := filepath.Join(h.Target, c.Parent, c.Name)
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			attr.CgroupFD, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		}
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("join cgroup: %v", err))
			continue
		}
		attr.UseCgroupFD = true
		done = func() { unix.Close(attr.CgroupFD) }
		break
	}
	return done, warnings
}

// matters tells whether the daemon needs a cgroup of its own in a hierarchy of
// version 1. Its memory is always its own. Elsewhere there is nothing to get away
// from when the starter is at the top, and each move takes milliseconds: the
// kernel waits for all CPUs, and holds up every fork meanwhile.
func matters(hierarchy rootfs.Mount, homes string) bool {
	return slices.Contains(strings.Split(hierarchy.Options, ","), "memory") || home(homes, hierarchy) != "/"
}

// join moves the calling thread into a cgroup of version 1, which moves single
// threads: the rest of this process stays where it is. "0" is whoever writes.
func join(dir string) error {
	return os.WriteFile(filepath.Join(dir, "tasks"), []byte("0"), 0)
}

// home finds the path within a hierarchy of version 1 in the text of
// /proc/PID/cgroup, lines such as "4:cpu,cpuacct:/some/path".
func home(text string, hierarchy rootfs.Mount) string {
	options := strings.Split(hierarchy.Options, ",")
	for _, line := range strings.Split(text, "\n") {
		part := strings.SplitN(line, ":", 3)
		if len(part) == 3 && part[1] != "" && slices.Contains(options, strings.Split(part[1], ",")[0]) {
			return part[2]
		}
	}
	return "/"
}

// Remove takes the cgroup away; one that is not there is no error.
func (c Cgroup) Remove() error {
	if c.Parent == "" {
		return nil
	}
	v1, v2, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range append(v1, v2...) {
		if err := removeCgroup(filepath.Join(h.Target, c.Parent, c.Name)); err != nil {
			errs = append(errs, fmt.Errorf("remove cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}

const (
	// busyTries and busyWait bound the wait for a cgroup that is still busy:
	// the kernel counts a process as a member for a moment after it has ended,
	// and tells nobody when it no longer does.
	busyTries = 100
	busyWait  = 5 * time.Millisecond
)

func removeCgroup(dir string) error {
	tick := time.NewTicker(busyWait)
	defer tick.Stop()
	for try := 1; ; try++ {
		err := os.Remove(dir)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EROFS) {
			return nil // in a read-only hierarchy it is nobody's of ours
		}
		if !errors.Is(err, unix.EBUSY) || try == busyTries {
			return err
		}
		<-tick.C
	}
}
