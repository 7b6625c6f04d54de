package main

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
)

func TestOnlineCPUs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "online")
	for text, want := range map[string]int{"0\n": 1, "0-3\n": 4, "0-3,6,8-9\n": 7} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := onlineCPUs(file); got != want || err != nil {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x", "3-1", "1-"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := onlineCPUs(file); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%q: %d, %v; want an error", text, got, err)
		}
	}
}

// Percentages are of this machine, and travel as numbers.
func TestLimitsOfThisMachine(t *testing.T) {
	cfg := config.Default()
	cfg.Cgroup = config.Cgroup{Memory: "50%", CPU: "50%"}
	n, err := newNydusd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	d := n.spec()
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if off := d.MemoryLimit - kib*1024/2; off < -4096 || off > 4096 {
		t.Errorf("half of %d KiB is %d bytes", kib, d.MemoryLimit)
	}
	// NumCPU may be fewer when this process may not run on all.
	if d.CPULimit < runtime.NumCPU()*500 {
		t.Errorf("half of %d CPUs is %d thousandths of a core", runtime.NumCPU(), d.CPULimit)
	}
}
