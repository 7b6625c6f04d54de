package kit

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// ShardsVar is the environment variable that says by how many processes Main runs the tests
// of a package at a time, each of which has namespaces of its own. Most of these tests wait
// for something most of the time, but see all processes and mounts of their namespaces, so
// that they cannot run beside each other in one process.
const ShardsVar = "NYDUS_TEST_SHARDS"

// shards returns how many are wanted, 1 when tests were chosen: these share what they print.
func shards() (int, error) {
	text := os.Getenv(ShardsVar)
	run := flag.Lookup("test.run")
	if text == "" || run == nil || run.Value.String() != "" && run.Value.String() != "." || isSet("test.list") || isSet("test.bench") {
		return 1, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%s: %q is not a number above 0", ShardsVar, text)
	}
	return n, nil
}

func isSet(name string) bool {
	f := flag.Lookup(name)
	return f != nil && f.Value.String() != ""
}

// runShards runs the tests by n processes, and returns the exit status: 1 if one of them
// failed. What a process prints is shown when it has ended.
func runShards(n int) (int, error) {
	self := func(args ...string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", slices.Concat(os.Args[1:], args)...)
		cmd.Env = setenv(os.Environ(), ShardsVar, "1")
		cmd.Args[0], cmd.Stderr = os.Args[0], os.Stderr
		return cmd
	}
	out, err := self("-test.list=.").Output()
	if err != nil {
		return 0, fmt.Errorf("list the tests: %w", err)
	}
	names := regexp.MustCompile(`(?m)^(Test|Fuzz|Example)\w*$`).FindAllString(string(out), -1)
	if len(names) == 0 {
		return 0, errors.New("list the tests: there is none")
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	code := 0
	for _, part := range deal(names, n) {
		cmd := self("-test.run=^(" + strings.Join(part, "|") + ")$")
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		wg.Go(func() {
			runtime.LockOSThread() // Pdeathsig means the death of the thread
			err := cmd.Start()
			if err == nil {
				forwardSignals(cmd.Process.Pid)
				err = cmd.Wait()
			}
			mu.Lock()
			defer mu.Unlock()
			_, _ = os.Stdout.Write(said.Bytes())
			if err != nil {
				fmt.Fprintf(os.Stderr, "kit: shard of %s and %d others: %v\n", part[0], len(part)-1, err)
				code = 1
			}
		})
	}
	wg.Wait()
	return code, nil
}

// deal gives each of at most n parts every n-th name: neighbours take about as long.
func deal(names []string, n int) [][]string {
	parts := make([][]string, min(n, len(names)))
	for i, name := range names {
		parts[i%len(parts)] = append(parts[i%len(parts)], name)
	}
	return parts
}
