package crash_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// daemonlessKills is how many there are in each cell unless CRASH_KILLS says so.
const daemonlessKills = 12

// prover is a node on which images become complete, are proven, mounted without a daemon,
// swept and fetched again, while all that takes part is killed.
type prover struct {
	*round
	want int  // kills
	all  bool // that can be killed is, and not only what has a part in this
	// evicting is a configuration with which a sweep evicts whatever is not read.
	evicting string
	counts   map[string]int
	boxes    int
}

// TestDaemonless kills serve, sweeps, helpers and daemons at random moments of an image's way
// to a mount without a daemon and back. After each, all that a container shows is compared.
func TestDaemonless(t *testing.T) {
	p := newPlan(t)
	list := autoCells(p, p.chances(3))
	if os.Getenv("CRASH_KILLS") == "" {
		p.kills = daemonlessKills
	}
	reg := newDepot(t)
	for n, s := range list {
		t.Run(s.String(), func(t *testing.T) { daemonlessCell(t, reg, s, p, uint64(300+n)) })
	}
}

// autoCells are the nodes on which the default driver is killed at: those of each style and
// mode, or two that have each of these. No other nydusd completes a cache that others use.
func autoCells(p plan, random *rand.Rand) []setup {
	list := []setup{
		{daemonNew, "helper", dedicated},
		{daemonNew, "managed", shared},
		{daemonNew, "helper", shared},
		{daemonNew, "managed", dedicated},
	}
	if p.all {
		return list
	}
	half := list[2*random.IntN(2):][:2]
	random.Shuffle(len(half), func(i, j int) { half[i], half[j] = half[j], half[i] })
	return half
}

func daemonlessCell(t *testing.T, reg *depot, s setup, p plan, purpose uint64) {
	traps := newTraps(t)
	l := newLab(t, s, reg, p.chances(purpose), traps.bin)
	r := &prover{
		round: &round{lab: l, traps: traps, spans: map[string]time.Duration{}}, want: p.kills, all: p.all,
		evicting: filepath.Join(t.TempDir(), "evicting.toml"), counts: map[string]int{},
	}
	defer func() {
		l.watch.verdict()
		t.Logf("CRASH_SEED=%d: %d kills, %v, %+v", p.seed, r.kills, r.counts, l.watch.score())
	}()
	r.configure()
	for r.more() {
		r.play()
	}
	if t.Failed() || l.watch.faulty() {
		return
	}
	for _, what := range []string{"proven", "by EROFS", "by FUSE", "evicted"} {
		if r.counts[what] == 0 {
			t.Errorf("nothing was %s: %v", what, r.counts)
		}
	}
	r.deadSockets()
	r.empty()
	l.balance()
}

func (r *prover) more() bool {
	return r.kills < r.want && !r.t.Failed() && !r.watch.faulty()
}

// configure starts the snapshotter with what this takes.
func (r *prover) configure() {
	r.t.Helper()
	template := filepath.Join(r.t.TempDir(), "template.json")
	must(r.t, os.WriteFile(template, []byte(`{"fs_prefetch": {"enable": true, "threads_count": 4, "merging_size": 1048576, "prefetch_all": true}}`), 0o644))
	for key, value := range map[string]any{
		"mount.driver": "auto", "daemon.config_template": template, "cache.grace": "0s", "cache.sweep_interval": "1s", "cache.high_watermark": "1K",
	} {
		r.node.Configure(key, value)
	}
	// Written with the watermark for sweeps of their own, then without for what serves:
	// what was just proven would be evicted before it is mounted again.
	r.must("restart snapshotter", r.node.RestartSnapshotter)
	text, err := os.ReadFile(r.node.SnapshotterConfig())
	must(r.t, err)
	must(r.t, os.WriteFile(r.evicting, text, 0o644))
	r.node.Configure("cache.high_watermark", nil)
	r.must("restart snapshotter", r.node.RestartSnapshotter)
	r.found()
}

// play takes one image all the way, once or twice.
func (r *prover) play() {
	r.t.Helper()
	r.img = r.pull()
	r.other = r.img
	for range 1 + r.random.IntN(2) {
		c := r.begin()
		r.while(c, r.killServe, r.killFetcher, r.killSweep)
		r.close(c)
		if r.proves(); !r.more() {
			break
		}
		c = r.begin()
		r.while(c, r.undaemoned()...)
		r.close(c)
		r.killSweep()
		r.sweep()
	}
	if !r.watch.faulty() {
		r.found()
		r.forget(r.img)
	}
}

// begin starts a container that is read in every way.
func (r *prover) begin() *kit.Container {
	r.t.Helper()
	r.found()
	r.boxes++
	c := r.run(r.img, fmt.Sprintf("box-%d", r.boxes))
	driver := r.driver()
	r.counts["by "+driver]++
	r.read(c, slices.DeleteFunc(wayNames(), func(way string) bool {
		return way == "direct" && driver == "EROFS" // the kernel has no O_DIRECT for what lies in files
	})...)
	return c
}

// driver is what serves the image.
func (r *prover) driver() string {
	r.t.Helper()
	g, err := r.mounted(r.img)
	must(r.t, err)
	if g.Daemonless() {
		return "EROFS"
	}
	return "FUSE"
}

