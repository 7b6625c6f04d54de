package rootfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestProbeEROFS says what this kernel can. Where it cannot, the reason must say so.
func TestProbeEROFS(t *testing.T) {
	dir := t.TempDir()
	must(t, ProbeEROFS(dir))
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("the probe leaves %v", left)
	}
	err := ProbeEROFS(memory(t))
	if !errors.Is(err, unix.ENOTBLK) || !CannotEROFS(err) || !strings.Contains(err.Error(), "tmpfs") {
		t.Errorf("on a tmpfs: %v", err)
	}
}

func TestEROFS(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "boot"), filepath.Join(dir, "mnt")
	must(t, os.WriteFile(source, emptyEROFS(), 0o600))
	must(t, os.Mkdir(target, 0o700))
	must(t, EROFS(target, source, nil))
	m, ok, err := Lookup(target)
	must(t, err)
	if !ok || m.Type != TypeEROFS || m.Source != source {
		t.Errorf("mounted %+v", m)
	}
	for _, flag := range []string{"ro", "nosuid", "nodev", "noatime"} {
		if !strings.Contains(","+m.Flags+",", ","+flag+",") {
			t.Errorf("mounted with %s, without %s", m.Flags, flag)
		}
	}
	must(t, Detach(target))

	must(t, os.WriteFile(source, make([]byte, 4096), 0o600))
	if err := EROFS(target, source, nil); err == nil || CannotEROFS(err) || !strings.Contains(err.Error(), source) {
		t.Errorf("no EROFS: %v", err)
	}
	if _, ok, err := Lookup(target); ok || err != nil {
		t.Errorf("after a failure something is mounted (%v)", err)
	}
}
