package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// within bounds every wait for something that should happen by itself.
const within = 20 * time.Second

// idleLinger is long enough to tell what the hook lets go from what nobody did.
const idleLinger = 5 * time.Second

// demo is one run.
type demo struct {
	out      io.Writer
	prefix   string // of the next line: a step's number
	progress *show.Progress
	result   result

	registry      *kit.Registry
	node          *kit.Node
	tree          kit.Tree // the image's files, from its source
	before, after sample   // read before and after the snapshotter is killed
	ref           string
	image         containerd.Image
	daemon        kit.Process
	first, second *kit.Container
}

// step is one part of the story; it says what it did.
type step struct {
	title string // while it runs
	run   func(*demo, context.Context) error
}

var steps = []step{
	{"pulling", (*demo).pull},
	{"starting a container", (*demo).start},
	{"starting a second container", (*demo).share},
	{"reading files", (*demo).read},
	{"killing nydusd and reading on", (*demo).succeed},
	{"killing the snapshotter and reading on", (*demo).orphan},
	{"stopping the containers", (*demo).stop},
	{"removing everything", (*demo).remove},
}

func (d *demo) run(t kit.TB) error {
	defer d.progress.Start("cleaning up")
	if err := d.prepare(t); err != nil {
		return err
	}
	for n, s := range steps {
		d.progress.Start("%s", s.title)
		d.prefix = fmt.Sprintf("\n%d. ", n+1)
		err := s.run(d, t.Context())
		d.progress.Stop()
		if err != nil {
			return fmt.Errorf("%s: %w", s.title, err)
		}
	}
	return nil // the kit's leak check follows
}

// say writes a line of the story.
func (d *demo) say(format string, args ...any) {
	d.progress.Stop()
	fmt.Fprintf(d.out, d.prefix+format+"\n", args...)
	d.prefix = ""
}

// more is a further line of the same step.
func (d *demo) more(format string, args ...any) { d.say("   "+format, args...) }

// prepare makes the image and starts what a node has.
func (d *demo) prepare(t kit.TB) error {
	d.progress.Start("making the example image (once; takes a minute or two)")
	_, image, err := show.MainImage(t)
	if err != nil {
		return err
	}
	d.progress.Start("reading the example image's source")
	if d.tree, err = image.Tree(); err != nil {
		return fmt.Errorf("read the image's source: %w", err)
	}
	d.before, d.after = samples(d.tree)
	d.progress.Start("starting registry, containerd and snapshotter")
	d.registry = kit.NewRegistry(t, kit.RegistryOptions{})
	d.ref = d.registry.MustPush(t, image, "demo/image:nydus")
	d.node = kit.NewNode(t, kit.NodeConfig{
		Snapshotter: true,
		Hook:        true,
		Config:      map[string]any{"mount.idle_linger": idleLinger.String()},
	})
	d.usePath()
	r := &d.result
	if r.Versions.Nydusd, err = nydusdVersion(t.Context(), kit.MustTools(t).Nydusd); err != nil {
		return err
	}
	version, err := d.node.Client().Version(t.Context())
	if err != nil {
		return fmt.Errorf("ask containerd for its version: %w", err)
	}
	r.Versions.Containerd, _, _ = strings.Cut(strings.TrimPrefix(version.Version, "v"), "+")
	r.Image.Bytes, r.Image.Layers, r.Image.Files = image.Size(), len(image.Layers), countFiles(d.tree)
	d.say("containerd %s, nydusd %s, and a registry of the demo's own. The image: %s in %d layers, %d files.",
		r.Versions.Containerd, r.Versions.Nydusd, show.Bytes(r.Image.Bytes), r.Image.Layers, r.Image.Files)
	return nil
}

// usePath lets this program find the mount helper, as ctr would on a node:
// containerd's client mounts an image itself to read its /etc/group.
func (d *demo) usePath() {
	for _, e := range d.node.Env() {
		if path, ok := strings.CutPrefix(e, "PATH="); ok {
			os.Setenv("PATH", path)
		}
	}
}

func (d *demo) pull(ctx context.Context) error {
	d.registry.ResetRequests()
	start := time.Now()
	image, err := d.node.Pull(ctx, d.ref, kit.PullOptions{})
	if err != nil {
		return err
	}
	d.image = image
	p := &d.result.Pull
	p.Seconds, p.Bytes, p.Daemons = seconds(time.Since(start)), d.registry.BlobTotal(), len(d.node.Daemons())
	if p.Daemons != 0 {
		return fmt.Errorf("%d nydusd run after a pull, expected none", p.Daemons)
	}
	if p.Bytes == 0 || p.Bytes > d.result.Image.Bytes/4 {
		return fmt.Errorf("the pull fetched %d of %d bytes, expected the metadata only", p.Bytes, d.result.Image.Bytes)
	}
	d.say("Pulled %s of %s (the metadata) in %s. nydusd running: none.",
		show.Bytes(p.Bytes), show.Bytes(d.result.Image.Bytes), show.Duration(time.Duration(p.Seconds)))
	return nil
}

