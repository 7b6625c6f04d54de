package kit

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/nydus-snapshotter/pkg/converter"
	"github.com/opencontainers/go-digest"
)

// Variant says how an image is converted in a way that nydusify does not take unless it
// is told to. The zero value converts as NydusOptions do.
type Variant struct {
	NydusOptions
	// ChunkDict is the path of a bootstrap: chunks that its blobs have are not stored again.
	ChunkDict string
	// Ref leaves the layers as they are and makes an index of each (zran).
	Ref bool
	// Apart keeps a layer's metadata in a bootstrap of its own rather than in its blob.
	Apart bool
}

// Converted is what Variant makes: not an image that can be pushed, but what a daemon
// needs to serve one.
type Converted struct {
	Bootstrap []byte
	// Blobs are the files that the bootstrap needs, by their ids, besides those of a chunk
	// dictionary.
	Blobs map[string]string
}

// Variant converts a plain image. Several may be made at a time, in directories of their own.
func (i *Image) Variant(ctx context.Context, tools Tools, dir string, v Variant) (*Converted, error) {
	if v.Version == "" {
		v.Version = "6"
	}
	if v.Compressor == "" {
		v.Compressor = "zstd"
	}
	convert := i.inline
	if v.Apart {
		convert = i.apart
	}
	c, err := convert(ctx, tools, dir, v)
	if err != nil {
		return nil, fmt.Errorf("convert image: %w", err)
	}
	return c, nil
}

// inline converts as upstream's converter does: the metadata of each layer lies in its blob.
func (i *Image) inline(ctx context.Context, tools Tools, dir string, v Variant) (*Converted, error) {
	c := &Converted{Blobs: map[string]string{}}
	var layers []converter.Layer
	for n, source := range i.Tars {
		layer := converter.Layer{}
		if v.Ref {
			source = i.Layers[n].Path
			original := i.Layers[n].Desc.Digest
			c.Blobs[original.Encoded()] = source
			layer.OriginalDigest = &original
		}
		blob := filepath.Join(dir, fmt.Sprintf("variant-%d.blob", n))
		if err := v.create(ctx, tools, source, blob, ""); err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
		id, err := fileDigest(blob)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
		c.Blobs[id.Encoded()] = blob
		reader, err := local.OpenReader(blob)
		if err != nil {
			return nil, err
		}
		defer reader.Close()
		layer.Digest, layer.ReaderAt = id, reader
		layers = append(layers, layer)
	}
	var boot bytes.Buffer
	_, err := converter.Merge(ctx, layers, &boot, converter.MergeOption{
		WorkDir: dir, BuilderPath: tools.NydusImage, FsVersion: v.Version, ChunkDictPath: v.ChunkDict, OCIRef: v.Ref,
	})
	c.Bootstrap = boot.Bytes()
	return c, err
}

// create makes a blob, and in it or in boot the metadata. It gives the builder a file, not a
// pipe as the converter does: the builder ends without reading a tar's padding.
func (v Variant) create(ctx context.Context, tools Tools, source, blob, boot string) error {
	args := []string{"create", "--blob", blob, "--fs-version", v.Version}
	if !v.Ref { // whiteouts are for the merge
		args = append(args, "--whiteout-spec", "none")
	}
	switch {
	case v.Ref:
		args = append(args, "--type", "targz-ref", "--blob-inline-meta", "--features", "blob-toc")
	case boot != "":
		args = append(args, "--type", "tar-rafs", "--compressor", v.Compressor, "--bootstrap", boot)
	case v.Version == "6":
		args = append(args, "--type", "tar-rafs", "--compressor", v.Compressor, "--blob-inline-meta", "--features", "blob-toc")
	default:
		args = append(args, "--type", "tar-rafs", "--compressor", v.Compressor, "--blob-inline-meta")
	}
	if v.ChunkSize != "" {
		args = append(args, "--chunk-size", v.ChunkSize)
	}
	if v.ChunkDict != "" {
		args = append(args, "--chunk-dict", "bootstrap="+v.ChunkDict)
	}
	return builder(ctx, tools, append(args, source)...)
}

// apart calls the builder itself.
func (i *Image) apart(ctx context.Context, tools Tools, dir string, v Variant) (*Converted, error) {
	c := &Converted{Blobs: map[string]string{}}
	merge := []string{"merge", "--bootstrap", filepath.Join(dir, "merged.boot")}
	for n, source := range i.Tars {
		blob, made := filepath.Join(dir, fmt.Sprintf("apart-%d.blob", n)), filepath.Join(dir, fmt.Sprintf("apart-%d.boot", n))
		if err := v.create(ctx, tools, source, blob, made); err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
		id, err := fileDigest(blob)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
		c.Blobs[id.Encoded()] = blob
		// The builder takes a blob's id from the name of this file.
		boot := filepath.Join(dir, id.Encoded())
		if err := os.Rename(made, boot); err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
		merge = append(merge, boot)
	}
	if err := builder(ctx, tools, merge...); err != nil {
		return nil, err
	}
	var err error
	c.Bootstrap, err = os.ReadFile(filepath.Join(dir, "merged.boot"))
	return c, err
}

func builder(ctx context.Context, tools Tools, args ...string) error {
	out, err := exec.CommandContext(ctx, tools.NydusImage, append(args, "--log-level", "warn")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("nydus-image %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func fileDigest(path string) (digest.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return digest.FromReader(f)
}
