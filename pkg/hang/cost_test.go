package hang

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs/fusetest"
)

func TestMain(m *testing.M) { os.Exit(fusetest.Main(m)) }

// BenchmarkLook looks at 50 idle instances and reports what that takes of a
// processor. A Watch looks every two seconds.
func BenchmarkLook(b *testing.B) {
	runDir := b.TempDir()
	for n := range 50 {
		writeRecord(b, runDir, n, fusetest.Mount(b).Dev)
	}
	w := New(Config{RunDir: runDir, Timeout: 10 * time.Second, Log: slog.New(slog.DiscardHandler)})
	var err error
	if w.conns, err = rootfs.OpenConnections(); err != nil {
		b.Fatal(err)
	}
	defer w.conns.Close()
	before := ownTime(b)
	n := 0
	for b.Loop() {
		w.look(b.Context())
		n++
	}
	b.ReportMetric(float64(ownTime(b)-before)/float64(n)/1e6, "cpu-ms/op")
	if len(w.seen) != 50 {
		b.Errorf("%d instances were seen", len(w.seen))
	}
}

func writeRecord(b *testing.B, runDir string, n int, dev string) {
	b.Helper()
	key := fmt.Sprintf("%032x", n)
	rec := instance.Record{Version: 1, Key: key, Current: &instance.Generation{Number: 1, Ready: true, Dev: dev, PID: os.Getpid()}}
	text, err := json.Marshal(rec)
	if err != nil {
		b.Fatal(err)
	}
	path := instance.RecordPath(runDir, key)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		b.Fatal(err)
	}
}

func ownTime(b *testing.B) int64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
