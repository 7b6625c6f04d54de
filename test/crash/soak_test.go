package crash_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	maxImages     = 3
	maxContainers = 5
)

// soak is a node on which everything happens, and what should be there.
type soak struct {
	*lab
	images []*soaked
	boxes  []*box
	n      int // of containers
}

// soaked is an image on the node.
type soaked struct {
	containerd.Image
}

// box is a container.
type box struct {
	*kit.Container
	img     *soaked
	running bool
}

// deed is something that happens. Which one comes next depends on the seed alone,
// so what is possible depends on what was done, and not on how long it took.
type deed struct {
	name   string
	weight int
	// possible is nil for what always is.
	possible func(s *soak) bool
	do       func(s *soak)
}

func deeds() []deed {
	return []deed{
		{"pull", 3, func(s *soak) bool { return len(s.images) < maxImages }, (*soak).getImage},
		{"forget", 2, func(s *soak) bool { return len(s.unused()) > 0 }, (*soak).dropImage},
		{"create", 8, func(s *soak) bool { return len(s.images) > 0 && len(s.boxes) < maxContainers }, (*soak).create},
		{"start", 4, func(s *soak) bool { return len(s.which(false)) > 0 }, (*soak).start},
		{"exec", 6, anyRuns, (*soak).exec},
		{"stop", 3, anyRuns, (*soak).stop},
		{"kill -9", 3, anyRuns, (*soak).kill},
		{"remove", 4, func(s *soak) bool { return len(s.boxes) > 0 }, (*soak).drop},
		{"snapshotter INT", 2, nil, func(s *soak) { s.restartSnapshotter(unix.SIGINT) }},
		{"snapshotter KILL", 2, nil, func(s *soak) { s.restartSnapshotter(unix.SIGKILL) }},
		{"containerd TERM", 1, nil, func(s *soak) { s.restartContainerd(s.node.StopContainerd) }},
		{"containerd KILL", 1, nil, func(s *soak) { s.restartContainerd(s.node.KillContainerd) }},
		{"nydusd KILL", 6, func(s *soak) bool { return len(s.served()) > 0 }, (*soak).killDaemon},
		{"nydusd STOP", 2, anyRuns, (*soak).pauseDaemon},
		{"holder KILL", 2, nil, (*soak).killHolder},
		{"upgrade", 2, anyRuns, (*soak).upgrade},
		{"nothing", 2, nil, func(s *soak) { s.moment(time.Second) }},
	}
}

func anyRuns(s *soak) bool { return len(s.which(true)) > 0 }

// TestSoak does everything that a node does, in random order.
func TestSoak(t *testing.T) {
	p := newPlan(t)
	random := p.chances(2)
	config := setup{daemonNew, []string{"helper", "managed"}[random.IntN(2)], []string{dedicated, shared}[random.IntN(2)]}
	reg := newDepot(t)
	s := &soak{lab: newLab(t, config, reg, random, "")}
	counts := map[string]int{}
	defer func() {
		s.watch.verdict()
		t.Logf("CRASH_SEED=%d, %v: %v, %+v", p.seed, config, counts, s.watch.score())
	}()
	for end := time.Now().Add(p.soak); time.Now().Before(end); {
		d := s.next()
		s.did("%s:", d.name)
		d.do(s)
		counts[d.name]++
		if t.Failed() || s.watch.faulty() {
			return
		}
	}
	s.found()
	for len(s.boxes) > 0 {
		s.removeBox(s.boxes[0])
	}
	for len(s.images) > 0 {
		s.forgetImage(s.images[0])
	}
	if !t.Failed() && !s.watch.faulty() {
		s.balance()
	}
}

// next chooses a deed.
func (s *soak) next() deed {
	var open []deed
	total := 0
	for _, d := range deeds() {
		if d.possible == nil || d.possible(s) {
			open = append(open, d)
			total += d.weight
		}
	}
	n := s.random.IntN(total)
	for _, d := range open {
		if n -= d.weight; n < 0 {
			return d
		}
	}
	panic("weights do not add up")
}

// which are the containers that run, or that do not.
func (s *soak) which(running bool) []*box {
	var list []*box
	for _, b := range s.boxes {
		if b.running == running {
			list = append(list, b)
		}
	}
	return list
}

func pick[T any](s *soak, list []T) T { return list[s.random.IntN(len(list))] }

// unused are the images without a container.
func (s *soak) unused() []*soaked {
	var list []*soaked
	for _, img := range s.images {
		if !slices.ContainsFunc(s.boxes, func(b *box) bool { return b.img == img }) {
			list = append(list, img)
		}
	}
	return list
}

// served are the images that are served.
func (s *soak) served() []*soaked {
	var list []*soaked
	for _, b := range s.which(true) {
		if !slices.Contains(list, b.img) {
			list = append(list, b.img)
		}
	}
	return list
}

func (s *soak) getImage() { s.images = append(s.images, &soaked{Image: s.pull()}) }

func (s *soak) dropImage() { s.forgetImage(pick(s, s.unused())) }

func (s *soak) forgetImage(img *soaked) {
	s.forget(img.Image)
	s.images = slices.DeleteFunc(s.images, func(i *soaked) bool { return i == img })
}

func (s *soak) create() {
	img := pick(s, s.images)
	s.n++
	b := &box{Container: s.run(img.Image, fmt.Sprintf("box-%d", s.n)), img: img}
	s.boxes = append(s.boxes, b)
	s.runs(b)
}

// runs begins to read through a container that was started.
func (s *soak) runs(b *box) {
	b.running = true
	ways := wayNames()
	s.random.Shuffle(len(ways), func(i, j int) { ways[i], ways[j] = ways[j], ways[i] })
	s.read(b.Container, ways[:3]...)
}

