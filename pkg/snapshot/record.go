package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

const (
	recordName    = "layer.json"
	recordVersion = 1
	// maxRecord bounds what is read; a record with rafs.MaxBlobs has 300 KB.
	maxRecord = 1 << 20
)

// The kinds of record.
const (
	kindData      = "data"
	kindBootstrap = "bootstrap"
)

// record describes a nydus layer. It lies beside the layer's content, where
// neither an image nor a container can write.
type record struct {
	Version int    `json:"version"`
	Kind    string `json:"kind"`
	Image   string `json:"image"`
	// Backend is the one that the layer's labels ask for.
	Backend string `json:"backend,omitempty"`
	// Download is what the labels ask for, see LabelDownload.
	Download string `json:"download,omitempty"`

	// Blob is the id of a data layer's blob; empty when it was not known.
	Blob string `json:"blob,omitempty"`

	// Path is the bootstrap's within the layer, Digest that of its content.
	Path      string   `json:"path,omitempty"`
	Digest    string   `json:"digest,omitempty"`
	Size      int64    `json:"size,omitempty"`
	FSVersion string   `json:"fs_version,omitempty"`
	Blobs     []string `json:"blobs,omitempty"`
}

// writeRecord writes it into a snapshot's directory, whole or not at all.
func writeRecord(dir string, r record) error {
	r.Version = recordVersion
	if err := writeJSON(dir, recordName, r); err != nil {
		return fmt.Errorf("write record of nydus layer: %w", err)
	}
	return nil
}

// writeJSON replaces dir/name, mode 0600, so that it survives a power cut.
func writeJSON(dir, name string, value any) (err error) {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, "."+name+".")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(append(text, '\n'))
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readRecord returns nil for a layer that is not nydus's.
func readRecord(dir string) (*record, error) {
	path := filepath.Join(dir, recordName)
	text, err := readRegular(path, maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read record of nydus layer: %w", err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("read record of nydus layer %s: %w; remove the image and pull it again", path, err)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("read record of nydus layer %s: %w", path, err)
	}
	return &r, nil
}

func (r *record) check() error {
	if r.Version != recordVersion {
		return fmt.Errorf("it has version %d, this program reads %d; it was written by a newer nydus-snapshotter", r.Version, recordVersion)
	}
	switch {
	case r.Kind == kindData:
		return nil
	case r.Kind == kindBootstrap && slices.Contains(bootstrapPaths(), r.Path):
		return nil
	default:
		return fmt.Errorf("kind %q with path %q is unknown", r.Kind, r.Path)
	}
}

func readRegular(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s: want a regular file of at most %d bytes", path, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// dropRecord makes sure that a snapshot which is no nydus layer has no record.
// It never has one of ours; but the guest of a VM has its snapshot's directory
// and could leave one there.
func dropRecord(dir string) error {
	if err := os.Remove(filepath.Join(dir, recordName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
