package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
)

func daemonCommand() *cli.Command {
	return &cli.Command{
		Name:        "daemon",
		Usage:       "act on running daemons",
		Subcommands: []*cli.Command{upgradeCommand()},
	}
}

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name:      "upgrade",
		Usage:     "replace serving daemons, one after the other, while containers use them",
		ArgsUsage: "[INSTANCE…]",
		Description: "Each daemon hands its filesystem over to one of the configured nydusd, or of --nydusd;\n" +
			"containers wait for some ten milliseconds. It stops at the first failure, with the old\n" +
			"daemon serving. INSTANCE is as in ps, or the beginning of it. It needs no running snapshotter.",
		Flags: []cli.Flag{
			configFlag(), runDirFlag(),
			&cli.BoolFlag{Name: "all", Usage: "all serving daemons"},
			&cli.StringFlag{Name: "nydusd", Usage: "`PATH` of the new executable, instead of the configured one"},
			&cli.StringFlag{Name: "format", Value: "text", Usage: "text or json, an object a line"},
		},
		Action: func(c *cli.Context) error {
			cfg, err := loadOverridden(c)
			if err != nil {
				return err
			}
			u, err := upgradeOf(c.Context, c, cfg)
			if err != nil {
				return fmt.Errorf("daemon upgrade: %w", err)
			}
			return u.run(c.Context)
		},
	}
}

// upgrade is one call of the command.
type upgrade struct {
	recovery.Upgrade
	todo []instance.Status
	// unread says which instances could not be looked at.
	unread error
	print  func(step) error
}

// step is one daemon that was replaced.
type step struct {
	Instance   string  `json:"instance"`
	Generation int     `json:"generation"`
	Image      string  `json:"image"`
	Before     int     `json:"pid_before"`
	After      int     `json:"pid_after"`
	Stall      float64 `json:"stall_ms"`
	Done       int     `json:"done"`
	Of         int     `json:"of"`
}

func upgradeOf(ctx context.Context, c *cli.Context, cfg config.Config) (*upgrade, error) {
	u := &upgrade{Upgrade: recovery.Upgrade{RunDir: cfg.RunDir, StartTimeout: cfg.Daemon.StartTimeout}}
	switch format := c.String("format"); format {
	case "text":
		u.print = func(s step) error { return printStep(c.App.Writer, s) }
	case "json":
		u.print = func(s step) error { return json.NewEncoder(c.App.Writer).Encode(s) }
	default:
		return nil, fmt.Errorf("--format is %q, want text or json", format)
	}
	if c.Bool("all") == c.Args().Present() {
		return nil, errors.New("want either --all or instances, as ps lists them")
	}
	var list []instance.Status
	var err error
	if list, u.unread = instance.List(cfg.RunDir); len(list) == 0 && u.unread != nil {
		return nil, u.unread
	}
	if u.todo, err = choose(list, c.Args().Slice()); err != nil {
		return nil, err
	}
	if u.Nydusd, err = successorPath(c.String("nydusd"), cfg.Daemon); err != nil {
		return nil, err
	}
	// One that does not tell its version is tried: only then it shows what it can do.
	version, err := nydusd.VersionOf(ctx, u.Nydusd)
	if err == nil && version.Known() && !version.SharesCache() {
		err = fmt.Errorf("%s cannot take a filesystem over: 2.3 or newer is needed", u.Nydusd)
	}
	return u, err
}

// successorPath makes sure that a daemon, whose working directory is another, finds
// its executable.
func successorPath(flag string, d config.Daemon) (string, error) {
	if flag != "" {
		return filepath.Abs(flag)
	}
	path, err := nydusdOf{Daemon: d}.find()
	if err != nil {
		err = fmt.Errorf("find nydusd: %w; install it, set [daemon] nydusd_path, or name it by --nydusd", err)
	}
	return path, err
}

// choose picks the daemons that serve: all, or those that were named.
func choose(list []instance.Status, names []string) ([]instance.Status, error) {
	var serving []instance.Status
	for _, s := range list {
		if s.Replaceable() {
			serving = append(serving, s)
		}
	}
	if len(names) == 0 {
		return serving, nil
	}
	var chosen []instance.Status
	for _, name := range names {
		found := ""
		for _, s := range serving {
			if !strings.HasPrefix(s.Instance, name) || name == "" {
				continue
			}
			if found != "" && found != s.Instance {
				return nil, fmt.Errorf("%q begins the names of several instances", name)
			}
			found = s.Instance
			chosen = append(chosen, s)
		}
		if found == "" {
			return nil, fmt.Errorf("no serving nydusd has an instance that begins with %q; nydus-snapshotter ps lists them", name)
		}
	}
	return chosen, nil
}

func (u *upgrade) run(ctx context.Context) error {
	// Ended or stopped in the middle it would leave an image without a daemon.
	signal.Ignore(unix.SIGHUP, unix.SIGTSTP, unix.SIGTTOU)
	for n, s := range u.todo {
		if ctx.Err() != nil {
			return fmt.Errorf("daemon upgrade: interrupted after %d of %d", n, len(u.todo))
		}
		done, err := u.Run(ctx, s.Instance, s.Generation)
		if errors.Is(err, instance.ErrGone) || errors.Is(err, recovery.ErrNotServing) {
			continue // it has ended meanwhile, as daemons do
		}
		if err != nil {
			return fmt.Errorf("daemon upgrade: stopped after %d of %d: image %s: %w", n, len(u.todo), s.Image, err)
		}
		err = u.print(step{
			Instance: s.Instance, Generation: s.Generation, Image: s.Image, Before: done.Before, After: done.After,
			Stall: float64(done.Stall) / float64(time.Millisecond), Done: n + 1, Of: len(u.todo),
		})
		if err != nil {
			return err
		}
	}
	if u.unread != nil {
		return fmt.Errorf("daemon upgrade: not all could be looked at: %w", u.unread)
	}
	return nil
}

func printStep(w io.Writer, s step) error {
	_, err := fmt.Fprintf(w, "%d/%d  %s  nydusd %d -> %d  nobody served for %.0f ms  %s\n", s.Done, s.Of, s.Instance[:min(shortKey, len(s.Instance))], s.Before, s.After, s.Stall, s.Image)
	return err
}
