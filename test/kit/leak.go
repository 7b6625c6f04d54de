package kit

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// settle is how long a leak check waits for what is on its way out.
const settle = 10 * time.Second

// Baseline records what is mounted, running and lying in /run now, and fails
// the test, after its other cleanups, unless that is so again at the end. What
// is on its way out gets ten seconds. The failure names everything that is left, and then it
// is removed, so that the next test starts clean. NewNode and NewRegistry call it.
//
// It covers the program's namespaces: every mount, every process (a nydusd, a
// shim, a forgotten child), every socket and file below /run, every directory of
// an instance there, and every cgroup below CgroupRoot. Tests that use it cannot
// run in parallel.
func Baseline(t TB) {
	t.Helper()
	BaselineWithin(t, settle)
}

// BaselineWithin is Baseline with another time for what is on its way out.
func BaselineWithin(t TB, within time.Duration) {
	t.Helper()
	if err := inside(); err != nil {
		t.Fatalf("baseline: %v", err)
	}
	before, err := capture()
	if err != nil {
		t.Fatalf("baseline: %v", err)
	}
	t.Cleanup(func() {
		if left := before.wait(within); len(left) > 0 {
			t.Errorf("left behind by %s:\n  %s", t.Name(), strings.Join(left, "\n  "))
			before.purge()
		}
	})
}

// Leaks captures now and returns a function that reports what has come since
// and is still there after at most the given time: for checks within a test.
func Leaks(t TB) func(within time.Duration) []string {
	t.Helper()
	before, err := capture()
	if err != nil {
		t.Fatalf("leaks: %v", err)
	}
	return before.wait
}

// Process is one running process.
type Process struct {
	PID     int
	PPID    int
	Exe     string // as the kernel names it; empty for a zombie
	Cmdline []string
	State   byte   // as in /proc/PID/stat: R, S, D, T, Z …
	start   string // start time: a reused pid is another process
}

func (p Process) String() string {
	return fmt.Sprintf("process %d (parent %d, state %c): %s", p.PID, p.PPID, p.State, strings.Join(p.Cmdline, " "))
}

// Processes lists every process of the namespace but the program itself and
// the namespace's first one.
func Processes() ([]Process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var list []Process
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if pid == 1 || pid == os.Getpid() {
			continue
		}
		if p, ok := readProcess(pid); ok {
			list = append(list, p)
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].PID < list[j].PID })
	return list, nil
}

// readProcess reports false for a process that has gone, and for a zombie that
// waits only for the namespace's first process.
func readProcess(pid int) (Process, bool) {
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return Process{}, false
	}
	// The name in parentheses may hold anything: what follows it is regular.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return Process{}, false
	}
	p := Process{PID: pid, State: fields[0][0], start: fields[19]}
	p.PPID, _ = strconv.Atoi(fields[1])
	p.Exe, _ = os.Readlink(dir + "/exe")
	text, _ := os.ReadFile(dir + "/cmdline")
	p.Cmdline = strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
	if p.State == 'Z' || p.State == 'X' {
		p.Cmdline = []string{"(" + string(stat[bytes.IndexByte(stat, '(')+1:bytes.LastIndexByte(stat, ')')]) + ")"}
		return p, p.PPID == os.Getpid()
	}
	return p, true
}

// DaemonProcesses lists the nydusd processes of the namespace.
func DaemonProcesses() ([]Process, error) {
	all, err := Processes()
	if err != nil {
		return nil, err
	}
	var list []Process
	for _, p := range all {
		if strings.HasPrefix(filepath.Base(p.Exe), "nydusd") && p.State != 'Z' {
			list = append(list, p)
		}
	}
	return list, nil
}

type mountKey struct {
	id     int
	target string
}

// state is what a leak check compares.
type state struct {
	mounts  map[mountKey]*mountinfo.Info
	procs   map[string]Process
	entries map[string]bool // files, sockets, links below /run, and the directories of instances
	cgroups map[string]bool // directories below CgroupRoot
}

func capture() (*state, error) {
	s := &state{map[mountKey]*mountinfo.Info{}, map[string]Process{}, map[string]bool{}, map[string]bool{}}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	for _, m := range mounts {
		s.mounts[mountKey{m.ID, m.Mountpoint}] = m
	}
	procs, err := Processes()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, p := range procs {
		s.procs[fmt.Sprintf("%d@%s", p.PID, p.start)] = p
	}
	mounted := map[string]bool{}
	for _, m := range mounts {
		mounted[m.Mountpoint] = m.FSType != "tmpfs"
	}
	_ = filepath.WalkDir("/run", func(path string, d fs.DirEntry, err error) error {
		if mounted[path] {
			return fs.SkipDir // a container's root or an image is no run-directory entry
		}
		if err == nil && !d.IsDir() && strings.HasPrefix(d.Name(), "cache-") {
			return nil // says for the whole boot that a cache directory was looked at
		}
		if err == nil && (!d.IsDir() || strings.Contains(filepath.Dir(path)+"/", "/i/")) {
			s.entries[path] = true
		}
		return nil
	})
	for _, dir := range cgroupDirs(filepath.Base(Scratch())) {
		s.cgroups[dir] = true
	}
	return s, nil
}

