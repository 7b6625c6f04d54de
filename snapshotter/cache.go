package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// newCache connects the cache with what it asks for.
func newCache(cfg config.Config) (*blob.Cache, error) {
	high, low, err := cfg.Cache.Watermarks()
	if err != nil {
		return nil, err
	}
	return blob.New(blob.Options{
		Root: cfg.Root, RunDir: cfg.RunDir, Place: placed(cfg), Grace: cfg.Cache.Grace,
		High: blob.Mark(high), Low: blob.Mark(low), Now: time.Now, Log: slog.Default(),
	}), nil
}

// placed tells where an image's blobs are cached, as backends does for a mount, but without
// asking how they are reached.
func placed(cfg config.Config) func(ctx context.Context, ref, wanted string) (string, error) {
	return func(_ context.Context, ref, wanted string) (string, error) {
		host, repository, err := home(cfg.Backends, ref, wanted)
		if err != nil {
			return "", err
		}
		return mountspec.CacheDir(cfg.Root, host, repository), nil
	}
}

// sweeping has the cache swept after an image's layers were removed. Removing a
// container's snapshot makes nothing unneeded.
type sweeping struct {
	*snapshot.Snapshotter
	cache  *blob.Cache
	pulled *pulled
}

// Commit implements snapshots.Snapshotter.
func (s sweeping) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	defer s.pulled.Changed()
	return s.Snapshotter.Commit(ctx, name, key, opts...)
}

// Remove implements snapshots.Snapshotter.
func (s sweeping) Remove(ctx context.Context, key string) error {
	info, err := s.Snapshotter.Snapshotter.Stat(ctx, key) // as it is in the database
	if err == nil && info.Kind == snapshots.KindCommitted {
		defer s.cache.Wake()
		defer s.pulled.Changed()
	}
	return s.Snapshotter.Remove(ctx, key)
}

func cacheCommand() *cli.Command {
	flags := func(more ...cli.Flag) []cli.Flag {
		return append([]cli.Flag{
			configFlag(), rootFlag(), runDirFlag(),
			&cli.StringFlag{Name: "format", Value: "table", Usage: "table or json"},
		}, more...)
	}
	return &cli.Command{
		Name:  "cache",
		Usage: "look after the blobs that nydusd has fetched; needs no running snapshotter",
		Subcommands: []*cli.Command{
			{Name: "ls", Usage: "list blobs and who needs them", Before: noArguments, Flags: flags(), Action: configured(listCache)},
			{
				Name: "gc", Usage: "remove what nothing needs, as serve does by itself", Before: noArguments,
				Flags:  flags(&cli.BoolFlag{Name: "dry-run", Usage: "only tell what would be removed"}),
				Action: cacheAction(sweepCache),
			},
			{Name: "sync", Usage: "bring what was fetched to the disk, as serve does every minute and at its end: only that counts after the next start of the machine", Before: noArguments, Flags: flags(), Action: cacheAction(syncCache)},
			{Name: "verify", Usage: "compare what is cached with the images' digests, and remove what is wrong and not in use", Before: noArguments, Flags: flags(), Action: cacheAction(verifyCache)},
			{
				Name: "prove", ArgsUsage: "[IMAGE…]", Flags: flags(),
				Usage: "compare pulled images that are complete with their digests, so that they are mounted without nydusd; all when none is named",
				Action: func(c *cli.Context) error {
					names, err := behind(c)
					if err != nil {
						return err
					}
					return configured(func(c *cli.Context, cfg config.Config, asJSON bool) error {
						return proveCommand(c, cfg, asJSON, names)
					})(c)
				},
			},
		},
		Action: func(c *cli.Context) error {
			return fmt.Errorf("cache: want ls, gc, sync, verify or prove; see %s cache --help", c.App.Name)
		},
	}
}

func cacheAction(run func(c *cli.Context, cache *blob.Cache, asJSON bool) error) cli.ActionFunc {
	return configured(func(c *cli.Context, cfg config.Config, asJSON bool) error {
		cache, err := newCache(cfg)
		if err != nil {
			return err
		}
		return run(c, cache, asJSON)
	})
}

func configured(run func(c *cli.Context, cfg config.Config, asJSON bool) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		format := c.String("format")
		if format != "table" && format != "json" {
			return fmt.Errorf("cache %s: --format is %q, want table or json", c.Command.Name, format)
		}
		cfg, err := loadOverridden(c)
		if err != nil {
			return err
		}
		// A wrong one would look like a cache that has nothing.
		if _, err := os.Stat(cfg.Root); err != nil {
			return fmt.Errorf("cache %s: look at root: %w; name the one of the snapshotter by --root or --config", c.Command.Name, err)
		}
		return run(c, cfg, format == "json")
	}
}

// listCache prints what can be read, and reports the rest.
func listCache(c *cli.Context, cfg config.Config, asJSON bool) error {
	cache, err := newCache(cfg)
	if err != nil {
		return err
	}
	list, unknown, err := cache.List(c.Context)
	if asJSON {
		return errors.Join(writeJSON(c.App.Writer, append([]blob.Blob{}, list...)), err)
	}
	for _, path := range unknown {
		fmt.Fprintf(c.App.ErrWriter, "not a blob's: %s\n", path)
	}
	err = errors.Join(printBlobs(c.App.Writer, list, time.Now()), err)
	// A state that cannot be read is among the list's errors.
	if state, unread := blob.ReadScrubState(cfg.Root); unread == nil {
		printScrub(c.App.ErrWriter, state, time.Now())
	}
	return err
}

