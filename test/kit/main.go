package kit

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	stageVar   = "NYDUS_KIT_STAGE"   // "", "init" or "run": see Enter
	scratchVar = "NYDUS_KIT_SCRATCH" // the run's directory on disk

	// RunRoot is the kit's own directory on the private /run.
	RunRoot = "/run/kit"
)

// Main is the TestMain of every package whose tests need root and real parts:
//
//	func TestMain(m *testing.M) { kit.Main(m) }
//
// It runs the tests as Enter does and fails them when something is left behind
// after the last one. It does not return.
//
// With ShardsVar set, it does so by several processes.
func Main(m *testing.M) {
	flag.Parse()
	if n, err := shards(); err != nil || n > 1 && os.Getenv(stageVar) == "" {
		code := 1
		if err == nil {
			code, err = runShards(n)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "kit:", err)
			code = 1
		}
		os.Exit(code)
	}
	Enter(func() int {
		before, err := capture()
		if err != nil {
			fmt.Fprintln(os.Stderr, "kit:", err)
			return 1
		}
		code := m.Run()
		if left := before.wait(settle); len(left) > 0 {
			fmt.Fprintln(os.Stderr, "kit: left behind after all tests:\n  "+strings.Join(left, "\n  "))
			return 1
		}
		return code
	})
}

// Enter re-executes the program in a process and mount namespace of its own and
// exits with what run returns there. Inside,
//
//   - nothing propagates to the machine, and every process that is still there
//     at the end, orphaned daemons included, is killed with the namespace, even
//     if the program is killed itself;
//   - /run is a fresh tmpfs; /etc and the directory behind /sbin can be written
//     to (overlays): default paths and /sbin/mount.TYPE can be used freely;
//   - orphans are adopted and reaped by the namespace's first process, not by
//     the program, so they cannot be mistaken for its own children;
//   - Scratch is a directory on disk, TMPDIR lies in it, both go at the end;
//   - the cgroup file systems and the network are the machine's.
//
// It ends the program with the reason when not root.
func Enter(run func() int) {
	var code int
	var err error
	switch os.Getenv(stageVar) {
	case "":
		code, err = outerStage()
	case "init":
		code, err = initStage()
	case "run":
		code = run()
	default:
		err = fmt.Errorf("%s has an unknown value", stageVar)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kit:", err)
		code = 1
	}
	os.Exit(code)
}

// Scratch is the run's directory on disk: for data that a tmpfs cannot hold or
// that should behave as on a real node. Empty outside of Enter.
func Scratch() string { return os.Getenv(scratchVar) }

// inside reports whether the program runs in namespaces of its own.
func inside() error {
	if os.Getenv(stageVar) != "run" {
		return errors.New("not inside kit.Enter: call kit.Main from TestMain")
	}
	return nil
}

func outerStage() (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("these tests mount file systems and run containers: they need root")
	}
	scratch, release, err := makeScratch()
	if err != nil {
		return 0, err
	}
	defer release()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), stageVar+"=init", scratchVar+"="+scratch)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig means the death of the thread
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("enter namespaces: %w", err)
	}
	forwardSignals(cmd.Process.Pid)
	err = cmd.Wait()
	removeCgroups(filepath.Base(scratch))
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// makeScratch makes the run's directory and removes those of runs that were
// killed: a living one holds a lock on its own.
func makeScratch() (dir string, release func(), err error) {
	base := os.TempDir()
	old, _ := filepath.Glob(filepath.Join(base, "nydus-kit-*"))
	for _, d := range old {
		if lock, err := lockDir(d); err == nil {
			removeCgroups(filepath.Base(d))
			_ = os.RemoveAll(d)
			lock.Close()
		}
	}
	// A run that starts at this moment may take the new directory for an old one.
	var lock *os.File
	for range 10 {
		if dir, err = os.MkdirTemp(base, "nydus-kit-"); err != nil {
			return "", nil, fmt.Errorf("make scratch directory: %w", err)
		}
		if lock, err = lockDir(dir); err == nil {
			if _, err = os.Stat(dir); err == nil {
				break
			}
			lock.Close()
		}
	}
	if err != nil {
		return "", nil, fmt.Errorf("lock scratch directory %s: %w", dir, err)
	}
	return dir, func() {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, "kit: remove scratch directory:", err)
		}
		lock.Close()
	}, nil
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func forwardSignals(pid int) {
	c := make(chan os.Signal, 8)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP)
	go func() {
		for s := range c {
			_ = unix.Kill(pid, s.(syscall.Signal))
		}
	}()
}

