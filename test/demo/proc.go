package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// rss is a process's resident memory in bytes.
func rss(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			return kb * 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no VmRSS", pid)
}

// cgroup is the path of a process's cgroup for memory, or the only one.
func cgroup(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	var path string
	for line := range strings.Lines(strings.TrimSpace(string(text))) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && (f[1] == "memory" || path == "") {
			path = f[2]
		}
	}
	return path, nil
}

// oneDaemon is the nydusd that runs, if it is exactly one and serves below the
// project's run directory.
func oneDaemon(n *kit.Node) (kit.Process, error) {
	list, err := kit.DaemonProcesses()
	if err != nil {
		return kit.Process{}, err
	}
	if len(list) != 1 {
		return kit.Process{}, fmt.Errorf("%d nydusd run, expected one: %v", len(list), list)
	}
	for i, arg := range list[0].Cmdline[:len(list[0].Cmdline)-1] {
		if arg == "--mountpoint" && strings.HasPrefix(list[0].Cmdline[i+1], filepath.Clean(n.RunDir())+"/") {
			return list[0], nil
		}
	}
	return kit.Process{}, fmt.Errorf("nydusd does not serve below %s: %v", n.RunDir(), list[0])
}

// nydusdVersion asks nydusd itself. One that was built from a crate does not
// know; the tool cache's directory tells then.
func nydusdVersion(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", path, err)
	}
	for _, r := range []struct{ pattern, text string }{
		{`Version:\s*v?([0-9]\S*)`, string(out)},
		{`/nydus-rs-([0-9.]+)/`, path},
	} {
		if m := regexp.MustCompile(r.pattern).FindStringSubmatch(r.text); m != nil {
			return m[1], nil
		}
	}
	return "of unknown version", nil
}
