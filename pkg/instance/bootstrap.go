package instance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// bootstrap is the image's metadata file. A start reads it once, whichever ways it tries; the
// zero value is one that no start has wanted yet.
type bootstrap struct {
	file *os.File
	head *rafs.Bootstrap
	// checked is closed once err tells what the digest of the content says.
	checked chan struct{}
	err     error
}

// open opens the file, after its blob table was found harmless, and begins to check its
// digest.
func (b *bootstrap) open(s Spec) error {
	if b.file != nil {
		return nil
	}
	f, err := openBootstrap(s)
	if err != nil {
		return fmt.Errorf("open bootstrap: %w", err)
	}
	// nydusd must not be given just any: its blob ids become file names.
	if b.head, _, err = rafs.OpenFile(f); err != nil {
		return errors.Join(fmt.Errorf("bootstrap %s: %w", s.Bootstrap, err), f.Close())
	}
	b.file, b.checked = f, make(chan struct{})
	go func() {
		defer close(b.checked)
		b.err = checkDigest(f, s)
	}()
	return nil
}

// link gives the file a second name at dst.
func (b *bootstrap) link(s Spec, dst string) error {
	if err := b.open(s); err != nil {
		return err
	}
	if err := linkFile(b.file, dst); err != nil {
		return fmt.Errorf("link bootstrap %s to %s: %w", s.Bootstrap, dst, err)
	}
	return nil
}

// check waits for what the digest says, which is to be known before anything may be mounted
// that comes of the file.
func (b *bootstrap) check(ctx context.Context) error {
	select {
	case <-b.checked:
		return b.err
	case <-ctx.Done():
		return fmt.Errorf("check bootstrap: %w", context.Cause(ctx))
	}
}

// close ends a check that nobody waits for.
func (b *bootstrap) close() {
	if b.file != nil {
		b.file.Close()
	}
}

// openBootstrap opens the file without following symbolic links and without
// blocking on what is not a file.
func openBootstrap(s Spec) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_NOCTTY}
	rel, beneath := strings.CutPrefix(s.Bootstrap, s.Root+"/")
	at := unix.AT_FDCWD
	if beneath {
		root, err := os.Open(s.Root)
		if err != nil {
			return nil, err
		}
		defer root.Close()
		at = int(root.Fd())
		how.Resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS
	}
	fd, err := unix.Openat2(at, rel, &how)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s: it, or a directory on the way to it, is a symbolic link", s.Bootstrap)
	}
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: s.Bootstrap, Err: err}
	}
	return os.NewFile(uintptr(fd), s.Bootstrap), nil
}

func linkFile(f *os.File, dst string) error {
	tmp := dst + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, tmp, unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		// Another file system, or one without hard links.
		err = copyFile(f, tmp)
	}
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, dst); err != nil {
		return err
	}
	// Of two names of one file rename leaves both.
	return remove(tmp)
}

func copyFile(f *os.File, dst string) error {
	out, err := os.OpenFile(filepath.Clean(dst), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.NewSectionReader(f, 0, 1<<62))
	return errors.Join(err, out.Sync(), out.Close())
}

func checkDigest(f *os.File, s Spec) error {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62)); err != nil {
		return fmt.Errorf("read bootstrap: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != s.BootstrapDigest {
		return fmt.Errorf("bootstrap %s has digest %s, expected %s: it was changed after the image was pulled; remove and pull the image again", s.Bootstrap, got, s.BootstrapDigest)
	}
	return nil
}

// cache returns the directory that the daemon may use for its blobs.
func (l *launch) cache(ctx context.Context) (string, error) {
	s := l.spec
	if err := claimCache(s); err != nil {
		return "", err
	}
	shares, err := sharesCache(ctx, s.RunDir, s.Daemon.Path)
	if err != nil || shares {
		return s.CacheDir, err
	}
	// An older nydusd destroys a cache directory that another process of its
	// kind uses. Each gets its own, for as long as it lives.
	var late time.Time // until when the first cache's owner may still be ending
	for n := 0; ; n++ {
		dir := filepath.Join(s.CacheDir, "private", fmt.Sprintf("%s.%d", s.Key, n))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", fmt.Errorf("create cache directory: %w", err)
		}
		lock, err := os.OpenFile(dir+".lock", os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return "", fmt.Errorf("lock cache directory: %w", err)
		}
		err = flock(lock, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			l.cacheLock = lock
			return dir, nil
		}
		lock.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return "", fmt.Errorf("lock cache directory %s: %w", dir, err)
		}
		if n == 0 && (late.IsZero() || time.Now().Before(late)) && l.inst.awaitRetired(ctx) {
			n-- // its owner may have just ended
			if late.IsZero() {
				late = time.Now().Add(lastThreads)
			}
			tick(ctx)
		}
	}
}

// lastThreads is how long the threads of a process that was killed may keep its files
// open after it looks ended.
const lastThreads = 300 * time.Millisecond

// tick waits for what makes no event.
func tick(ctx context.Context) {
	timer := time.NewTimer(5 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// claimCache makes the image's cache directory exist, and its backend's.
func claimCache(s Spec) error {
	if err := os.MkdirAll(s.CacheDir, 0o700); err != nil {
		return fmt.Errorf("create cache directory: %w", err)
	}
	return claim(s.CacheDir, s.Host, s.Repository)
}

// origin is the content of a cache directory's origin.json.
type origin struct {
	Host       string `json:"host"`
	Repository string `json:"repository"`
}

// claim makes a cache directory one backend's: blobs are found by their ids,
// and another server could have put other bytes under the same id.
func claim(dir, host, repository string) error {
	want := origin{host, repository}
	path := filepath.Join(dir, "origin.json")
	text, err := json.Marshal(want)
	if err != nil {
		return err
	}
	if text, err = readOrWrite(path, text); err != nil {
		return fmt.Errorf("claim cache directory: %w", err)
	}
	var have origin
	if err := json.Unmarshal(text, &have); err != nil {
		return fmt.Errorf("check whose the cache directory is: %s: %w", path, err)
	}
	if have != want {
		return fmt.Errorf("cache directory %s belongs to %q %q, not to %q %q: give each repository its own", dir, have.Host, have.Repository, want.Host, want.Repository)
	}
	return nil
}

// sharesCache remembers what nydusd says of itself as long as the file is the
// same.
func sharesCache(ctx context.Context, runDir, path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, fmt.Errorf("find nydusd: %w; install it or set [daemon] nydusd_path", &os.PathError{Op: "stat", Path: path, Err: err})
	}
	id := fmt.Sprintf("%s %d %d %d %d", path, st.Dev, st.Ino, st.Size, st.Mtim.Nano())
	sum := sha256.Sum256([]byte(id))
	memo := filepath.Join(runDir, "nydusd-"+hex.EncodeToString(sum[:8]))
	if text, err := os.ReadFile(memo); err == nil {
		return string(text) == "shared", nil
	}
	shares, err := nydusd.SharesCache(ctx, path)
	if err != nil {
		return false, err
	}
	word := "private"
	if shares {
		word = "shared"
	}
	if _, err := readOrWrite(memo, []byte(word)); err != nil {
		return false, fmt.Errorf("remember nydusd's version: %w", err)
	}
	return shares, nil
}
