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
	// Memory is the most that it may use in bytes, CPU in thousandths of a core;
	// 0 is no limit.
	Memory int64
	CPU    int
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

// place is where a process is about to start, and what could not be had of it.
type place struct {
	attr     *syscall.SysProcAttr
	warnings []string
	// unmet are those of the warnings that a limit is not in force.
	unmet []string
	// pending are limits that are in force once the process is in its cgroup of
	// version 2.
	pending []limit
}

// enter prepares the calling thread and attr so that what is forked next starts
// within the cgroup and its limits; close releases what that took. The thread
// stays where it was put, and must end. What cannot be had is reported, not fatal: a
// daemon in the wrong cgroup is better than none.
func (c Cgroup) enter(attr *syscall.SysProcAttr) *place {
	p := &place{attr: attr}
	if c.Parent == "" {
		p.lack(c.limits(), errNoCgroup)
		return p
	}
	v1, v2, err := hierarchies()
	if err != nil {
		p.warn(err)
		p.lack(c.limits(), err)
		return p
	}
	homes, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		p.warn(fmt.Errorf("join cgroup: %w", err))
		p.lack(c.limits(), err)
		return p
	}
	left := c.limits()
	for _, h := range v1 {
		var here []limit
		here, left = split(left, h)
		if !matters(h, string(homes)) && !slices.ContainsFunc(here, limit.wanted) {
			continue
		}
		p.enterV1(filepath.Join(h.Target, c.Parent, c.Name), here)
	}
	if len(v2) == 0 {
		p.lack(left, errNoController)
		return p
	}
	p.enterV2(v2[0].Target, c, left) // a node has one
	return p
}

// errNoCgroup says why there is no limit without a cgroup.
var errNoCgroup = errors.New("the daemon has no cgroup of its own; set daemon.cgroup_parent")

func (p *place) warn(err error) { p.warnings = append(p.warnings, err.Error()) }

// lack reports which limits are not in force.
func (p *place) lack(limits []limit, cause error) {
	for _, l := range limits {
		if l.wanted() {
			text := fmt.Sprintf("the %s limit of %s is not in force: %v", l.controller, l, cause)
			p.warnings, p.unmet = append(p.warnings, text), append(p.unmet, text)
		}
	}
}

func (p *place) enterV1(dir string, limits []limit) {
	created, err := makeCgroup(dir)
	if err != nil {
		p.warn(fmt.Errorf("join cgroup: %w", err))
		p.lack(limits, err)
		return
	}
	for _, l := range limits {
		if err := l.write(dir, l.v1, created); err != nil {
			p.lack([]limit{l}, err)
		}
	}
	if err := join(dir); err != nil {
		p.warn(fmt.Errorf("join cgroup: %w", err))
		p.lack(limits, err)
	}
}

func (p *place) enterV2(top string, c Cgroup, limits []limit) {
	parent := filepath.Join(top, c.Parent)
	dir := filepath.Join(parent, c.Name)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		p.warn(fmt.Errorf("join cgroup: %w", err))
		p.lack(limits, err)
		return
	}
	var possible []limit
	for _, l := range limits {
		// Others than wanted ones are written where they are possible anyway.
		if l.wanted() {
			if err := enable(top, parent, l.controller); err != nil {
				p.lack([]limit{l}, err)
				continue
			}
		}
		possible = append(possible, l)
	}
	created, err := makeCgroup(dir)
	if err == nil {
		p.attr.CgroupFD, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		p.warn(fmt.Errorf("join cgroup: %w", err))
		p.lack(possible, err)
		return
	}
	p.attr.UseCgroupFD = true
	for _, l := range possible {
		if err := l.write(dir, l.v2, created); err != nil {
			p.lack([]limit{l}, err)
			continue
		}
		p.pending = append(p.pending, l)
	}
}

// refused says that the kernel did not let the process into its cgroup of version
// 2, for example because it is a threaded one; it is to be started beside it.
func (p *place) refused(err error) {
	p.close()
	p.attr.UseCgroupFD = false
	p.warn(fmt.Errorf("start within a cgroup of its own: %w", err))
	p.lack(p.pending, err)
}

func (p *place) close() {
	if p.attr.UseCgroupFD {
		unix.Close(p.attr.CgroupFD)
	}
}

// makeCgroup makes a cgroup, or finds it as a predecessor left it.
func makeCgroup(dir string) (created bool, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return false, err
	}
	err = os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		return false, nil
	}
	return err == nil, err
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
