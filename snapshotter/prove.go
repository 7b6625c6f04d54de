package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/containerd/log"
	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// proveRate is how many bytes a second are read to compare blobs with their digests. It is
// done once for each image, beside the containers' own reads.
const proveRate = 64 << 20

// newProver is for all who prove in the background: together they read no faster, and what
// one compares the others do not.
func newProver() prove.Prover {
	return prove.Prover{Rate: prove.NewRate(proveRate), Turn: prove.NewTurn()}
}

// relist is how often the pulled images are listed that nobody said anything about.
const relist = 5 * time.Minute

// proveImages finds images that are complete, so that their next start needs no daemon.
func proveImages(cfg config.Config, pulled *pulled, prover prove.Prover) func(context.Context) error {
	b := prove.Background{
		Root: cfg.Root,
		Images: func(ctx context.Context) ([]prove.Image, error) {
			// The next start of what runs comes first, and a container may live longer
			// than its image.
			running, err := mountedImages(cfg.RunDir)
			others, failed := pulled.images(ctx)
			return append(running, others...), errors.Join(err, failed)
		},
		Prover: prover,
		Log:    slog.Default(),
	}
	return func(ctx context.Context) error {
		if err := rootfs.ProbeEROFS(cfg.Root); err != nil {
			// With auto it is no fault of anybody's.
			level := log.InfoLevel
			if cfg.Mount.Driver == mountspec.DriverEROFS {
				level = log.WarnLevel
			}
			log.G(ctx).WithError(err).WithField("driver", cfg.Mount.Driver).Log(level, "this node cannot serve images without nydusd")
			<-ctx.Done()
			return nil
		}
		return b.Run(ctx)
	}
}

// mountedImages lists the images that are mounted, and what is known of each.
func mountedImages(runDir string) ([]prove.Image, error) {
	keys, err := instance.Keys(runDir)
	if err != nil {
		return nil, err
	}
	var images []prove.Image
	var errs []error
	for _, key := range keys {
		rec, err := instance.ReadRecord(runDir, key)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		case rec.Current == nil || !rec.Current.Ready || rec.Current.Shared || rec.Current.Daemonless() || rec.Current.Held:
		default:
			images = append(images, prove.Image{Name: rec.Image, CacheDir: rec.CacheDir, Bootstrap: instance.BootstrapPath(rec), Digest: rec.BootstrapDigest})
		}
	}
	return images, errors.Join(errs...)
}

// pulled are the images that containerd has pulled, mounted or not: who has read all of one
// may be gone before anybody looks. They are listed anew when a layer was committed or
// removed, and now and then.
type pulled struct {
	root  string
	place func(ctx context.Context, ref, backend string) (dir string, err error)
	now   func() time.Time

	changed atomic.Bool
	list    []prove.Image
	listed  time.Time
}

// Changed says that there may be other images now.
func (p *pulled) Changed() { p.changed.Store(true) }

// images lists them. It is for one caller at a time, who changes nothing in the list.
func (p *pulled) images(ctx context.Context) ([]prove.Image, error) {
	now := p.now()
	if !p.changed.Swap(false) && now.Sub(p.listed) < relist {
		return p.list, nil
	}
	list, err := provable(ctx, p.root, p.place)
	p.list, p.listed = list, now
	return slices.Clip(list), err
}

// provable lists the images whose place in the cache is known. Another one's backend is
// not configured any more.
func provable(ctx context.Context, root string, place func(ctx context.Context, ref, backend string) (string, error)) ([]prove.Image, error) {
	all, err := snapshot.Images(root)
	list := make([]prove.Image, 0, len(all))
	for _, im := range all {
		if dir, err := place(ctx, im.Ref, im.Backend); err == nil {
			list = append(list, prove.Image{Name: im.Ref, CacheDir: dir, Bootstrap: im.Dir(), Digest: im.Digest, Open: im.Open})
		}
	}
	return list, err
}

// proven is what `cache prove` found out about an image.
type proven struct {
	Image     string `json:"image"`
	Digest    string `json:"bootstrap"`
	Directory string `json:"directory"`
	// Proven says that its next start needs no nydusd, New that this was not known before.
	Proven bool `json:"proven"`
	New    bool `json:"new"`
	// Missing is what the cache lacks, Reason why it is not proven, for people.
	Missing []prove.Lack `json:"missing,omitempty"`
	Reason  string       `json:"reason,omitempty"`
}

