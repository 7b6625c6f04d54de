package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
)

// fetchThreads is how many requests nydusd makes at a time when somebody waits for it.
const fetchThreads = 8

func imageCommand() *cli.Command {
	return &cli.Command{
		Name:  "image",
		Usage: "look after pulled images",
		Subcommands: []*cli.Command{{
			Name:      "fetch",
			Usage:     "fetch all that the cache lacks of pulled images, so that their next start needs no nydusd; exit code 1 when one is not complete",
			ArgsUsage: "IMAGE...",
			Description: "Fetches what is missing by a nydusd of its own, beside those of containers, and compares all of the image with its digests\n" +
				"unless that was done before. What was interrupted goes on where it was when it is called again.\n\n" +
				"--verify compares also what was compared before, and fetches again what is wrong and not in use.\n" +
				"--from takes the blobs from files in DIR, which are named ID, sha256:ID or blobs/sha256/ID (an OCI layout), and asks no registry.",
			Flags: []cli.Flag{
				configFlag(), rootFlag(), runDirFlag(),
				&cli.BoolFlag{Name: "verify", Usage: "compare again what is there, and fetch again what is wrong"},
				&cli.StringFlag{Name: "from", Usage: "`DIR` of blobs or OCI layout to take them from, instead of the registry"},
				&cli.StringFlag{Name: "rate", Value: "0", Usage: "`BYTES` a second at most on average, with K, M or G; 0 for no bound"},
				&cli.StringFlag{Name: "format", Value: "table", Usage: "table or json"},
			},
			Action: fetchImages,
		}},
		Action: func(c *cli.Context) error {
			return fmt.Errorf("image: want fetch; see %s image --help", c.App.Name)
		},
	}
}

// behind takes the options that stand behind arguments, which the library takes for
// arguments, and returns the others.
func behind(c *cli.Context) ([]string, error) {
	var args []string
	for all := c.Args().Slice(); len(all) > 0; {
		arg := all[0]
		all = all[1:]
		switch {
		case !strings.HasPrefix(arg, "-"):
			args = append(args, arg)
			continue
		case arg == "--":
			return append(args, all...), nil
		}
		name, value, given := strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
		if name == "help" || name == "h" {
			return nil, fmt.Errorf("%s has to stand before all else; see %s --help", arg, c.Command.HelpName)
		}
		at := slices.IndexFunc(c.Command.Flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), name) })
		if at < 0 {
			return nil, fmt.Errorf("flag provided but not defined: %s; see %s --help", arg, c.Command.HelpName)
		}
		if _, isBool := c.Command.Flags[at].(*cli.BoolFlag); !given && isBool {
			value = "true"
		} else if !given {
			if len(all) == 0 {
				return nil, fmt.Errorf("flag needs an argument: %s; see %s --help", arg, c.Command.HelpName)
			}
			value, all = all[0], all[1:]
		}
		if err := c.Set(name, value); err != nil {
			return nil, fmt.Errorf("%s: %w", arg, err)
		}
	}
	return args, nil
}

// fetched is what became of an image.
type fetched struct {
	Image     string `json:"image"`
	Bootstrap string `json:"bootstrap,omitempty"`
	// State is proven (its next start needs no daemon), complete or failed.
	State string `json:"state"`
	// Reason is why a complete one is not proven, Error why another one failed.
	Reason string `json:"reason,omitempty"`
	Error  string `json:"error,omitempty"`
	// Fetched is about how many bytes were fetched.
	Fetched  int64       `json:"fetched"`
	Seconds  float64     `json:"seconds"`
	Repaired []string    `json:"repaired"`
	Blobs    fetch.State `json:"blobs"`
}

// The states of an image.
const (
	stateProven   = "proven"
	stateComplete = "complete"
	stateFailed   = "failed"
)

func fetchImages(c *cli.Context) error {
	images, err := behind(c)
	if err != nil {
		return err
	}
	rate, err := config.ParseSize(c.String("rate"))
	format := c.String("format")
	switch {
	case err != nil:
		return fmt.Errorf("image fetch: --rate: %w", err)
	case format != "table" && format != "json":
		return fmt.Errorf("image fetch: --format is %q, want table or json", format)
	case len(images) == 0 || slices.Contains(images, ""):
		return errors.New("image fetch: want an IMAGE, by the name that it was pulled with")
	case c.IsSet("from") && c.String("from") == "":
		// As from a script's variable that has nothing: it asked for no registry.
		return errors.New("image fetch: --from is empty, want a directory")
	case os.Geteuid() != 0:
		return errors.New("image fetch: only root can do what this needs: mount, and write the cache; run it as root")
	}
	cfg, err := loadOverridden(c)
	if err != nil {
		return err
	}
	f := &fetchCommand{c: c, json: format == "json"}
	stop, err := f.setUp(cfg, int64(rate))
	if err != nil {
		return fmt.Errorf("image fetch: %w", err)
	}
	defer stop()
	out, err := f.all(c.Context, cfg, images)
	if f.json {
		err = errors.Join(err, writeJSON(c.App.Writer, out))
	}
	if err != nil {
		return fmt.Errorf("image fetch: %w", err)
	}
	return nil
}