func (d *demo) start(ctx context.Context) error {
	start := time.Now()
	var err error
	if d.first, err = d.node.Run(ctx, d.image, "first", kit.RunOptions{}); err != nil {
		return err
	}
	f := &d.result.First
	f.UpSeconds = seconds(time.Since(start))
	start = time.Now()
	out, code, err := d.first.Exec(ctx, kit.MainCommand...)
	f.ProgramSeconds, f.FetchedBytes = seconds(time.Since(start)), d.registry.BlobTotal()
	if err != nil {
		return err
	}
	if code != 0 || strings.TrimSpace(out) != "ready" {
		return fmt.Errorf("python in the container ended with %d: %s", code, out)
	}
	d.say("Container up after %s; python in it imported json, ssl, sqlite3 and more in %s.",
		show.Duration(time.Duration(f.UpSeconds)), show.Duration(time.Duration(f.ProgramSeconds)))
	if err := d.inspect(); err != nil {
		return err
	}
	v := d.result.Daemon
	d.more("nydusd was started by the mount: pid %d, RSS %s, in its own cgroup %s,", v.PID, show.Bytes(v.RSS), v.Cgroup)
	d.more("no child of the snapshotter (pid %d). Fetched from the registry so far: %s.", v.SnapshotterID, show.Bytes(f.FetchedBytes))
	return nil
}

// inspect looks at the daemon that the first mount started.
func (d *demo) inspect() (err error) {
	if d.daemon, err = oneDaemon(d.node); err != nil {
		return err
	}
	v := &d.result.Daemon
	v.PID, v.Parent, v.SnapshotterID = d.daemon.PID, d.daemon.PPID, d.node.Snapshotter.PID
	if v.RSS, err = rss(v.PID); err != nil {
		return err
	}
	if v.Cgroup, err = cgroup(v.PID); err != nil {
		return err
	}
	container, err := cgroup(d.first.PID())
	if err != nil {
		return err
	}
	if v.Parent == v.SnapshotterID {
		return fmt.Errorf("nydusd (pid %d) is a child of the snapshotter (pid %d)", v.PID, v.SnapshotterID)
	}
	if !strings.HasPrefix(v.Cgroup, filepath.Join(kit.CgroupRoot(), kit.DaemonCgroup)+"/") || v.Cgroup == container {
		return fmt.Errorf("nydusd is in cgroup %s, the container in %s: expected one of its own", v.Cgroup, container)
	}
	return nil
}

func (d *demo) share(ctx context.Context) error {
	start := time.Now()
	var err error
	if d.second, err = d.node.Run(ctx, d.image, "second", kit.RunOptions{}); err != nil {
		return err
	}
	s := &d.result.Second
	s.UpSeconds, s.Daemons = seconds(time.Since(start)), len(d.node.Daemons())
	if err := d.sameDaemon(); err != nil {
		return err
	}
	d.say("Second container of the image up after %s. It shares nydusd %d; nydusd running: %d.",
		show.Duration(time.Duration(s.UpSeconds)), d.daemon.PID, s.Daemons)
	return nil
}

// sameDaemon checks that the one daemon is still the one of the first mount.
func (d *demo) sameDaemon() error {
	now, err := oneDaemon(d.node)
	if err != nil {
		return err
	}
	if now.PID != d.daemon.PID {
		return fmt.Errorf("nydusd %d runs in place of %d", now.PID, d.daemon.PID)
	}
	return nil
}

// sampleIn reads a sample in a container and sees what it made nydusd fetch.
func (d *demo) sampleIn(ctx context.Context, c *kit.Container, s sample) (reading, error) {
	before := d.registry.BlobTotal()
	r, err := s.read(ctx, c, d.tree)
	r.FetchedBytes = d.registry.BlobTotal() - before
	return r, err
}

func (d *demo) read(ctx context.Context) (err error) {
	if d.result.Read, err = d.sampleIn(ctx, d.first, d.before); err != nil {
		return err
	}
	r := d.result.Read
	d.say("Read %d files, %s, in %s: the SHA-256 of each is that of the source.",
		r.Files, show.Bytes(r.Bytes), show.Duration(time.Duration(r.Seconds)))
	d.more("Fetched for it, neighbouring chunks included: %s.", show.Bytes(r.FetchedBytes))
	return nil
}

