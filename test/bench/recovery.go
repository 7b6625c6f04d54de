package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	recoveryName = "kill, upgrade and hang of nydusd"
	watchName    = "watching and starting with many"

	// kills and readers are the conditions of the failover figures.
	kills     = 50
	killEvery = 500 * time.Millisecond
	readers   = 8
	upgrades  = 20
	// What the node has when watching is measured.
	watched        = 50
	watchFor       = time.Minute
	startSnapshots = 1000
)

// figure is one that has no peer: its target is absolute.
type figure struct {
	Name    string    `json:"name"`
	What    string    `json:"what"`
	Text    string    `json:"text"`
	Target  string    `json:"target"`
	Met     bool      `json:"met"`
	Samples []float64 `json:"samples,omitempty"`
}

func (f *figure) verdict() string {
	if f.Target == "" {
		return "–"
	}
	if f.Met {
		return "met"
	}
	return "**missed**"
}

func (r *report) figure(f figure) { r.Figures = append(r.Figures, &f) }

// recovery measures what readers in a container notice.
func (l *lab) recovery(t kit.TB) error {
	ctx := t.Context()
	l.progress.Start("%s: making the example image (once; takes a minute or two)", recoveryName)
	_, nydus, err := show.MainImage(t)
	if err != nil {
		return err
	}
	registry := kit.NewRegistry(t, kit.RegistryOptions{})
	node := kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Config: map[string]any{"log.level": "info", "mount.idle_linger": "1s"}})
	image, err := node.Pull(ctx, registry.MustPush(t, nydus, "bench/recovery:v1"), kit.PullOptions{})
	if err != nil {
		return err
	}
	c, err := node.Run(ctx, image, "recovery", kit.RunOptions{})
	if err != nil {
		return err
	}
	crowd, err := readIn(filepath.Join(c.Root(), "usr/lib"), readers)
	if err == nil {
		err = errors.Join(l.killed(ctx, node, crowd), l.upgraded(ctx, node, crowd), crowd.stop())
	}
	if err == nil {
		err = l.hung(ctx, node, registry, image)
	}
	return errors.Join(err, c.Remove(ctx))
}

// killed kills the daemon again and again.
func (l *lab) killed(ctx context.Context, node *kit.Node, crowd *crowd) error {
	var stalls []float64
	tick := time.NewTicker(killEvery)
	defer tick.Stop()
	for n := range kills {
		l.progress.Set("%s: kill %d of %d", recoveryName, n+1, kills)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		daemons := node.Daemons()
		if len(daemons) != 1 {
			return fmt.Errorf("kill %d: %d nydusd run, want 1", n, len(daemons))
		}
		at := time.Now()
		if err := end(daemons[0].PID); err != nil {
			return fmt.Errorf("kill %d: %w", n, err)
		}
		// Not what it may have answered yet.
		served := crowd.after(time.Now())
		select {
		case <-served:
		case <-time.After(within):
			return fmt.Errorf("kill %d: nothing is served after %v", n, within)
		}
		stalls = append(stalls, time.Since(at).Seconds())
	}
	median, most := quantile(stalls, 0.5), quantile(stalls, 1)
	l.report.figure(figure{
		Name: "SIGKILL of nydusd to the next byte served", Samples: stalls,
		What:   fmt.Sprintf("%d kills, %d apart, %d readers in a container compare files past the page cache; from the signal until a read that began after it is served", kills, killEvery/time.Millisecond, readers),
		Text:   fmt.Sprintf("median %.1f ms, most %.1f ms, %d of %d reads failed", median*1e3, most*1e3, crowd.failed(), crowd.reads()),
		Target: "median ≤ 60 ms, most ≤ 500 ms, 0 failed", Met: median <= 0.06 && most <= 0.5 && crowd.failed() == 0,
	})
	return nil
}

// end kills a process and waits for its end.
func end(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return err
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(within/time.Millisecond))
	if err == nil && n == 0 {
		err = fmt.Errorf("it has not ended after %v", within)
	}
	return err
}

