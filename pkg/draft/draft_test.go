package draft_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/draft"
)

// TestWrite replaces a file that others may read.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	for _, text := range []string{"old", "new"} {
		if err := draft.Write(path, ".draft-", []byte(text)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		info, _ := os.Stat(path)
		if err != nil || string(got) != text || info.Mode() != 0o600 {
			t.Errorf("it has %q, mode %v (%v), want %q and 0600", got, info.Mode(), err, text)
		}
	}
	only(t, dir, "file")
}

// TestWriteFails: the file that is there stays, and errors name nothing else.
func TestWriteFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	err := draft.Write(path, ".draft-", nil)
	if err == nil || !strings.Contains(err.Error(), path+":") || strings.Contains(err.Error(), ".draft-") {
		t.Errorf("over a directory: %v, want an error that names %s and no other file", err, path)
	}
	only(t, dir, "file")
	missing := filepath.Join(dir, "none", "file")
	if err := draft.Write(missing, ".draft-", nil); !os.IsNotExist(err) || !strings.Contains(err.Error(), missing+":") {
		t.Errorf("in no directory: %v", err)
	}
}

// TestWriteOnAFullDisk leaves the file that is there, and nothing else.
func TestWriteOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "file")
	if err := draft.Write(path, ".draft-", []byte("old")); err != nil {
		t.Fatal(err)
	}
	if err := draft.Write(path, ".draft-", make([]byte, 64<<10)); err == nil || !strings.Contains(err.Error(), unix.ENOSPC.Error()) {
		t.Errorf("%v, want no space", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("it has %q (%v), want the old content", got, err)
	}
	only(t, dir, "file")
}

// TestDiscard: what got its name stays.
func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	for _, place := range []bool{false, true} {
		f, err := draft.New(filepath.Join(dir, "file"), ".draft-")
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		want := []string{}
		if place {
			want = append(want, "file")
			if err := f.Place(); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Discard(); err != nil {
			t.Fatal(err)
		}
		only(t, dir, want...)
	}
}

func only(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if strings.Join(names, " ") != strings.Join(want, " ") {
		t.Errorf("there are %q, want %q", names, want)
	}
}
