package nydusd

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SharesCache tells whether several daemons of this executable may use one
// cache directory: from 2.3 on. A build that does not tell its version may not.
func SharesCache(ctx context.Context, path string) (bool, error) {
	cmd := exec.CommandContext(ctx, path, "--version")
	// What it started itself ends with it, and otherwise may keep the pipe open.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if ctx.Err() != nil {
		err = fmt.Errorf("no answer in time: %w", ctx.Err())
	}
	if err != nil {
		return false, fmt.Errorf("ask %s for its version: %w", path, explain(err))
	}
	major, minor := versionOf(string(out))
	return major > 2 || major == 2 && minor >= 3, nil
}

// versionOf finds "Version: v2.3.1" in what `nydusd --version` prints; zeros
// without. No regular expressions here: they would be compiled, and Unicode's
// tables built, in each mount.
func versionOf(text string) (major, minor int) {
	_, after, _ := strings.Cut(text, "Version:")
	if n, _ := fmt.Sscanf(strings.TrimPrefix(strings.TrimSpace(after), "v"), "%d.%d", &major, &minor); n < 2 {
		return 0, 0
	}
	return major, minor
}
