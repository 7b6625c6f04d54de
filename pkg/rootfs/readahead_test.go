package rootfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadAhead(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "boot"), filepath.Join(dir, "mnt")
	must(t, os.WriteFile(source, emptyEROFS(), 0o600))
	must(t, os.Mkdir(target, 0o700))
	must(t, EROFS(target, source, nil))
	t.Cleanup(func() { must(t, Detach(target)) })
	name, err := sysfsName(target)
	must(t, err)
	setting := filepath.Join(backingDevices, filepath.Base(name), "read_ahead_kb")
	for _, c := range []struct{ is, want string }{{"", "512"}, {"4096", "4096"}, {"64", "512"}} {
		if c.is != "" {
			must(t, os.WriteFile(setting, []byte(c.is), 0))
		}
		must(t, ReadAhead(target))
		got, err := os.ReadFile(setting)
		must(t, err)
		if strings.TrimSpace(string(got)) != c.want {
			t.Errorf("after %q it reads %s KiB ahead, want %s", c.is, got, c.want)
		}
	}
}

// Nothing but an EROFS is touched.
func TestReadAheadOfOthers(t *testing.T) {
	if err := ReadAhead(memory(t)); err == nil {
		t.Error("a tmpfs has a setting")
	}
	if err := ReadAhead(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("nothing: %v", err)
	}
}
