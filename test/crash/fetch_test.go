package crash_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	// fetchKills is how many there are in a cell unless CRASH_KILLS says so.
	fetchKills = 8
	// fewKills and manyKills are how many one image has to stand before it is completed.
	fewKills, manyKills = 4, 8
	// longFetch bounds the guess of how long a command takes.
	longFetch = 5 * time.Second
	// proven is what image fetch says of an image whose next start needs no daemon.
	proven = "proven"
	// labelDownload is the annotation by which an image asks to be completed.
	labelDownload = "containerd.io/snapshot/nydus-download"
)

// fetcher is a node on which images are completed, by image fetch and in the background,
// while what does that is killed.
type fetcher struct {
	*prover
	blobs string                   // a directory that has them, for --from
	takes map[string]time.Duration // that a command is thought to take
	hits  map[string]int           // kills by what they came between
	ways  []string                 // to complete an image that have yet to come
}

// TestFetch kills image fetch, the daemons that it starts, and the snapshotter that fetches
// in the background, at random moments. What was killed is called again until the image is
// complete, and then all that a container shows without a daemon is compared.
func TestFetch(t *testing.T) {
	p := newPlan(t)
	list := autoCells(p, p.chances(4))
	if !p.all {
		list = list[:1]
	}
	if os.Getenv("CRASH_KILLS") == "" {
		p.kills = fetchKills
	}
	reg := newDepot(t)
	for n, s := range list {
		t.Run(s.String(), func(t *testing.T) { fetchCell(t, reg, s, p, uint64(400+n)) })
	}
}

func fetchCell(t *testing.T, reg *depot, s setup, p plan, purpose uint64) {
	l := newLab(t, s, reg, p.chances(purpose), "")
	f := &fetcher{
		prover: &prover{round: &round{lab: l}, want: p.kills, counts: map[string]int{}},
		blobs:  t.TempDir(), takes: map[string]time.Duration{}, hits: map[string]int{},
	}
	defer func() {
		l.watch.verdict()
		t.Logf("CRASH_SEED=%d: %d kills, %v, %v, %+v", p.seed, f.kills, f.hits, f.counts, l.watch.score())
	}()
	f.configure()
	for f.more() {
		f.play()
	}
	if t.Failed() || l.watch.faulty() {
		return
	}
	if f.kills >= 20 && (f.hits["fetching"] == 0 || f.hits["comparing"] == 0) {
		t.Errorf("%d kills met %v: none came while something was fetched, or none while it was compared", f.kills, f.hits)
	}
	f.empty()
	l.balance()
}

func (f *fetcher) configure() {
	f.t.Helper()
	for i, layer := range f.reg.picture.Layers {
		if i != f.reg.picture.Bootstrap() {
			must(f.t, os.Symlink(layer.Path, filepath.Join(f.blobs, layer.Desc.Digest.Encoded())))
		}
	}
	for key, value := range map[string]any{"mount.driver": "auto", "cache.grace": "0s", "cache.sweep_interval": "1s"} {
		f.node.Configure(key, value)
	}
	f.must("restart snapshotter", f.node.RestartSnapshotter)
	f.found()
}

// play completes one image.
func (f *fetcher) play() {
	f.t.Helper()
	if len(f.ways) == 0 {
		f.ways = []string{"by itself", "read meanwhile", "by itself", "in the background"}
		f.random.Shuffle(len(f.ways), func(i, j int) { f.ways[i], f.ways[j] = f.ways[j], f.ways[i] })
	}
	way := f.ways[0]
	f.ways = f.ways[1:]
	f.counts[way]++
	switch way {
	case "in the background":
		f.background()
	case "read meanwhile":
		f.img = f.pull()
		f.n++
		c := f.run(f.img, fmt.Sprintf("reader-%d", f.n))
		f.read(c, wayNames()...)
		f.commanded()
		f.watch.served(c.ID())
		f.same(c)
		f.close(c)
	default:
		f.img = f.pull()
		f.commanded()
	}
	if f.t.Failed() || f.watch.faulty() {
		return // what is left shows what happened
	}
	f.settled()
	f.forget(f.img)
}