// all fetches one image after the other.
func (f *fetchCommand) all(ctx context.Context, cfg config.Config, refs []string) ([]fetched, error) {
	list, unread := pulledImages(cfg)
	out := []fetched{}
	var errs []error
	for _, ref := range refs {
		images, err := namedBy(list, ref)
		if err != nil {
			err = errors.Join(err, unread)
			out, errs = append(out, f.done(fetched{Image: ref}, err)), append(errs, err)
		}
		for _, im := range images {
			one, err := f.one(ctx, im)
			out, errs = append(out, one), append(errs, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return out, errors.Join(errs...)
}

// fetchCommand is one run of image fetch.
type fetchCommand struct {
	c         *cli.Context
	json      bool
	cache     *blob.Cache
	daemons   *daemons
	completer fetch.Completer
}

// setUp makes what the command works with, until the returned function is called.
func (f *fetchCommand) setUp(cfg config.Config, rate int64) (stop func(), err error) {
	if f.cache, err = newCache(cfg); err != nil {
		return nil, err
	}
	f.daemons = &daemons{cfg: cfg, purpose: "fetch"}
	if f.daemons.nydusd, err = newNydusd(cfg); err != nil {
		return nil, err
	}
	stop = func() {}
	b := backends{rules: cfg.Backends, tuning: tuningOf(cfg.Daemon.ConfigTemplate), validate: cfg.Daemon.Validate}
	if dir := f.c.String("from"); dir != "" {
		if f.daemons.from, err = newDirectory(dir); err != nil {
			return nil, err
		}
	} else {
		logins, err := newKeychain(cfg)
		if err != nil {
			return nil, err
		}
		if b.sealing, err = gatewayKey(cfg.Root); err != nil {
			return nil, err
		}
		b.remote, b.keychain, b.endpoints = cfg.Remote, logins, endpoints(cfg.Remote, logins)
		stop = logins.watch(f.c.Context)
	}
	f.daemons.backends = b.prefetch(fetchThreads, rate)
	f.completer = fetch.Completer{Fetcher: fetch.Fetcher{Rate: rate}}
	if f.c.Bool("verify") {
		f.completer.Prover = prove.Prover{Again: true}
		f.completer.Evict = f.cache.Evict
	}
	return stop, nil
}

func newDirectory(path string) (*directory, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is no directory", path)
	}
	if err != nil {
		return nil, fmt.Errorf("take blobs from --from: %w", err)
	}
	return &directory{path: path}, nil
}

// one fetches one image.
func (f *fetchCommand) one(ctx context.Context, im pulledImage) (fetched, error) {
	out := fetched{Image: im.Name, Bootstrap: im.Digest}
	began := time.Now()
	p := f.progress(im.Name)
	res, err := f.complete(ctx, im, p)
	p.end()
	out.Seconds = time.Since(began).Seconds()
	out.Fetched, out.Repaired, out.Blobs, out.Reason = res.Fetched, res.Repaired, res.State, res.Unproven
	out.State = stateComplete
	if res.Proven {
		out.State = stateProven
	}
	var bad *fetch.DamagedError
	if errors.As(err, &bad) && f.completer.Evict == nil {
		err = fmt.Errorf("%w; --verify fetches it again", err)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", im.Name, err)
	}
	return f.done(out, err), err
}

func (f *fetchCommand) complete(ctx context.Context, im pulledImage, p progress) (fetch.Result, error) {
	if err := ctx.Err(); err != nil {
		return fetch.Result{}, context.Cause(ctx)
	}
	if im.homeless != nil {
		return fetch.Result{}, im.homeless
	}
	c := f.completer
	c.Fetcher.Start = func(ctx context.Context, _ fetch.Image) (fetch.Daemon, error) {
		if err := f.fits(im); err != nil {
			return nil, err
		}
		return f.daemons.start(ctx, im)
	}
	return c.Complete(ctx, im.Image, p.tell)
}

// fits refuses to fill the disk, with which nydusd does not cope well.
func (f *fetchCommand) fits(im pulledImage) error {
	s, err := fetch.Look(im.Image)
	if err != nil {
		return err
	}
	free, err := f.cache.Free()
	if err != nil {
		return err
	}
	if need := s.Missing(); need > free {
		return fmt.Errorf("%s more are needed, and the disk of the cache has %s left; make room, see nydus-snapshotter cache", megabytes(need), megabytes(free))
	}
	return nil
}

func (f *fetchCommand) progress(image string) progress {
	w := f.c.App.ErrWriter
	switch {
	case isTerminal(w):
		return newBars(w, image, time.Now)
	case f.json:
		return noProgress{}
	}
	return &lines{w: w, image: image, now: time.Now, every: lineEvery}
}

// done completes what is told of an image, and tells it.
func (f *fetchCommand) done(out fetched, err error) fetched {
	if err != nil {
		out.State, out.Error = stateFailed, err.Error()
	}
	if out.Repaired == nil {
		out.Repaired = []string{}
	}
	if out.Blobs == nil {
		out.Blobs = fetch.State{}
	}
	if !f.json {
		out.print(f.c.App.Writer)
	}
	return out
}

func (o fetched) print(w io.Writer) {
	took := time.Duration(o.Seconds * float64(time.Second)).Round(100 * time.Millisecond)
	if n := len(o.Repaired); n > 0 {
		fmt.Fprintf(w, "%s: %d blobs were wrong in the cache and were removed from it\n", o.Image, n)
	}
	switch o.State {
	case stateProven:
		fmt.Fprintf(w, "%s: complete and compared, %s fetched in %s: its next start needs no nydusd\n", o.Image, megabytes(o.Fetched), took)
	case stateComplete:
		fmt.Fprintf(w, "%s: complete, %s fetched in %s; it goes on to be served by nydusd: %s\n", o.Image, megabytes(o.Fetched), took, o.Reason)
	default:
		fmt.Fprintf(w, "%s: not complete, %s fetched in %s\n", o.Image, megabytes(o.Fetched), took)
	}
}
