package cri

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

const (
	// maxFiles bounds how many repositories are known, maxTotal their files in bytes:
	// they share the run directory's tmpfs, and whoever starts pods can bring any.
	// Those go first that have no proven login, and of them the one that was not pulled
	// for the longest time.
	maxFiles = 1000
	maxTotal = 8 << 20
	// maxLogins bounds how many logins of a repository are known.
	maxLogins = 4
	// maxLogin bounds a login in bytes, maxFile a file.
	maxLogin = 16 << 10
	maxFile  = maxLogins*maxLogin + 4<<10
	// version of the files.
	version = 1

	suffix = ".json"
	// unfinished begins the names of files that are being written.
	unfinished = ".new-"
)

// Store keeps the logins of repositories, a file for each: a credentials.Provider.
// One process writes, any number read.
type Store struct {
	dir string
	now func() time.Time
	mu  sync.Mutex // held while a file is changed
	// proven tells which files have a proven login, as far as that was looked up.
	proven map[string]bool
}

// saved is a file.
type saved struct {
	Version    int    `json:"version"`
	Host       string `json:"host"`
	Repository string `json:"repository"`
	// Logins are the best first.
	Logins []login `json:"logins"`
}

// login is what PullImage brought.
type login struct {
	User          string `json:"user,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identity_token,omitempty"`
	// Proven says that an image was pulled with it.
	Proven bool      `json:"proven,omitempty"`
	At     time.Time `json:"at"`
}

// String hides the secret.
func (login) String() string { return "[login]" }

// GoString does so for %#v.
func (login) GoString() string { return "[login]" }

func (l login) same(other login) bool {
	return l.User == other.User && l.Password == other.Password && l.IdentityToken == other.IdentityToken
}

// OpenStore returns the Store in a directory below a run directory, which need not
// exist yet. Now is the clock; nil means time.Now.
func OpenStore(dir string, now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	return &Store{dir: dir, now: now, proven: map[string]bool{}}
}

// Setup makes the directory, and refuses one that is not in memory or not trusted.
// Only who writes needs it.
func (s *Store) Setup() error {
	if err := os.Mkdir(s.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make directory for kubelet's credentials: %w", err)
	}
	if err := s.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	left, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("look for kubelet's credentials: %w", err)
	}
	for _, e := range left {
		if strings.HasPrefix(e.Name(), unfinished) {
			os.Remove(filepath.Join(s.dir, e.Name()))
		}
	}
	return nil
}

// check tells whether the directory may hold secrets.
func (s *Store) check() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, s.dir, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return fmt.Errorf("open directory of kubelet's credentials: %w", &os.PathError{Op: "openat2", Path: s.dir, Err: err})
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(fd, &st), unix.Fstatfs(fd, &fs)); err != nil {
		return fmt.Errorf("check directory of kubelet's credentials: %w", &os.PathError{Op: "stat", Path: s.dir, Err: err})
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("directory %s of kubelet's credentials is not trusted: owner %d, mode %04o, want owner %d and mode 0700; remove it", s.dir, st.Uid, st.Mode&0o7777, os.Geteuid())
	}
	if fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("directory %s of kubelet's credentials is not on a tmpfs, and they may not be on a disk; see run_dir", s.dir)
	}
	return nil
}

// path is that of a repository's file. Its name tells nothing to who only sees that.
func (s *Store) path(host, repository string) string {
	sum := sha256.Sum256([]byte("nydus pull credentials\x00" + host + "\x00" + repository))
	return filepath.Join(s.dir, hex.EncodeToString(sum[:16])+suffix)
}

// Name implements credentials.Provider.
func (*Store) Name() string { return "kubelet's pulls" }

// Lookup implements credentials.Provider: those that have opened the repository
// first, and of them the newest.
func (s *Store) Lookup(_ context.Context, host, repository string) ([]*registry.Credentials, error) {
	host = hostOf(host)
	file, err := s.read(s.path(host, repository))
	if err != nil || file == nil {
		return nil, err
	}
	if file.Host != host || file.Repository != repository {
		return nil, fmt.Errorf("read kubelet's credentials: %s is another image's; remove it", s.path(host, repository))
	}
	var list []*registry.Credentials
	for _, l := range file.Logins {
		c := &registry.Credentials{IdentityToken: l.IdentityToken}
		if l.User != "" {
			c = registry.Basic(l.User, l.Password, "", l.At)
		}
		if !c.Expires.IsZero() && !s.now().Before(c.Expires) {
			continue // a token that has ended for sure
		}
		c.Source = "kubelet's pull of " + host + "/" + repository
		list = append(list, c)
	}
	return list, nil
}

// read returns nil when nothing is known.
func (*Store) read(path string) (*saved, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read kubelet's credentials: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("read kubelet's credentials: %w", &os.PathError{Op: "stat", Path: path, Err: err})
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 || st.Size > maxFile {
		return nil, fmt.Errorf("read kubelet's credentials: %s is not trusted: want a file of at most %d bytes, owner %d, mode 0600; remove it", path, maxFile, os.Geteuid())
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("read kubelet's credentials: %w", err)
	}
	file := &saved{}
	if json.Unmarshal(text, file) != nil || file.Version != version {
		return nil, fmt.Errorf("read kubelet's credentials: %s is not as this version writes it; remove it", path)
	}
	return file, nil
}

