package kit

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Blob is one object of an image, kept in a file.
type Blob struct {
	Desc ocispec.Descriptor
	Path string
}

// Open opens the blob's content.
func (b Blob) Open() (*os.File, error) { return os.Open(b.Path) }

// Image is an image ready to be pushed: plain OCI, or nydus.
type Image struct {
	Config       Blob
	Layers       []Blob
	Manifest     []byte
	ManifestType string
	Tars         []string // the uncompressed layers it was made of, lowest first
}

// Digest is the digest of the manifest.
func (i *Image) Digest() digest.Digest { return digest.FromBytes(i.Manifest) }

// Size is the sum of the layers' sizes in the registry.
func (i *Image) Size() int64 {
	var n int64
	for _, l := range i.Layers {
		n += l.Desc.Size
	}
	return n
}

// Tree is the file system that the image's layers make: what every mount of it must show.
func (i *Image) Tree() (Tree, error) { return ApplyLayers(i.Tars...) }

// Bootstrap is the index of the nydus bootstrap among the layers, or -1 for a plain image.
func (i *Image) Bootstrap() int {
	for n, l := range i.Layers {
		if l.Desc.Annotations[annotationBootstrap] != "" {
			return n
		}
	}
	return -1
}

// Layer writes one layer's entries.
type Layer func(*tar.Writer) error

// epoch is the modification time of generated files: fixed, so that images are
// the same in every run, and not zero, which FUSE would not show.
var epoch = time.Unix(1_700_000_000, 0)

// File is a layer entry of FileLayer: a regular file or, with a name that ends
// in "/", a directory.
type File struct {
	Name string
	Data string
	Mode int64  // 0 means 0644, or 0755 for a directory
	Link string // symlink target
}

// FileLayer is a layer of the given files, owned by root.
func FileLayer(files ...File) Layer {
	return func(w *tar.Writer) error {
		for _, f := range files {
			h := &tar.Header{Name: f.Name, Mode: f.Mode, ModTime: epoch, Size: int64(len(f.Data)), Typeflag: tar.TypeReg}
			switch {
			case f.Link != "":
				h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, f.Link, 0
			case strings.HasSuffix(f.Name, "/"):
				h.Typeflag = tar.TypeDir
			}
			if h.Mode == 0 {
				h.Mode = 0o644
				if h.Typeflag != tar.TypeReg {
					h.Mode = 0o755
				}
			}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if h.Typeflag == tar.TypeReg {
				if _, err := io.WriteString(w, f.Data); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// BuildImage makes a plain OCI image of the layers below dir (usually t.TempDir()).
// cmd is the image's command.
func BuildImage(dir string, cmd []string, layers ...Layer) (*Image, error) {
	img := &Image{ManifestType: ocispec.MediaTypeImageManifest}
	var diffIDs []digest.Digest
	for n, layer := range layers {
		blob, tarPath, diffID, err := writeLayer(dir, n, layer)
		if err != nil {
			return nil, fmt.Errorf("build image: layer %d: %w", n, err)
		}
		img.Layers = append(img.Layers, blob)
		img.Tars = append(img.Tars, tarPath)
		diffIDs = append(diffIDs, diffID)
	}
	return img, img.seal(dir, cmd, diffIDs)
}

// MustBuildImage is BuildImage for a test.
func MustBuildImage(t TB, cmd []string, layers ...Layer) *Image {
	t.Helper()
	img, err := BuildImage(t.TempDir(), cmd, layers...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return img
}

func writeLayer(dir string, n int, layer Layer) (Blob, string, digest.Digest, error) {
	tarPath := filepath.Join(dir, fmt.Sprintf("layer-%d.tar", n))
	f, err := os.Create(tarPath)
	if err != nil {
		return Blob{}, "", "", err
	}
	defer f.Close()
	sum := sha256.New()
	buf := bufio.NewWriterSize(io.MultiWriter(f, sum), 1<<20)
	w := tar.NewWriter(buf)
	if err := layer(w); err != nil {
		return Blob{}, "", "", err
	}
	if err := w.Close(); err != nil {
		return Blob{}, "", "", err
	}
	if err := buf.Flush(); err != nil {
		return Blob{}, "", "", err
	}
	blob, err := compress(tarPath, filepath.Join(dir, fmt.Sprintf("layer-%d.tar.gz", n)))
	return blob, tarPath, digest.NewDigest(digest.SHA256, sum), err
}

// compress writes the gzip form of a tar file as a layer.
func compress(src, dst string) (Blob, error) {
	in, err := os.Open(src)
	if err != nil {
		return Blob{}, err
	}
	defer in.Close()
	return writeBlob(dst, ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error {
		z := gzip.NewWriter(w)
		if _, err := io.Copy(z, in); err != nil {
			return err
		}
		return z.Close()
	})
}

// writeBlob writes a file through its digest.
func writeBlob(path, mediaType string, write func(io.Writer) error) (Blob, error) {
	f, err := os.Create(path)
	if err != nil {
		return Blob{}, err
	}
	defer f.Close()
	sum := sha256.New()
	buf := bufio.NewWriterSize(io.MultiWriter(f, sum), 1<<20)
	if err := write(buf); err != nil {
		return Blob{}, err
	}
	if err := buf.Flush(); err != nil {
		return Blob{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return Blob{}, err
	}
	return Blob{ocispec.Descriptor{
		MediaType: mediaType,
		Digest:    digest.NewDigest(digest.SHA256, sum),
		Size:      info.Size(),
	}, path}, nil
}

// seal writes configuration and manifest for the layers at hand.
func (i *Image) seal(dir string, cmd []string, diffIDs []digest.Digest) error {
	created := epoch.UTC()
	config := ocispec.Image{
		Created:  &created,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: ocispec.ImageConfig{
			Cmd: cmd,
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffIDs},
	}
	return i.sealConfig(dir, config)
}

func (i *Image) sealConfig(dir string, config ocispec.Image) error {
	text, err := json.Marshal(config)
	if err != nil {
		return err
	}
	// The name holds the digest: several images may be sealed in one directory.
	path := filepath.Join(dir, "config-"+digest.FromBytes(text).Encoded()[:16]+".json")
	i.Config, err = writeBlob(path, ocispec.MediaTypeImageConfig, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
	if err != nil {
		return fmt.Errorf("write image configuration: %w", err)
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    i.Config.Desc,
	}
	for _, l := range i.Layers {
		manifest.Layers = append(manifest.Layers, l.Desc)
	}
	i.Manifest, err = json.Marshal(manifest)
	i.ManifestType = ocispec.MediaTypeImageManifest
	return err
}

// config reads the image's configuration back.
func (i *Image) config() (ocispec.Image, error) {
	var c ocispec.Image
	text, err := os.ReadFile(i.Config.Path)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	return c, err
}
