package instance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// recordVersion is the version of record.json.
const recordVersion = 1

// Record is what is known of an instance. It holds no secret.
type Record struct {
	Version         int    `json:"version"`
	Key             string `json:"key"`
	Image           string `json:"image,omitempty"`
	BootstrapDigest string `json:"bootstrap_digest"`
	Host            string `json:"host,omitempty"`
	Repository      string `json:"repository,omitempty"`
	CacheDir        string `json:"cache_dir"`
	Root            string `json:"root"`
	// Driver is how the newest generation is served.
	Driver mountspec.Driver `json:"driver"`
	// Last is the number of the newest generation there was.
	Last int `json:"last"`
	// Current is the generation that new mounts use, nil for none.
	Current *Generation `json:"current,omitempty"`
	// Retired are the earlier ones that may not have ended yet.
	Retired []Generation `json:"retired,omitempty"`
}

// Generation is one daemon with its mount, a mount of an image in a pool, or one that the
// kernel serves without a daemon.
type Generation struct {
	Number int `json:"number"`
	// Ready is set once the filesystem has answered. Until then nothing uses it.
	Ready bool `json:"ready"`
	// Alone says that no snapshotter looks after it: whoever mounts it lets it
	// go at once.
	Alone bool `json:"alone,omitempty"`
	// Failed is set once it did not answer. Nothing new is mounted on it.
	Failed bool `json:"failed,omitempty"`
	// Driver is how it is served; empty for a nydusd. Without a daemon (see Daemonless)
	// there is no PID, Socket or Supervisor.
	Driver mountspec.Driver `json:"driver,omitempty"`
	// Source is what the mount table shows as the source of one without a daemon.
	Source string `json:"source,omitempty"`
	// Mountpoint is where the filesystem is, or was, mounted.
	Mountpoint string `json:"mountpoint"`
	// Socket is the daemon's API.
	Socket string `json:"socket"`
	// Supervisor is the socket through which the daemon can be succeeded.
	Supervisor string `json:"supervisor,omitempty"`
	// Kept says that somebody keeps the daemon's FUSE descriptor: users wait for
	// a successor when it dies, and so do its files here.
	Kept bool `json:"kept,omitempty"`
	// Restarts counts the successors.
	Restarts int `json:"restarts,omitempty"`
	// Threads, LogLevel, LogMaxSize and OOMScoreAdj are how it was started.
	Threads     int    `json:"threads,omitempty"`
	LogLevel    string `json:"log_level,omitempty"`
	LogMaxSize  int64  `json:"log_max_size,omitempty"`
	OOMScoreAdj int    `json:"oom_score_adj,omitempty"`
	// Dev is the filesystem's device number, "major:minor".
	Dev string `json:"dev,omitempty"`
	// PID and StartTime name the daemon's process.
	PID       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"start_time,omitempty"`
	// Nydusd is the executable, Cgroup the parent of its cgroup.
	Nydusd string `json:"nydusd"`
	Cgroup string `json:"cgroup,omitempty"`
	// MemoryLimit is the most it may use there in bytes, CPULimit in thousandths
	// of a core; Unmet says which of them is not in force, and why.
	MemoryLimit int64    `json:"memory_limit,omitempty"`
	CPULimit    int      `json:"cpu_limit,omitempty"`
	Unmet       []string `json:"unmet,omitempty"`
	// Started is when the daemon was started.
	Started time.Time `json:"started"`
	// Berth is set when the image is in a pool: there is no daemon of its own, and
	// PID, Socket and Supervisor are empty.
	Berth *Berth `json:"berth,omitempty"`
	// Shared says that this is a pool's: the daemon serves Passengers.
	Shared     bool        `json:"shared,omitempty"`
	Passengers []Passenger `json:"passengers,omitempty"`
	// Held says that it is a Hold's: the daemon fetches and serves nobody, and ends with
	// the lock of the instance.
	Held bool `json:"held,omitempty"`
	// Revision counts what was added to the daemon since its start: a state that a
	// daemon handed over before lacks it.
	Revision int `json:"revision,omitempty"`
	// KeptRevision is the one that a successor would know, see Kept.
	KeptRevision int `json:"kept_revision,omitempty"`
	// Private is the directory of the daemon in each cache directory, when it cannot
	// share them.
	Private string `json:"private,omitempty"`
}

// User is one overlay that the mount helper made on an instance. Overlays name
// their lower directories in a way that cannot be relied on, so the helper
// writes down what it mounted.
type User struct {
	// Target is the overlay's mountpoint.
	Target string `json:"target"`
	// Generation is the one it was mounted on.
	Generation int `json:"generation"`
	// Dev is the overlay's device number; empty while it is being mounted.
	Dev string `json:"dev,omitempty"`
	// Upper is its upper directory. It tells this overlay from a later one
	// with the same device number, since no two snapshots share one.
	Upper string `json:"upper,omitempty"`
	// Options are all its options as the mount table has them, for an overlay
	// without an upper directory.
	Options string `json:"options,omitempty"`
}

func instancesDir(runDir string) string { return filepath.Join(runDir, "i") }

// dir is an instance's directory.
type dir string

func dirOf(runDir, key string) dir { return dir(filepath.Join(instancesDir(runDir), key)) }

func (d dir) lock() string     { return filepath.Join(string(d), "lock") }
func (d dir) record() string   { return filepath.Join(string(d), "record.json") }
func (d dir) users() string    { return filepath.Join(string(d), "u") }
func (d dir) gen(n int) genDir { return genDir(filepath.Join(string(d), "g"+strconv.Itoa(n))) }

// user is the file of the overlay on target.
func (d dir) user(target string) string {
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(d.users(), hex.EncodeToString(sum[:16]))
}

// genDir is the directory of one generation.
type genDir string

func (d genDir) mountpoint() string { return filepath.Join(string(d), "mnt") }
func (d genDir) socket() string     { return filepath.Join(string(d), "api.sock") }
func (d genDir) supervisor() string { return filepath.Join(string(d), "sup.sock") }
func (d genDir) config() string     { return filepath.Join(string(d), "config.json") }

func (d genDir) env() string { return filepath.Join(string(d), "env.json") }

// succession is the file whose lock is the right to replace the daemon, and whose
// size counts who was to.
func (d genDir) succession() string { return filepath.Join(string(d), "succession") }

// diskDir is the instance's directory on disk.
type diskDir string

func diskDirOf(root, key string) diskDir {
	return diskDir(filepath.Join(DiskDir(root), key))
}

// DiskDir is where each instance has a directory on disk, named by its key.
func DiskDir(root string) string { return filepath.Join(root, "instances") }

// LogName is the name of the daemon's log in it.
const LogName = "nydusd.log"

func (d diskDir) bootstrap() string { return filepath.Join(string(d), "bootstrap") }
func (d diskDir) log() string       { return filepath.Join(string(d), LogName) }

// LogPath is where the daemons of an instance write.
func LogPath(r *Record) string { return diskDirOf(r.Root, r.Key).log() }

// BootstrapPath is the image's bootstrap, which stays when its snapshot goes.
func BootstrapPath(r *Record) string { return diskDirOf(r.Root, r.Key).bootstrap() }

// ConfigPath is the configuration that a generation's daemon was started with: a
// secret.
func ConfigPath(g Generation) string { return genDir(filepath.Dir(g.Mountpoint)).config() }

// Environment is what a generation's daemons have in their environment beside PATH: a
// secret.
func Environment(g Generation) ([]string, error) {
	text, err := readFile(genDir(filepath.Dir(g.Mountpoint)).env())
	if errors.Is(err, fs.ErrNotExist) {
		return []string{}, nil
	}
	env := []string{}
	if err == nil {
		err = json.Unmarshal(text, &env)
	}
	if err != nil {
		return nil, fmt.Errorf("read nydusd's environment: %w", err)
	}
	return env, nil
}

// Instance is an instance whose lock is held.
type Instance struct {
	dir  dir
	lock *os.File
	rec  Record
	// started says that this handle's Ensure made the current generation
	// reachable: it was not when it came.
	started bool
	// hang is how long a filesystem may take to answer.
	hang time.Duration
}

// errGone says that the instance does not exist, errLocked that somebody else
// holds its lock.
var (
	errGone   = errors.New("no such instance")
	errLocked = errors.New("instance is locked by another process")
)

// How open goes about an instance that is missing or locked.
type openMode int

const (
	openExisting openMode = iota // wait for the lock; errGone when it is missing
	openCreate                   // wait for the lock; make it when it is missing
	openTry                      // errLocked when it is locked, errGone when it is missing
)

// open locks an instance and reads its record. It waits for the lock no longer
// than ctx and, unless that is 0, wait.
func open(ctx context.Context, d dir, mode openMode, wait time.Duration) (*Instance, error) {
	for {
		if mode == openCreate {
			err := os.MkdirAll(d.users(), 0o700)
			if (errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist)) && ctx.Err() == nil {
				continue // removed while it was being made
			}
			if err != nil {
				return nil, fmt.Errorf("create instance: %w", err)
			}
		}
		f, err := openFile(d.lock(), unix.O_RDWR|unix.O_CREAT)
		if errors.Is(err, fs.ErrNotExist) {
			if mode == openCreate {
				continue // removed since mkdir
			}
			return nil, errGone
		}
		if err != nil {
			return nil, fmt.Errorf("open instance lock: %w", err)
		}
		if err := acquire(ctx, f, mode, wait); err != nil {
			return nil, fmt.Errorf("lock instance %s: %w", d, err)
		}
		// Whoever held the lock before may have removed the directory.
		if !sameFile(f, d.lock()) {
			f.Close()
			continue
		}
		i := &Instance{dir: d, lock: f}
		if err := i.read(); err != nil {
			f.Close()
			return nil, err
		}
		return i, nil
	}
}

// lockHolders returns the processes that locked the file, as far as the kernel says
// (proc_locks(5)): one that has got its lock from another is listed as that other one.
func lockHolders(path string) []string {
	var st unix.Stat_t
	text, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Stat(path, &st) != nil {
		return nil
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	var pids []string
	for line := range strings.Lines(string(text)) {
		// "3: FLOCK  ADVISORY  WRITE 4711 00:1a:42 0 EOF"; who waits has "->" before FLOCK.
		if f := strings.Fields(line); len(f) > 5 && f[1] == "FLOCK" && f[5] == file {
			pids = append(pids, f[4])
		}
	}
	return pids
}

// acquire locks f, or closes it and returns an error.
func acquire(ctx context.Context, f *os.File, mode openMode, wait time.Duration) error {
	err := flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if !errors.Is(err, unix.EWOULDBLOCK) || mode == openTry {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errLocked
		}
		if err != nil {
			f.Close()
		}
		return err
	}
	if wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
	}
	done := make(chan struct{})
	go func() {
		err = flock(f, unix.LOCK_EX)
		close(done)
	}()
	select {
	case <-done:
		if err != nil {
			f.Close()
		}
		return err
	case <-ctx.Done():
		// The lock may still come; it goes again with the file.
		go func() {
			<-done
			f.Close()
		}()
		return fmt.Errorf("%w, which did not finish in time: %w", errLocked, context.Cause(ctx))
	}
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// Close gives the lock back.
func (i *Instance) Close() error { return i.lock.Close() }

// read loads the record. A missing one is that of a new instance.
func (i *Instance) read() error {
	text, err := readFile(i.dir.record())
	if errors.Is(err, fs.ErrNotExist) {
		i.rec = Record{Version: recordVersion, Key: filepath.Base(string(i.dir))}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read instance record: %w", err)
	}
	err = json.Unmarshal(text, &i.rec)
	if err == nil && (i.rec.Version == 0 || i.rec.Key != filepath.Base(string(i.dir))) {
		err = errors.New("not the record of this instance")
	}
	if err != nil {
		return fmt.Errorf("read instance record %s: %w; it was damaged: end the containers of this image, unmount %s and remove %s", i.dir.record(), err, filepath.Join(string(i.dir), "g*", "mnt"), i.dir)
	}
	if i.rec.Version != recordVersion {
		return fmt.Errorf("read instance record %s: version %d, this program knows %d; end the containers of this image before changing versions", i.dir.record(), i.rec.Version, recordVersion)
	}
	return nil
}

func (i *Instance) write() error {
	text, err := json.Marshal(i.rec)
	if err == nil {
		err = writeFile(i.dir.record(), text)
	}
	if err != nil {
		return fmt.Errorf("write instance record: %w", err)
	}
	return nil
}

// Keys lists the instances of a run directory. One that does not exist has none.
func Keys(runDir string) ([]string, error) {
	entries, err := os.ReadDir(instancesDir(runDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var keys []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			keys = append(keys, e.Name())
		}
	}
	return keys, nil
}

// RecordPath is where an instance's record is. Each version of it is another file.
func RecordPath(runDir, key string) string { return dirOf(runDir, key).record() }

// ReadRecord reads an instance's record without its lock: it is as of some
// moment. The error wraps fs.ErrNotExist when there is none.
func ReadRecord(runDir, key string) (*Record, error) {
	i := Instance{dir: dirOf(runDir, key)}
	if _, err := os.Stat(i.dir.record()); err != nil {
		return nil, fmt.Errorf("read instance record: %w", err)
	}
	if err := i.read(); err != nil {
		return nil, err
	}
	return &i.rec, nil
}

// Records reads those of all instances of a run directory, as ReadRecord does. An error means
// that the list may lack some.
func Records(runDir string) ([]*Record, error) {
	keys, err := Keys(runDir)
	if err != nil {
		return nil, err
	}
	list := make([]*Record, 0, len(keys))
	var errs []error
	for _, key := range keys {
		rec, err := ReadRecord(runDir, key)
		switch {
		case err == nil:
			list = append(list, rec)
		case !errors.Is(err, fs.ErrNotExist): // just beginning, or just gone
			errs = append(errs, err)
		}
	}
	return list, errors.Join(errs...)
}
