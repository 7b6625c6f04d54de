package nydusd

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

// Command describes one daemon that serves images over FUSE.
type Command struct {
	// Path is the executable.
	Path string
	// Config is the configuration file, Bootstrap the image's metadata file. Without
	// both the daemon begins with no image: see AddSubmount.
	Config, Bootstrap string
	// Mountpoint is an existing, empty directory.
	Mountpoint string
	// Socket is where the daemon's API will listen; it must not exist.
	Socket string
	// Supervisor is the socket to which the daemon connects when it is told to
	// hand its filesystem over; see package custody. Empty for none.
	Supervisor string
	// ID is the daemon's name. With Supervisor it must have one, and a successor
	// the same.
	ID string
	// Successor starts a daemon that mounts nothing and has neither Config nor
	// Bootstrap: it waits to be told to fetch both from Supervisor.
	Successor bool
	// Args, when set, is the whole command line behind Path instead: for a
	// program of ours that is to live like a daemon.
	Args []string
	// Env is what the daemon's environment has beside PATH, see Environment.
	Env []string
	// Log receives standard output and error, panics included.
	Log *os.File
	// LogLevel is nydusd's; empty means info.
	LogLevel string
	// Threads is the number of FUSE threads; 0 means nydusd's default.
	Threads int
	// OOMScoreAdj is the process's; see proc_pid_oom_score_adj(5).
	OOMScoreAdj int
	// Cgroup places the process; the zero value leaves it where it is started.
	Cgroup Cgroup
	// CacheLock is inherited, so that what it locks stays locked exactly as
	// long as the process is there. May be nil.
	CacheLock *os.File
}

// Starts is in the line that stands in a daemon's log before its own, whatever its log
// level; the executable follows. Package health looks for it: the daemons of several
// generations may write to one log at a time.
func Starts(generation int) string {
	return fmt.Sprintf("mount helper: starts nydusd of generation %d: ", generation)
}

// Start starts the daemon and does not wait for it. It outlives its starter.
func Start(c Command) (*Process, error) {
	var p *Process
	var err error
	// A child inherits signal mask and cgroup from the thread that forks.
	thread.Throwaway(func() { p, err = start(c) })
	if err != nil {
		return nil, fmt.Errorf("start nydusd %s: %w", c.Path, err)
	}
	return p, nil
}

func start(c Command) (*Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	if err := blockSignals(); err != nil {
		return nil, err
	}
	// Whatever the caller of our program left open must not reach the daemon.
	if err := closeOnExec(); err != nil {
		return nil, fmt.Errorf("close inherited descriptors: %w", err)
	}
	p := &Process{FD: -1}
	attr := &syscall.SysProcAttr{Setsid: true, PidFD: &p.FD}
	place := c.Cgroup.enter(attr)
	defer place.close()

	files := []*os.File{null, c.Log, c.Log}
	if c.CacheLock != nil {
		files = append(files, c.CacheLock)
	}
	attrs := &os.ProcAttr{Dir: "/", Env: append([]string{path}, c.Env...), Files: files, Sys: attr}
	proc, err := os.StartProcess(c.Path, c.args(), attrs)
	if err != nil && attr.UseCgroupFD {
		place.refused(err)
		proc, err = os.StartProcess(c.Path, c.args(), attrs)
	}
	if err != nil {
		return nil, explain(err)
	}
	p.PID, p.Warnings, p.Unmet = proc.Pid, place.warnings, place.unmet
	p.limits(c.OOMScoreAdj)
	// Nobody has reaped it, so it is there even if it has ended already.
	if p.StartTime, err = startTime(p.PID); err == nil && p.FD < 0 {
		err = errors.New("the kernel has no pidfds: Linux 5.4 is needed")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("follow process %d: %w", p.PID, err), proc.Kill())
	}
	// It has a descriptor of its own of the process, which would stay open until
	// the garbage is collected.
	_ = proc.Release()
	return p, nil
}

func (c Command) args() []string {
	if c.Args != nil {
		return append([]string{c.Path}, c.Args...)
	}
	args := []string{c.Path, "fuse"}
	if c.Successor {
		args = append(args, "--upgrade")
	} else if c.Bootstrap != "" {
		args = append(args, "--config", c.Config, "--bootstrap", c.Bootstrap)
	}
	args = append(args, "--mountpoint", c.Mountpoint, "--apisock", c.Socket,
		// The limit is set from outside: nydusd ends when it may not raise it.
		"--rlimit-nofile", "0")
	if c.Supervisor != "" {
		args = append(args, "--supervisor", c.Supervisor, "--id", c.ID)
	}
	if c.LogLevel != "" {
		args = append(args, "--log-level", c.LogLevel)
	}
	if c.Threads > 0 {
		args = append(args, "--fuse-threads", strconv.Itoa(c.Threads))
	}
	return args
}

const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Environment keeps of an environment what nydusd's HTTP client and its panics
// understand, and nothing of the container whose mount happens to start it. A proxy's
// address may hold a password. caFile, if there is one, has the certificate authorities
// that it is to trust.
func Environment(all []string, caFile string) []string {
	env := []string{}
	if caFile != "" {
		env = append(env, certFile+"="+caFile)
	}
	// The gateway is on this machine, which a client in Go would know by itself.
	direct := []string{loopback}
	for _, e := range all {
		name, value, _ := strings.Cut(e, "=")
		switch strings.ToUpper(name) {
		case "NO_PROXY":
			// The client takes one of the two spellings.
			if value != "" && !slices.Contains(direct, value) {
				direct = append(direct, value)
			}
		case certFile:
			if caFile == "" {
				env = append(env, e)
			}
		case "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_DIR", "RUST_BACKTRACE":
			env = append(env, e)
		}
	}
	without := strings.Join(direct, ",")
	return append(env, "NO_PROXY="+without, "no_proxy="+without)
}

// certFile names the variable of both daemons' TLS library.
const certFile = "SSL_CERT_FILE"

// loopback is what is reached without a proxy, however that is written.
const loopback = "localhost,127.0.0.1,127.0.0.0/8,::1"

// closeOnExec keeps every descriptor but the standard three from what is
// executed next.
func closeOnExec() error {
	err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	// Before Linux 5.11.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// blockSignals blocks SIGINT and SIGTERM for the calling thread and what it
// starts.
func blockSignals() error {
	var set unix.Sigset_t
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
		set.Val[(sig-1)/64] |= 1 << ((sig - 1) % 64)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	return nil
}

// limits gives the process the file limit that it can have and its OOM score.
func (p *Process) limits(oomScoreAdj int) {
	var now unix.Rlimit
	if err := unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, nil, &now); err == nil {
		want := unix.Rlimit{Cur: 1 << 20, Max: max(1<<20, now.Max)}
		if unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, &want, nil) != nil {
			want = unix.Rlimit{Cur: now.Max, Max: now.Max}
			if err := unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, &want, nil); err != nil {
				p.Warnings = append(p.Warnings, fmt.Sprintf("raise the file limit to %d: %v", now.Max, err))
			}
		}
	}
	file := fmt.Sprintf("/proc/%d/oom_score_adj", p.PID)
	if err := os.WriteFile(file, []byte(strconv.Itoa(oomScoreAdj)), 0); err != nil {
		p.Warnings = append(p.Warnings, fmt.Sprintf("set oom_score_adj to %d: %v", oomScoreAdj, err))
	}
}

// explain makes the usual mistakes readable.
func explain(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w; install nydusd or set [daemon] nydusd_path", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w; is the file executable?", err)
	}
	return err
}
