package instance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/checkpoint"
)

// CacheDirs lists a cache directory and the private ones of older daemons in it: each may
// have blobs.
func CacheDirs(cacheDir string) ([]string, error) {
	list := []string{cacheDir}
	for _, pattern := range []string{"private/*", "private/*/*"} {
		more, err := filepath.Glob(filepath.Join(cacheDir, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range more {
			info, err := os.Lstat(path)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			if err == nil && info.IsDir() {
				list = append(list, path)
			}
		}
	}
	return list, nil
}

// TrustCache sees to it that a cache directory says nothing of its blobs that a power cut may
// have made untrue, before the first daemon of this boot uses it: it is restored to what
// was synced (package checkpoint). In the run directory, which ends with the boot, it is
// noted that this is done: from then on the call takes two small reads. It returns what
// was not believed. On an error no daemon must use the directory.
func TrustCache(ctx context.Context, runDir, cacheDir string) (checkpoint.Report, error) {
	var out checkpoint.Report
	err := trustCache(ctx, runDir, cacheDir, &out)
	if err != nil {
		err = fmt.Errorf("check what cache directory %s still has since this machine started: %w", cacheDir, err)
	}
	return out, err
}

func trustCache(ctx context.Context, runDir, cacheDir string, out *checkpoint.Report) error {
	note := trustNote(runDir, cacheDir)
	if trusted(note, cacheDir) {
		return nil
	}
	lock, err := LockCache(ctx, cacheDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if trusted(note, cacheDir) {
		return nil // somebody else was faster
	}
	dirs, err := CacheDirs(cacheDir)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		r, err := checkpoint.Restore(dir)
		out.Blobs, out.Chunks = out.Blobs+r.Blobs, out.Chunks+r.Chunks
		if err != nil {
			return err
		}
	}
	id, err := directoryID(cacheDir)
	if err != nil {
		return err
	}
	return writeFile(note, []byte(noteText(id, cacheDir)))
}

// pruneNotes removes what is noted about cache directories that are gone. Other roots may
// have theirs in the same run directory.
func pruneNotes(runDir string) error {
	notes, err := filepath.Glob(filepath.Join(runDir, notePrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, note := range notes {
		text, err := readFile(note)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// One that does not tell its directory nobody trusts.
		_, cacheDir, told := strings.Cut(string(text), "\n")
		if _, err := os.Lstat(cacheDir); told && !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, remove(note))
	}
	return errors.Join(errs...)
}

// notePrefix begins the names of such notes in the run directory.
const notePrefix = "cache-"

// trustNote is the file that says that a cache directory was looked at in this boot, by its
// noteText.
func trustNote(runDir, cacheDir string) string {
	sum := sha256.Sum256([]byte(cacheDir))
	return filepath.Join(runDir, notePrefix+hex.EncodeToString(sum[:8]))
}

// noteText is the directory's id, a line break, and its path.
func noteText(id, cacheDir string) string { return id + "\n" + cacheDir }

func trusted(note, cacheDir string) bool {
	text, err := readFile(note)
	if err != nil {
		return false
	}
	id, err := directoryID(cacheDir)
	return err == nil && string(text) == noteText(id, cacheDir)
}

// directoryID names the directory: another disk may be mounted there meanwhile.
func directoryID(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return fmt.Sprintf("%d %d", st.Dev, st.Ino), nil
}

// trustCache is TrustCache for the image's directory, before its daemon has it.
func (l *launch) trustCache(ctx context.Context) error {
	lost, err := TrustCache(ctx, l.spec.RunDir, l.spec.CacheDir)
	if lost.Blobs > 0 {
		l.inst.note("%d chunks of %d cached blobs may not have reached the disk before this machine stopped: they are fetched again on demand", lost.Chunks, lost.Blobs)
	}
	return err
}
