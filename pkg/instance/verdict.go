package instance

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// A kernel that could not mount files of a root directory through EROFS cannot do it at the
// next mount either. So the first one leaves a verdict in the run directory, which goes with
// the boot as the kernel does: whoever finds it tries no more. It is the root, a line break
// and the reason.

// verdictPath is where the verdict lies.
func verdictPath(runDir string) string { return filepath.Join(runDir, "no-erofs") }

// condemn notes that err keeps the kernel from serving images of this root.
func condemn(s Spec, err error) error {
	if !rootfs.CannotEROFS(err) {
		return nil
	}
	return writeFile(verdictPath(s.RunDir), []byte(s.Root+"\n"+err.Error()))
}

// condemned is the verdict as an error, nil if there is none. It costs one open, which
// mostly fails.
func condemned(s Spec) error {
	text, err := readFile(verdictPath(s.RunDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the verdict about this kernel's EROFS: %w", err)
	}
	root, reason, ok := strings.Cut(string(text), "\n")
	if !ok || root != s.Root {
		return nil
	}
	return fmt.Errorf("this kernel could not before: %s (remove %s to have it tried again)", reason, verdictPath(s.RunDir))
}