// upgraded replaces the daemon again and again. The stall is what a reader sees: its
// slowest read.
func (l *lab) upgraded(ctx context.Context, node *kit.Node, crowd *crowd) error {
	var stalls []float64
	for n := range upgrades {
		l.progress.Set("%s: upgrade %d of %d", recoveryName, n+1, upgrades)
		crowd.slowest()
		out, err := node.Command(ctx, "nydus-snapshotter", "daemon", "upgrade", "--config", node.SnapshotterConfig(), "--all", "--format", "json").CombinedOutput()
		if err != nil {
			return fmt.Errorf("upgrade: %w: %s", err, out)
		}
		var done struct{ Done int }
		if err := json.Unmarshal(out, &done); err != nil || done.Done != 1 {
			return fmt.Errorf("upgrade: %s: %w", out, errors.Join(err, errors.New("want one daemon replaced")))
		}
		stalls = append(stalls, crowd.slowest().Seconds())
	}
	median := quantile(stalls, 0.5)
	l.report.figure(figure{
		Name: "live upgrade, stall seen by readers", Samples: stalls,
		What:   fmt.Sprintf("%d upgrades by `daemon upgrade --all` to the same version, the same readers; the slowest of their reads within each, with the comparison of what was read", upgrades),
		Text:   fmt.Sprintf("median %.1f ms, most %.1f ms, %d failed", median*1e3, quantile(stalls, 1)*1e3, crowd.failed()),
		Target: "median ≤ 50 ms", Met: median <= 0.05 && crowd.failed() == 0,
	})
	return nil
}

// hangBound is the default hang_timeout.
const hangBound = 10 * time.Second

// hangs is how often a daemon is made to hang.
const hangs = 5

// hung deletes containers whose daemon was stopped while it fetched what somebody
// waits for: a process that reads past the page cache cannot be killed then.
func (l *lab) hung(ctx context.Context, node *kit.Node, registry *kit.Registry, image containerd.Image) error {
	var took []float64
	for n := range hangs {
		l.progress.Set("%s: deletion with a daemon that hangs, %d of %d", recoveryName, n+1, hangs)
		c, err := node.Run(ctx, image, fmt.Sprintf("hung-%d", n), kit.RunOptions{})
		if err != nil {
			return err
		}
		one, err := deleted(ctx, node, registry, c, n)
		if err != nil {
			return errors.Join(err, c.Remove(context.WithoutCancel(ctx)))
		}
		took = append(took, one.Seconds())
	}
	most := quantile(took, 1)
	l.report.figure(figure{
		Name: "deletion of a container whose daemon hangs", Samples: took,
		What: fmt.Sprintf("SIGSTOP to nydusd while it fetches what a process in the container waits for past the page cache; then task, container and snapshot are deleted through containerd; %d times, default hang_timeout", hangs),
		Text: fmt.Sprintf("median %.1f s, most %.1f s", quantile(took, 0.5), most), Target: "≤ 11 s", Met: most <= (hangBound + time.Second).Seconds(),
	})
	return nil
}

// deleted stops the container's daemon in the middle of a request and returns how long
// the container's deletion takes.
func deleted(ctx context.Context, node *kit.Node, registry *kit.Registry, c *kit.Container, n int) (time.Duration, error) {
	files, err := large(filepath.Join(c.Root(), "usr"))
	if err != nil {
		return 0, err
	}
	asked, gate := make(chan struct{}, 64), make(chan struct{})
	registry.SetHook(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		asked <- struct{}{}
		<-gate
		next.ServeHTTP(w, r)
	})
	read := make(chan error, 1)
	go func() {
		// Some of them have come with others: until one has to be fetched.
		var err error
		for _, file := range files[len(files)*n/hangs:] {
			if _, _, err = c.Exec(context.WithoutCancel(ctx), "dd", "if="+strings.TrimPrefix(file, c.Root()), "of=/dev/null", "iflag=direct", "bs=64k"); err != nil {
				break
			}
		}
		read <- err
	}()
	select {
	case <-asked:
	case err := <-read:
		return 0, errors.Join(errors.New("nothing had to be fetched"), err)
	}
	for _, d := range node.Daemons() {
		if err := unix.Kill(d.PID, unix.SIGSTOP); err != nil {
			return 0, err
		}
	}
	registry.SetHook(nil)
	close(gate)
	at := time.Now()
	err = c.Remove(ctx)
	took := time.Since(at)
	<-read
	return took, err
}

// large lists the large files below dir.
func large(dir string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > 256<<10 {
			found = append(found, path)
		}
		return err
	})
	return found, err
}

// watching measures a node with many instances that does nothing.
func (l *lab) watching(t kit.TB) error {
	ctx := t.Context()
	registry := kit.NewRegistry(t, kit.RegistryOptions{})
	node := kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Config: map[string]any{"log.level": "info", "mount.idle_linger": "1s"}})
	var last containerd.Image
	var made []*kit.Container
	for n := range watched {
		l.progress.Start("%s: image %d of %d", watchName, n+1, watched)
		name := fmt.Sprintf("watch-%d", n)
		image := kit.SmallImage(t, name).MustNydus(t, kit.NydusOptions{})
		var err error
		if last, err = node.Pull(ctx, registry.MustPush(t, image, "bench/"+name+":v1"), kit.PullOptions{}); err != nil {
			return err
		}
		c, err := node.Run(ctx, last, name, kit.RunOptions{})
		if err != nil {
			return err
		}
		made = append(made, c)
	}
	err := l.idleCost(ctx, node)
	if err == nil {
		err = l.startWithMany(ctx, node, last)
	}
	return errors.Join(err, removeAll(context.WithoutCancel(ctx), made))
}

