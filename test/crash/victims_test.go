package crash_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// victim is what is killed.
type victim struct {
	name string
	// daemon says that a nydusd dies.
	daemon bool
	// each is how many kills one image has to stand.
	each   int
	strike func(r *round)
}

// victims are all there are.
func victims() []victim {
	return []victim{
		{"helper", false, 10, (*round).killHelper},
		{"hook", false, 10, (*round).killHook},
		{"nydusd", true, 10, (*round).killDaemon},
		{"snapshotter", false, 10, (*round).killSnapshotter},
		{"nydusd+snapshotter", true, 10, (*round).killDaemonAndSnapshotter},
		{"containerd", false, 10, (*round).killContainerd},
		{"shim", false, 10, (*round).killShim},
		{"holder", false, 10, (*round).killHolder},
		{"holder+nydusd", true, 10, (*round).killHolderAndDaemon},
	}
}

// round is one image that is read through one container, while something is
// killed.
type round struct {
	*lab
	traps *traps
	spans map[string]time.Duration // of programs that are trapped
	img   containerd.Image         // that is read
	other containerd.Image         // that nobody uses
	c     *kit.Container           // that reads
	n     int                      // of passing containers

	kills, met int // and how many of them while a request was in flight
	shims      int // that were killed
}

// killed counts a kill that was about to happen.
func (r *round) killed(what string, waiting int64) {
	r.kills++
	if waiting > 0 {
		r.met++
	}
	r.did("killed %s with %d requests in flight", what, waiting)
}

// end kills a process and waits for its end. It tells whether it was there.
func (l *lab) end(p kit.Process) bool {
	l.t.Helper()
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return false
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
	if n != 1 && !errors.Is(err, unix.EINTR) {
		l.t.Errorf("%v does not end: %v\n%s", p, err, abortAll())
	}
	return true
}

// find waits for a process to be there and chooses one.
func (l *lab) find(what string, is func(kit.Process) bool) (found kit.Process) {
	l.t.Helper()
	choice := l.random.Uint64() // once, however often it takes: a seed repeats a run
	l.until("find "+what, func(context.Context) error {
		all, err := kit.Processes()
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(p kit.Process) bool { return p.State == 'Z' || !is(p) })
		if len(all) == 0 {
			return fmt.Errorf("%s: %w", what, errNone)
		}
		found = all[choice%uint64(len(all))]
		return nil
	})
	return found
}

// endOne kills a process that somebody will start if it is not there.
func (l *lab) endOne(what string, is func(kit.Process) bool) {
	l.t.Helper()
	for !l.end(l.find(what, is)) {
		l.did("%s has just ended", what)
	}
}

func isDaemon(p kit.Process) bool {
	return strings.HasPrefix(filepath.Base(p.Exe), "nydusd") && slices.Contains(p.Cmdline, "--apisock")
}

func isHolder(p kit.Process) bool {
	return filepath.Base(p.Exe) == "nydus-shim-hook" && len(p.Cmdline) > 1 && p.Cmdline[1] == "holder"
}

func isShim(id string) func(kit.Process) bool {
	return func(p kit.Process) bool {
		return filepath.Base(p.Exe) == "containerd-shim-runc-v2" && slices.Contains(p.Cmdline, id)
	}
}

func (r *round) killDaemon() {
	r.t.Helper()
	waiting := r.reg.inFlight.Load()
	r.endOne("nydusd", isDaemon)
	r.killed("nydusd", waiting)
}

func (r *round) killSnapshotter() {
	r.t.Helper()
	waiting := r.reg.inFlight.Load()
	must(r.t, r.node.KillSnapshotter())
	r.killed("snapshotter", waiting)
	r.moment(300 * time.Millisecond)
	r.must("start snapshotter", r.node.StartSnapshotter)
}