func (s *soak) start() {
	b := pick(s, s.which(false))
	s.must("start "+b.ID(), b.Start)
	s.runs(b)
}

func (s *soak) exec() {
	b := pick(s, s.which(true))
	name := fmt.Sprintf("%s/%02d", coldDir, s.random.IntN(coldFiles))
	s.must("exec in "+b.ID(), func(ctx context.Context) error {
		out, code, err := b.Exec(ctx, "/usr/bin/busybox", "sha256sum", "/"+name)
		if err != nil || code != 0 {
			return fmt.Errorf("exit status %d, %w: %s", code, err, out)
		}
		if want := s.reg.picture.tree[name].SHA256; len(want) != 2*sha256.Size || !strings.HasPrefix(out, want) {
			return fmt.Errorf("%s is wrong: %s, want %s", name, out, want)
		}
		return nil
	})
}

// halts ends the readers of a container that is about to end.
func (s *soak) halts(b *box) {
	if b.running {
		s.watch.stop(b.ID())
	}
	b.running = false
}

func (s *soak) stop() {
	b := pick(s, s.which(true))
	s.halts(b)
	s.must("stop "+b.ID(), b.DeleteTask)
}

func (s *soak) kill() {
	b := pick(s, s.which(true))
	s.halts(b)
	if !s.end(kit.Process{PID: b.PID()}) {
		s.t.Errorf("%s had ended before it was killed", b.ID())
	}
	s.must("delete the task of "+b.ID(), b.DeleteTask)
}

func (s *soak) drop() { s.removeBox(pick(s, s.boxes)) }

func (s *soak) removeBox(b *box) {
	s.halts(b)
	s.remove(b.Container)
	s.boxes = slices.DeleteFunc(s.boxes, func(o *box) bool { return o == b })
}

// spared waits until a process has what a successor of each daemon needs. Holder,
// snapshotter and a daemon that end together are one too many, and so is a daemon
// that dies before the one of the two that is new has its copies.
func (s *soak) spared(name string, is func(kit.Process) bool) {
	s.until("the "+name+" has its copies", func(context.Context) error {
		all, err := kit.Processes()
		if err != nil {
			return err
		}
		has := 0
		for _, p := range all {
			if is(p) {
				has += len(s.openLike(p.PID, "/dev/fuse"))
			}
		}
		want, err := s.keeps()
		if err == nil && has < want {
			err = fmt.Errorf("it has %d, want %d", has, want)
		}
		return err
	})
}

// keeps counts the daemons that can be succeeded, idle ones and those that were
// replaced too.
func (s *soak) keeps() (n int, err error) {
	keys, err := instance.Keys(s.node.RunDir())
	if err != nil {
		return 0, err
	}
	for _, key := range keys {
		rec, err := instance.ReadRecord(s.node.RunDir(), key)
		if err != nil {
			return 0, err
		}
		for _, g := range rec.Generations() {
			if g.Kept && g.Berth == nil {
				n++
			}
		}
	}
	return n, nil
}

func (s *soak) killHolder() {
	s.spared("snapshotter", func(p kit.Process) bool { return p.PID == s.node.Snapshotter.PID })
	s.endOne("holder", isHolder)
}

func (s *soak) restartSnapshotter(sig unix.Signal) {
	s.spared("holder", isHolder)
	s.must(fmt.Sprintf("end the snapshotter with %v", sig), func(context.Context) error {
		if !s.end2(s.node.Snapshotter, sig) {
			return fmt.Errorf("it does not end")
		}
		return nil
	})
	s.moment(300 * time.Millisecond)
	s.must("start snapshotter", s.node.StartSnapshotter)
	s.found()
}

// end2 ends a server with a signal.
func (s *soak) end2(d *kit.Daemon, sig unix.Signal) bool {
	if d.Signal(sig) != nil {
		return false
	}
	ended := make(chan struct{})
	go func() {
		_ = d.Err()
		close(ended)
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-ended:
		return true
	case <-timer.C:
		return false
	}
}

func (s *soak) restartContainerd(stop func() error) {
	must(s.t, stop())
	s.must("start containerd", s.node.StartContainerd)
	s.found()
}

// killDaemon kills what serves an image. It does not wait for its successor.
func (s *soak) killDaemon() {
	img := pick(s, s.served())
	s.kept(img.Image)
	s.until("kill what serves "+img.Name(), func(context.Context) error {
		g, err := s.serving(img.Image)
		if err == nil && !s.end(kit.Process{PID: g.PID}) {
			err = fmt.Errorf("nydusd %d has ended", g.PID) // its successor comes
		}
		return err
	})
}

// pauseDaemon stops what serves an image for a moment: readers wait.
func (s *soak) pauseDaemon() {
	img := pick(s, s.which(true)).img
	d := time.Duration(s.random.Int64N(int64(time.Second)))
	s.until("stop what serves "+img.Name(), func(context.Context) error {
		g, err := s.serving(img.Image)
		if err == nil {
			err = unix.Kill(g.PID, unix.SIGSTOP)
		}
		if err != nil {
			return err
		}
		s.pass(d)
		return unix.Kill(g.PID, unix.SIGCONT)
	})
}

// upgrade replaces all daemons while they serve.
func (s *soak) upgrade() {
	for _, b := range s.which(true) {
		s.kept(b.img.Image)
	}
	s.must("upgrade", func(ctx context.Context) error {
		out, err := s.node.Command(ctx, "nydus-snapshotter", "daemon", "upgrade", "--config", s.node.SnapshotterConfig(), "--all").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}