// idleCost is the processor time of the snapshotter and all that works for it.
func (l *lab) idleCost(ctx context.Context, node *kit.Node) error {
	l.progress.Set("%s: watching %d instances for %v", watchName, watched, watchFor)
	if err := quiet(ctx, node.Snapshotter.PID); err != nil {
		return err
	}
	before, err := spent(node)
	if err != nil {
		return err
	}
	at := time.Now()
	select {
	case <-time.After(watchFor):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	after, err := spent(node)
	if err != nil {
		return err
	}
	share := (after - before).Seconds() / time.Since(at).Seconds()
	l.report.figure(figure{
		Name: fmt.Sprintf("idle cost of watching %d instances", watched), Samples: []float64{share},
		What: fmt.Sprintf("processor time of the snapshotter, its holder and its children during %v in which nothing happens, as a share of one core", watchFor),
		Text: fmt.Sprintf("%.3f %% of a core", share*100), Target: "≤ 0.1 %", Met: share <= 0.001,
	})
	return nil
}

// spent sums the processor time of the snapshotter with its ended children and of
// its holder.
func spent(node *kit.Node) (time.Duration, error) {
	all, err := kit.Processes()
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, p := range all {
		if p.PID != node.Snapshotter.PID && filepath.Base(p.Exe) != "nydus-shim-hook" {
			continue
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		// utime, stime, cutime, cstime: fields 14 to 17 of proc_pid_stat(5).
		for _, field := range fields[11:15] {
			var ticks int64
			if _, err := fmt.Sscan(field, &ticks); err != nil {
				return 0, err
			}
			sum += time.Duration(ticks) * (time.Second / 100)
		}
	}
	return sum, nil
}

// startWithMany starts the snapshotter of a full node.
func (l *lab) startWithMany(ctx context.Context, node *kit.Node, image containerd.Image) error {
	l.progress.Set("%s: preparing %d snapshots", watchName, startSnapshots)
	ids, err := image.RootFS(ctx)
	if err != nil {
		return err
	}
	if err := fill(ctx, node, chain(ids), startSnapshots); err != nil {
		return err
	}
	var took []float64
	for range 5 {
		if err := node.StopSnapshotter(); err != nil {
			return err
		}
		at := time.Now()
		if err := node.StartSnapshotter(ctx); err != nil {
			return err
		}
		took = append(took, time.Since(at).Seconds())
	}
	median := quantile(took, 0.5)
	l.report.figure(figure{
		Name: fmt.Sprintf("snapshotter start with %d snapshots and %d live instances", startSnapshots, watched), Samples: took,
		What: "from exec until it accepts connections and has its holder; 5 starts",
		Text: fmt.Sprintf("median %.0f ms", median*1e3), Target: "≤ 1 s", Met: median <= 1,
	})
	return nil
}

// crowd are readers that compare files, past the page cache.
type crowd struct {
	end  chan struct{}
	done sync.WaitGroup

	mu      sync.Mutex
	count   int64
	faults  []error
	longest time.Duration
	since   time.Time // reads that began later are waited for
	waiting chan struct{}
}

// readIn starts readers of the files below dir.
func readIn(dir string, n int) (*crowd, error) {
	want, err := kit.Contents(dir, 500)
	if err != nil {
		return nil, err
	}
	c := &crowd{end: make(chan struct{})}
	for range n {
		c.done.Go(func() { c.read(want) })
	}
	return c, nil
}

func (c *crowd) read(want map[string][]byte) {
	// Else the readers leave no processor to the daemon.
	pause := time.NewTicker(2 * time.Millisecond)
	defer pause.Stop()
	for {
		for path, text := range want {
			select {
			case <-c.end:
				return
			case <-pause.C:
			}
			began := time.Now()
			c.note(began, kit.ReadPast(path, text))
		}
	}
}

func (c *crowd) note(began time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	c.longest = max(c.longest, time.Since(began))
	if err != nil {
		c.faults = append(c.faults, err)
		return
	}
	if c.waiting != nil && began.After(c.since) {
		close(c.waiting)
		c.waiting = nil
	}
}

// after is closed when a read has ended that began after a moment.
func (c *crowd) after(moment time.Time) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.since, c.waiting = moment, make(chan struct{})
	return c.waiting
}

// slowest returns the longest read that has ended since it was last asked.
func (c *crowd) slowest() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	longest := c.longest
	c.longest = 0
	return longest
}

func (c *crowd) failed() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.faults)
}

func (c *crowd) reads() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

func (c *crowd) stop() error {
	close(c.end)
	c.done.Wait()
	return errors.Join(c.faults...)
}