// settled checks that nothing is left of those that fetched, and what a container shows
// that needs neither a daemon nor the registry.
func (f *fetcher) settled() {
	f.t.Helper()
	f.until("all that fetched has ended", func(context.Context) error {
		daemons, err := kit.DaemonProcesses()
		left := f.node.RunEntries()
		if err == nil && len(daemons)+len(left) > 0 {
			err = fmt.Errorf("there are %v and %q", daemons, left)
		}
		return err
	})
	f.found()
	f.reg.ResetRequests()
	f.n++
	c := f.run(f.img, fmt.Sprintf("box-%d", f.n))
	if driver := f.driver(); driver != "EROFS" {
		f.t.Errorf("what is complete is mounted by %s", driver)
	}
	f.same(c)
	if got := f.reg.BlobTotal(); got > 0 {
		f.t.Errorf("%d bytes were fetched of an image that is complete", got)
	}
	f.remove(c)
}

// commanded has image fetch complete the image that was pulled, and kills it on its way.
func (f *fetcher) commanded() {
	f.t.Helper()
	for end := f.kills + fewKills + f.random.IntN(1+manyKills-fewKills); f.kills < end && f.more(); {
		var args []string
		if f.random.IntN(4) == 0 {
			args = append(args, "--from", f.blobs)
		}
		if state, err := f.look(); err == nil && state.Complete() {
			if f.random.IntN(2) == 0 {
				break
			}
			args = append(args, "--verify")
		}
		f.strike(args)
		if f.random.IntN(3) == 0 {
			f.moment(700 * time.Millisecond) // the reconciler's, too
		}
	}
	if f.watch.faulty() {
		return
	}
	run := f.start()
	f.must("wait for "+run.name, run.wait)
	run.proven()
}

// command is a run of image fetch.
type command struct {
	*fetcher
	name     string
	cmd      *exec.Cmd
	out, err bytes.Buffer
	done     chan struct{} // closed when it has ended
	end      error
}

// start starts image fetch.
func (f *fetcher) start(args ...string) *command {
	f.t.Helper()
	args = append([]string{"image", "fetch", "--format", "json", "--config", f.node.SnapshotterConfig()}, args...)
	c := &command{fetcher: f, name: strings.Join(append([]string{"image fetch"}, args[6:]...), " "), done: make(chan struct{})}
	c.cmd = f.node.Command(f.t.Context(), "nydus-snapshotter", append(args, f.img.Name())...)
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.err
	must(f.t, c.cmd.Start())
	go func() {
		c.end = c.cmd.Wait()
		close(c.done)
	}()
	return c
}

func (c *command) wait(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("it does not end: %w", ctx.Err())
	}
}

// wasKilled tells whether that is how it has ended.
func (c *command) wasKilled() bool {
	var exit *exec.ExitError
	return errors.As(c.end, &exit) && !exit.Exited()
}

// proven checks that it succeeded, and found nothing wrong.
func (c *command) proven() {
	c.t.Helper()
	var list []struct {
		State    string
		Repaired []string
	}
	err := errors.Join(c.end, json.Unmarshal(c.out.Bytes(), &list))
	if err != nil || len(list) != 1 || list[0].State != proven || len(list[0].Repaired) > 0 {
		c.t.Errorf("%s: %v: %s\n%s", c.name, err, &c.out, &c.err)
	}
}

// strike starts image fetch and kills it, or what it has started, at some moment.
func (f *fetcher) strike(args []string) {
	f.t.Helper()
	run := f.start(args...)
	victims := fetchVictims[f.random.IntN(len(fetchVictims))]
	timer := time.NewTimer(f.sometime(run.name))
	defer timer.Stop()
	hit := false
	select {
	case <-run.done:
	case <-timer.C:
		hit = f.kill(run, victims)
	}
	f.must("wait for "+run.name, run.wait)
	f.learn(run.name, hit)
	switch lost := hit && slices.Equal(victims, []string{"nydusd"}); {
	case run.wasKilled():
	case lost && strings.Contains(run.out.String(), "ended before it served: killed by SIGKILL"):
		f.did("%s tells of it", run.name)
	default:
		run.proven() // it was done, or has gone on with another daemon
	}
	f.restart()
}

// fetchVictims are what is killed at the same moment, in order.
var fetchVictims = [][]string{
	{"command"}, {"command"}, {"nydusd"}, {"command", "nydusd"}, {"nydusd", "command"}, {"snapshotter", "command"}, {"command", "snapshotter"},
}

