package nydusd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

// testCgroup is a cgroup that is gone, with its parent, after the test.
func testCgroup(t *testing.T) Cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("making cgroups needs root; run make test as root")
	}
	v1, v2, err := hierarchies()
	must(t, err)
	c := Cgroup{Parent: fmt.Sprintf("/nydusd-limit-%d", os.Getpid()), Name: "one"}
	t.Cleanup(func() {
		must(t, c.Remove())
		for _, h := range append(v1, v2...) {
			if err := os.Remove(filepath.Join(h.Target, c.Parent)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}
	})
	return c
}

// homeOf finds the cgroup in the hierarchy that has a controller, and the files
// there that hold its limit, by the version of the hierarchy.
func homeOf(t *testing.T, c Cgroup, controller string) (dir string, files []string) {
	t.Helper()
	v1, v2, err := hierarchies()
	must(t, err)
	n := slices.IndexFunc(c.limits(), func(l limit) bool { return l.controller == controller })
	l, in := c.limits()[n], ""
	settings := l.v2
	for _, h := range v2 {
		in = h.Target
	}
	for _, h := range v1 {
		if slices.Contains(strings.Split(h.Options, ","), controller) {
			in, settings = h.Target, l.v1
		}
	}
	for _, s := range settings {
		files = append(files, s.file)
	}
	return filepath.Join(in, c.Parent, c.Name), files
}

// readLimits are the words that a script prints to show its limits as they are
// when it starts.
func readLimits(t *testing.T, c Cgroup) (script string) {
	t.Helper()
	script = "echo \"$(</proc/self/cgroup)\"\n"
	for _, controller := range []string{"memory", "cpu"} {
		dir, files := homeOf(t, c, controller)
		for _, f := range files {
			script += fmt.Sprintf("echo %s \"$(<%s)\"\n", f, filepath.Join(dir, f))
		}
	}
	return script
}

func lines(t *testing.T, log string) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(log)
	must(t, err)
	all := map[string]bool{}
	for _, l := range strings.Split(string(text), "\n") {
		all[l] = true
	}
	return all
}

// What a daemon sees of its limits when it starts; and what one sees that is to
// have none and comes into a cgroup that was left with some.
func TestLimitsAreThereFromTheStart(t *testing.T) {
	c := testCgroup(t)
	limited := []string{
		"memory.limit_in_bytes 67108864", "memory.max 67108864",
		"cpu.cfs_quota_us 150000", "cpu.cfs_period_us 100000", "cpu.max 150000 100000",
	}
	free := []string{
		"memory.limit_in_bytes 9223372036854771712", "memory.max max",
		"cpu.cfs_quota_us -1", "cpu.cfs_period_us 100000", "cpu.max max 100000",
	}
	for _, step := range []struct {
		memory int64
		cpu    int
		want   []string
	}{{64 << 20, 1500, limited}, {0, 0, free}, {64 << 20, 1500, limited}} {
		c.Memory, c.CPU = step.memory, step.cpu
		p, log := startScript(t, Command{Cgroup: c}, readLimits(t, c))
		if len(p.Warnings)+len(p.Unmet) > 0 {
			t.Errorf("warnings: %q, %q", p.Warnings, p.Unmet)
		}
		ended(t, p)
		seen := lines(t, log)
		for _, controller := range []string{"memory", "cpu"} {
			inside := startedIn(t, seen, c, controller)
			if !inside && step.memory != 0 {
				t.Errorf("it did not start in the %s cgroup:\n%v", controller, seen)
			}
			if !inside {
				continue // and not limited: in version 1 nothing made it necessary
			}
			_, files := homeOf(t, c, controller)
			for _, w := range step.want {
				if name, _, _ := strings.Cut(w, " "); slices.Contains(files, name) && !seen[w] {
					t.Errorf("limits %d, %d: it did not see %q:\n%v", step.memory, step.cpu, w, seen)
				}
			}
		}
		p.Exit()
	}
}

// They are written when a process is about to be started, not when it was.
func TestLimitsAreWrittenBeforeTheStart(t *testing.T) {
	c := testCgroup(t)
	c.Memory, c.CPU = 64<<20, 1500
	var p *place
	thread.Throwaway(func() {
		p = c.enter(&syscall.SysProcAttr{})
		p.close()
	})
	if len(p.warnings) > 0 {
		t.Errorf("warnings: %q", p.warnings)
	}
	for controller, want := range map[string][]string{"memory": {"67108864"}, "cpu": {"100000", "150000", "150000 100000"}} {
		dir, files := homeOf(t, c, controller)
		for _, f := range files {
			if text, err := os.ReadFile(filepath.Join(dir, f)); err != nil || !slices.Contains(want, strings.TrimSpace(string(text))) {
				t.Errorf("%s is %q, %v; want one of %q", f, text, err, want)
			}
		}
	}
}

// startedIn tells from the lines of /proc/self/cgroup whether a process is in c
// where a controller is.
func startedIn(t *testing.T, seen map[string]bool, c Cgroup, controller string) bool {
	t.Helper()
	v1, _, err := hierarchies()
	must(t, err)
	var text strings.Builder
	for l := range seen {
		text.WriteString(l + "\n")
	}
	for _, h := range v1 {
		if slices.Contains(strings.Split(h.Options, ","), controller) {
			return home(text.String(), h) == c.Parent+"/"+c.Name
		}
	}
	return seen["0::"+c.Parent+"/"+c.Name]
}

