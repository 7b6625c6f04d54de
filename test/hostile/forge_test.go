package hostile_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// The annotations by which a manifest declares nydus layers.
const (
	dataLabel      = "containerd.io/snapshot/nydus-blob"
	bootstrapLabel = "containerd.io/snapshot/nydus-bootstrap"
	imageLabel     = "containerd.io/snapshot/cri.image-ref"
	refLabel       = "containerd.io/snapshot.ref"
)

// part is one layer of a forged image: what the registry has, and what the
// image's configuration says that it is.
type part struct {
	blob kit.Blob
	diff digest.Digest
}

// labelled is the part with one annotation more.
func (p part) labelled(name string) part { return p.annotated(name, "true") }

func (p part) annotated(name, value string) part {
	annotations := map[string]string{name: value}
	for k, v := range p.blob.Desc.Annotations {
		annotations[k] = v
	}
	p.blob.Desc.Annotations = annotations
	return p
}

// forge makes an image of parts, with a manifest that a builder would not write.
func forge(t *testing.T, parts ...part) *kit.Image {
	t.Helper()
	config := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   ocispec.ImageConfig{Cmd: kit.Pause, Env: []string{"PATH=/usr/bin:/bin"}},
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	img := &kit.Image{ManifestType: ocispec.MediaTypeImageManifest}
	for _, p := range parts {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, p.diff)
		img.Layers = append(img.Layers, p.blob)
	}
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	img.Config = blob(t, ocispec.MediaTypeImageConfig, text)
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: img.ManifestType, Config: img.Config.Desc}
	for _, l := range img.Layers {
		manifest.Layers = append(manifest.Layers, l.Desc)
	}
	if img.Manifest, err = json.Marshal(manifest); err != nil {
		t.Fatal(err)
	}
	return img
}

func blob(t *testing.T, mediaType string, content []byte) kit.Blob {
	t.Helper()
	d := digest.FromBytes(content)
	path := filepath.Join(t.TempDir(), d.Encoded())
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return kit.Blob{Desc: ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(content))}, Path: path}
}

// dataParts are the data layers of a nydus image.
func dataParts(img *kit.Image) []part {
	var parts []part
	for _, l := range img.Layers[:img.Bootstrap()] {
		parts = append(parts, part{l, l.Desc.Digest})
	}
	return parts
}

// tarPart is a layer that containerd unpacks.
func tarPart(t *testing.T, layer kit.Layer) part {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(layer(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	return rawPart(t, b.Bytes())
}

// rawPart is a layer of a tar file's bytes.
func rawPart(t *testing.T, tarball []byte) part {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(tarball)
	if err = errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return part{blob(t, ocispec.MediaTypeImageLayerGzip, b.Bytes()), digest.FromBytes(tarball)}
}

// bootstrapPart is a bootstrap layer of any shape.
func bootstrapPart(t *testing.T, layer kit.Layer) part {
	t.Helper()
	return tarPart(t, layer).labelled(bootstrapLabel)
}

// entries is a layer of tar headers without content.
func entries(headers ...tar.Header) kit.Layer {
	return func(w *tar.Writer) error {
		for _, h := range headers {
			if h.Mode == 0 {
				h.Mode = 0o755
			}
			if err := w.WriteHeader(&h); err != nil {
				return fmt.Errorf("%s: %w", h.Name, err)
			}
		}
		return nil
	}
}

// layers writes several layers into one.
func layers(all ...kit.Layer) kit.Layer {
	return func(w *tar.Writer) error {
		for _, layer := range all {
			if err := layer(w); err != nil {
				return err
			}
		}
		return nil
	}
}

// bombPart is a bootstrap layer of a few hundred bytes whose bootstrap is a hole
// of the given size: a sparse file as GNU tar writes it (PAX, version 1.0).
func bombPart(t *testing.T, size int64) part {
	t.Helper()
	const name = "image/image.boot"
	var records bytes.Buffer
	for _, r := range [][2]string{
		{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", name}, {"GNU.sparse.realsize", fmt.Sprint(size)},
	} {
		records.WriteString(paxRecord(r[0], r[1]))
	}
	// One piece of data, of no bytes, at the end.
	sparse := fmt.Sprintf("1\n%d\n0\n", size)
	var b bytes.Buffer
	b.Write(rawEntry("image/", tar.TypeDir, ""))
	b.Write(rawEntry("PaxHeaders/image.boot", tar.TypeXHeader, records.String()))
	b.Write(rawEntry(name, tar.TypeReg, sparse+string(make([]byte, 512-len(sparse)))))
	b.Write(make([]byte, 1024))
	return rawPart(t, b.Bytes()).labelled(bootstrapLabel)
}

// paxRecord counts its own length, digits included.
func paxRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	n := len(rest)
	for {
		text := fmt.Sprint(n) + rest
		if len(text) == n {
			return text
		}
		n = len(text)
	}
}

// rawEntry is one entry of a tar file, padded: archive/tar writes no sparse ones.
func rawEntry(name string, kind byte, data string) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000755\x00")
	copy(h[108:], "0000000\x00")
	copy(h[116:], "0000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", len(data)))
	copy(h[136:], "00000000000\x00")
	copy(h[148:], "        ")
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	out := append(h, data...)
	return append(out, make([]byte, (512-len(data)%512)%512)...)
}