// kill kills, and tells whether that came in time. There is no run of a command when the
// snapshotter fetches.
func (f *fetcher) kill(run *command, victims []string) bool {
	f.t.Helper()
	daemons, err := f.fetching()
	must(f.t, err)
	phase, waiting := f.phase(len(daemons)), f.reg.inFlight.Load()
	hit, of := false, "a download"
	if run != nil {
		of = run.name
	}
	for _, victim := range victims {
		switch victim {
		case "command":
			_ = run.cmd.Process.Kill()
			f.must("wait for "+of, run.wait)
			hit = hit || run.wasKilled()
		case "nydusd":
			for _, d := range daemons {
				hit = f.end(d) || hit
			}
		case "snapshotter":
			must(f.t, f.node.KillSnapshotter())
			hit = hit || run == nil
		}
	}
	if hit {
		f.hits[phase]++
		f.killed(fmt.Sprintf("%s of %s, %s", strings.Join(victims, " and "), of, phase), waiting)
	}
	return hit
}

// restart starts the snapshotter if it was killed.
func (f *fetcher) restart() {
	f.t.Helper()
	if !f.node.Snapshotter.Running() {
		f.moment(300 * time.Millisecond)
		f.must("start snapshotter", f.node.StartSnapshotter)
	}
}

// fetching are the daemons that serve nobody.
func (f *fetcher) fetching() ([]kit.Process, error) {
	keys, err := instance.Keys(f.node.RunDir())
	if err != nil {
		return nil, err
	}
	serving := map[int]bool{}
	for _, key := range keys {
		rec, err := instance.ReadRecord(f.node.RunDir(), key)
		if err != nil {
			continue // it has just come, or gone
		}
		for _, g := range rec.Generations() {
			serving[g.PID] = !g.Held
		}
	}
	all, err := kit.Processes()
	return slices.DeleteFunc(all, func(p kit.Process) bool { return p.State == 'Z' || !isDaemon(p) || serving[p.PID] }), err
}

// phase names what a kill comes between.
func (f *fetcher) phase(daemons int) string {
	f.t.Helper()
	state, err := f.look()
	must(f.t, err)
	switch {
	case state.Complete():
		return "comparing"
	case f.reg.inFlight.Load() > 0:
		return "fetching"
	case daemons > 0:
		return "with nydusd"
	}
	return "without nydusd"
}

// look tells how much of the image there is.
func (f *fetcher) look() (fetch.State, error) {
	images, err := snapshot.Images(f.node.SnapshotterRoot())
	for _, im := range images {
		if im.Ref != f.img.Name() {
			continue
		}
		return fetch.Look(fetch.Image{Name: im.Ref, Bootstrap: im.Path(), Digest: im.Digest, CacheDir: f.cacheDir()})
	}
	return nil, errors.Join(fmt.Errorf("image %s: %w", f.img.Name(), errNone), err)
}

// sometime is a moment of what a command is thought to take.
func (f *fetcher) sometime(name string) time.Duration {
	if f.takes[name] == 0 {
		f.takes[name] = time.Second
	}
	return time.Duration(f.random.Int64N(int64(f.takes[name])))
}

func (f *fetcher) learn(name string, hit bool) {
	factor := 0.8
	if hit {
		factor = 1.15
	}
	f.takes[name] = min(max(time.Duration(float64(f.takes[name])*factor), 50*time.Millisecond), longFetch)
}

// background has the snapshotter complete an image, and kills it and its daemons.
func (f *fetcher) background() {
	f.t.Helper()
	ref := f.reg.fresh(f.t)
	f.must("pull "+ref, func(ctx context.Context) (err error) {
		f.img, err = f.node.Pull(ctx, ref, kit.PullOptions{Labels: map[string]string{labelDownload: "always"}})
		return err
	})
	for end := f.kills + fewKills + f.random.IntN(1+manyKills-fewKills); f.kills < end && f.more() && !f.isProven(); {
		victims := [][]string{{"snapshotter"}, {"nydusd"}, {"nydusd", "snapshotter"}, {"snapshotter", "nydusd"}}[f.random.IntN(4)]
		f.moment(2 * time.Second)
		f.kill(nil, victims)
		f.restart()
	}
	f.found()
	f.until("the image is proven", func(context.Context) error {
		if !f.isProven() {
			return errors.New("it is not")
		}
		return nil
	})
}

// isProven tells whether the image has its proof.
func (f *fetcher) isProven() bool {
	f.t.Helper()
	proofs, err := filepath.Glob(filepath.Join(f.cacheDir(), "*.proven"))
	must(f.t, err)
	return len(proofs) > 0
}

// cacheDir is where the image's blobs are cached.
func (f *fetcher) cacheDir() string {
	host, rest, _ := strings.Cut(f.img.Name(), "/")
	repository, _, _ := strings.Cut(rest, ":")
	return mountspec.CacheDir(f.node.SnapshotterRoot(), host, repository)
}
