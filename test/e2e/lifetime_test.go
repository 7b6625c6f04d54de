package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// smallNydus pushes a small image and returns its reference and its content.
func smallNydus(t *testing.T, r *kit.Registry, name string) (string, kit.Tree) {
	t.Helper()
	plain := kit.SmallImage(t, name)
	return r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), name+":nydus"), tree(t, plain)
}

// TestPullingStartsNothing pulls many images.
func TestPullingStartsNothing(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	const images = 20
	refs := make([]string, images)
	for i := range refs {
		refs[i], _ = smallNydus(t, r, fmt.Sprintf("image-%d", i))
	}
	eachStyle(t, func(t *testing.T, s style) {
		count := countStarts(t)
		n := s.node(t, kit.NodeConfig{Config: map[string]any{"daemon.nydusd_path": count.path, "mount.idle_linger": "1h"}})
		parallel(t, images, func(i int) error {
			_, err := n.Pull(t.Context(), refs[i], kit.PullOptions{})
			return err
		})
		daemonsNow(t, n, 0)
		imageMounts(t, 0)
		count.want(t, 0)
		if left := n.RunEntries(); len(left) > 0 {
			t.Errorf("pulling left %v in the run directory", left)
		}
		// The counter sees what a container needs.
		img := pull(t, n, refs[0])
		count.want(t, 0)
		remove(t, run(t, n, img, "one", kit.RunOptions{}))
		count.want(t, 1)
		endLinger(t, n)
	})
}

// TestManyContainersShareOneDaemon starts 64 containers of one image at once.
func TestManyContainersShareOneDaemon(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "shared")
	eachStyle(t, func(t *testing.T, s style) {
		const containers = 64
		count := countStarts(t)
		n := s.node(t, kit.NodeConfig{Config: map[string]any{"daemon.nydusd_path": count.path, "mount.idle_linger": "1h"}})
		img := pull(t, n, ref)
		list := make([]*kit.Container, containers)
		parallel(t, containers, func(i int) (err error) {
			list[i], err = tryRun(t, n, img, fmt.Sprintf("c%d", i), kit.RunOptions{})
			return err
		})
		daemonsNow(t, n, 1)
		imageMounts(t, 1)
		count.want(t, 1)
		for _, c := range list[:4] {
			kit.EqualTrees(t, "the view of "+c.ID(), want, kit.MustWalk(t, c.Root()))
		}
		parallel(t, containers, func(i int) error { return list[i].Remove(t.Context()) })
		count.want(t, 1)
		endLinger(t, n)
	})
}

// TestDaemonEnds ends containers in every way there is; the daemon always goes.
func TestDaemonEnds(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "ends")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: linger("500ms")})
		img := pull(t, n, ref)
		t.Run("process killed", func(t *testing.T) {
			c := run(t, n, img, "killed", kit.RunOptions{})
			if err := unix.Kill(c.PID(), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if code, err := wait(t, c); code != 137 || err != nil {
				t.Errorf("the killed container ended with %d, %v", code, err)
			}
			if err := c.DeleteTask(t.Context()); err != nil {
				t.Error(err)
			}
			wantDaemons(t, n, 0, soon)
			remove(t, c)
		})
		t.Run("program ends", func(t *testing.T) {
			c := run(t, n, img, "program", kit.RunOptions{Args: []string{"busybox", "true"}})
			if code, err := wait(t, c); code != 0 || err != nil {
				t.Errorf("the container ended with %d, %v", code, err)
			}
			remove(t, c)
			wantDaemons(t, n, 0, soon)
		})
		t.Run("shim killed", func(t *testing.T) {
			c := run(t, n, img, "orphan", kit.RunOptions{})
			killShim(t, n, c)
			within := soon
			if s.mount == "managed" {
				// Of a task whose shim is gone containerd's mount manager lets go when
				// garbage is collected, some time after the container has gone: the
				// longer that took last time, the later it is done again.
				remove(t, c)
				within = 3 * time.Minute
			}
			wantDaemons(t, n, 0, within)
			if s.mount != "managed" {
				remove(t, c)
			}
		})
		t.Run("snapshotter down meanwhile", func(t *testing.T) {
			c := run(t, n, img, "meanwhile", kit.RunOptions{})
			if err := n.KillSnapshotter(); err != nil {
				t.Fatal(err)
			}
			if err := c.DeleteTask(t.Context()); err != nil {
				t.Error(err)
			}
			daemonsNow(t, n, 1) // nobody is there to let it go
			startSnapshotter(t, n, img)
			wantDaemons(t, n, 0, soon)
			remove(t, c)
		})
		t.Run("started again", func(t *testing.T) {
			c := run(t, n, img, "again", kit.RunOptions{})
			if err := c.DeleteTask(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantDaemons(t, n, 0, soon)
			if err := again(t, n, func() error { return c.Start(t.Context()) }); err != nil {
				t.Fatal(err)
			}
			if out := exec(t, c, "busybox", "cat", "/name"); out != "ends" {
				t.Errorf("/name is %q", out)
			}
			remove(t, c)
			wantDaemons(t, n, 0, soon)
		})
	})
}