func (r *round) killDaemonAndSnapshotter() {
	r.t.Helper()
	// Found before the snapshotter dies: nobody would start another.
	p := r.find("nydusd", isDaemon)
	waiting := r.reg.inFlight.Load()
	if r.random.IntN(2) == 0 {
		r.end(p)
		must(r.t, r.node.KillSnapshotter())
	} else {
		must(r.t, r.node.KillSnapshotter())
		r.end(p)
	}
	r.killed("nydusd and snapshotter", waiting)
	r.moment(300 * time.Millisecond)
	r.must("start snapshotter", r.node.StartSnapshotter)
}

func (r *round) killHolder() {
	r.t.Helper()
	waiting := r.reg.inFlight.Load()
	r.endOne("holder", isHolder)
	r.killed("holder", waiting)
}

func (r *round) killHolderAndDaemon() {
	r.t.Helper()
	waiting := r.reg.inFlight.Load()
	if r.random.IntN(2) == 0 {
		r.endOne("holder", isHolder)
		r.endOne("nydusd", isDaemon)
	} else {
		r.endOne("nydusd", isDaemon)
		r.endOne("holder", isHolder)
	}
	r.killed("holder and nydusd", waiting)
}

// passing names a container that comes and goes, and chooses its image: the one
// that is being read, or one that must be mounted first.
func (r *round) passing() (string, containerd.Image) {
	r.n++
	if r.random.IntN(2) == 0 {
		return fmt.Sprintf("pass-%d", r.n), r.img
	}
	return fmt.Sprintf("pass-%d", r.n), r.other
}

// comesAndGoes starts a container, reads through it, and removes it.
func (r *round) comesAndGoes(id string, img containerd.Image) {
	r.t.Helper()
	r.works(r.run(img, id))
}

// works reads through a container in every way but the cold one, and removes it.
func (r *round) works(c *kit.Container) {
	r.t.Helper()
	r.read(c, "buffered", "mmap", "exec", "readdir")
	r.watch.served(c.ID())
	r.watch.stop(c.ID())
	r.remove(c)
}

// eventually is comesAndGoes where containerd may not have finished its cleaning
// up: it says then that the task exists, and the container is created once more.
func (r *round) eventually(id string, img containerd.Image) {
	r.t.Helper()
	var c *kit.Container
	r.until("run "+id+" again", func(ctx context.Context) (err error) {
		c, err = r.node.Run(ctx, img, id, kit.RunOptions{})
		return err
	})
	r.works(c)
}

// span is how long a program may take: a guess that misses correct.
func (r *round) span(program string) time.Duration {
	if r.spans[program] == 0 {
		r.spans[program] = 30 * time.Millisecond
	}
	return r.spans[program]
}

func (r *round) guess(program string, hit bool) {
	factor := 0.8
	if hit {
		factor = 1.15
	}
	r.spans[program] = min(max(time.Duration(float64(r.span(program))*factor), 2*time.Millisecond), time.Second)
}

// maxMisses bounds how often a program ends before its moment comes.
const maxMisses = 40

// killHelper kills a helper while a container is being created.
func (r *round) killHelper() {
	r.t.Helper()
	const helper = "nydus-overlayfs"
	for range maxMisses {
		id, img := r.passing()
		trap := r.traps.arm(helper, "", time.Duration(r.random.Int64N(int64(r.span(helper)))))
		waiting := r.reg.inFlight.Load()
		var c *kit.Container
		err := r.bounded("run "+id+" with a helper that is killed", func(ctx context.Context) (err error) {
			c, err = r.node.Run(ctx, img, id, kit.RunOptions{})
			return err
		})
		hit := r.traps.disarm(trap)
		r.guess(helper, hit)
		switch {
		case err == nil:
			r.works(c)
		case !hit:
			r.t.Fatalf("no helper was killed: %v", err)
		default:
			r.scrub(id)
			r.comesAndGoes(id, img)
		}
		if hit {
			r.killed("helper", waiting)
			return
		}
	}
	r.t.Fatalf("no helper was there to be killed in %d attempts", maxMisses)
}

