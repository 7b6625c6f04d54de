// Command bench measures the project against what it competes with and writes
// the table and the plot of docs/benchmarks.md. Run it by `make bench`.
//
// Each work is done in turn by the project and by its peer, in one run on one
// machine, so that a ratio means something on any machine. Times are medians.
// Missing a target is a result, not an error: the exit status is 0 then, and 1
// only when something could not be measured.
//
// Do not use it as a test: nothing here says that a result is right, only how
// long it took. And leave the machine alone meanwhile.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const usage = `Usage: bench [-n ROUNDS] [-only REGEXP] [-out DIR] [-json] [-list]

Measures the project against overlayfs, bare nydusd and a static overlay mount,
prints a table, and writes benchmarks.md and benchmarks.svg into the project's
docs. Needs root, the binaries of "make build", the parts of "make tools" and
gcc; "make bench" sees to that. Takes some 20 minutes; nothing else should run.

  -n ROUNDS      rounds of each work (default 15)
  -only REGEXP   the works whose name matches; writes no file unless -out is given
  -out DIR       where to write instead of docs
  -json          print all samples as JSON instead of the table: seconds
  -list          list the works and exit
`

// options are the command line.
type options struct {
	rounds int
	only   *regexp.Regexp
	out    string
	json   bool
	list   bool
}

func parse(args []string) (options, error) {
	o := options{}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.IntVar(&o.rounds, "n", 15, "")
	only := flags.String("only", "", "")
	flags.StringVar(&o.out, "out", "", "")
	flags.BoolVar(&o.json, "json", false, "")
	flags.BoolVar(&o.list, "list", false, "")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if o.rounds < 1 {
		return o, fmt.Errorf("-n %d: want a number above 0", o.rounds)
	}
	var err error
	if *only != "" {
		if o.only, err = regexp.Compile(*only); err != nil {
			return o, fmt.Errorf("-only: %w", err)
		}
	}
	return o, nil
}

func main() {
	o, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "bench: %v; see bench -help\n", err)
		os.Exit(2)
	case o.list:
		for _, w := range append(slices.Clone(works), completeWorks()...) {
			fmt.Println(w.name)
		}
		fmt.Println(completeName)
		fmt.Println(binaryName)
		fmt.Println(memoryName)
		fmt.Println(gatewayName)
		fmt.Println(recoveryName)
		fmt.Println(watchName)
		fmt.Println(manyName)
		return
	}
	kit.Enter(func() int { return run(o) })
}

// run is the program inside of the kit's namespaces.
func run(o options) int {
	l := &lab{options: o, progress: show.NewProgress(os.Stderr)}
	err := l.sessions()
	l.progress.Stop()
	if err == nil {
		err = l.report.publish(o)
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, show.ErrInterrupted):
		fmt.Fprintln(os.Stderr, "bench: interrupted, cleaned up")
		return 130
	}
	fmt.Fprintf(os.Stderr, "bench: failed: %v\n", err)
	return 1
}

// sessions measures everything that is wanted, each session on a node of its
// own that is gone before the next.
func (l *lab) sessions() error {
	for _, s := range []struct {
		wanted bool
		run    func(kit.TB) error
	}{
		{true, l.describe},
		{l.options.wantsWork(), l.run},
		{l.options.wantsComplete(), l.complete},
		{l.options.wants(binaryName), l.binary},
		{l.options.wants(memoryName), l.memory},
		{l.options.wants(gatewayName), l.gateway},
		{l.options.wants(recoveryName), l.recovery},
		{l.options.wants(watchName), l.watching},
		{l.options.wants(manyName), l.many},
	} {
		if !s.wanted {
			continue
		}
		if err := show.Run(os.Stderr, "bench", s.run); err != nil {
			return err
		}
	}
	return nil
}
