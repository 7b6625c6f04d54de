package hang

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
)

// records reads the records of a run directory, and each again only when it has
// changed: that is looked at every other second.
type records struct {
	runDir string
	known  map[string]*record
}

type record struct {
	// stamp tells one version of the file from the next, which is another file.
	inode   uint64
	written unix.Timespec
	path    string
	rec     *instance.Record
}

func newRecords(runDir string) *records {
	return &records{runDir: runDir, known: map[string]*record{}}
}

// read returns what can be read. What is damaged, or just beginning or ending, is
// left out: whoever works on it says so.
func (r *records) read() ([]*instance.Record, error) {
	keys, err := instance.Keys(r.runDir)
	if err != nil {
		return nil, err
	}
	var list []*instance.Record
	next := make(map[string]*record, len(keys))
	for _, key := range keys {
		k := r.known[key]
		if k == nil {
			k = &record{path: instance.RecordPath(r.runDir, key)}
		}
		var st unix.Stat_t
		if err := unix.Stat(k.path, &st); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, err
		}
		if k.rec == nil || k.inode != st.Ino || k.written != st.Mtim {
			rec, err := instance.ReadRecord(r.runDir, key)
			if err != nil {
				continue
			}
			k.inode, k.written, k.rec = st.Ino, st.Mtim, rec
		}
		next[key] = k
		list = append(list, k.rec)
	}
	r.known = next
	return list, nil
}
