// Command nydus-snapshotter is containerd's snapshotter for nydus images: a
// gRPC proxy plugin on a unix socket. It answers with mounts and starts nothing;
// beside that it releases images that nobody uses any more.
//
// This package only reads the command line, connects the packages of pkg/ with
// one another and serves.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"
)

// version is set by the linker.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	app := newApp()
	if err := app.RunContext(ctx, os.Args); err != nil {
		fmt.Fprintf(app.ErrWriter, "%s: %v\n", app.Name, err)
		os.Exit(1)
	}
}

func newApp() *cli.App {
	app := &cli.App{
		Name:                   "nydus-snapshotter",
		Usage:                  "containerd's snapshotter for nydus images",
		Version:                version,
		HideHelpCommand:        true,
		UseShortOptionHandling: true,
		Writer:                 os.Stdout,
		ErrWriter:              os.Stderr,
		Commands:               []*cli.Command{serveCommand(), gatewayCommand(), psCommand(), cacheCommand(), daemonCommand(), registryCommand(), imageCommand(), configCommand()},
		// Usage errors go through main like all others.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   func(_ *cli.Context, err error, _ bool) error { return err },
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unknown command %q; see %s --help", c.Args().First(), c.App.Name)
			}
			return errors.Join(cli.ShowAppHelp(c), errors.New("a command is missing"))
		},
	}
	brief(app.Commands)
	return app
}

// brief has commands answer a wrong option with one line, and not with all of their help on
// standard output, where programs read.
func brief(commands []*cli.Command) {
	for _, command := range commands {
		command.OnUsageError = func(c *cli.Context, err error, _ bool) error {
			return fmt.Errorf("%w; see %s --help", err, c.Command.HelpName)
		}
		brief(command.Subcommands)
	}
}

// noArguments refuses what would silently be ignored.
func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("unexpected argument %q", c.Args().First())
	}
	return nil
}
