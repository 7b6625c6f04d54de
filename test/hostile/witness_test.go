package hostile_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// witness reads arguments and environment of every process of the namespaces
// however short its life. It uses fanotify's permission events: a process that
// opens a file waits until the witness has looked at it.
//
// What it reaches: every process that opens at least one file on the root file
// system, /etc, /sbin, /run or /sys after its exec. A dynamically linked program does
// so before its main (its libraries), a Go program in its runtime (the size of huge
// pages, in /sys). A program that opens nothing there is seen only if it lives while
// secret.processes looks. TestWitness proves both kinds.
//
// It is a process of its own: this program's runtime stops as a whole while it
// forks, and its child would wait for an answer then.
type witness struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// testimony is what a witness answers.
type testimony struct {
	Finds []string // what was found since the last question
	Seen  []string // programs looked at since the start, by the name they were called
	Error string
}

// witnessVar makes this program a witness: see TestMain.
const witnessVar = "NYDUS_TEST_WITNESS"

func newWitness(t *testing.T, secrets ...*secret) *witness {
	t.Helper()
	w := &witness{cmd: exec.Command("/proc/self/exe")}
	w.cmd.Env = append(os.Environ(), witnessVar+"=1")
	w.cmd.Stderr = os.Stderr
	out, err := w.cmd.StdoutPipe()
	if err == nil {
		w.in, err = w.cmd.StdinPipe()
	}
	if err == nil {
		err = w.cmd.Start()
	}
	if err != nil {
		t.Fatalf("watch processes: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.in.Close(), w.cmd.Wait()); err != nil {
			t.Errorf("watch processes: %v", err)
		}
	})
	w.out = bufio.NewReader(out)
	if err := json.NewEncoder(w.in).Encode(either(secrets...).forms); err != nil {
		t.Fatalf("watch processes: %v", err)
	}
	w.answer(t) // it watches
	return w
}

func (w *witness) answer(t *testing.T) testimony {
	t.Helper()
	var a testimony
	line, err := w.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &a)
	}
	if err != nil || a.Error != "" {
		t.Fatalf("watch processes: %v %s", err, a.Error)
	}
	return a
}

// take returns what was found since the last call, and the programs seen.
func (w *witness) take(t *testing.T) (finds, seen []string) {
	t.Helper()
	if _, err := w.in.Write([]byte("\n")); err != nil {
		t.Fatalf("watch processes: %v", err)
	}
	a := w.answer(t)
	return a.Finds, a.Seen
}

// observer is the witness's side.
type observer struct {
	secret secret
	fd     int
	finds  []string
	seen   map[string]bool
}

// witnessMain watches until its standard input ends. It reads the secret's forms
// from the first line; each further line asks for a testimony.
func witnessMain() int {
	in := bufio.NewReader(os.Stdin)
	o := &observer{seen: map[string]bool{}}
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &o.secret.forms)
	}
	if err == nil {
		err = o.watch()
	}
	o.testify(err)
	if err == nil {
		err = o.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		return 1
	}
	return 0
}

func (o *observer) testify(fault error) {
	slices.Sort(o.finds)
	a := testimony{Finds: slices.Compact(o.finds), Seen: slices.Sorted(maps.Keys(o.seen))}
	if fault != nil {
		a.Error = fault.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(a)
	o.finds = nil
}

func (o *observer) watch() (err error) {
	o.fd, err = unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		return fmt.Errorf("fanotify: %w (the kernel needs CONFIG_FANOTIFY_ACCESS_PERMISSIONS)", err)
	}
	sbin, err := filepath.EvalSymlinks("/sbin")
	if err != nil {
		return err
	}
	for _, path := range []string{"/", "/etc", sbin, "/run", "/sys"} {
		if err := unix.FanotifyMark(o.fd, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN_PERM, unix.AT_FDCWD, path); err != nil {
			return fmt.Errorf("fanotify mark on %s: %w", path, err)
		}
	}
	return nil
}

