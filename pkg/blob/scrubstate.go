package blob

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/draft"
)

const (
	scrubVersion = 1
	// scrubName is the state's name below the snapshotter's root, scrubTemporary begins
	// that of one that is being written.
	scrubName      = "scrub.json"
	scrubTemporary = ".scrub-"
	// maxScrubState bounds the file in bytes: a damaged blob takes some hundred.
	maxScrubState = 4 << 20
)

// ScrubState is how far Scrub is, and what it found out. It is kept in the file scrub.json
// below the snapshotter's root. Times are in UTC.
type ScrubState struct {
	Version int `json:"version"`
	// Next is when the next pass begins; zero before the first.
	Next time.Time `json:"next,omitzero"`
	// Pass is the one under way, Last the newest that has ended; nil for none.
	Pass *ScrubPass `json:"pass,omitempty"`
	Last *ScrubPass `json:"last,omitempty"`
	// Damaged are the blobs that are wrong and in use. They are removed when nobody uses
	// them, unless nydusd has repaired them by then.
	Damaged []Damage `json:"damaged,omitempty"`
}

// ScrubPass is one pass over the cache.
type ScrubPass struct {
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	// Blobs is how many were looked at, Checked how many of their chunks were compared
	// with digests, Unchecked how many have none.
	Blobs     int `json:"blobs"`
	Checked   int `json:"checked"`
	Unchecked int `json:"unchecked"`
	// Removed is how many blobs were wrong and not in use, Damaged how many were wrong
	// and in use, Failed how many could not be looked at.
	Removed int `json:"removed"`
	Damaged int `json:"damaged"`
	Failed  int `json:"failed"`
	// Directory and Blob are the last one that was done.
	Directory string `json:"directory,omitempty"`
	Blob      string `json:"blob,omitempty"`
}

// Damage is a blob that is wrong and in use.
type Damage struct {
	Directory string    `json:"directory"`
	Blob      string    `json:"blob"`
	Problem   string    `json:"problem"`
	Since     time.Time `json:"since"`
}

// ReadScrubState reads how far the scrub of the cache below root is. Without one it is the
// zero value.
func ReadScrubState(root string) (ScrubState, error) {
	path := filepath.Join(root, scrubName)
	var s ScrubState
	text, err := readScrub(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err == nil && s.Version != scrubVersion {
		err = fmt.Errorf("it has version %d, this program knows %d", s.Version, scrubVersion)
	}
	if err != nil {
		return ScrubState{}, fmt.Errorf("read how far the scrub is from %s: %w", path, err)
	}
	return s, nil
}

func readScrub(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxScrubState {
		return nil, fmt.Errorf("want a regular file of at most %d bytes", maxScrubState)
	}
	return io.ReadAll(io.LimitReader(f, maxScrubState))
}

// write replaces the state below root so that it survives a power cut.
func (s *ScrubState) write(root string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write how far the scrub is: %w", err)
		}
	}()
	s.Version = scrubVersion
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := draft.Write(filepath.Join(root, scrubName), scrubTemporary, append(text, '\n')); err != nil {
		return err
	}
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// tidyScrub removes what was left of states by processes that were killed.
func tidyScrub(root string) error {
	entries, err := os.ReadDir(root)
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), scrubTemporary) {
			errs = append(errs, os.Remove(filepath.Join(root, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func (s *ScrubState) damage(p place) int {
	return slices.IndexFunc(s.Damaged, func(d Damage) bool { return d.Directory == p.dir && d.Blob == p.id })
}

// note keeps or forgets a damaged blob, and tells whether that is news.
func (s *ScrubState) note(p place, problem string, now time.Time) bool {
	n := s.damage(p)
	switch {
	case problem == "" && n >= 0:
		s.Damaged = slices.Delete(s.Damaged, n, n+1)
		return true
	case problem == "":
		return false
	case n >= 0:
		s.Damaged[n].Problem = problem
		return false
	}
	s.Damaged = append(s.Damaged, Damage{Directory: p.dir, Blob: p.id, Problem: problem, Since: now.UTC()})
	return true
}