// proveCommand proves pulled images at once, those that are named or all, and fails unless
// all of them are.
func proveCommand(c *cli.Context, cfg config.Config, asJSON bool) error {
	images, err := provable(c.Context, cfg.Root, placed(cfg))
	if err != nil {
		return fmt.Errorf("cache prove: %w", err)
	}
	var unknown error
	if names := c.Args().Slice(); len(names) > 0 {
		images, unknown = selected(images, names)
	}
	list := make([]proven, 0, len(images))
	seen := map[[2]string]bool{}
	failed := 0
	for i := range images {
		im := &images[i]
		if name := [2]string{im.Name, im.CacheDir + im.Digest}; seen[name] {
			continue // one of its layers is there twice
		} else {
			seen[name] = true
		}
		p, err := proveNow(c, im)
		if c.Context.Err() != nil {
			return fmt.Errorf("cache prove: image %q: %w", im.Name, err)
		}
		if err != nil {
			failed++
		}
		list = append(list, p)
	}
	if asJSON {
		err = writeJSON(c.App.Writer, list)
	} else {
		err = printProven(c.App.Writer, list)
	}
	if failed > 0 {
		err = errors.Join(fmt.Errorf("cache prove: %d of %d images are not proven", failed, len(list)), err)
	}
	return errors.Join(unknown, err)
}

// selected are the images of these names. One that there is not is an error.
func selected(images []prove.Image, names []string) ([]prove.Image, error) {
	var list []prove.Image
	var errs []error
	for _, name := range names {
		before := len(list)
		for i := range images {
			if images[i].Name == name {
				list = append(list, images[i])
			}
		}
		if len(list) == before {
			errs = append(errs, fmt.Errorf("cache prove: no nydus image %q has been pulled; `cache ls` names those that have", name))
		}
	}
	return list, errors.Join(errs...)
}

// attempts is how often an image is tried that somebody has just written to.
const attempts = 3

// proveNow proves an image, and waits a little for who has just written to it.
func proveNow(c *cli.Context, im *prove.Image) (out proven, err error) {
	out = proven{Image: im.Name, Digest: im.Digest, Directory: im.CacheDir}
	w := c.App.ErrWriter
	p := prove.Prover{}
	if isTerminal(w) {
		p.Progress = func(done, total int64) {
			fmt.Fprintf(w, "\r\x1b[K%s: %s of %s compared", im.Name, megabytes(done), megabytes(total))
		}
		defer fmt.Fprint(w, "\r\x1b[K")
	}
	for n := 1; ; n++ {
		out.New, err = p.Image(c.Context, *im)
		if !errors.Is(err, prove.ErrRecent) || n == attempts {
			break
		}
		settled := time.NewTimer(prove.Settled)
		select {
		case <-settled.C:
		case <-c.Context.Done():
			settled.Stop()
			return out, c.Context.Err()
		}
	}
	var missing *prove.Missing
	switch {
	case err == nil:
		out.Proven = true
	case errors.As(err, &missing):
		out.Missing = missing.Blobs
	}
	if err != nil {
		out.Reason = err.Error()
	}
	return out, err
}

// printProven has a line for each image, and for each blob that is not all there.
func printProven(w io.Writer, list []proven) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tBOOTSTRAP\tPROVEN\tREASON")
	for i := range list {
		p := &list[i]
		digest := strings.TrimPrefix(p.Digest, "sha256:")
		name := fmt.Sprintf("%s\t%s\t", p.Image, digest[:min(len(digest), shortKey)])
		switch {
		case p.New:
			fmt.Fprintf(t, "%snow\t-\n", name)
		case p.Proven:
			fmt.Fprintf(t, "%sbefore\t-\n", name)
		case len(p.Missing) > 0:
			for _, b := range p.Missing {
				fmt.Fprintf(t, "%sno\tmissing %d of %d chunks of blob %s\n", name, b.Chunks-b.Ready, b.Chunks, b.Blob[:shortKey])
			}
		default:
			fmt.Fprintf(t, "%sno\t%s\n", name, p.Reason)
		}
	}
	return t.Flush()
}