func (o *observer) run() error {
	buf := make([]byte, 64<<10)
	polls := []unix.PollFd{{Fd: int32(o.fd), Events: unix.POLLIN}, {Fd: 0, Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(polls, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		n, err := unix.Read(o.fd, buf)
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err := o.events(buf[:max(n, 0)]); err != nil {
			return err
		}
		if n > 0 || polls[1].Revents == 0 {
			continue
		}
		// Asked only after all events so far.
		var question [1]byte
		if n, err := unix.Read(0, question[:]); err != nil || n == 0 {
			return err
		}
		o.testify(nil)
	}
}

func (o *observer) events(buf []byte) error {
	const size = int(unsafe.Sizeof(unix.FanotifyEventMetadata{}))
	for len(buf) >= size {
		e := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&buf[0]))
		if e.Event_len < uint32(size) || int(e.Event_len) > len(buf) {
			return fmt.Errorf("event of %d bytes", e.Event_len)
		}
		if e.Fd >= 0 {
			if int(e.Pid) != os.Getpid() {
				o.look(int(e.Pid))
			}
			answer := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, uint32(e.Fd)), unix.FAN_ALLOW)
			_, err := unix.Write(o.fd, answer)
			if err = errors.Join(err, unix.Close(int(e.Fd))); err != nil {
				return err
			}
		}
		buf = buf[e.Event_len:]
	}
	return nil
}

// look runs while the process waits. It opens nothing on a watched mount.
func (o *observer) look(pid int) {
	for _, name := range []string{"cmdline", "environ"} {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/" + name)
		if err != nil {
			continue
		}
		if name == "cmdline" {
			program, _, _ := strings.Cut(string(text), "\x00")
			o.seen[filepath.Base(program)] = true
		}
		if form := o.secret.in(text); form != "" {
			shown := strings.ReplaceAll(string(text[:min(len(text), 120)]), "\x00", " ")
			o.finds = append(o.finds, fmt.Sprintf("%s of %d (%s…): %s", name, pid, shown, form))
		}
	}
}

// TestWitness plants a password in the arguments and in the environment of
// processes that end at once. Each must be found, every time.
func TestWitness(t *testing.T) {
	s := newSecret("planted")
	w := newWitness(t, s)
	helper := filepath.Join(kit.Binaries(t, "nydus-overlayfs"), "nydus-overlayfs")
	var twice string
	for name, form := range s.forms {
		if strings.HasPrefix(name, "base64 of base64") {
			twice = string(form)
		}
	}
	for round := range 20 {
		for _, c := range []struct {
			what string
			env  []string
			args []string
		}{
			{"arguments, dynamic", nil, []string{"/bin/true", s.password}},
			{"arguments, of a shell", nil, []string{"/bin/sh", "-c", ": -o " + s.password}},
			{"arguments, static", nil, []string{helper, "--version", "x" + s.password}},
			{"arguments, base64 of base64", nil, []string{helper, "--version", "x" + twice + "x"}},
			{"environment, dynamic", []string{"X=" + s.password}, []string{"/bin/true"}},
			{"environment, static", []string{"X=" + s.password}, []string{helper, "--version"}},
		} {
			run(t, c.env, c.args...)
			if finds, _ := w.take(t); len(finds) == 0 {
				t.Errorf("round %d: a password in %s was not seen", round, c.what)
			}
		}
		run(t, nil, "/bin/true", "nothing")
		if finds, _ := w.take(t); len(finds) > 0 {
			t.Errorf("round %d: seen where there is none: %q", round, finds)
		}
	}
}

// run runs a command to its end.
func run(t *testing.T, env []string, args ...string) {
	t.Helper()
	p, err := os.StartProcess(args[0], args, &os.ProcAttr{Env: env})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(); err != nil {
		t.Fatal(err)
	}
}
