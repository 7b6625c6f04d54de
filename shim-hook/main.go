// Command nydus-shim-hook is an OCI runtime hook. At createRuntime it makes sure
// that the nydus image beneath a container's root filesystem answers, before a
// process of the container meets it; at poststop it lets the image go at once
// instead of after the snapshotter's linger.
//
// It is optional, needs no snapshotter, and does nothing for containers whose
// root filesystem is not a nydus image.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/probe"
)

// version is set by the linker.
var version = "devel"

const usage = `Usage: nydus-shim-hook [OPTIONS] createRuntime|poststop
       nydus-shim-hook holder SOCKET
       nydus-shim-hook probe

An OCI runtime hook; reads the container's state, JSON, from standard input.

  createRuntime   fail, and so stop the container, when the nydus image beneath
                  its root filesystem does not answer; the next start gets a new
                  nydusd
  poststop        release the image at once if no other container uses it

And, started by the snapshotter:

  holder          keep what a successor of a nydusd needs, until nothing is left
  probe           ask filesystems whether they answer

Options:
`

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "nydus-shim-hook: %v\n", err)
		os.Exit(1)
	}
}

// hook is one call of the program.
type hook struct {
	runDir  string
	timeout time.Duration
}

func run(args []string, in io.Reader, out io.Writer) error {
	var h hook
	flags := flag.NewFlagSet("nydus-shim-hook", flag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&h.runDir, "run-dir", "/run/nydus-snapshotter", "the snapshotter's run directory")
	flags.DurationVar(&h.timeout, "timeout", 10*time.Second, "how long the image may take to answer, and another mount to finish")
	showVersion := flags.Bool("version", false, "print the version")
	flags.Usage = func() {
		fmt.Fprint(out, usage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *showVersion {
		_, err := fmt.Fprintf(out, "nydus-shim-hook %s\n", version)
		return err
	}
	if flags.NArg() == 1 && flags.Arg(0) == probe.Command {
		return probe.Serve(in, out, func() { os.Exit(0) })
	}
	if flags.NArg() == 2 && flags.Arg(0) == lookUpCommand {
		os.Exit(lookUp(flags.Arg(1)))
	}
	if flags.NArg() == 2 && flags.Arg(0) == holderCommand {
		return hold(context.Background(), flags.Arg(1))
	}
	if flags.NArg() != 1 {
		return fmt.Errorf("want one of createRuntime, poststop; got %q; see --help", flags.Args())
	}
	act, ok := map[string]func(context.Context, string, *specs.State) error{
		"createRuntime": h.createRuntime, "poststop": h.poststop,
	}[flags.Arg(0)]
	if !ok {
		return fmt.Errorf("unknown hook %q: want createRuntime or poststop", flags.Arg(0))
	}
	state, rootfs, err := readState(in)
	if err != nil {
		return fmt.Errorf("%s: %w", flags.Arg(0), err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), h.timeout)
	defer cancel()
	if err := act(ctx, rootfs, state); err != nil {
		return fmt.Errorf("%s of container %s: %w", flags.Arg(0), state.ID, err)
	}
	return nil
}

// maxState bounds the state and the bundle's configuration in bytes.
const maxState = 16 << 20

// readState reads the container's state and finds its root filesystem, as the
// OCI runtime specification lays them out.
func readState(in io.Reader) (*specs.State, string, error) {
	var state specs.State
	if err := json.NewDecoder(io.LimitReader(in, maxState)).Decode(&state); err != nil {
		return nil, "", fmt.Errorf("read the container's state from standard input: %w", err)
	}
	if !filepath.IsAbs(state.Bundle) {
		return nil, "", fmt.Errorf("read the container's state: bundle %q is not an absolute path", state.Bundle)
	}
	f, err := os.Open(filepath.Join(state.Bundle, "config.json"))
	if err != nil {
		return nil, "", fmt.Errorf("read the bundle: %w", err)
	}
	defer f.Close()
	var spec struct {
		Root specs.Root `json:"root"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxState)).Decode(&spec); err != nil {
		return nil, "", fmt.Errorf("read the bundle %s: %w", f.Name(), err)
	}
	rootfs := spec.Root.Path
	if !filepath.IsAbs(rootfs) {
		rootfs = filepath.Join(state.Bundle, rootfs)
	}
	// The mount table has real paths. The last element may be the root
	// filesystem itself, which is not to be touched here.
	parent, err := filepath.EvalSymlinks(filepath.Dir(filepath.Clean(rootfs)))
	if err != nil {
		return nil, "", fmt.Errorf("find the root filesystem: %w", err)
	}
	return &state, filepath.Join(parent, filepath.Base(rootfs)), nil
}

func (h *hook) createRuntime(ctx context.Context, rootfs string, _ *specs.State) error {
	key, err := instance.FindByTarget(h.runDir, rootfs)
	if errors.Is(err, instance.ErrNotNydus) {
		return nil
	}
	if err != nil {
		return err
	}
	fault := ask(ctx, rootfs)
	if fault == nil {
		return nil
	}
	image := key
	if rec, err := instance.ReadRecord(h.runDir, key); err == nil {
		image = rec.Image
	}
	fault = fmt.Errorf("image %s (instance %s) beneath %s does not answer: %w; start the container again, it gets a new nydusd", image, key, rootfs, fault)
	// The time for asking may be used up; replacing has its own.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.timeout)
	defer cancel()
	return errors.Join(fault, instance.Replace(ctx, h.runDir, key, rootfs))
}

func (h *hook) poststop(ctx context.Context, rootfs string, _ *specs.State) error {
	key, err := instance.FindByTarget(h.runDir, rootfs)
	if errors.Is(err, instance.ErrNotNydus) {
		return nil
	}
	if err != nil {
		return err
	}
	return instance.Release(ctx, h.runDir, key, rootfs)
}
