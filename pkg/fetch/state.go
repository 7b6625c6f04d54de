package fetch

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// Image is one to complete.
type Image struct {
	// Name is for people.
	Name string
	// CacheDir has its blobs, Bootstrap is the path of its bootstrap, Digest that file's:
	// sha256: and 64 hex digits.
	CacheDir, Bootstrap, Digest string
}

// Blob is what the cache has of one blob, as nydusd says.
type Blob struct {
	// ID is 64 hex digits.
	ID string `json:"id"`
	// Chunks is how many it has, Ready how many of them are there.
	Chunks int `json:"chunks"`
	Ready  int `json:"ready"`
	// Size is the blob's in bytes, as it is fetched, Raw as it is cached.
	Size int64 `json:"size"`
	Raw  int64 `json:"raw_size"`
}

// Done is how many of Size bytes are there. It is an estimate: chunks differ in size.
func (b *Blob) Done() int64 { return part(b.Size, b.Ready, b.Chunks) }

// Missing is how much more the blob will take in the cache, in bytes: an estimate, too.
func (b *Blob) Missing() int64 { return b.Raw - part(b.Raw, b.Ready, b.Chunks) }

func part(all int64, n, of int) int64 {
	if of == 0 {
		return all
	}
	return int64(float64(all) * float64(n) / float64(of))
}

// State is what the cache has of an image, by blob.
type State []Blob

// Complete tells whether nothing is missing.
func (s State) Complete() bool { return s.Chunks() == s.Ready() }

// Chunks is how many there are in all, Ready how many of them are there.
func (s State) Chunks() int { return s.sum(func(b *Blob) int64 { return int64(b.Chunks) }) }

// Ready is how many chunks are there.
func (s State) Ready() int { return s.sum(func(b *Blob) int64 { return int64(b.Ready) }) }

// Size is how many bytes the image has, as they are fetched.
func (s State) Size() int64 { return int64(s.sum(func(b *Blob) int64 { return b.Size })) }

// Done is how many bytes are there.
func (s State) Done() int64 { return int64(s.sum((*Blob).Done)) }

// Missing is how much more the cache will take.
func (s State) Missing() int64 { return int64(s.sum((*Blob).Missing)) }

func (s State) sum(of func(*Blob) int64) int {
	n := int64(0)
	for i := range s {
		n += of(&s[i])
	}
	return int(n)
}

// Errors of an image that cannot be completed.
var (
	// ErrUncounted says that the bootstrap does not tell how many chunks the image has,
	// as those of RAFS v5 without an extended blob table.
	ErrUncounted = errors.New("the bootstrap does not tell how many chunks there are")
	// ErrStalled says that nydusd gets nothing more.
	ErrStalled = errors.New("nydusd gets no more of it")
)

// DamagedError says that the cache has something that cannot be, or is not, the image's.
type DamagedError struct {
	// Blob is whose files are wrong.
	Blob  string
	Cause error
}

// Error implements error.
func (e *DamagedError) Error() string {
	return fmt.Sprintf("the cache's files of blob %s are damaged: %v", e.Blob, e.Cause)
}

// Unwrap returns the cause.
func (e *DamagedError) Unwrap() error { return e.Cause }

// Look tells what the cache has of an image. The error is a *DamagedError when a daemon
// must not be let at the files, which would take holes for data.
func Look(im Image) (State, error) {
	blobs, err := blobsOf(im)
	if err != nil {
		return nil, err
	}
	return look(im.CacheDir, blobs)
}

// look is Look for an image that has these blobs.
func look(dir string, blobs []rafs.Blob) (_ State, err error) {
	s := make(State, 0, len(blobs))
	for i := range blobs {
		b := Blob{ID: blobs[i].ID, Chunks: int(blobs[i].ChunkCount), Size: int64(blobs[i].CompressedSize), Raw: int64(blobs[i].UncompressedSize)}
		if b.Ready, err = ready(dir, &blobs[i]); err != nil {
			return nil, err
		}
		s = append(s, b)
	}
	return s, nil
}

// blobsOf reads which blobs the image has.
func blobsOf(im Image) ([]rafs.Blob, error) {
	b, err := rafs.ReadFile(im.Bootstrap)
	if err != nil {
		return nil, err
	}
	for i := range b.Blobs {
		if b.Version == rafs.V5 && b.Blobs[i].ChunkCount == 0 {
			return nil, fmt.Errorf("%w: blob %s", ErrUncounted, b.Blobs[i].ID)
		}
	}
	return b.Blobs, nil
}

func ready(dir string, b *rafs.Blob) (int, error) {
	if b.ChunkCount == 0 {
		return 0, nil
	}
	m, err := chunkmap.Open(dir, b.ID, b.ChunkCount)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil
	case errors.Is(err, chunkmap.ErrInvalid):
		return 0, &DamagedError{b.ID, err}
	case err != nil:
		return 0, err
	}
	if m.Ready() == 0 {
		return 0, nil
	}
	info, err := os.Lstat(filepath.Join(dir, proof.DataName(b.ID)))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, &DamagedError{b.ID, fmt.Errorf("%d chunks are said to be there, and there is no data: %w", m.Ready(), err)}
	case err != nil:
		return 0, err
	case b.UncompressedSize > 0 && info.Size() != int64(b.UncompressedSize):
		return 0, &DamagedError{b.ID, fmt.Errorf("the data has %d bytes, want %d", info.Size(), b.UncompressedSize)}
	}
	return m.Ready(), nil
}
