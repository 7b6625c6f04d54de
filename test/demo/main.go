// Command demo runs the project's main job on real parts and shows it: a
// registry, containerd, the snapshotter and nydusd of its own, an image of some
// hundred megabytes, two containers. Run it by `make demo`.
//
// Each figure it prints was measured in this run and each claim checked: it
// ends with "demo: ok" only when all of them hold and nothing was left behind,
// and otherwise with the reason and exit status 1 (130 when interrupted). The
// machine's own containerd, /run and /etc stay untouched.
//
// Do not use it to compare speeds: that is what bench is for.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const usage = `Usage: demo [--json]

Pulls a nydus image, starts two containers of it, reads files, kills the
snapshotter meanwhile, stops the containers, and shows what happened. Needs
root, the binaries of "make build" and the parts of "make tools"; "make demo"
sees to all that.

  --json   print the figures as one JSON object instead of a story: sizes in
           bytes, times in seconds
`

func main() {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	asJSON := flags.Bool("json", false, "")
	switch err := flags.Parse(os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return
	case err != nil || flags.NArg() > 0:
		fmt.Fprintf(os.Stderr, "demo: unknown argument; see demo --help\n")
		os.Exit(2)
	}
	kit.Enter(func() int { return run(*asJSON) })
}

// run is the program inside of the kit's namespaces.
func run(asJSON bool) int {
	var story io.Writer = os.Stdout
	if asJSON {
		story = io.Discard
	}
	d := &demo{out: story, progress: show.NewProgress(os.Stderr)}
	err := show.Run(os.Stderr, "demo", d.run)
	d.progress.Stop()
	d.result.OK = err == nil
	if err != nil {
		d.result.Reason = err.Error()
	}
	if asJSON {
		text, _ := json.MarshalIndent(d.result, "", "  ")
		fmt.Printf("%s\n", text)
	}
	switch {
	case err == nil:
		fmt.Fprintln(story, "\ndemo: ok")
		return 0
	case errors.Is(err, show.ErrInterrupted):
		fmt.Fprintln(os.Stderr, "demo: interrupted, cleaned up")
		return 130
	}
	fmt.Fprintf(story, "\ndemo: failed: %v\n", err)
	return 1
}
