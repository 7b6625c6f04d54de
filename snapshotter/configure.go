package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/signature"
)

func configCommand() *cli.Command {
	return &cli.Command{
		Name:  "config",
		Usage: "show the default configuration or check a file",
		Subcommands: []*cli.Command{
			{
				Name:   "default",
				Usage:  "print the default configuration with an explanation of each key",
				Before: noArguments,
				Action: func(c *cli.Context) error {
					_, err := io.WriteString(c.App.Writer, config.DefaultTOML)
					return err
				},
			},
			{
				Name:      "check",
				Usage:     "report everything that is wrong with a configuration file; exit code 1 when there is something",
				ArgsUsage: "FILE",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "format", Value: "text", Usage: "text or json"},
				},
				Action: check,
			},
		},
	}
}

func check(c *cli.Context) error {
	format := c.String("format")
	if format != "text" && format != "json" {
		return fmt.Errorf("config check: --format is %q, want text or json", format)
	}
	if c.Args().Len() != 1 {
		return errors.New("config check: want one FILE, after the options")
	}
	name := c.Args().First()
	text, err := readConfig(name)
	if err != nil {
		return err
	}
	cfg, err := config.Parse(name, text, nil)
	if err == nil {
		err = checkFiles(name, cfg)
	}
	if format == "json" {
		return errors.Join(printFaults(c.App.Writer, name, err), err)
	}
	if err == nil {
		_, err = fmt.Fprintf(c.App.Writer, "configuration %s: ok\n", name)
	}
	return err
}

// checkFiles looks into the files that a configuration names and that would otherwise
// fail the first mount.
func checkFiles(name string, cfg config.Config) error {
	faults := []config.Fault{}
	fail := func(key string, err error) {
		if err != nil {
			faults = append(faults, config.Fault{Key: key, Problem: err.Error()})
		}
	}
	_, err := tuningOf(cfg.Daemon.ConfigTemplate)()
	fail("daemon.config_template", err)
	for i, b := range cfg.Backends {
		if b.CredentialsFile != "" {
			_, err := accessKey(b)
			fail(fmt.Sprintf("backend[%d].credentials_file", i+1), err)
		}
	}
	if cfg.Image.ValidateSignature {
		_, err := signature.ReadKeys(cfg.Image.PublicKeyFile)
		fail("image.public_key_file", err)
	}
	if cfg.Credentials.Kubelet.Config != "" {
		_, err := plugins(cfg)
		fail("credentials.kubelet.config", err)
	}
	if len(faults) > 0 {
		return &config.Error{Name: name, Faults: faults}
	}
	return nil
}

func printFaults(w io.Writer, name string, err error) error {
	faults := []config.Fault{}
	var all *config.Error
	if errors.As(err, &all) {
		faults = all.Faults
	}
	return writeJSON(w, struct {
		File   string         `json:"file"`
		OK     bool           `json:"ok"`
		Faults []config.Fault `json:"faults"`
	}{name, err == nil, faults})
}

// loadConfig reads the file that the command line names, or the default file if
// there is one, or nothing.
func loadConfig(name string, named bool, over config.Overrides) (config.Config, error) {
	text, err := readConfig(name)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return config.FromDefaults(over)
	}
	if err != nil {
		return config.Config{}, err
	}
	return config.Parse(name, text, over)
}

// readConfig reads no more than it takes to see that a file is too long.
func readConfig(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, config.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return text, nil
}
