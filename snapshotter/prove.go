package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/log"
	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// proveRate is how many bytes a second are read to compare blobs with their digests. It is
// done once for each image, beside the containers' own reads.
const proveRate = 64 << 20

// newProver is for all who prove in the background: together they read no faster, and what
// one compares the others do not.
func newProver() prove.Prover {
	return prove.Prover{Rate: prove.NewRate(proveRate), Turn: prove.NewTurn()}
}

// proveImages finds images that are complete, so that their next start needs no daemon.
func proveImages(cfg config.Config, pulled *pulled, prover prove.Prover) func(context.Context) error {
	b := prove.Background{
		Root: cfg.Root,
		Images: func(context.Context) ([]prove.Image, error) {
			// The next start of what runs comes first, and a container may live longer
			// than its image. Who has read all of another one may be gone before anybody
			// looks.
			list, err := mountedImages(cfg.RunDir)
			others, failed := pulled.images()
			for i := range others {
				list = append(list, others[i].proveImage())
			}
			return list, errors.Join(err, failed)
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
	records, err := instance.Records(runDir)
	var images []prove.Image
	for _, rec := range records {
		if g := rec.Current; g != nil && g.Ready && !g.Shared && !g.Daemonless() && !g.Held {
			images = append(images, prove.Image{Name: rec.Image, CacheDir: rec.CacheDir, Bootstrap: instance.BootstrapPath(rec), Digest: rec.BootstrapDigest})
		}
	}
	return images, err
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
func proveCommand(c *cli.Context, cfg config.Config, asJSON bool, names []string) error {
	images, err := wanted(cfg, names)
	list := make([]proven, 0, len(images))
	failed := 0
	for i := range images {
		im := &images[i]
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
		err = errors.Join(err, writeJSON(c.App.Writer, list))
	} else {
		err = errors.Join(err, printProven(c.App.Writer, list))
	}
	if failed > 0 {
		err = errors.Join(err, fmt.Errorf("%d of %d images are not proven", failed, len(list)))
	}
	if err != nil {
		return fmt.Errorf("cache prove: %w", err)
	}
	return nil
}

// wanted are the images of these names, or all that have a place in the cache when there
// are none. A name that no image has is an error, as is what could not be read.
func wanted(cfg config.Config, names []string) ([]pulledImage, error) {
	all, unread := pulledImages(cfg)
	if len(names) == 0 {
		return slices.DeleteFunc(all, func(im pulledImage) bool { return im.homeless != nil }), unread
	}
	var list []pulledImage
	var errs []error
	for _, name := range names {
		images, err := namedBy(all, name)
		if err != nil {
			err = errors.Join(err, unread)
		}
		list, errs = append(list, images...), append(errs, err)
	}
	return list, errors.Join(errs...)
}

// attempts is how often an image is tried that somebody has just written to.
const attempts = 3

// proveNow proves an image, and waits a little for who has just written to it.
func proveNow(c *cli.Context, im *pulledImage) (out proven, err error) {
	out = proven{Image: im.Name, Digest: im.Digest, Directory: im.CacheDir}
	if im.homeless != nil {
		out.Reason = im.homeless.Error()
		return out, im.homeless
	}
	w := c.App.ErrWriter
	p := prove.Prover{}
	if isTerminal(w) {
		p.Progress = func(done, total int64) {
			fmt.Fprintf(w, "\r\x1b[K%s: %s of %s compared", im.Name, megabytes(done), megabytes(total))
		}
		defer fmt.Fprint(w, "\r\x1b[K")
	}
	for n := 1; ; n++ {
		out.New, err = p.Image(c.Context, im.proveImage())
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