// while kills something while a container is read.
func (r *prover) while(c *kit.Container, strikes ...func()) {
	r.t.Helper()
	for range 1 + r.random.IntN(2) {
		if r.watch.faulty() {
			return
		}
		r.moment(time.Second)
		strikes[r.random.IntN(len(strikes))]()
	}
	r.watch.served(c.ID())
	r.same(c)
}

// close removes a container once nothing reads it.
func (r *prover) close(c *kit.Container) {
	r.t.Helper()
	r.watch.stop(c.ID())
	r.found()
	r.remove(c)
}

// killServe kills the snapshotter: its prover, its sweeps and whatever else it does.
func (r *prover) killServe() {
	r.t.Helper()
	must(r.t, r.node.KillSnapshotter())
	r.killed("snapshotter", r.reg.inFlight.Load())
	r.must("start snapshotter", r.node.StartSnapshotter)
}

// killFetcher kills the daemon that fetches, and somebody starts its successor.
func (r *prover) killFetcher() {
	r.t.Helper()
	if r.driver() != "FUSE" {
		r.killServe()
		return
	}
	r.kept(r.img)
	r.killDaemon()
}

// undaemoned are the kills that a container without a daemon has to stand. The helper mounts
// the same image for another one.
func (r *prover) undaemoned() []func() {
	list := []func(){r.killServe, r.killHelper, r.killSweep}
	if r.all {
		list = append(list, r.killContainerd, r.killShim, r.killHolder, r.killHook)
	}
	return list
}

// killSweep kills a sweep that evicts what nothing reads.
func (r *prover) killSweep() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	cmd := r.node.Command(ctx, "nydus-snapshotter", "cache", "gc", "--config", r.evicting)
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	must(r.t, cmd.Start())
	const program = "cache gc"
	timer := time.AfterFunc(time.Duration(r.random.Int64N(int64(r.span(program)))), func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	hit := !timer.Stop() && err != nil
	r.guess(program, hit)
	if hit {
		r.killed(program, r.reg.inFlight.Load())
	} else if err != nil {
		r.t.Errorf("%s: %v: %s", program, err, said.String())
	}
}

// sweep evicts what is left, and makes sure of it.
func (r *prover) sweep() {
	r.t.Helper()
	r.until("nothing is mounted", func(context.Context) error {
		keys, err := instance.Keys(r.node.RunDir())
		if err == nil && len(keys) > 0 {
			err = fmt.Errorf("there are the instances %q", keys)
		}
		return err
	})
	r.until("all is evicted", func(ctx context.Context) error {
		out, err := r.node.Command(ctx, "nydus-snapshotter", "cache", "gc", "--config", r.evicting).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return r.cached()
	})
	r.counts["evicted"]++
}

// proves waits for the proof of the image while the snapshotter, which looks for complete
// images when it starts, is killed again and again.
func (r *prover) proves() {
	r.t.Helper()
	r.boxes++
	c := r.run(r.img, fmt.Sprintf("box-%d", r.boxes)) // what is mounted is looked at
	defer r.remove(c)
	if r.driver() == "EROFS" {
		r.counts["proven"]++
		return
	}
	for n := 0; ; n++ {
		if proofs := r.glob("*.proven"); len(proofs) > 0 {
			r.counts["proven"]++
			return
		}
		if n < 6 && r.more() {
			r.moment(1500 * time.Millisecond)
			r.killServe()
			continue
		}
		r.until("the image is proven", func(context.Context) error {
			if len(r.glob("*.proven")) == 0 {
				return errors.New("it is not")
			}
			return nil
		})
	}
}

// glob lists files of the cache.
func (r *prover) glob(pattern string) []string {
	r.t.Helper()
	list, err := filepath.Glob(filepath.Join(r.node.SnapshotterRoot(), "cache", "*", pattern))
	must(r.t, err)
	return list
}

// cached tells what is left in the cache besides the notes of what it is for.
func (r *prover) cached() error {
	var left []string
	for _, path := range r.glob("*") {
		if name := filepath.Base(path); name != "origin.json" && !strings.HasPrefix(name, unfinished) {
			left = append(left, path)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("the cache still has %q", left)
	}
	return nil
}

// unfinished begins the names of files that somebody writes, or was killed at.
const unfinished = ".new-"

// empty waits until sweeps have removed all that no image needs any more, and whoever syncs
// the cache what killed writers left, once it is so old that nobody can be at it.
func (r *prover) empty() {
	r.t.Helper()
	r.until("the cache is empty", func(context.Context) error { return r.cached() })
	left, old := r.glob(unfinished+"*"), time.Now().Add(-24*time.Hour)
	for _, path := range left {
		if err := os.Chtimes(path, old, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.t.Error(err)
		}
	}
	if len(left) == 0 {
		return
	}
	r.must("restart snapshotter", r.node.RestartSnapshotter) // which syncs when it starts
	r.found()
	r.until("the cache is tidy", func(context.Context) error {
		if left := r.glob(unfinished + "*"); len(left) > 0 {
			return fmt.Errorf("there are %q", left)
		}
		return nil
	})
}
