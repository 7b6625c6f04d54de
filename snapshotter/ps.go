package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/client"
)

const (
	// watchEvery is how often --watch looks: memory changes without an event.
	watchEvery = 2 * time.Second
	// askVersion bounds how long a daemon may take to tell its version.
	askVersion = time.Second
	// shortKey is how much of an instance's key the table shows.
	shortKey = 12
)

func psCommand() *cli.Command {
	return &cli.Command{
		Name:   "ps",
		Usage:  "list mounted images and their daemons; needs no running snapshotter",
		Before: noArguments,
		Flags: []cli.Flag{
			configFlag(), runDirFlag(),
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print the instances' keys only"},
			&cli.StringFlag{Name: "format", Value: "table", Usage: "table or json"},
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "go on, until interrupted"},
		},
		Action: func(c *cli.Context) error {
			print, err := printerOf(c)
			if err != nil {
				return err
			}
			p := ps{runDir: c.String("run-dir"), out: c.App.Writer, errors: c.App.ErrWriter, print: print, now: time.Now}
			// A configuration that is broken keeps nobody from looking.
			if p.runDir == "" || c.IsSet("config") {
				cfg, err := loadOverridden(c)
				if err != nil {
					return err
				}
				p.runDir = cfg.RunDir
			}
			if c.Bool("watch") {
				return p.watch(c.Context)
			}
			return p.once(c.Context)
		},
	}
}

func configFlag() cli.Flag {
	return &cli.StringFlag{Name: "config", Value: config.DefaultPath, Usage: "configuration `FILE`; the default one may be missing"}
}

func runDirFlag() cli.Flag {
	return &cli.StringFlag{Name: "run-dir", Usage: "`DIR` for mounted images, instead of the configured one"}
}

// row is a line of the list.
type row struct {
	instance.Status
	// Version is what the daemon says of itself, empty when it does not.
	Version string `json:"version"`
}

type printer func(w io.Writer, rows []row, now time.Time) error

func printerOf(c *cli.Context) (printer, error) {
	switch format := c.String("format"); {
	case c.Bool("quiet") && c.IsSet("format"):
		return nil, errors.New("ps: --quiet and --format exclude one another")
	case c.Bool("quiet"):
		return printKeys, nil
	case format == "table":
		return printTable, nil
	case format == "json":
		return printJSON, nil
	default:
		return nil, fmt.Errorf("ps: --format is %q, want table or json", format)
	}
}

type ps struct {
	runDir string
	out    io.Writer
	errors io.Writer // of --watch
	print  printer
	now    func() time.Time
}

// once prints what can be read, and reports the rest.
func (p ps) once(ctx context.Context) error {
	list, err := instance.List(p.runDir)
	rows := make([]row, len(list))
	var all sync.WaitGroup
	for n, s := range list {
		// All at once: many may hang.
		all.Go(func() { rows[n] = row{Status: s, Version: versionOf(ctx, s)} })
	}
	all.Wait()
	return errors.Join(p.print(p.out, rows, p.now()), err)
}

// versionOf asks the daemon; one that hangs must not hold the list up for long.
func versionOf(ctx context.Context, s instance.Status) string {
	if s.State == instance.StateDead || s.State == instance.StateStarting {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, askVersion)
	defer cancel()
	info, err := client.New(s.Socket).Info(ctx)
	if err != nil {
		return ""
	}
	return strings.TrimPrefix(info.Version.Package, "v")
}

// watch prints again and again, each time over what it printed before when that is
// on a terminal, and one list below the other elsewhere.
func (p ps) watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	out := p.out
	for {
		var screen bytes.Buffer
		if isTerminal(out) {
			screen.WriteString("\x1b[H\x1b[2J")
		}
		p.out = &screen
		err := p.once(ctx)
		if _, werr := out.Write(screen.Bytes()); werr != nil {
			return werr
		}
		if err != nil && ctx.Err() == nil {
			// The next list may be whole; what there is was printed.
			if _, err := fmt.Fprintf(p.errors, "nydus-snapshotter: ps: %v\n", err); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func printKeys(w io.Writer, rows []row, _ time.Time) error {
	last := ""
	for _, r := range rows {
		if r.Instance == last {
			continue // another generation
		}
		last = r.Instance
		if _, err := fmt.Fprintln(w, r.Instance); err != nil {
			return err
		}
	}
	return nil
}

// writeJSON is how all commands print for programs.
func writeJSON(w io.Writer, value any) error {
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	return out.Encode(value)
}

func printJSON(w io.Writer, rows []row, _ time.Time) error {
	return writeJSON(w, append([]row{}, rows...))
}

func printTable(w io.Writer, rows []row, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "INSTANCE\tSTATE\tMOUNTS\tPID\tRSS\tVERSION\tDRIVER\tAGE\tRESTARTS\tIMAGE")
	for _, r := range rows {
		key := r.Instance
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", key[:min(shortKey, len(key))], r.State, r.Mounts,
			dash(r.PID > 0, fmt.Sprint(r.PID)), dash(r.RSS > 0, fmt.Sprintf("%.1f MB", float64(r.RSS)/1e6)),
			dash(r.Version != "", r.Version), driver(r), age(now.Sub(r.Started)), r.Restarts, r.Image)
	}
	return t.Flush()
}

// driver also tells that the daemon is not the image's alone.
func driver(r row) string {
	if r.Pool == "" {
		return string(r.Driver)
	}
	return string(r.Driver) + " (shared)"
}

func dash(known bool, text string) string {
	if known {
		return text
	}
	return "-"
}

// age is a duration as kubectl shows it: its two largest units at most.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 3*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}
