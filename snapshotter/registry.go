package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

func registryCommand() *cli.Command {
	return &cli.Command{
		Name:  "registry",
		Usage: "look at registries",
		Subcommands: []*cli.Command{{
			Name:      "check",
			Usage:     "ask every host of an image's registry for its manifest and a part of a blob; exit code 1 when a mount would not work",
			ArgsUsage: "IMAGE",
			Flags: []cli.Flag{
				configFlag(),
				&cli.StringFlag{Name: "format", Value: "table", Usage: "table or json"},
			},
			Action: checkRegistry,
		}},
	}
}

// checked is what registry check prints as JSON.
type checked struct {
	Image string `json:"image"`
	// Gateway says that nydusd would read through the gateway, because of Needs when
	// there are any.
	Gateway bool              `json:"gateway"`
	Needs   []string          `json:"needs"`
	Hosts   []registry.Report `json:"hosts"`
	Works   bool              `json:"works"`
}

func checkRegistry(c *cli.Context) error {
	format := c.String("format")
	if format != "table" && format != "json" {
		return fmt.Errorf("registry check: --format is %q, want table or json", format)
	}
	if c.Args().Len() != 1 {
		return errors.New("registry check: want one IMAGE, after the options")
	}
	cfg, err := loadConfig(c.String("config"), c.IsSet("config"), nil)
	if err != nil {
		return err
	}
	if cfg.Remote.Backend != config.BackendRegistry {
		return fmt.Errorf("registry check: remote.backend is %q: no registry is asked", cfg.Remote.Backend)
	}
	image := c.Args().First()
	logins, err := newKeychain(cfg)
	if err != nil {
		return fmt.Errorf("registry check: %w", err)
	}
	defer logins.watch(c.Context)()
	hosts := endpoints(cfg.Remote, logins)
	route, err := hosts.Route(c.Context, image)
	if err != nil {
		return fmt.Errorf("registry check: %w", err)
	}
	out := checked{Image: image, Gateway: viaGateway(cfg.Remote, route), Needs: append([]string{}, route.Needs...)}
	if out.Hosts, err = hosts.Check(c.Context, image); err != nil {
		return fmt.Errorf("registry check: %w", err)
	}
	for _, h := range out.Hosts {
		out.Works = out.Works || h.Works()
	}
	if !out.Gateway {
		if _, err := route.Direct(c.Context); err != nil {
			return fmt.Errorf("registry check: %w", err)
		}
	}
	if err := out.print(c.App.Writer, format); err != nil {
		return err
	}
	if !out.Works {
		return fmt.Errorf("registry check: no host gives out the blobs of %s", image)
	}
	return nil
}

func (o checked) print(w io.Writer, format string) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(o)
	}
	way := "nydusd reads from the registry itself"
	if o.Gateway {
		way = "nydusd reads through the gateway"
		if len(o.Needs) > 0 {
			way += ", because of " + strings.Join(o.Needs, ", ")
		}
	}
	fmt.Fprintf(w, "%s: %s\n", o.Image, way)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "HOST\tFROM\tTLS\tCREDENTIALS\tMANIFEST\tBLOB\tTOOK")
	for _, h := range o.Hosts {
		fmt.Fprintf(t, "%s://%s\t%s\t%s\t%s\t%s\t%s\t%s\n", h.Scheme, h.Host, dash(h.File != "", h.File), h.TLS, dash(h.Credentials != "", h.Credentials), line(h.Manifest), line(h.Blob), h.Took.Round(time.Millisecond))
	}
	return t.Flush()
}

// line keeps an error in its row.
func line(text string) string { return strings.Join(strings.Fields(text), " ") }
