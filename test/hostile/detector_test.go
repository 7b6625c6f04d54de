package hostile_test

import (
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestDetector plants a password in each kind of place that TestCanary looks at.
// Each must be found.
func TestDetector(t *testing.T) {
	kit.Baseline(t)
	s := newSecret("planted")
	forms := map[string]string{"plain": s.password}
	pair := base64.StdEncoding.EncodeToString([]byte(s.user + ":" + s.password))
	forms["docker's"] = pair
	for shift := range 3 {
		text := `{"auth":"` + strings.Repeat("x", shift) + pair + `"}`
		forms[fmt.Sprintf("an option's %d", shift)] = base64.StdEncoding.EncodeToString([]byte(text))
		forms[fmt.Sprintf("a password's %d", shift)] = base64.URLEncoding.EncodeToString([]byte(strings.Repeat("y", shift) + s.password + "yyyy"))
	}
	for _, dir := range []string{kit.Scratch(), "/run"} {
		for name, form := range forms {
			path := filepath.Join(dir, "planted")
			for _, before := range []int{0, 1<<20 - 20, 5 << 20} { // across the reader's blocks
				writeFile(t, path, strings.Repeat("z", before)+form+"zzz", 0o644)
				finds := s.files(t)
				if len(finds) != 1 || finds[0].path != path {
					t.Errorf("%s form, after %d bytes, in %s: found %v", name, before, dir, finds)
				}
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if finds := append(s.files(t), find{}); len(finds) != 1 {
		t.Errorf("found where there is nothing: %v", finds)
	}
	sleep := exec.Command("/bin/sleep", "1000")
	sleep.Env = []string{"X=" + pair}
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	// It is being executed before it has its environment.
	kit.Eventually(t, "a process has its environment", 10*time.Second, func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", sleep.Process.Pid))
		return err == nil && len(text) > 0
	})
	if finds := s.processes(t); len(finds) != 1 || !strings.HasSuffix(strings.Split(finds[0], ":")[0], "/environ") {
		t.Errorf("in an environment: found %q", finds)
	}
	if err := sleep.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = sleep.Wait()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(s.password, dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if finds := s.processes(t); len(finds) == 0 || !strings.Contains(finds[0], "mountinfo") {
		t.Errorf("in the mount table: found %q", finds)
	}
	if err := mount.UnmountAll(dir, 0); err != nil {
		t.Error(err)
	}
}