// keptCgroup reports whether a cgroup is one of those that stay during the run:
// its top ones and the parent of the nydusd cgroups.
func keptCgroup(dir string) bool {
	base := filepath.Base(dir)
	return base == DaemonCgroup || base == filepath.Base(Scratch())
}

// leftovers is what is in now but not in the baseline.
type leftovers struct {
	mounts  []*mountinfo.Info // deepest and newest first
	procs   []Process
	entries []string
	cgroups []string // deepest first
}

func (s *state) leftovers() (leftovers, error) {
	now, err := capture()
	if err != nil {
		return leftovers{}, err
	}
	var l leftovers
	for key, m := range now.mounts {
		if s.mounts[key] == nil {
			l.mounts = append(l.mounts, m)
		}
	}
	for key, p := range now.procs {
		if _, ok := s.procs[key]; !ok {
			l.procs = append(l.procs, p)
		}
	}
	for path := range now.entries {
		if !s.entries[path] {
			l.entries = append(l.entries, path)
		}
	}
	for dir := range now.cgroups {
		if !s.cgroups[dir] && !keptCgroup(dir) {
			l.cgroups = append(l.cgroups, dir)
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(l.cgroups)))
	sort.Slice(l.mounts, func(i, j int) bool { return l.mounts[i].ID > l.mounts[j].ID })
	sort.Slice(l.procs, func(i, j int) bool { return l.procs[i].PID < l.procs[j].PID })
	sort.Strings(l.entries)
	return l, nil
}

func (l leftovers) describe() []string {
	var lines []string
	for _, m := range l.mounts {
		lines = append(lines, fmt.Sprintf("mount %s (%s from %s, device %d:%d)", m.Mountpoint, m.FSType, m.Source, m.Major, m.Minor))
	}
	for _, p := range l.procs {
		lines = append(lines, p.String())
	}
	for _, e := range l.entries {
		lines = append(lines, "run-directory entry "+e)
	}
	for _, c := range l.cgroups {
		lines = append(lines, "cgroup "+c)
	}
	return lines
}

// wait returns what is left once nothing is, or the time is over.
func (s *state) wait(within time.Duration) []string {
	deadline := time.Now().Add(within)
	for {
		// The watch is set up before the look, so no change falls between.
		w, err := newWatch()
		if err != nil {
			return []string{err.Error()}
		}
		left, err := s.leftovers()
		if err != nil {
			w.close()
			return []string{err.Error()}
		}
		lines := left.describe()
		if len(lines) == 0 || !time.Now().Before(deadline) {
			w.close()
			return lines
		}
		if w.follow(left) {
			w.poll(time.Until(deadline))
		}
		w.close()
	}
}

// watch waits for the next change of what a leak check looks at.
type watch struct {
	mountinfo *os.File
	inotify   int
	fds       []unix.PollFd
}

func newWatch() (*watch, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	in, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("inotify: %w", err)
	}
	return &watch{f, in, []unix.PollFd{
		{Fd: int32(f.Fd()), Events: unix.POLLPRI},
		{Fd: int32(in), Events: unix.POLLIN},
	}}, nil
}

// follow adds the processes and directories of what is left. It reports false
// when one of them went meanwhile: then there is nothing to wait for.
func (w *watch) follow(l leftovers) bool {
	for _, p := range l.procs {
		fd, err := unix.PidfdOpen(p.PID, 0)
		if err != nil {
			return false
		}
		if p.State == 'Z' { // its pidfd is ready already; only its parent's wait removes it
			unix.Close(fd)
			continue
		}
		w.fds = append(w.fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for _, e := range append(l.cgroups, l.entries...) {
		_, err := unix.InotifyAddWatch(w.inotify, filepath.Dir(e), unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_DELETE_SELF)
		if err != nil {
			return false
		}
		if _, err := os.Lstat(e); err != nil {
			return false
		}
	}
	return true
}

func (w *watch) poll(within time.Duration) {
	// A zombie makes no event, hence no wait is longer than a second.
	within = min(within, time.Second)
	_, _ = unix.Poll(w.fds, int(within.Milliseconds())+1)
}

func (w *watch) close() {
	w.mountinfo.Close()
	unix.Close(w.inotify)
	for _, fd := range w.fds[2:] {
		unix.Close(int(fd.Fd))
	}
}

// purge removes by force what is left, so that the next test starts clean.
func (s *state) purge() {
	left, err := s.leftovers()
	if err != nil {
		return
	}
	for _, m := range left.mounts {
		_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH)
	}
	for _, p := range left.procs {
		_ = unix.Kill(p.PID, unix.SIGKILL)
	}
	for _, e := range slices.Backward(left.entries) { // what is in a directory comes after it
		_ = os.Remove(e)
	}
	for _, c := range left.cgroups {
		_ = unix.Rmdir(c)
	}
	s.wait(settle)
}
