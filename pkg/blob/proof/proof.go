// Package proof tells whether the blobs of an image are known to be complete and right in
// a cache directory, so that the kernel's EROFS may read them: it checks nothing itself
// once it is mounted, and takes missing, swapped or holed data without a word.
//
// The proof is a small file beside the blobs, written by package prove after it has
// compared every chunk with the digests in the image's bootstrap. It names the bootstrap,
// the blobs in the order of their device slots, and of each data file what a stat of it
// said: whoever writes to the file afterwards changes its times, and one that was replaced
// has another inode.
//
// What the package promises:
//
//   - What Open returns is what was compared: the files are opened first, looked at by
//     their descriptors, and to be mounted by those.
//   - To look takes an open and a stat for each blob, and reads no data.
//   - Whatever does not match is ErrNotProven with the reason. There is nothing between.
//   - It is linked by the mount helper, so it links the standard library, pkg/rafs and
//     golang.org/x/sys alone.
//
// What it does not promise: that a disk returns tomorrow what it returned when the data was
// compared.
//
// A proof goes with the blobs: whoever removes one of them removes the proofs beside it that
// name it first (Remove).
package proof

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

var (
	// ErrNotProven says that there is no proof, or none that still holds.
	ErrNotProven = errors.New("not proven")
	// ErrNotRegular says that something else lies where a file should.
	ErrNotRegular = errors.New("no regular file")
)

const (
	// version is the version of a proof.
	version = 1
	// Suffix ends the names of proofs.
	Suffix = ".proven"
	// Temporary begins the names of proofs that are being written.
	Temporary = ".proof-"
	// maxSize bounds a proof in bytes: as many blobs as an image can have take less.
	maxSize = 4 << 20
	// blockSize is that of the kernel's device slots, in bytes.
	blockSize = 4096
)

// Record is the content of a proof.
type Record struct {
	Version int `json:"version"`
	// Bootstrap is the digest of the bootstrap's content: "sha256:" and 64 hex digits.
	Bootstrap string `json:"bootstrap"`
	// Blobs are the image's, in the order of their device slots.
	Blobs []Blob `json:"blobs"`
}

// Blob is one blob whose data was compared.
type Blob struct {
	ID   string `json:"id"`
	File File   `json:"file"`
}

// File is what a stat of a data file says. Times are in nanoseconds.
type File struct {
	Dev    uint64 `json:"dev"`
	Inode  uint64 `json:"inode"`
	Size   int64  `json:"size"`
	Mtime  int64  `json:"mtime"`
	Change int64  `json:"ctime"`
}

// Path is where the proof of an image lies in its cache directory. The digest is
// "sha256:" and 64 lowercase hex digits; of any other it is empty.
func Path(cacheDir, bootstrap string) string {
	hex, ok := strings.CutPrefix(bootstrap, "sha256:")
	if !ok || !rafs.IsID(hex) {
		return ""
	}
	return filepath.Join(cacheDir, hex+Suffix)
}

// Is tells whether a name in a cache directory is that of a proof, or of one that is being
// written.
func Is(name string) bool {
	return strings.HasSuffix(name, Suffix) || strings.HasPrefix(name, Temporary)
}

// DataName is the name of a blob's data in a cache directory, uncompressed as nydusd keeps
// it.
func DataName(id string) string { return id + ".blob.data" }

// Read reads a proof. It says nothing about the files that the proof names.
func Read(cacheDir, bootstrap string) (*Record, error) {
	path := Path(cacheDir, bootstrap)
	if path == "" {
		return nil, fmt.Errorf("%w: bootstrap digest %.80q is not sha256: and 64 lowercase hex digits", ErrNotProven, bootstrap)
	}
	text, err := read(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: nobody has compared the cached blobs with the image yet: %w", ErrNotProven, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: read proof: %w", ErrNotProven, err)
	}
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%w: read proof %s: %w", ErrNotProven, path, err)
	}
	if r.Version != version {
		return nil, fmt.Errorf("%w: proof %s has version %d, this program knows %d", ErrNotProven, path, r.Version, version)
	}
	if r.Bootstrap != bootstrap {
		return nil, fmt.Errorf("%w: proof %s is for the bootstrap %.80q", ErrNotProven, path, r.Bootstrap)
	}
	return &r, nil
}

func read(path string) ([]byte, error) {
	f, err := OpenRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err == nil && len(text) > maxSize {
		err = fmt.Errorf("%s: more than %d bytes", path, maxSize)
	}
	return text, err
}

// OpenRegular opens a file that is one, and no link.
func OpenRegular(path string) (*os.File, error) { return openRegular(path, 0) }

// OpenQuiet is OpenRegular for whoever looks at what the cache has and does not use it: to
// read the file leaves its time of access alone, by which the cache knows what was used
// last. Only its owner, or a capable process, can have that; for another one it is
// OpenRegular.
func OpenQuiet(path string) (*os.File, error) {
	f, err := openRegular(path, unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) {
		return openRegular(path, 0)
	}
	return f, err
}

