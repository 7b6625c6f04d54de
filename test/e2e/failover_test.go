package e2e_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// succeeds tells whether the nydusd under test can be succeeded.
func succeeds(t *testing.T) bool {
	t.Helper()
	tools := kit.MustTools(t)
	if tools.Nydusd == tools.NydusdOld {
		t.Log("this nydusd cannot be succeeded: what needs that is tested with the other one")
		return false
	}
	return true
}

// holders lists the holders that run.
func holders(t *testing.T) []kit.Process {
	t.Helper()
	all, err := kit.Processes()
	if err != nil {
		t.Fatal(err)
	}
	var list []kit.Process
	for _, p := range all {
		if filepath.Base(p.Exe) == "nydus-shim-hook" && len(p.Cmdline) > 1 && p.Cmdline[1] == "holder" {
			list = append(list, p)
		}
	}
	return list
}

// keeps tells whether a holder has the descriptor of a filesystem.
func keeps(pid int) bool {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(links, func(path string) bool {
		to, err := os.Readlink(path)
		return err == nil && to == "/dev/fuse"
	})
}

// eventually waits for what makes no event.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	kit.Eventually(t, what, time.Minute, ok)
}

// listed is a line of `nydus-snapshotter ps --format json`.
type listed struct {
	Instance, State string
	PID, Restarts   int
	Kept            bool
}

func ps(t *testing.T, n *kit.Node) []listed {
	t.Helper()
	out, err := n.Command(t.Context(), "nydus-snapshotter", "ps", "--config", n.SnapshotterConfig(), "--format", "json").Output()
	if err != nil {
		t.Fatalf("ps: %v", err)
	}
	var list []listed
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("ps: %v: %s", err, out)
	}
	return list
}

// kept waits until the one nydusd there is can be succeeded.
func kept(t *testing.T, n *kit.Node) {
	t.Helper()
	eventually(t, "what a successor needs is kept", func() bool {
		now := ps(t, n)
		return len(now) == 1 && now[0].Kept
	})
}

// killDaemon kills the one nydusd there is and waits for another.
func killDaemon(t *testing.T, n *kit.Node) {
	t.Helper()
	before := ps(t, n)[0]
	if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a successor", func() bool {
		now := ps(t, n)
		return len(now) == 1 && now[0].Restarts == before.Restarts+1 && now[0].PID != before.PID
	})
}

// A container goes on with its files whatever dies or is replaced beneath it.
func TestContainersOutliveDaemons(t *testing.T) {
	if !succeeds(t) {
		return // TestDaemonThatCannotBeSucceeded
	}
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "outlive")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: linger("500ms")})
		c := run(t, n, pull(t, n, ref), "one", kit.RunOptions{})
		equal := func(after string) {
			t.Helper()
			// So that the daemon is asked.
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
				t.Error(err)
			}
			kit.EqualTrees(t, "the container after "+after, want, kit.MustWalk(t, c.Root()))
			daemonsNow(t, n, 1)
		}
		kept(t, n)
		killDaemon(t, n)
		equal("the daemon's death")

		old := holders(t)
		if len(old) != 1 {
			t.Fatalf("%d holders run, want 1: %v", len(old), old)
		}
		if err := unix.Kill(old[0].PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another holder", func() bool {
			now := holders(t)
			return len(now) == 1 && now[0].PID != old[0].PID && keeps(now[0].PID)
		})

		pid := ps(t, n)[0].PID
		if err := errors.Join(n.KillSnapshotter(), unix.Kill(pid, unix.SIGKILL)); err != nil {
			t.Fatal(err)
		}
		if err := n.StartSnapshotter(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a successor", func() bool { now := ps(t, n); return len(now) == 1 && now[0].PID != pid && now[0].State == "serving" })
		equal("the death of snapshotter and daemon")

		out, err := n.Command(t.Context(), "nydus-snapshotter", "daemon", "upgrade", "--config", n.SnapshotterConfig(), "--all").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "1/1") {
			t.Errorf("upgrade: %v: %s", err, out)
		}
		equal("an upgrade")
		remove(t, c)
		wantDaemons(t, n, 0, soon)
	})
}

// What lies on a daemon that cannot be succeeded fails, and can be deleted; what
// comes works at once.
func TestDaemonThatCannotBeSucceeded(t *testing.T) {
	if succeeds(t) {
		return // TestContainersOutliveDaemons
	}
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "restart")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: linger("500ms")})
		img := pull(t, n, ref)
		c := run(t, n, img, "one", kit.RunOptions{})
		eventually(t, "it is known that nydusd cannot be succeeded", func() bool {
			log, err := os.ReadFile(n.SnapshotterLog())
			return err == nil && strings.Contains(string(log), "cannot hand a filesystem over")
		})
		before := ps(t, n)[0]
		if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another nydusd", func() bool {
			now := ps(t, n)
			return len(now) > 0 && now[0].PID != before.PID && now[0].State != "starting"
		})
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			t.Error(err)
		}
		// Its process may have ended: its program is there, too.
		if _, err := os.ReadDir(c.Rootfs()); !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("what lies on the dead one says %v, want ENOTCONN", err)
		}
		again := run(t, n, img, "two", kit.RunOptions{})
		kit.EqualTrees(t, "the new container", want, kit.MustWalk(t, again.Root()))
		daemonsNow(t, n, 1)
		remove(t, c)
		remove(t, again)
		wantDaemons(t, n, 0, soon)
	})
}

// A holder that was stopped keeps nobody waiting and is replaced.
func TestStoppedHolder(t *testing.T) {
	if !succeeds(t) {
		return
	}
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "holder")
	n := helper24.node(t, kit.NodeConfig{Config: linger("500ms")})
	c := run(t, n, pull(t, n, ref), "one", kit.RunOptions{})
	kept(t, n)
	old := holders(t)[0]
	kit.Stop(t, old.PID)
	killDaemon(t, n)
	kit.EqualTrees(t, "the container", want, kit.MustWalk(t, c.Root()))
	eventually(t, "another holder", func() bool { now := holders(t); return len(now) == 1 && now[0].PID != old.PID })
	remove(t, c)
	wantDaemons(t, n, 0, soon)
}
