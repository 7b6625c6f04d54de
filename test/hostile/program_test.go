package hostile_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// versionOnly makes a script say the real version when it is asked.
const versionOnly = "#!/bin/sh\nif [ \"$1\" = --version ]; then exec %s --version; fi\n"

// TestBrokenNydusd starts containers with a nydusd that is missing or does not
// work. Each says what is wrong with it, and nothing stays behind.
func TestBrokenNydusd(t *testing.T) {
	real := kit.MustTools(t).Nydusd
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style, Config: map[string]any{"daemon.start_timeout": "1s"}})
			good := nydusImage(t, "good")
			ref := r.MustPush(t, good, "good:1")
			img := mustPull(t, n, ref, kit.PullOptions{})
			for _, c := range []struct {
				name, script string
				mode         os.FileMode
				want         []string
			}{
				{"missing", "", 0, []string{"find nydusd", "no such file or directory", "[daemon] nydusd_path"}},
				{"not executable", "#!/bin/sh\n", 0o644, []string{"permission denied", "is the file executable?"}},
				{"of another format", "neither script nor program", 0o755, []string{"exec format error"}},
				{"exits at once", versionOnly + "echo no good >&2\nexit 3\n", 0o755, []string{"ended before it served", "exit status 3", "the end of", "no good"}},
				{"crashes", versionOnly + "kill -SEGV $$\n", 0o755, []string{"ended before it served", "SIGSEGV"}},
				{"hangs", versionOnly + "exec sleep 1000\n", 0o755, []string{"did not mount", "within 1s"}},
				{"hangs with a child", versionOnly + "sleep 1000\n", 0o755, []string{"did not mount", "within 1s"}},
				{"does not tell its version", "#!/bin/sh\nexec sleep 1000\n", 0o755, []string{"for its version"}},
				{"has a child that does not tell its version", "#!/bin/sh\nsleep 1000\n", 0o755, []string{"for its version"}},
			} {
				t.Run(c.name, func(t *testing.T) {
					path := filepath.Join(t.TempDir(), "nydusd")
					if c.script != "" {
						script := c.script
						if len(script) > len(versionOnly) {
							script = fmt.Sprintf(script, real)
						}
						writeFile(t, path, script, c.mode)
					}
					n.Configure("daemon.nydusd_path", path)
					restart(t, n)
					leaks := kit.Leaks(t)
					before := outside(t, n)
					_, err := n.Run(t.Context(), img, "broken", kit.RunOptions{})
					refused(t, c.name, err, append(c.want, ref, path)...)
					untouched(t, n, c.name, before)
					clean(t, c.name, leaks)
				})
			}
			n.Configure("daemon.nydusd_path", real)
			n.Configure("daemon.start_timeout", "20s")
			restart(t, n)
			runs(t, n, img, good, "repaired")
		})
	}
}

// TestMissingPrograms starts containers on a node where a part of the mount path
// is not installed. The error names it.
func TestMissingPrograms(t *testing.T) {
	for _, style := range styles {
		t.Run(style+"/mount.fuse", func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n := newNode(t, kit.NodeConfig{Style: style})
			good := nydusImage(t, "good")
			img := mustPull(t, n, r.MustPush(t, good, "good:1"), kit.PullOptions{})
			restore := hide(t, "mount.fuse", "mount.fuse3")
			leaks := kit.Leaks(t)
			_, err := n.Run(t.Context(), img, "none", kit.RunOptions{})
			refused(t, "without mount.fuse", err, "mount.fuse", "executable file not found in $PATH")
			clean(t, "without mount.fuse", leaks)
			restore()
			runs(t, n, img, good, "installed")
		})
		t.Run(style+"/helper", func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			bin := t.TempDir()
			for _, name := range []string{"nydus-snapshotter", "nydus-shim-hook"} {
				if err := os.Symlink(filepath.Join(kit.Binaries(t, name), name), filepath.Join(bin, name)); err != nil {
					t.Fatal(err)
				}
			}
			n := newNode(t, kit.NodeConfig{Style: style, Bin: bin})
			img := mustPull(t, n, r.MustPush(t, nydusImage(t, "good"), "good:1"), kit.PullOptions{})
			leaks := kit.Leaks(t)
			_, err := n.Run(t.Context(), img, "none", kit.RunOptions{})
			refused(t, "without the helper", err, "nydus-overlayfs: not found")
			clean(t, "without the helper", leaks)
		})
	}
}

// hide takes programs out of /sbin, which is the run's own, until it is undone.
func hide(t *testing.T, names ...string) (restore func()) {
	t.Helper()
	sbin, err := filepath.EvalSymlinks("/sbin")
	if err != nil {
		t.Fatal(err)
	}
	hidden := 0
	restore = func() {
		for _, name := range names {
			if err := os.Rename(filepath.Join(sbin, name+".hidden"), filepath.Join(sbin, name)); err == nil {
				hidden--
			}
		}
		if hidden != 0 {
			t.Errorf("%d of %q are still hidden", hidden, names)
		}
	}
	for _, name := range names {
		if err := os.Rename(filepath.Join(sbin, name), filepath.Join(sbin, name+".hidden")); err == nil {
			hidden++
		}
	}
	if hidden == 0 {
		t.Fatalf("none of %q is in %s: there is nothing to hide", names, sbin)
	}
	t.Cleanup(func() {
		if hidden > 0 {
			restore()
		}
	})
	return restore
}