func wait(t *testing.T, c *kit.Container) (uint32, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	return c.Wait(ctx)
}

// killShim kills a container's shim and waits until containerd has cleaned up.
func killShim(t *testing.T, n *kit.Node, c *kit.Container) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	deleted, failed := n.Client().EventService().Subscribe(ctx, `topic=="/tasks/delete"`)
	all, err := kit.Processes()
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, p := range all {
		if filepath.Base(p.Exe) == "containerd-shim-runc-v2" && slices.Contains(p.Cmdline, c.ID()) {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			killed++
		}
	}
	if killed != 1 {
		t.Fatalf("%d shims of %s", killed, c.ID())
	}
	select {
	case <-deleted:
	case err := <-failed:
		t.Fatalf("containerd does not clean up after a killed shim: %v", err)
	}
	until(t, "containerd forgets the task of a killed shim", func(ctx context.Context) error {
		_, err := c.Container.Task(ctx, nil)
		if errdefs.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it still has it"), err) // the event comes a moment before
	})
	// The socket of a killed shim stays for ever: containerd's doing.
	sockets, err := filepath.Glob("/run/containerd/s/*")
	if err != nil || len(sockets) != 1 {
		t.Fatalf("the sockets of shims: %v, %v; want the killed one's", sockets, err)
	}
	if err := os.Remove(sockets[0]); err != nil {
		t.Error(err)
	}
}

// startSnapshotter starts the snapshotter and waits until containerd, which backs
// off from a dead one for some seconds, has found it.
func startSnapshotter(t *testing.T, n *kit.Node, img containerd.Image) {
	t.Helper()
	if err := n.StartSnapshotter(t.Context()); err != nil {
		t.Fatal(err)
	}
	diffs, err := img.RootFS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	until(t, "containerd finds the snapshotter again", func(ctx context.Context) error {
		_, err := n.Client().SnapshotService("nydus").Stat(ctx, identity.ChainID(diffs).String())
		return err
	})
}

// until repeats a question for whose answer no event exists.
func until(t *testing.T, what string, ask func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx)
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within %v: %v", what, soon, err)
		}
	}
}

// TestHook ends a container while the snapshotter is down: the hook lets the
// daemon go at once.
func TestHook(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "hook")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Hook: true, Config: linger("1h")})
		img := pull(t, n, ref)
		first, second := run(t, n, img, "first", kit.RunOptions{}), run(t, n, img, "second", kit.RunOptions{})
		if err := n.KillSnapshotter(); err != nil {
			t.Fatal(err)
		}
		remove(t, first)
		exec(t, second, "busybox", "cat", "/data")
		daemonsNow(t, n, 1)
		begin := time.Now()
		remove(t, second)
		wantDaemons(t, n, 0, soon) // the linger is an hour
		t.Logf("gone %v after the container", time.Since(begin).Round(time.Millisecond))
	})
}

// TestSnapshotterKilled works with containers while the snapshotter is dead.
func TestSnapshotterKilled(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := coldImage(t)
	want := tree(t, plain)
	ref := r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "survivor:nydus")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		c := run(t, n, img, "survivor", kit.RunOptions{})
		if err := n.KillSnapshotter(); err != nil {
			t.Fatal(err)
		}
		r.ResetRequests()
		if out := exec(t, c, "busybox", "sha256sum", "/cold"); out != want["cold"].SHA256+"  /cold\n" {
			t.Errorf("cold data is wrong: %s", out)
		}
		if got := r.BlobTotal(); got < want["cold"].Size/2 {
			t.Errorf("the data was not cold: %d bytes were fetched", got)
		}
		// Until containerd has noticed that its connection was closed, it says no more
		// than that.
		until(t, "the error of a new container without snapshotter names its socket", func(ctx context.Context) error {
			_, err := n.Run(ctx, img, "new", kit.RunOptions{})
			if err == nil {
				t.Fatal("a new container came up without snapshotter")
			}
			if !strings.Contains(err.Error(), n.SnapshotterAddress()) {
				return err
			}
			return nil
		})
		if err := c.DeleteTask(t.Context()); err != nil {
			t.Errorf("stop without snapshotter: %v", err)
		}
		remove(t, c)
		startSnapshotter(t, n, img)
		c = run(t, n, img, "new", kit.RunOptions{})
		if out := exec(t, c, "busybox", "cat", "/etc/passwd"); !strings.HasPrefix(out, "root:") {
			t.Errorf("/etc/passwd is %q", out)
		}
		remove(t, c)
		wantDaemons(t, n, 0, soon)
		noSnapshots(t, n, ref)
	})
}

