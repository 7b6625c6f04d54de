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

// Version is what `nydusd --version` prints; zero when it does not tell.
type Version struct{ Major, Minor int }

// Known tells whether it is one at all.
func (v Version) Known() bool { return v != Version{} }

// SharesCache tells whether several daemons may use one cache directory: from 2.3 on.
func (v Version) SharesCache() bool { return v.Major > 2 || v.Major == 2 && v.Minor >= 3 }

// SharesCache is Version.SharesCache of an executable. A build that does not tell its
// version may not.
func SharesCache(ctx context.Context, path string) (bool, error) {
	v, err := VersionOf(ctx, path)
	return v.SharesCache(), err
}

// VersionOf asks an executable.
func VersionOf(ctx context.Context, path string) (Version, error) {
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
		return Version{}, fmt.Errorf("ask %s for its version: %w", path, explain(err))
	}
	return versionOf(string(out)), nil
}

// versionOf finds "Version: v2.3.1" in what `nydusd --version` prints. No regular expressions here: they would be compiled, and Unicode's
// tables built, in each mount.
func versionOf(text string) Version {
	var v Version
	_, after, _ := strings.Cut(text, "Version:")
	if n, _ := fmt.Sscanf(strings.TrimPrefix(strings.TrimSpace(after), "v"), "%d.%d", &v.Major, &v.Minor); n < 2 {
		return Version{}
	}
	return v
}
