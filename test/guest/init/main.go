// Command init is what happens in the guest of test/guest: a service that plays the
// part of a node's operator and containers, and reports. It has more names: "engine" is
// containerd, which mounts; "stand" takes nydusd's place until it has seen what nydusd
// would see; "hog" uses up a cgroup's memory.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/guest"
)

// lifetime bounds what the guest does.
const lifetime = 3 * time.Minute

func main() {
	switch filepath.Base(os.Args[0]) {
	case filepath.Base(guest.Stand):
		end(first())
	case filepath.Base(guest.Engine):
		end(engine())
	case "hog":
		end(hog(os.Args[1]))
	default:
		r := &guest.Report{}
		if err := run(r); err != nil {
			r.Fault = err.Error()
		}
		if err := send(r); err != nil {
			fmt.Fprintln(os.Stderr, "report:", err)
		}
		unix.Sync()
		fmt.Fprintln(os.Stderr, "power off:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	}
}

func end(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(r *guest.Report) error {
	ctx, cancel := context.WithTimeout(context.Background(), lifetime)
	defer cancel()
	if err := setup(r); err != nil {
		return err
	}
	err := scenario(ctx, r)
	text, _ := os.ReadFile(guest.SnapshotterLog)
	r.Log = string(text[max(0, len(text)-8000):])
	return err
}

// setup adds what the kernel and systemd leave to others.
func setup(r *guest.Report) error {
	for _, m := range []struct{ kind, target string }{{"tmpfs", "/tmp"}, {"tmpfs", "/var/lib"}, {"fusectl", "/sys/fs/fuse/connections"}} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	module, err := os.Open(guest.Module)
	if err != nil {
		return err
	}
	defer module.Close()
	if err := unix.FinitModule(int(module.Fd()), "", unix.MODULE_INIT_COMPRESSED_FILE); err != nil {
		return fmt.Errorf("load %s: %w", guest.Module, err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	r.Kernel = unix.ByteSliceToString(name.Release[:])
	return os.MkdirAll(births, 0o755)
}

// send writes the report as one line.
func send(r *guest.Report) error {
	port, err := os.OpenFile(guest.Console, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer port.Close()
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err := port.Write(append(text, '\n')); err != nil {
		return err
	}
	// The kernel drops what it has not sent yet when it goes off.
	return unix.IoctlSetInt(int(port.Fd()), unix.TCSBRK, 1)
}

// await asks again and again, as nothing tells when a record or a counter changes.
func await(ctx context.Context, what string, ok func() (bool, error)) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		done, err := ok()
		if err != nil {
			return fmt.Errorf("wait until %s: %w", what, err)
		}
		if done {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, ctx.Err())
		}
	}
}

// births is where those write that stand in for nydusd.
const births = "/run/births"

// first writes down what a process in nydusd's place sees, and becomes nydusd.
func first() error {
	args := append([]string{guest.Nydusd}, os.Args[1:]...)
	if len(args) > 1 && args[1] == "fuse" {
		if err := bear(args); err != nil {
			return err
		}
	}
	return fmt.Errorf("execute %s: %w", guest.Nydusd, unix.Exec(guest.Nydusd, args, os.Environ()))
}

func bear(args []string) error {
	home, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	b := guest.Birth{PID: os.Getpid(), Cgroup: strings.TrimSpace(string(home))}
	for _, a := range args {
		b.Successor = b.Successor || a == "--upgrade"
	}
	dir := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(b.Cgroup, "0::"))
	// Without limits the files need not be there.
	b.MemoryMax, b.CPUMax = word(filepath.Join(dir, "memory.max")), word(filepath.Join(dir, "cpu.max"))
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	// A later one sorts behind.
	return os.WriteFile(filepath.Join(births, fmt.Sprintf("%s.%020d", filepath.Base(dir), time.Now().UnixNano())), text, 0o600)
}

func word(file string) string {
	text, _ := os.ReadFile(filepath.Clean(file))
	return strings.TrimSpace(string(text))
}

// hog uses memory until the kernel has killed somebody else in the cgroup for it.
func hog(cgroup string) error {
	// Not itself.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return err
	}
	const step = 1 << 20
	for kept := [][]byte{}; ; {
		events := word(filepath.Join(cgroup, "memory.events"))
		if events == "" {
			return fmt.Errorf("%s has no memory controller any more", cgroup)
		}
		if !strings.Contains(events, "oom_kill 0") {
			return nil
		}
		if len(kept)*step > 2*guest.MemoryLimit {
			return fmt.Errorf("%d MiB were used in %s, and nobody was killed: %s", len(kept), cgroup, events)
		}
		more := make([]byte, step)
		for i := 0; i < step; i += os.Getpagesize() {
			more[i] = 1
		}
		kept = append(kept, more)
	}
}
