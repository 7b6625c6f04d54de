package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
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
				configFlag(), rootFlag(),
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
	// Why says why a mount would not work.
	Why string `json:"why,omitempty"`
}

func checkRegistry(c *cli.Context) error {
	format := c.String("format")
	if format != "table" && format != "json" {
		return fmt.Errorf("registry check: --format is %q, want table or json", format)
	}
	if c.Args().Len() != 1 {
		return errors.New("registry check: want one IMAGE, after the options")
	}
	cfg, err := loadOverridden(c)
	if err != nil {
		return err
	}
	image := c.Args().First()
	rule, err := selectRule(cfg.Backends, image, "")
	if err != nil {
		return fmt.Errorf("registry check: %w", err)
	}
	if rule != nil && rule.Type != config.BackendRegistry {
		return fmt.Errorf("registry check: the blobs of %s are where [[backend]] %q says (%s): no registry is asked for them", image, rule.Name, rule.Type)
	}
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
	if cfg.Remote.Gateway == config.GatewayAuto && len(route.Needs) == 0 {
		// What is wrong with either the check itself says.
		if at, err := route.Direct(c.Context); err == nil {
			if need, _ := credentialsNeed(c.Context, logins, at); need != "" {
				route.Needs = append(route.Needs, need)
			}
		}
	}
	out := checked{Image: image, Gateway: viaGateway(cfg.Remote, route), Needs: append([]string{}, route.Needs...)}
	if out.Hosts, err = hosts.Check(c.Context, image); err != nil {
		return fmt.Errorf("registry check: %w", err)
	}
	wrong := out.try(c.Context, cfg, route, logins)
	if out.Works = wrong == nil; !out.Works {
		out.Why = wrong.Error()
		wrong = fmt.Errorf("registry check: %w", wrong)
	}
	return errors.Join(out.print(c.App.Writer, format), wrong)
}

// try returns why a mount would not work.
func (o *checked) try(ctx context.Context, cfg config.Config, route registry.Route, logins registry.Keychain) error {
	if !slices.ContainsFunc(o.Hosts, registry.Report.Works) {
		return fmt.Errorf("no host gives out the blobs of %s", o.Image)
	}
	if o.Gateway {
		sealing, err := gatewayKey(cfg.Root)
		if err != nil {
			return err
		}
		if err := gateway.Probe(ctx, cfg.Remote.GatewayAddress, sealing); err != nil {
			return fmt.Errorf("the gateway on %s: %w; run it (systemctl enable --now nydus-gateway.socket)", cfg.Remote.GatewayAddress, err)
		}
		return nil
	}
	at, err := route.Direct(ctx)
	if err != nil {
		return err
	}
	// The one that nydusd would be given has to work, whoever else does.
	for _, h := range o.Hosts {
		if h.Host == at.Host && !h.Works() {
			return fmt.Errorf("nydusd would read from %s alone, which does not give out the blobs: %s", h.Host, line(h.Blob))
		}
	}
	_, err = directCredentials(ctx, logins, at)
	return err
}

func (o checked) print(w io.Writer, format string) error {
	if format == "json" {
		return writeJSON(w, o)
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