// initStage is the namespace's first process: it arranges the mounts, starts
// the program and reaps whatever is orphaned until the program ends.
func initStage() (int, error) {
	if err := arrangeMounts(os.Getenv(scratchVar)); err != nil {
		return 0, err
	}
	env := setenv(os.Environ(), stageVar, "run")
	env = setenv(env, "TMPDIR", filepath.Join(Scratch(), "tmp"))
	pid, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env:   env,
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s in its namespaces: %w", os.Args[0], err)
	}
	forwardSignals(pid)
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR || (err == nil && got != pid) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait for %s: %w", os.Args[0], err)
		}
		if status.Signaled() {
			return 0, fmt.Errorf("%s was ended by signal %v", os.Args[0], status.Signal())
		}
		return status.ExitStatus(), nil
	}
}

func setenv(env []string, name, value string) []string {
	kept := make([]string, 0, len(env)+1)
	for _, e := range env {
		if !strings.HasPrefix(e, name+"=") {
			kept = append(kept, e)
		}
	}
	return append(kept, name+"="+value)
}

func arrangeMounts(scratch string) error {
	sbin, err := filepath.EvalSymlinks("/sbin")
	if err != nil {
		return fmt.Errorf("resolve /sbin: %w", err)
	}
	layers := filepath.Join(scratch, "layers")
	for _, dir := range []string{layers, filepath.Join(scratch, "tmp")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("arrange mounts: %w", err)
		}
	}
	type m struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
	}
	mounts := []m{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"tmpfs", layers, "tmpfs", 0, "mode=755"},
	}
	for _, dir := range []string{"/etc", sbin} {
		up := filepath.Join(layers, strings.ReplaceAll(dir[1:], "/", "-"))
		mounts = append(mounts, m{"overlay", dir, "overlay", 0,
			fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", dir, up, up+".work")})
	}
	mounts = append(mounts, m{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"})
	for _, m := range mounts {
		if m.fstype == "overlay" {
			_, rest, _ := strings.Cut(m.data, "upperdir=")
			up, _, _ := strings.Cut(rest, ",")
			if err := errors.Join(os.Mkdir(up, 0o755), os.Mkdir(up+".work", 0o755)); err != nil {
				return fmt.Errorf("arrange mounts: %w", err)
			}
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("arrange mounts: %s on %s: %w", m.fstype, m.target, err)
		}
	}
	return os.Mkdir(RunRoot, 0o755)
}

// CgroupRoot is the cgroup below which a run's containers live, the same path
// in every hierarchy. It is removed at the end of the run.
func CgroupRoot() string { return "/" + filepath.Base(Scratch()) }

// DaemonCgroup is the name below CgroupRoot of the cgroup that holds those of
// the nydusd processes: the kit's nodes set daemon.cgroup_parent to it.
const DaemonCgroup = "nydusd"

// cgroupDirs lists a run's cgroups in all hierarchies (v1 and v2), each before
// those below it.
func cgroupDirs(name string) []string {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	tops = append(tops, "/sys/fs/cgroup/"+name)
	var dirs []string
	for _, top := range tops {
		_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	return dirs
}

// removeCgroups removes a run's cgroups. What is still in use stays: rmdir refuses it.
func removeCgroups(name string) {
	dirs := cgroupDirs(name)
	for i := len(dirs) - 1; i >= 0; i-- {
		_ = unix.Rmdir(dirs[i])
	}
}
