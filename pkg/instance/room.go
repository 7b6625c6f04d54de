package instance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// nydusd writes presence maps and metadata through mappings of sparse files. Where the disk
// has no room for a page of them the kernel kills it (SIGBUS), and the image's containers
// lose their root filesystem; without room for data it only serves on without keeping
// it. So there is room for all pages before it starts, or the mount fails and says why.

const (
	// page is what the parts of these files are aligned to, in bytes, and how long their
	// heads are.
	page = 4096
	// maxReserve bounds what is reserved for one image, in bytes: what it says about its
	// lists of chunks is not checked. An image of 4 million chunks takes as much.
	maxReserve = 64 << 20
)

// reserve makes room for what nydusd maps of an image's blobs, without changing the size
// of any file: one that is empty is still one that nydusd is to make.
func (l *launch) reserve(cacheDir string) error {
	head := l.boot.head
	left := int64(maxReserve)
	for i := range head.Blobs {
		for name, size := range mappedFiles(&head.Blobs[i], cacheDir != l.spec.CacheDir) {
			if size > left {
				l.inst.note("no room is reserved for all metadata of the image: it says that it has more than %d bytes", maxReserve)
				return nil
			}
			left -= size
			if err := reserveFile(filepath.Join(cacheDir, name), size); err != nil {
				return fmt.Errorf("reserve room for metadata in the cache: %w", err)
			}
		}
	}
	if !nydusd.Validates(l.spec.Config) {
		return nil // then nydusd fetches no digests
	}
	if err := roomForDigests(head.Blobs, cacheDir); err != nil {
		return fmt.Errorf("reserve room for metadata in the cache: %w", err)
	}
	return nil
}

// roomForDigests looks whether what nydusd fetches to compare chunks with has room. It is
// written to files that are renamed, so that nothing can be reserved for it; without it
// every read of the blob fails until nydusd is started anew. (nydus-storage 0.6.2 and 0.7.1,
// src/cache/filecache/mod.rs: need_validation.)
func roomForDigests(blobs []rafs.Blob, cacheDir string) error {
	need := int64(0)
	for i := range blobs {
		b := &blobs[i]
		if b.ListSize == 0 || !b.Features.Has(rafs.FeatureInlinedDigests) || sizeOf(filepath.Join(cacheDir, b.ID+".blob.digest")) > 0 {
			continue
		}
		// The digests twice, since they are unpacked, with what a file takes beside.
		need += 2 * (whole(32*int64(b.ChunkCount)) + page)
	}
	if need == 0 {
		return nil
	}
	// How much is free would not tell how much of that may be used.
	fd, err := unix.Open(cacheDir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Fallocate(fd, 0, 0, need)
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("the image's digests take up to %d bytes in %s: %w", need, cacheDir, err)
	}
	return nil // not every filesystem can, and nydusd says what else is wrong
}

// whole rounds up to pages.
func whole(n int64) int64 { return (n + page - 1) &^ (page - 1) }

// mappedFiles are the files of a blob that nydusd maps, and their sizes. An older nydusd,
// which has a directory of its own, gives them other names.
func mappedFiles(b *rafs.Blob, older bool) map[string]int64 {
	if b.ChunkCount == 0 {
		return nil
	}
	id, names := b.ID, chunkmap.Names(b.ID)
	name := names[0]
	if older {
		if b.MetaID != "" {
			id = b.MetaID
		}
		name = chunkmap.Names(id)[1]
	}
	files := map[string]int64{name: page + (int64(b.ChunkCount)+7)/8}
	if b.ListSize > maxReserve {
		files[id+".blob.meta"] = maxReserve + 1
	} else if b.ListSize > 0 {
		files[id+".blob.meta"] = page + whole(int64(b.ListSize))
	}
	return files
}

func reserveFile(path string, size int64) error {
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil // not every filesystem can
	}
	if err != nil {
		return &os.PathError{Op: "fallocate", Path: path, Err: err}
	}
	return nil
}

// advise says what a person can do about an error that a disk is the reason of.
func advise(err error, root string) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w; the disk of %s is full: free space, or have nydus-snapshotter cache gc remove what nothing needs", err, root)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; %s is on a read-only filesystem: the kernel log (dmesg) says why if it was not mounted so", err, root)
	case errors.Is(err, unix.EIO):
		return fmt.Errorf("%w; the disk of %s fails: the kernel log (dmesg) has more", err, root)
	}
	return err
}
