package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	binaryName  = "helper binary"
	binaryLimit = 6_000_000
)

// heavy are packages that the helper must not link, as prefixes of import paths.
var heavy = []string{"net/http", "crypto/tls", "google.golang.org/grpc", "k8s.io/"}

// binary measures the helper's file and looks at what is linked into it.
func (l *lab) binary(t kit.TB) error {
	path := filepath.Join(kit.Binaries(t, "nydus-overlayfs"), "nydus-overlayfs")
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	top, err := kit.Checkout()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "./mount-helper")
	cmd.Dir, cmd.Env = top, append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go list -deps: %w", err)
	}
	b := &binary{Bytes: info.Size(), Limit: binaryLimit}
	for pkg := range strings.FieldsSeq(string(out)) {
		b.Packages++
		for _, h := range heavy {
			if strings.HasPrefix(pkg, h) {
				b.Heavy = append(b.Heavy, pkg)
			}
		}
	}
	if b.Packages == 0 {
		return fmt.Errorf("go list -deps ./mount-helper named no package")
	}
	l.report.Binary = b
	return nil
}
