package kit

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/nydus-snapshotter/pkg/converter"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Annotations of nydus layers, as nydusify writes them.
const (
	annotationBootstrap = converter.LayerAnnotationNydusBootstrap
	annotationBlob      = converter.LayerAnnotationNydusBlob
	annotationVersion   = converter.LayerAnnotationFSVersion
)

// NydusOptions says how an image is converted. The zero value is what nydusify does.
type NydusOptions struct {
	Version    string // RAFS version, "6" (default) or "5"
	Compressor string // "zstd" (default), "lz4_block" or "none"
	ChunkSize  string // such as "0x100000" (default)
}

// Nydus converts a plain image with upstream's converter and the real
// nydus-image: a blob layer for each layer, and the bootstrap last.
func (i *Image) Nydus(ctx context.Context, tools Tools, dir string, opts NydusOptions) (*Image, error) {
	if opts.Version == "" {
		opts.Version = "6"
	}
	if opts.Compressor == "" {
		opts.Compressor = "zstd"
	}
	config, err := i.config()
	if err != nil {
		return nil, fmt.Errorf("convert image: %w", err)
	}
	img := &Image{Tars: i.Tars}
	for n, path := range i.Tars {
		blob, err := packLayer(ctx, tools, dir, n, path, opts)
		if err != nil {
			return nil, fmt.Errorf("convert image: layer %d: %w", n, err)
		}
		img.Layers = append(img.Layers, blob)
	}
	boot, err := img.mergeLayers(ctx, tools, dir, opts)
	if err != nil {
		return nil, fmt.Errorf("convert image: merge: %w", err)
	}
	return img.withBootstrapTar(dir, config, boot, opts.Version)
}

// MustNydus is Nydus for a test.
func (i *Image) MustNydus(t TB, opts NydusOptions) *Image {
	t.Helper()
	img, err := i.Nydus(t.Context(), MustTools(t), t.TempDir(), opts)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return img
}

func packLayer(ctx context.Context, tools Tools, dir string, n int, tarPath string, opts NydusOptions) (Blob, error) {
	in, err := os.Open(tarPath)
	if err != nil {
		return Blob{}, err
	}
	defer in.Close()
	blob, err := writeBlob(filepath.Join(dir, fmt.Sprintf("nydus-%d.blob", n)), converter.MediaTypeNydusBlob, func(w io.Writer) error {
		pack, err := converter.Pack(ctx, w, converter.PackOption{
			WorkDir: dir, BuilderPath: tools.NydusImage, FsVersion: opts.Version,
			Compressor: opts.Compressor, ChunkSize: opts.ChunkSize,
		})
		if err != nil {
			return err
		}
		_, err = io.Copy(pack, in)
		return errors.Join(err, pack.Close())
	})
	blob.Desc.Annotations = map[string]string{annotationBlob: "true"}
	return blob, err
}

// mergeLayers returns the uncompressed tar of the bootstrap layer.
func (i *Image) mergeLayers(ctx context.Context, tools Tools, dir string, opts NydusOptions) ([]byte, error) {
	var layers []converter.Layer
	for _, l := range i.Layers {
		ra, err := local.OpenReader(l.Path)
		if err != nil {
			return nil, err
		}
		defer ra.Close()
		layers = append(layers, converter.Layer{Digest: l.Desc.Digest, ReaderAt: ra})
	}
	var boot bytes.Buffer
	_, err := converter.Merge(ctx, layers, &boot, converter.MergeOption{
		WorkDir: dir, BuilderPath: tools.NydusImage, FsVersion: opts.Version, WithTar: true, OCI: true,
	})
	return boot.Bytes(), err
}

// withBootstrapTar completes an image of blob layers with a bootstrap layer.
func (i *Image) withBootstrapTar(dir string, config ocispec.Image, tarball []byte, version string) (*Image, error) {
	path := filepath.Join(dir, "bootstrap-"+digest.FromBytes(tarball).Encoded()[:16]+".tar.gz")
	boot, err := writeBlob(path, ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error {
		z := gzip.NewWriter(w)
		_, err := z.Write(tarball)
		return errors.Join(err, z.Close())
	})
	if err != nil {
		return nil, err
	}
	boot.Desc.Annotations = map[string]string{annotationBootstrap: "true", annotationVersion: version}
	out := &Image{Tars: i.Tars}
	var diffIDs []digest.Digest
	for _, l := range i.Layers {
		if l.Desc.Annotations[annotationBootstrap] != "" {
			continue
		}
		out.Layers = append(out.Layers, l)
		diffIDs = append(diffIDs, l.Desc.Digest) // nydusify counts a blob as its own uncompressed form
	}
	out.Layers = append(out.Layers, boot)
	config.RootFS.DiffIDs = append(diffIDs, digest.FromBytes(tarball))
	return out, out.sealConfig(dir, config)
}

// BootstrapBytes is the RAFS bootstrap inside a nydus image.
func (i *Image) BootstrapBytes() ([]byte, error) {
	n := i.Bootstrap()
	if n < 0 {
		return nil, errors.New("read bootstrap: not a nydus image")
	}
	f, err := i.Layers[n].Open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("read bootstrap: %s: %w", converter.BootstrapFileNameInLayer, err)
		}
		if filepath.Clean(h.Name) == converter.BootstrapFileNameInLayer {
			return io.ReadAll(r)
		}
	}
}

// Hostile is the same nydus image with another bootstrap layer: whatever the
// given Layer writes, as in
//
//	img.Hostile(dir, kit.FileLayer(kit.File{Name: "image/"}, kit.File{Name: "image/image.boot", Link: "/etc/shadow"}))
func (i *Image) Hostile(dir string, bootstrap Layer) (*Image, error) {
	if i.Bootstrap() < 0 {
		return nil, errors.New("hostile image: not a nydus image")
	}
	config, err := i.config()
	if err != nil {
		return nil, fmt.Errorf("hostile image: %w", err)
	}
	var tarball bytes.Buffer
	w := tar.NewWriter(&tarball)
	if err := errors.Join(bootstrap(w), w.Close()); err != nil {
		return nil, fmt.Errorf("hostile image: %w", err)
	}
	return i.withBootstrapTar(dir, config, tarball.Bytes(), i.Layers[i.Bootstrap()].Desc.Annotations[annotationVersion])
}

// BootstrapLayer is the usual shape of a bootstrap layer around any bytes.
func BootstrapLayer(boot []byte) Layer {
	return FileLayer(File{Name: "image/"}, File{Name: converter.BootstrapFileNameInLayer, Data: string(boot)})
}

// RenameBlob returns a copy of a RAFS v6 bootstrap in which a blob's id is
// another one of at most 64 bytes, in the device slots and the blob table:
// for blob ids that are no digests.
func RenameBlob(boot []byte, old, id string) ([]byte, error) {
	const magicAt, magic = 1024, 0xE0F5E1E2
	if len(boot) < magicAt+4 || binary.LittleEndian.Uint32(boot[magicAt:]) != magic {
		return nil, errors.New("rename blob: not a RAFS v6 bootstrap")
	}
	if len(id) > 64 || len(old) != 64 {
		return nil, errors.New("rename blob: ids have 64 bytes")
	}
	padded := make([]byte, 64)
	copy(padded, id)
	if !bytes.Contains(boot, []byte(old)) {
		return nil, fmt.Errorf("rename blob: the bootstrap does not name %s", old)
	}
	return bytes.ReplaceAll(boot, []byte(old), padded), nil
}
