package instance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Reader is an image whose blobs a daemon, or the kernel, may be reading.
type Reader struct {
	// Key is the instance's; for an image that a shared daemon was given once and
	// still has open, it is the pool's.
	Key string
	// Image is for people.
	Image string
	// CacheDir is where it has its blobs. It is empty when that is not known any
	// more: then it may be any.
	CacheDir string
	// Bootstrap is the file that names the blobs.
	Bootstrap string
	// Digest is the bootstrap's; empty for an image of a shared daemon.
	Digest string
}

// Readers lists what may be reading blobs, the ones that are about to begin, that
// failed and that are ending included. It takes no lock. Whoever wants to remove what
// no reader has must hold the lock of the cache directory, see LockCache: an instance
// appears here before it passes that lock, and it passes before anything of it opens a
// blob. An error means that the list may lack some.
func Readers(runDir string) ([]Reader, error) {
	records, err := Records(runDir)
	var list []Reader
	for _, rec := range records {
		list = append(list, rec.readers(dirOf(runDir, rec.Key))...)
	}
	return list, err
}

func (r *Record) readers(d dir) []Reader {
	all := r.Generations()
	if len(all) == 0 {
		return nil
	}
	if !r.shared() {
		return []Reader{{Key: r.Key, Image: r.Image, CacheDir: r.CacheDir, Bootstrap: BootstrapPath(r), Digest: r.BootstrapDigest}}
	}
	var list []Reader
	i := &Instance{dir: d, rec: *r}
	for n := range all {
		for _, p := range all[n].Passengers {
			path := filepath.Join(i.berths(&all[n]), p.Name)
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
				continue // the daemon was not given it yet, or has ended
			}
			list = append(list, Reader{Key: r.Key, Image: p.Key, Bootstrap: path})
		}
	}
	return list
}

// LockCache locks a cache directory for whoever removes files of blobs there, until the
// file is closed. It waits no longer than ctx. Nothing begins to read blobs there
// meanwhile, so it is to be held for some milliseconds only.
func LockCache(ctx context.Context, cacheDir string) (*os.File, error) {
	return lockCache(ctx, cacheDir, unix.LOCK_EX)
}

// HoldCache keeps others from removing files of blobs from a cache directory, until the file
// is closed. Daemons may start and end meanwhile. It waits no longer than ctx.
func HoldCache(ctx context.Context, cacheDir string) (*os.File, error) {
	return lockCache(ctx, cacheDir, unix.LOCK_SH)
}

func lockCache(ctx context.Context, cacheDir string, how int) (*os.File, error) {
	f, err := openFile(cacheDir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("lock cache directory: %w", err)
	}
	if err := flock(f, how|unix.LOCK_NB); err == nil {
		return f, nil
	}
	locked := make(chan struct{})
	go func() {
		err = flock(f, how)
		close(locked)
	}()
	select {
	case <-locked:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock cache directory %s: %w", cacheDir, err)
		}
		return f, nil
	case <-ctx.Done():
		// The lock may still come; it goes again with the file.
		go func() {
			<-locked
			f.Close()
		}()
		return nil, fmt.Errorf("lock cache directory %s, of which another process removes something: %w", cacheDir, context.Cause(ctx))
	}
}

// passCache waits until nobody removes anything from the image's cache directory. The
// instance's record is there by now: whoever begins to remove something later sees it
// and leaves the image's blobs alone.
func (l *launch) passCache(ctx context.Context) error {
	f, err := HoldCache(ctx, l.spec.CacheDir)
	if err != nil {
		return err
	}
	return f.Close()
}
