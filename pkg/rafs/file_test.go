package rafs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	text := load(t, "v6-merged")
	good := filepath.Join(dir, "good")
	must(t, os.WriteFile(good, text, 0o600))
	f, err := os.Open(good)
	must(t, err)
	defer f.Close()
	b, size, err := OpenFile(f)
	if err != nil || size != int64(len(text)) || len(b.Blobs) == 0 {
		t.Errorf("it has %d bytes, %+v, %v", size, b, err)
	}
	if b, err := ReadFile(good); err != nil || len(b.Blobs) == 0 {
		t.Errorf("%+v, %v", b, err)
	}
	must(t, os.Symlink(good, filepath.Join(dir, "link")))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "large"), text, 0o600))
	must(t, os.Truncate(filepath.Join(dir, "large"), MaxSize+4096))
	for name, want := range map[string]string{
		"none": "no such file", "link": "symbolic link", "fifo": "not a regular file", ".": "not a regular file", "large": "more than the limit",
	} {
		path := filepath.Join(dir, name)
		if b, err := ReadFile(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %+v, %v; want an error that says %q", name, b, err, want)
		}
	}
	if _, err := ReadFile(filepath.Join(dir, "large")); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
