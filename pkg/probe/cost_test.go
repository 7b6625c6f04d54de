package probe_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs/fusetest"
)

// BenchmarkAsk asks 50 filesystems and reports what the child takes of a processor.
// The test program stands in for nydus-shim-hook, which begins somewhat faster.
func BenchmarkAsk(b *testing.B) {
	p := prober(b)
	var dirs []string
	for range 50 {
		dirs = append(dirs, fusetest.Mount(b).Dir)
	}
	before := childTime(b)
	n := 0
	for b.Loop() {
		for dir, err := range p.Ask(b.Context(), dirs, time.Minute) {
			if err != nil {
				b.Fatalf("%s: %v", dir, err)
			}
		}
		n++
	}
	b.ReportMetric(float64(childTime(b)-before)/float64(n)/1e6, "child-ms/op")
}

func childTime(b *testing.B) int64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