func printBlobs(w io.Writer, list []blob.Blob, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "BLOB\tREPOSITORY\tSIZE\tCOMPLETE\tMOUNTED\tLAST USE\tIMAGES")
	for i := range list {
		b := &list[i]
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", b.ID[:shortKey], from(b), megabytes(b.Usage), complete(b),
			dash(len(b.Instances) > 0, "yes"), age(now.Sub(b.LastUse)), dash(len(b.Images) > 0, strings.Join(b.Images, ",")))
	}
	return t.Flush()
}

func from(b *blob.Blob) string {
	return dash(b.Host+b.Repository != "", strings.TrimPrefix(b.Host+"/"+b.Repository, "/"))
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// complete is rounded down: 100% is all of it.
func complete(b *blob.Blob) string {
	switch {
	case b.Fault != "":
		return "broken"
	case b.Damage != "":
		return "damaged"
	}
	return dash(b.Chunks > 0, fmt.Sprintf("%d%%", 100*int64(b.Ready)/int64(max(b.Chunks, 1))))
}

func sweepCache(c *cli.Context, cache *blob.Cache, asJSON bool) error {
	dry := c.Bool("dry-run")
	report, err := cache.Sweep(c.Context, dry)
	if asJSON {
		return errors.Join(writeJSON(c.App.Writer, report), err)
	}
	return errors.Join(printReport(c.App.Writer, report, dry), err)
}

func printReport(w io.Writer, r blob.Report, dry bool) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	did := map[bool][2]string{false: {"removed", "evicted"}, true: {"would remove", "would evict"}}[dry]
	for i, list := range [][]blob.Blob{r.Removed, r.Evicted} {
		for n := range list {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", did[i], list[n].ID[:shortKey], from(&list[n]), megabytes(list[n].Usage))
		}
	}
	for _, path := range r.Unknown {
		fmt.Fprintf(t, "not a blob's\t%s\n", path)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "%d blobs with %s; %s %d and %s %d, %s in all\n", r.Blobs, megabytes(r.Usage), did[0], len(r.Removed), did[1], len(r.Evicted), megabytes(r.Freed))
	if r.Orphans > 0 {
		fmt.Fprintf(w, "%s %d proofs of images that are gone\n", did[0], r.Orphans)
	}
	if r.Young > 0 {
		fmt.Fprintf(w, "%d that nothing needs were written too lately; the first goes at %s\n", r.Young, r.Next.Format(time.DateTime))
	}
	if r.Busy > 0 {
		fmt.Fprintf(w, "%d are still open somewhere\n", r.Busy)
	}
	if r.Short > 0 {
		fmt.Fprintf(w, "%s more should go to reach the low watermark, but what is left is in use or too young\n", megabytes(r.Short))
	}
	return nil
}

// syncCache prints what it did.
func syncCache(c *cli.Context, cache *blob.Cache, asJSON bool) error {
	s, err := cache.Sync(c.Context)
	if asJSON {
		return errors.Join(writeJSON(c.App.Writer, s), err)
	}
	if s.Lost > 0 {
		fmt.Fprintf(c.App.Writer, "%d chunks may not have reached the disk before this machine stopped: they are fetched again on demand\n", s.Lost)
	}
	fmt.Fprintf(c.App.Writer, "synced %d chunks of %d blobs\n", s.Chunks, s.Blobs)
	return err
}

// verifyCache fails when something is wrong.
func verifyCache(c *cli.Context, cache *blob.Cache, asJSON bool) error {
	var progress func(done, total int64)
	if w := c.App.ErrWriter; isTerminal(w) {
		progress = func(done, total int64) {
			fmt.Fprintf(w, "\r\x1b[K%s of %s", megabytes(done), megabytes(total))
		}
	}
	list, err := cache.Verify(c.Context, progress)
	if progress != nil {
		fmt.Fprint(c.App.ErrWriter, "\r\x1b[K")
	}
	if asJSON {
		err = errors.Join(writeJSON(c.App.Writer, append([]blob.Verdict{}, list...)), err)
	} else {
		err = errors.Join(printVerdicts(c.App.Writer, list), err)
	}
	wrong := 0
	for i := range list {
		if list[i].Problem != "" {
			wrong++
		}
	}
	if wrong > 0 {
		err = errors.Join(fmt.Errorf("cache verify: %d of %d blobs are wrong", wrong, len(list)), err)
	}
	return err
}

func printVerdicts(w io.Writer, list []blob.Verdict) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "BLOB\tREPOSITORY\tCHUNKS\tTHERE\tCHECKED\tBAD\tRESULT")
	for i := range list {
		v := &list[i]
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t%s\n", v.ID[:shortKey], from(&v.Blob), v.Chunks, v.Ready, v.Checked, v.Bad, result(v))
	}
	return t.Flush()
}

func result(v *blob.Verdict) string {
	switch {
	case v.Problem == "" && v.Unchecked > 0:
		return fmt.Sprintf("ok; nothing tells what %d chunks must be", v.Unchecked)
	case v.Problem == "":
		return "ok"
	case v.Evicted:
		return v.Problem + "; removed, and fetched again on demand"
	}
	return v.Problem + "; in use: end its containers and verify again"
}
