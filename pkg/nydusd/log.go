package nydusd

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/logs"
)

// Tail returns the last lines of a log file, at most n, joined by " | ", printable
// and without credentials, the given secrets among them. It looks at what stands behind offset only, at all when
// the log was cut since.
func Tail(path string, offset int64, n int, secrets ...string) string {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return ""
	}
	defer f.Close()
	buf := make([]byte, 8<<10)
	size, err := f.Seek(0, 2)
	if err != nil {
		return ""
	}
	if size < offset {
		offset = 0
	}
	got, _ := f.ReadAt(buf, max(offset, size-int64(len(buf))))
	lines := strings.Split(strings.TrimSpace(string(buf[:got])), "\n")
	lines = lines[max(0, len(lines)-n):]
	hide := logs.NewHider(secrets...)
	for n, line := range lines {
		lines[n] = hide.Hide(logs.Clean(line))
	}
	return strings.Join(lines, " | ")
}