// The kernel ends what needs more memory, and counts it before the end can be seen.
func TestOOMKills(t *testing.T) {
	c := testCgroup(t)
	c.Memory = 16 << 20
	if n, err := c.OOMKills(); n != 0 || err != nil {
		t.Errorf("without a cgroup: %d, %v", n, err)
	}
	for n := range 3 {
		// Keeps all that it reads in memory, as there is no end of a line in it.
		p, _ := startScript(t, Command{Cgroup: c}, "exec tail -n 1 /dev/zero")
		ended(t, p)
		if got, err := c.OOMKills(); got != n+1 || err != nil {
			t.Errorf("%d processes were killed for memory, %v; want %d", got, err, n+1)
		}
		if got := p.Exit(); got != "killed by SIGKILL" {
			t.Errorf("it ended with %q", got)
		}
		// Another death does not count.
		p, _ = startScript(t, Command{Cgroup: c}, "kill -9 $$")
		ended(t, p)
		p.Exit()
	}
	if n, err := c.OOMKills(); n != 3 || err != nil {
		t.Errorf("in the end: %d, %v; want 3", n, err)
	}
	if n, err := (Cgroup{}).OOMKills(); n != 0 || err != nil {
		t.Errorf("of no cgroup: %d, %v", n, err)
	}
}

// What uses up its CPU time has to wait.
func TestCPULimit(t *testing.T) {
	c := testCgroup(t)
	c.CPU = 50
	p, _ := startScript(t, Command{Cgroup: c}, "while :; do :; done")
	dir, _ := homeOf(t, c, "cpu")
	tick := time.NewTicker(10 * time.Millisecond) // the kernel does not tell
	defer tick.Stop()
	for deadline := within(); ; <-tick.C {
		text, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
		must(t, err)
		if _, n, _ := strings.Cut(string(text), "nr_throttled "); strings.Trim(strings.SplitN(n, "\n", 2)[0], "0") != "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a process that never rests was never made to wait:\n%s", text)
		}
	}
	must(t, unix.Kill(p.PID, unix.SIGKILL))
	ended(t, p)
	p.Exit()
}

// A limit that cannot be had keeps no daemon from starting, and is told.
func TestUnmetLimits(t *testing.T) {
	c := testCgroup(t)
	for name, test := range map[string]struct {
		cgroup Cgroup
		want   []string
	}{
		"no cgroup": {Cgroup{Memory: 64 << 20, CPU: 500}, []string{
			"the memory limit of 67108864 bytes is not in force: the daemon has no cgroup of its own; set daemon.cgroup_parent",
			"the cpu limit of 500 thousandths of a core is not in force: the daemon has no cgroup",
		}},
		"no such name": {Cgroup{Parent: "/\x00", Name: "one", Memory: 64 << 20}, []string{"the memory limit of 67108864 bytes is not in force: "}},
		// Less than the kernel does. The other limit is in force.
		"too small": {Cgroup{Parent: c.Parent, Name: c.Name, Memory: 64 << 20, CPU: 1}, []string{"the cpu limit of 1 thousandths of a core is not in force: write "}},
		"none":      {Cgroup{Parent: c.Parent, Name: c.Name}, nil},
	} {
		p, _ := startScript(t, Command{Cgroup: test.cgroup}, "exit 7")
		ended(t, p)
		if got := p.Exit(); got != "exit status 7" {
			t.Errorf("%s: it ended with %q", name, got)
		}
		if len(p.Unmet) != len(test.want) {
			t.Errorf("%s: %q, want %q", name, p.Unmet, test.want)
			continue
		}
		for i, w := range test.want {
			if !strings.HasPrefix(p.Unmet[i], w) {
				t.Errorf("%s: %q, want %q", name, p.Unmet[i], w)
			}
			if !slices.Contains(p.Warnings, p.Unmet[i]) {
				t.Errorf("%s: not among the warnings: %q", name, p.Warnings)
			}
		}
	}
}

// In version 2 every cgroup on the way must pass a controller on.
func TestEnableController(t *testing.T) {
	_, v2, err := hierarchies()
	must(t, err)
	if len(v2) == 0 {
		t.Fatal("no cgroup file system of version 2 is mounted; mount one, on /sys/fs/cgroup/unified for example")
	}
	top := v2[0].Target
	has, err := os.ReadFile(filepath.Join(top, "cgroup.controllers"))
	must(t, err)
	passed, err := os.ReadFile(filepath.Join(top, "cgroup.subtree_control"))
	must(t, err)
	outer := filepath.Join(top, fmt.Sprintf("nydusd-enable-%d", os.Getpid()))
	parent := filepath.Join(outer, "inner")
	must(t, os.MkdirAll(parent, 0o755))
	t.Cleanup(func() {
		must(t, os.Remove(parent))
		must(t, os.Remove(outer))
		for _, controller := range strings.Fields(string(has)) {
			if !hasWord(passed, controller) {
				must(t, writeSetting(filepath.Join(top, "cgroup.subtree_control"), "-"+controller))
			}
		}
	})
	if err := enable(top, parent, "nothing"); !errors.Is(err, errNoController) || !strings.HasPrefix(err.Error(), top+": ") {
		t.Errorf("a controller that is not there: %v", err)
	}
	controllers := strings.Fields(string(has))
	if len(controllers) == 0 {
		t.Fatal("the hierarchy of version 2 has no controller at all")
	}
	for range 2 {
		must(t, enable(top, parent, controllers[0]))
	}
	for _, dir := range []string{top, outer, parent} {
		text, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
		if err != nil || !hasWord(text, controllers[0]) {
			t.Errorf("%s passes on %q, %v; want %s", dir, text, err, controllers[0])
		}
	}
}