// killHook kills one of the two hooks of a container.
func (r *round) killHook() {
	r.t.Helper()
	const hook = "nydus-shim-hook"
	for range maxMisses {
		id, img := r.passing()
		event := []string{"createRuntime", "poststop"}[r.random.IntN(2)]
		trap := r.traps.arm(hook, event, time.Duration(r.random.Int64N(int64(r.span(event)))))
		waiting := r.reg.inFlight.Load()
		var c *kit.Container
		err := r.bounded("run "+id+", "+event+" is killed", func(ctx context.Context) (err error) {
			c, err = r.node.Run(ctx, img, id, kit.RunOptions{})
			return err
		})
		if err == nil && event == "poststop" {
			// runc reports a killed poststop hook, once.
			err = r.bounded("remove "+id+", "+event+" is killed", c.Remove)
		}
		hit := r.traps.disarm(trap)
		r.guess(event, hit)
		switch {
		case err != nil && !hit:
			r.t.Fatalf("no hook was killed: %v", err)
		case err != nil && event == "poststop":
			r.remove(c)
			r.comesAndGoes(id, img)
		case err != nil:
			r.scrub(id)
			r.comesAndGoes(id, img)
		case event == "createRuntime":
			r.works(c)
		}
		if hit {
			r.killed("hook "+event, waiting)
			return
		}
	}
	r.t.Fatalf("no hook was there to be killed in %d attempts", maxMisses)
}

// killContainerd kills containerd while a container is being created or removed.
func (r *round) killContainerd() {
	r.t.Helper()
	id, img := r.passing()
	var c *kit.Container
	create := r.random.IntN(2) == 0
	what := "run " + id
	do := func(ctx context.Context) error {
		_, err := r.node.Run(ctx, img, id, kit.RunOptions{})
		return err
	}
	if !create {
		c, what = r.run(img, id), "remove "+id
		do = func(ctx context.Context) error { return c.Remove(ctx) }
	}
	done := make(chan struct{})
	go func() { // what becomes of it is in the history
		_ = r.bounded(what+" while containerd is killed", do)
		close(done)
	}()
	r.moment(500 * time.Millisecond)
	waiting := r.reg.inFlight.Load()
	must(r.t, r.node.KillContainerd())
	r.killed("containerd", waiting)
	r.must("start containerd", r.node.StartContainerd)
	<-done
	r.scrub(id)
	r.dropLeases()
	r.eventually(id, img)
}

// dropLeases deletes what a client's interrupted calls leave: a lease that would
// expire after a day, and keep all that belongs to it until then.
func (r *round) dropLeases() {
	r.t.Helper()
	r.must("drop leases", func(ctx context.Context) error {
		all, err := r.node.Client().LeasesService().List(ctx)
		for _, lease := range all {
			err = errors.Join(err, r.node.Client().LeasesService().Delete(ctx, lease, leases.SynchronousDelete))
		}
		return err
	})
}

// killShim kills the shim of a container: that one ends, and only that one.
func (r *round) killShim() {
	r.t.Helper()
	id, img := r.passing()
	c := r.run(img, id)
	r.moment(200 * time.Millisecond)
	waiting := r.reg.inFlight.Load()
	r.endOne("shim of "+id, isShim(id))
	r.shims++
	r.killed("shim", waiting)
	r.until("containerd forgets the task of "+id, func(ctx context.Context) error {
		_, err := c.Container.Task(ctx, nil)
		if errdefs.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it still has it"), err)
	})
	r.scrub(id)
	r.eventually(id, img)
}

// deadSockets removes the sockets of killed shims, which nobody else does:
// containerd's doing. No container may be left.
func (r *round) deadSockets() {
	r.t.Helper()
	sockets, err := filepath.Glob("/run/containerd/s/*")
	must(r.t, err)
	if len(sockets) > r.shims {
		r.t.Errorf("%d sockets of shims are left, %d were killed", len(sockets), r.shims)
	}
	for _, s := range sockets {
		must(r.t, os.Remove(s))
	}
}