// succeed kills nydusd. Who reads waits for its successor.
func (d *demo) succeed(ctx context.Context) (err error) {
	if err := d.kept(ctx); err != nil {
		return err
	}
	if err := syscall.Kill(d.daemon.PID, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill nydusd %d: %w", d.daemon.PID, err)
	}
	// Whoever read first reads something new at once.
	half := len(d.after) / 2
	s := &d.result.Succeeded
	if s.reading, err = d.sampleIn(ctx, d.first, d.after[:half]); err != nil {
		return fmt.Errorf("after nydusd was killed: %w", err)
	}
	d.after = d.after[half:]
	dead := d.daemon.PID
	if d.daemon, err = oneDaemon(d.node); err != nil {
		return err
	}
	if s.PID = d.daemon.PID; s.PID == dead {
		return fmt.Errorf("nydusd %d runs, which was killed", dead)
	}
	d.say("Killed nydusd %d (SIGKILL). The containers go on: nydusd %d has its place;", dead, s.PID)
	d.more("read %d other files, %s, in %s, all as in the source.", s.Files, show.Bytes(s.Bytes), show.Duration(time.Duration(s.Seconds)))
	return nil
}

// kept waits until the snapshotter has what a successor needs: nothing tells.
func (d *demo) kept(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := d.node.Command(ctx, "nydus-snapshotter", "ps", "--config", d.node.SnapshotterConfig(), "--format", "json").Output()
		if err != nil {
			return fmt.Errorf("nydus-snapshotter ps: %w", err)
		}
		var list []struct{ Kept bool }
		if err := json.Unmarshal(out, &list); err != nil {
			return fmt.Errorf("nydus-snapshotter ps: %w", err)
		}
		if len(list) == 1 && list[0].Kept {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait until nydusd can be succeeded: %w", context.Cause(ctx))
		}
	}
}

// orphan kills the snapshotter. Nothing that runs may notice.
func (d *demo) orphan(ctx context.Context) (err error) {
	if err := d.node.KillSnapshotter(); err != nil {
		return err
	}
	d.say("Killed the snapshotter (SIGKILL). The containers go on:")
	if d.result.Orphaned, err = d.sampleIn(ctx, d.second, d.after); err != nil {
		return err
	}
	if err := d.sameDaemon(); err != nil {
		return err
	}
	r := d.result.Orphaned
	if r.FetchedBytes == 0 {
		return errors.New("reading fetched nothing from the registry: it shows nothing about nydusd")
	}
	d.more("read %d other files, %s, in %s, all as in the source; fetched for it: %s.",
		r.Files, show.Bytes(r.Bytes), show.Duration(time.Duration(r.Seconds)), show.Bytes(r.FetchedBytes))
	return nil
}

// stop ends one container after the other, the snapshotter still being dead.
func (d *demo) stop(ctx context.Context) (err error) {
	e := &d.result.End
	if e.RSS, err = rss(d.daemon.PID); err != nil {
		return err
	}
	if err := d.first.DeleteTask(ctx); err != nil {
		return err
	}
	if err := d.sameDaemon(); err != nil {
		return fmt.Errorf("after the first of two containers: %w", err)
	}
	if _, err := (d.before[:10]).read(ctx, d.second, d.tree); err != nil {
		return fmt.Errorf("after the first of two containers: %w", err)
	}
	if err := d.second.Kill(ctx, syscall.SIGKILL); err != nil {
		return err
	}
	if _, err := d.second.Wait(ctx); err != nil {
		return err
	}
	ended := time.Now()
	if err := d.second.DeleteTask(ctx); err != nil {
		return err
	}
	if err := d.node.WaitDaemons(0, within); err != nil {
		return err
	}
	gone := time.Since(ended)
	if gone >= idleLinger {
		return fmt.Errorf("nydusd went %v after the last container, expected the hook to be quicker than idle_linger, %v", gone, idleLinger)
	}
	e.GoneSeconds, e.FetchedBytes = seconds(gone), d.registry.BlobTotal()
	d.say("Stopped one container: nydusd stays for the other, RSS %s. Stopped the other:", show.Bytes(e.RSS))
	d.more("nydusd gone %s after the last container's end. The hook let the image go, its last unmount ended it.",
		show.Duration(time.Duration(e.GoneSeconds)))
	return nil
}

// remove starts the snapshotter again and takes everything away.
func (d *demo) remove(ctx context.Context) error {
	if err := d.node.StartSnapshotter(ctx); err != nil {
		return err
	}
	for _, c := range []*kit.Container{d.first, d.second} {
		if err := c.Container.Delete(ctx, containerd.WithSnapshotCleanup); err != nil {
			return fmt.Errorf("delete %s: %w", c.ID(), err)
		}
	}
	if err := d.node.RemoveImage(ctx, d.ref); err != nil {
		return err
	}
	if err := d.node.WaitRunEntries(within); err != nil {
		return err
	}
	e := d.result.End
	d.say("Started the snapshotter again and removed containers and image: no snapshot, mount or daemon is left.")
	d.more("Fetched in all: %s of %s.", show.Bytes(e.FetchedBytes), show.Bytes(d.result.Image.Bytes))
	return nil
}
