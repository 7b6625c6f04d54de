package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// within bounds every wait for something that should happen by itself.
const within = 30 * time.Second

// lab is what all works share: one registry and one containerd with both
// snapshotters, which hold the same content as a nydus and as a plain image.
type lab struct {
	options  options
	progress *show.Progress
	report   report
	rounds   progressOf

	t        kit.TB
	goTool   string // the node's PATH, which is set later, has none
	registry *kit.Registry
	node     *kit.Node
	nydus    side
	plain    side
}

// side is one of the two that are compared.
type side struct {
	snapshotter string
	image       *kit.Image
	ref         string
	pulled      containerd.Image
}

func (l *lab) run(t kit.TB) error {
	defer l.progress.Start("cleaning up")
	if err := l.setUp(t); err != nil {
		return err
	}
	l.rounds.count(l.options, works)
	for _, w := range works {
		if !l.options.wants(w.name) {
			continue
		}
		if err := l.measure(t.Context(), w); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

func (o options) wants(name string) bool { return o.only == nil || o.only.MatchString(name) }

// wantsWork tells whether one of the works is wanted.
func (o options) wantsWork() bool {
	return slices.ContainsFunc(works, func(w work) bool { return o.wants(w.name) })
}

func (l *lab) setUp(t kit.TB) error {
	l.t = t
	var err error
	if l.goTool, err = exec.LookPath("go"); err != nil {
		return fmt.Errorf("find go, for a peer: %w", err)
	}
	l.progress.Start("making the example image (once; takes a minute or two)")
	plain, nydus, err := show.MainImage(t)
	if err != nil {
		return err
	}
	l.progress.Start("starting registry, containerd and snapshotter")
	l.registry = kit.NewRegistry(t, kit.RegistryOptions{})
	l.nydus = side{snapshotter: "nydus", image: nydus, ref: l.registry.MustPush(t, nydus, "bench/image:nydus")}
	l.plain = side{snapshotter: "overlayfs", image: plain, ref: l.registry.MustPush(t, plain, "bench/image:plain")}
	l.node = kit.NewNode(t, kit.NodeConfig{
		Snapshotter: true,
		Config: map[string]any{
			"log.level":         "info",
			"mount.idle_linger": "1s", // works wait for an instance to end
		},
	})
	l.usePath()
	return nil
}

// usePath takes the node's PATH: containerd's client mounts images itself to read their
// /etc/group.
func (l *lab) usePath() {
	for _, e := range l.node.Env() {
		if path, ok := strings.CutPrefix(e, "PATH="); ok {
			os.Setenv("PATH", path)
		}
	}
}

// pull pulls both images unless they are there.
func (l *lab) pull(ctx context.Context) error {
	for _, s := range []*side{&l.nydus, &l.plain} {
		if s.pulled != nil {
			continue
		}
		var err error
		if s.pulled, err = l.node.Pull(ctx, s.ref, kit.PullOptions{Snapshotter: s.snapshotter}); err != nil {
			return err
		}
	}
	return nil
}

// empty removes both images and everything of theirs that is kept anywhere on
// the node.
func (l *lab) empty(ctx context.Context) error {
	for _, s := range []*side{&l.nydus, &l.plain} {
		if s.pulled == nil {
			continue
		}
		if err := l.node.RemoveImage(ctx, s.ref); err != nil {
			return err
		}
		s.pulled = nil
	}
	if err := l.idle(); err != nil {
		return err
	}
	if err := l.checkEmpty(ctx); err != nil {
		return err
	}
	caches, err := filepath.Glob(filepath.Join(l.node.SnapshotterRoot(), "cache", "*"))
	if err != nil {
		return err
	}
	for _, c := range caches {
		if err := os.RemoveAll(c); err != nil {
			return fmt.Errorf("empty the blob cache: %w", err)
		}
	}
	return l.dropPageCache(ctx)
}

// checkEmpty makes sure that "caches empty" is true of containerd.
func (l *lab) checkEmpty(ctx context.Context) error {
	left := 0
	for _, s := range []side{l.nydus, l.plain} {
		err := l.node.Client().SnapshotService(s.snapshotter).Walk(ctx, func(context.Context, snapshots.Info) error {
			left++
			return nil
		})
		if err != nil {
			return err
		}
	}
	err := l.node.Client().ContentStore().Walk(ctx, func(content.Info) error { left++; return nil })
	if err == nil && left > 0 {
		err = fmt.Errorf("%d snapshots and contents are left after both images were removed", left)
	}
	return err
}

// idle waits until no image is mounted.
func (l *lab) idle() error {
	return errors.Join(l.node.WaitDaemons(0, within), l.node.WaitRunEntries(within))
}

// dropPageCache empties the kernel's page cache. The registry stands for another
// machine: what it serves is read into its memory again.
func (l *lab) dropPageCache(ctx context.Context) error {
	syscall.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache: %w", err)
	}
	for _, s := range []side{l.nydus, l.plain} {
		repository, _, _ := strings.Cut(strings.TrimPrefix(s.ref, l.registry.Host+"/"), ":")
		for _, b := range append([]kit.Blob{s.image.Config}, s.image.Layers...) {
			url := "http://" + l.registry.Host + "/v2/" + repository + "/blobs/" + b.Desc.Digest.String()
			if err := fetch(ctx, url); err != nil {
				return fmt.Errorf("warm the registry: %w", err)
			}
		}
	}
	l.registry.ResetRequests()
	return nil
}

func fetch(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}