func openRegular(path string, flags int) (*os.File, error) {
	// Not blocking: something else than a file may lie there.
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is %w", path, ErrNotRegular)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Proven are the data files of an image, open and as they were when they were compared.
type Proven struct {
	// Files are in the order of the device slots.
	Files []*os.File
	want  []Blob
}

// Open opens the data of an image whose bootstrap, of the digest given, is b, if it is
// proven. The caller closes what it returns.
func Open(cacheDir, bootstrap string, b *rafs.Bootstrap) (*Proven, error) {
	r, err := Read(cacheDir, bootstrap)
	if err != nil {
		return nil, err
	}
	return r.Open(cacheDir, b)
}

// Open is as the function for a proof that was read already. It does not matter how long
// ago that was: what counts is what the files are now.
func (r *Record) Open(cacheDir string, b *rafs.Bootstrap) (*Proven, error) {
	if err := Suitable(b); err != nil {
		return nil, err
	}
	if len(r.Blobs) != len(b.Blobs) {
		return nil, fmt.Errorf("%w: the proof has %d blobs, the image %d", ErrNotProven, len(r.Blobs), len(b.Blobs))
	}
	for i := range b.Blobs {
		if r.Blobs[i].ID != b.Blobs[i].ID || r.Blobs[i].File.Size != Size(&b.Blobs[i]) {
			return nil, fmt.Errorf("%w: blob %d is %s of %d bytes in the image, %.80q of %d in the proof", ErrNotProven,
				i, b.Blobs[i].ID, Size(&b.Blobs[i]), r.Blobs[i].ID, r.Blobs[i].File.Size)
		}
	}
	p := &Proven{want: r.Blobs}
	for _, blob := range r.Blobs {
		f, err := OpenRegular(filepath.Join(cacheDir, DataName(blob.ID)))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%w: %w", ErrNotProven, err), p.Close())
		}
		p.Files = append(p.Files, f)
	}
	if err := p.Check(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Check tells whether nobody has written to the files since they were compared.
func (p *Proven) Check() error {
	for i, f := range p.Files {
		now, err := Stat(f)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrNotProven, err)
		}
		if want := p.want[i].File; now != want {
			return fmt.Errorf("%w: %s is no longer the file that was compared: %s", ErrNotProven, f.Name(), difference(want, now))
		}
	}
	return nil
}

func difference(was, now File) string {
	switch {
	case was.Dev != now.Dev || was.Inode != now.Inode:
		return fmt.Sprintf("it is inode %d of device %d, was %d of %d", now.Inode, now.Dev, was.Inode, was.Dev)
	case was.Size != now.Size:
		return fmt.Sprintf("it has %d bytes, had %d", now.Size, was.Size)
	}
	return "it was written to, or its attributes were changed"
}

// Close closes the files.
func (p *Proven) Close() error {
	var errs []error
	for _, f := range p.Files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Stat is what a stat of an open file says.
func Stat(f *os.File) (File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return File{}, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return File{Dev: st.Dev, Inode: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Change: st.Ctim.Nano()}, nil
}

// Size is how large a blob's data is that the kernel can read, in bytes.
func Size(b *rafs.Blob) int64 { return int64(b.Blocks) * blockSize }

// Suitable refuses with ErrNotProven images that the kernel cannot read, whatever the cache
// has of them.
func Suitable(b *rafs.Bootstrap) error {
	if b.Version != rafs.V6 {
		return fmt.Errorf("%w: the image has RAFS %s, the kernel reads v6", ErrNotProven, b.Version)
	}
	for i := range b.Blobs {
		blob := &b.Blobs[i]
		switch {
		case blob.ChunkCount == 0:
			return fmt.Errorf("%w: blob %s has no chunks: there is no file of it", ErrNotProven, blob.ID)
		case blob.Blocks == 0 || uint64(Size(blob)) != blob.UncompressedSize:
			// nydusd makes the file by the one, the kernel reads by the other.
			return fmt.Errorf("%w: blob %s has %d bytes and %d blocks of %d", ErrNotProven, blob.ID, blob.UncompressedSize, blob.Blocks, blockSize)
		}
	}
	return nil
}

// Remove removes the proofs in a cache directory that name one of the blobs, as is to be
// done before anything of these is removed. One that cannot be read is removed too. Each
// is read once, however many blobs there are.
func Remove(cacheDir string, blobs ...string) error {
	paths, err := filepath.Glob(filepath.Join(cacheDir, "*"+Suffix))
	errs := []error{err}
	for _, path := range paths {
		r, err := Read(cacheDir, "sha256:"+strings.TrimSuffix(filepath.Base(path), Suffix))
		if err == nil && !r.names(blobs) {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove proof: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (r *Record) names(blobs []string) bool {
	return slices.ContainsFunc(r.Blobs, func(b Blob) bool { return slices.Contains(blobs, b.ID) })
}

// New is the record of a proof.
func New(bootstrap string, blobs []Blob) Record {
	return Record{Version: version, Bootstrap: bootstrap, Blobs: blobs}
}
