package nydusd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// limit is one of a cgroup's, with the files that hold it in both versions.
type limit struct {
	controller string
	value      int64 // 0 for none
	unit       string
	v1, v2     []setting
}

// setting is a file of a cgroup and what it says with and without the limit.
type setting struct{ file, limited, free string }

func (l limit) wanted() bool   { return l.value != 0 }
func (l limit) String() string { return fmt.Sprintf("%d %s", l.value, l.unit) }

// period is that of CPU limits in microseconds, the kernel's default: a daemon that
// has used up its share waits for the next one.
const period = 100_000

func (c Cgroup) limits() []limit {
	memory, quota := strconv.FormatInt(c.Memory, 10), strconv.Itoa(c.CPU*(period/1000))
	every := strconv.Itoa(period)
	return []limit{
		{
			controller: "memory", value: c.Memory, unit: "bytes",
			v1: []setting{{"memory.limit_in_bytes", memory, "-1"}},
			v2: []setting{{"memory.max", memory, "max"}},
		}, {
			controller: "cpu", value: int64(c.CPU), unit: "thousandths of a core",
			v1: []setting{{"cpu.cfs_period_us", every, every}, {"cpu.cfs_quota_us", quota, "-1"}},
			v2: []setting{{"cpu.max", quota + " " + every, "max " + every}},
		},
	}
}

// split divides limits into those of a hierarchy of version 1 and the others.
func split(limits []limit, hierarchy rootfs.Mount) (here, left []limit) {
	for _, l := range limits {
		if slices.Contains(strings.Split(hierarchy.Options, ","), l.controller) {
			here = append(here, l)
		} else {
			left = append(left, l)
		}
	}
	return here, left
}

// write puts the limit in force, before anybody is in the cgroup. In one that was
// not made just now it also takes away a limit that is not wanted.
func (l limit) write(dir string, settings []setting, created bool) error {
	for _, s := range settings {
		value := s.limited
		if !l.wanted() {
			value = s.free
		}
		if !l.wanted() && created {
			continue
		}
		err := writeSetting(filepath.Join(dir, s.file), value)
		if err != nil && (l.wanted() || !errors.Is(err, os.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// writeSetting writes a file that the kernel has made.
func writeSetting(path, value string) error {
	f, err := os.OpenFile(filepath.Clean(path), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// errNoController says that a limit cannot be had on this node.
var errNoController = errors.New("no cgroup hierarchy of this node has that controller; its kernel may lack it, or cgroup_disable= turn it off")

// enable makes a controller of version 2 work for the children of parent: every
// cgroup from the top down to parent must pass it on. They keep it, as others may
// need it.
func enable(top, parent, controller string) error {
	for dir := top; ; {
		file := filepath.Join(dir, "cgroup.subtree_control")
		passed, err := os.ReadFile(filepath.Clean(file))
		if err == nil && !hasWord(passed, controller) {
			err = passOn(dir, file, controller)
		}
		if err != nil {
			return err
		}
		rest, below := strings.CutPrefix(parent, strings.TrimSuffix(dir, "/")+"/")
		if !below {
			return nil
		}
		name, _, _ := strings.Cut(rest, "/")
		dir = filepath.Join(dir, name)
	}
}

func passOn(dir, file, controller string) error {
	has, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	if !hasWord(has, controller) {
		return fmt.Errorf("%s: %w", dir, errNoController)
	}
	if err := writeSetting(file, "+"+controller); err != nil {
		return fmt.Errorf("%w; no process may be in %s itself", err, dir)
	}
	return nil
}

func hasWord(text []byte, word string) bool {
	return slices.Contains(strings.Fields(string(text)), word)
}

// OOMKills counts the processes that the kernel has killed in the cgroup for its
// memory, by its limit or by the machine's. The number stands before the end of such
// a process can be seen, and never falls while the cgroup is there: a successor in
// the same cgroup goes on counting. Without a cgroup, or where the kernel does not
// count, it is 0.
func (c Cgroup) OOMKills() (int, error) {
	if c.Parent == "" {
		return 0, nil
	}
	v1, v2, err := hierarchies()
	if err != nil {
		return 0, err
	}
	file := ""
	for _, h := range v2 {
		file = filepath.Join(h.Target, c.Parent, c.Name, "memory.events")
	}
	for _, h := range v1 {
		if slices.Contains(strings.Split(h.Options, ","), "memory") {
			file = filepath.Join(h.Target, c.Parent, c.Name, "memory.oom_control")
		}
	}
	if file == "" {
		return 0, nil
	}
	text, err := os.ReadFile(filepath.Clean(file))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("count processes killed for memory: %w", err)
	}
	for line := range bytes.Lines(text) {
		if name, count, _ := strings.Cut(strings.TrimSpace(string(line)), " "); name == "oom_kill" {
			return strconv.Atoi(count)
		}
	}
	return 0, nil // before Linux 4.13
}