// noSnapshots removes the image and checks that nothing of it is left: no removal
// that failed meanwhile holds up later ones.
func noSnapshots(t *testing.T, n *kit.Node, ref string) {
	t.Helper()
	forget(t, n, ref)
	left, err := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "snapshots", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("snapshots are left after the image: %v, %v", left, err)
	}
}

// TestContainerdRestarts restarts containerd under running containers.
func TestContainerdRestarts(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "restart")
	eachStyle(t, func(t *testing.T, s style) {
		count := countStarts(t)
		n := s.node(t, kit.NodeConfig{Config: map[string]any{"daemon.nydusd_path": count.path, "mount.idle_linger": "1h"}})
		img := pull(t, n, ref)
		stays := run(t, n, img, "stays", kit.RunOptions{})
		if err := n.RestartContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		killed := run(t, n, img, "started-between", kit.RunOptions{})
		if err := errors.Join(n.KillContainerd(), n.StartContainerd(t.Context())); err != nil {
			t.Fatal(err)
		}
		daemonsNow(t, n, 1)
		imageMounts(t, 1)
		for _, c := range []*kit.Container{stays, killed} {
			if out := exec(t, c, "busybox", "sha256sum", "/data"); out != want["data"].SHA256+"  /data\n" {
				t.Errorf("%s reads %s", c.ID(), out)
			}
		}
		remove(t, killed)
		later := run(t, n, img, "later", kit.RunOptions{})
		exec(t, stays, "busybox", "cat", "/etc/passwd")
		daemonsNow(t, n, 1)
		remove(t, stays)
		exec(t, later, "busybox", "cat", "/etc/group")
		remove(t, later)
		count.want(t, 1)
		endLinger(t, n)
	})
}

// TestDaemonKilledWhileIdle kills the daemon of an image that nobody uses just
// now: the next container gets another one, and mounts do not pile up.
func TestDaemonKilledWhileIdle(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, want := smallNydus(t, r, "idle")
	eachStyle(t, func(t *testing.T, s style) {
		config := linger("1h")
		config["daemon.recover_policy"] = "none" // else there is another before it is wanted
		n := s.node(t, kit.NodeConfig{Config: config})
		img := pull(t, n, ref)
		for range 3 {
			c := run(t, n, img, "one", kit.RunOptions{})
			kit.EqualTrees(t, "the container's view", want, kit.MustWalk(t, c.Root()))
			imageMounts(t, 1)
			remove(t, c)
			daemons := n.Daemons()
			if len(daemons) != 1 {
				t.Fatalf("%d nydusd linger, want 1: %v", len(daemons), daemons)
			}
			if err := unix.Kill(daemons[0].PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			wantDaemons(t, n, 0, soon)
		}
		// The dead one goes as well, with the linger.
		endLinger(t, n)
		if err := n.WaitRunEntries(soon); err != nil {
			t.Error(err)
		}
		imageMounts(t, 0)
	})
}

// TestRunningContainersKeepTheirImage lets the linger pass while a container runs:
// the next one of the same image still shares its daemon.
func TestRunningContainersKeepTheirImage(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "kept")
	otherRef, _ := smallNydus(t, r, "other")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: linger("10ms")})
		img, other := pull(t, n, ref), pull(t, n, otherRef)
		first := run(t, n, img, "first", kit.RunOptions{})
		// Another image that came later and has been let go: the linger is over.
		remove(t, run(t, n, other, "other", kit.RunOptions{}))
		wantDaemons(t, n, 1, soon)
		second := run(t, n, img, "second", kit.RunOptions{})
		daemonsNow(t, n, 1)
		imageMounts(t, 1)
		remove(t, first)
		exec(t, second, "busybox", "cat", "/data")
		remove(t, second)
		wantDaemons(t, n, 0, soon)
	})
}

// TestDaemonWithoutAPISharesItsImage starts a container while nydusd serves the
// image but does not listen at its API, as in the first milliseconds of its life:
// that is no reason for another daemon.
func TestDaemonWithoutAPISharesItsImage(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "silent")
	n := helper24.node(t, kit.NodeConfig{})
	img := pull(t, n, ref)
	first := run(t, n, img, "first", kit.RunOptions{})
	daemons := n.Daemons()
	if len(daemons) != 1 {
		t.Fatalf("%d nydusd run, want 1: %v", len(daemons), daemons)
	}
	option := slices.Index(daemons[0].Cmdline, "--apisock")
	if err := os.Remove(daemons[0].Cmdline[option+1]); err != nil {
		t.Fatal(err)
	}
	second := run(t, n, img, "second", kit.RunOptions{})
	daemonsNow(t, n, 1)
	remove(t, first)
	remove(t, second)
	wantDaemons(t, n, 0, soon)
}