// add keeps a login for a repository: first if it is proven, after those that are
// otherwise.
func (s *Store) add(host, repository string, l login) error {
	l.At = s.now()
	if text, err := json.Marshal(l); err != nil || len(text) > maxLogin {
		return fmt.Errorf("keep kubelet's credentials: the login has %d bytes, more than %d", len(text), maxLogin)
	}
	return s.change(host, repository, func(list []login) []login {
		if i := slices.IndexFunc(list, l.same); i >= 0 {
			l.Proven = l.Proven || list[i].Proven
			list = slices.Delete(list, i, i+1)
		}
		at := 0
		if !l.Proven {
			at = len(list)
			if i := slices.IndexFunc(list, func(have login) bool { return !have.Proven }); i >= 0 {
				at = i
			}
		}
		list = slices.Insert(list, at, l)
		if len(list) <= maxLogins {
			return list
		}
		// What has just come stays, or a wrong one that was kept would keep it out.
		drop := maxLogins
		if at == drop {
			drop--
		}
		return slices.Delete(list, drop, drop+1)
	})
}

// refuse forgets a login that a registry refused. One that is proven is no longer that,
// but stays: a registry may be wrong once, and a pull may ask for too much.
func (s *Store) refuse(host, repository string, l login) error {
	return s.change(host, repository, func(list []login) []login {
		i := slices.IndexFunc(list, l.same)
		if i < 0 {
			return list
		}
		was := list[i]
		list = slices.Delete(list, i, i+1)
		if !was.Proven {
			return list
		}
		was.Proven = false
		at := slices.IndexFunc(list, func(have login) bool { return !have.Proven })
		if at < 0 {
			at = len(list)
		}
		return slices.Insert(list, at, was)
	})
}

// change replaces a repository's file.
func (s *Store) change(host, repository string, f func([]login) []login) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	path := s.path(host, repository)
	file, err := s.read(path)
	if err != nil || file == nil || file.Host != host || file.Repository != repository {
		// What cannot be read is of no use to anybody.
		file = &saved{Version: version, Host: host, Repository: repository}
	}
	if file.Logins = f(file.Logins); len(file.Logins) == 0 {
		delete(s.proven, path)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget kubelet's credentials: %w", err)
		}
		return nil
	}
	text, err := json.Marshal(file)
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("they have %d bytes, more than %d", len(text), maxFile)
	}
	if err == nil {
		err = s.write(path, text)
	}
	if err != nil {
		return fmt.Errorf("keep kubelet's credentials: %w", err)
	}
	s.proven[path] = file.proven()
	return nil
}

// proven tells whether an image was pulled with one of the logins.
func (f *saved) proven() bool {
	return f != nil && slices.ContainsFunc(f.Logins, func(l login) bool { return l.Proven })
}

// write replaces a file so that it is always either the old or the new one.
func (s *Store) write(path string, text []byte) (err error) {
	if err := s.makeRoom(path, int64(len(text))); err != nil {
		return err
	}
	tmp := filepath.Join(s.dir, fmt.Sprintf("%s%d", unfinished, rand.Uint64()))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// makeRoom removes files until one more, of a size, is not too much.
func (s *Store) makeRoom(path string, size int64) error {
	files, err := s.files(path)
	if err != nil {
		return err
	}
	total := size
	for _, f := range files {
		total += f.size
	}
	if len(files) < maxFiles && total <= maxTotal {
		return nil
	}
	for i := range files {
		files[i].proven = s.isProven(files[i].path)
	}
	slices.SortFunc(files, func(a, b kept) int {
		if a.proven != b.proven {
			if b.proven {
				return -1
			}
			return 1
		}
		return a.at.Compare(b.at)
	})
	for len(files) >= maxFiles || len(files) > 0 && total > maxTotal {
		if err := os.Remove(files[0].path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(s.proven, files[0].path)
		total -= files[0].size
		files = files[1:]
	}
	return nil
}

// kept is a file that is there.
type kept struct {
	path   string
	size   int64
	at     time.Time
	proven bool
}

// files are all but one.
func (s *Store) files(but string) (list []kept, err error) {
	entries, err := os.ReadDir(s.dir)
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if info, err := e.Info(); err == nil && path != but && strings.HasSuffix(path, suffix) {
			list = append(list, kept{path: path, size: info.Size(), at: info.ModTime()})
		}
	}
	return list, err
}

// isProven reads a file once at most: what it has is known after each change, and a
// change is what this is for.
func (s *Store) isProven(path string) bool {
	proven, known := s.proven[path]
	if !known {
		file, err := s.read(path)
		proven = err == nil && file.proven()
		s.proven[path] = proven
	}
	return proven
}
