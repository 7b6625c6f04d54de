package blob

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSweep marks and sweeps 1,000 images with 10 blobs each, of which a tenth is
// not needed. All that is allocated bounds what is held.
func BenchmarkSweep(b *testing.B) {
	const images, each = 1000, 10
	bed := newBed(b)
	fill := func(n int) {
		dir := bed.dir(fmt.Sprint("repository", n/10))
		ids := make([]string, each)
		for i := range ids {
			ids[i] = idOf(n*each + i)
			bed.blob(dir, ids[i], 9, 1)
		}
		if n%10 != 0 {
			bed.image(fmt.Sprint("repository", n/10), bootstrap(ids...))
		}
	}
	for n := range images {
		fill(n)
	}
	var removed int
	var peak uint64
	var mark, cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		for n := 0; n < images; n += 10 {
			fill(n)
		}
		unix.Sync() // or the sweep's sync would wait for what was just made
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		o := bed.options()
		begun := time.Now()
		if _, err := New(o).Sweep(b.Context(), true); err != nil {
			b.Fatal(err)
		}
		mark += time.Since(begun)
		runtime.ReadMemStats(&before)
		spent := spentCPU(b)
		b.StartTimer()
		r, err := New(o).Sweep(b.Context(), false)
		b.StopTimer()
		cpu += spentCPU(b) - spent
		runtime.ReadMemStats(&after)
		peak = max(peak, after.TotalAlloc-before.TotalAlloc)
		if err != nil || r.Blobs != images*each {
			b.Fatal(r.Blobs, err)
		}
		removed = len(r.Removed)
		b.StartTimer()
	}
	if removed != images*each/10 {
		b.Fatal(removed)
	}
	b.ReportMetric(float64(mark.Milliseconds())/float64(b.N), "ms-without-removing")
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms")
	b.ReportMetric(float64(peak)/(1<<20), "MiB-allocated")
}

// spentCPU is what the process has used so far.
func spentCPU(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
