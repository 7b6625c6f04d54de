package e2e_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// asUser runs a container as a user who may gain privileges.
func asUser(id uint32) []oci.SpecOpts {
	return []oci.SpecOpts{oci.WithUIDGID(id, id), oci.WithNewPrivileges}
}

// probeImage is a plain image with /probe: a setuid id, a device node, and a file
// from the epoch.
func probeImage(t *testing.T) *kit.Image {
	t.Helper()
	tools := kit.MustTools(t)
	packages := []string{"libc6", "libgcc-s1", "gcc-12-base", "coreutils", "libacl1", "libattr1", "libselinux1", "libpcre2-8-0",
		"libgmp10", "busybox-static"}
	return kit.MustBuildImage(t, kit.Pause, kit.DebLayer(tools, true, packages...), func(w *tar.Writer) error {
		id, err := fileOf(kit.DebLayer(tools, false, "coreutils"), "usr/bin/id")
		if err != nil {
			return err
		}
		then := time.Unix(1_500_000_000, 0)
		for _, h := range []*tar.Header{
			{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: then},
			{Name: "probe/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: then},
			{Name: "probe/id", Typeflag: tar.TypeReg, Mode: 0o4755, Size: int64(len(id)), ModTime: then},
			{Name: "probe/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: then},
			{Name: "probe/epoch", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(0, 0)},
		} {
			h.Format = tar.FormatPAX
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if h.Size > 0 {
				if _, err := w.Write(id); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// fileOf is the content of one file of a layer.
func fileOf(l kit.Layer, name string) ([]byte, error) {
	var all bytes.Buffer
	w := tar.NewWriter(&all)
	if err := errors.Join(l(w), w.Close()); err != nil {
		return nil, err
	}
	for r := tar.NewReader(&all); ; {
		h, err := r.Next()
		if err != nil {
			return nil, err
		}
		if h.Name == name {
			return io.ReadAll(r)
		}
	}
}

// coldImage is a plain image with 8 MB in /cold that no program reads by itself.
func coldImage(t *testing.T) *kit.Image {
	t.Helper()
	data := make([]byte, 8<<20)
	rand.New(rand.NewSource(8)).Read(data)
	return kit.MustBuildImage(t, kit.Pause, kit.BusyboxLayer(kit.MustTools(t)), kit.FileLayer(
		kit.File{Name: "./"}, kit.File{Name: "cold", Data: string(data)}))
}
