package instance

import (
	"os"
	"path/filepath"
	"testing"
)

// TestReadOrWriteLeavesOtherWriters: in the run directory others write other files, without
// the lock.
func TestReadOrWriteLeavesOtherWriters(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "file"), filepath.Join(dir, "note")
	writing, left := filepath.Join(dir, unfinished(other)+"1"), filepath.Join(dir, unfinished(path)+"1")
	for _, tmp := range []string{writing, left} {
		must(t, os.WriteFile(tmp, nil, 0o600))
	}
	if text, err := readOrWrite(path, []byte("text")); err != nil || string(text) != "text" {
		t.Fatalf("%q, %v", text, err)
	}
	if err := os.Rename(writing, other); err != nil {
		t.Errorf("another file's writer is disturbed: %v", err)
	}
	if _, err := os.Lstat(left); !os.IsNotExist(err) {
		t.Errorf("what a killed writer of the file left is still there: %v", err)
	}
}

// TestWriteFileErrors: the same failure has the same text each time, or it would be told
// each time.
func TestWriteFileErrors(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "is"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "is", "file"), nil, 0o600))
	for path, want := range map[string]string{
		filepath.Join(dir, "no", "file"): "open " + filepath.Join(dir, "no", "file") + ": no such file or directory",
		filepath.Join(dir, "is"):         "rename to " + filepath.Join(dir, "is") + ": file exists",
	} {
		if err := writeFile(path, nil); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("%v, %v; want no other file", names, err)
	}
}
