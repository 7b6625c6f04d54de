package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
)

// What nydusd and the holder write is passed on, and bounded as configured.
func TestServeFollowsLogs(t *testing.T) {
	dir := shortDir(t)
	const key = "0123456789abcdef0123456789abcdef"
	config := write(t, filepath.Join(dir, "config.toml"), "version = 1\n[daemon]\nlog_max_size = \"64K\"\n")
	nydusd := filepath.Join(instance.DiskDir(filepath.Join(dir, "root")), key, instance.LogName)
	// What was written while no snapshotter ran.
	write(t, nydusd, strings.Repeat("[2024-05-06 07:08:09 +00:00] INFO flood\n", 10_000)+"[2024-05-06 07:08:09 +00:00] ERROR [a:1] broken\n")
	p := start(t, dir, "--config", config)
	f, err := os.OpenFile(filepath.Join(dir, "root", "holder.log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	must(t, err)
	_, err = f.WriteString(strings.Repeat("the holder says\n", 10_000))
	must(t, err)
	must(t, f.Close())
	tick := time.NewTicker(5 * time.Millisecond) // that it is done makes no event
	defer tick.Stop()
	for deadline := time.Now().Add(limit); size(nydusd) > 64<<10 || size(nydusd+".1") == 0 || size(f.Name()) > 64<<10; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("the logs take %d, %d and %d", size(nydusd), size(nydusd+".1"), size(f.Name()))
		}
	}
	said := p.stop()
	for _, want := range []string{`level=error msg="nydusd: [a:1] broken"`, "instance=" + key, `msg="holder: the holder says"`} {
		if !strings.Contains(said, want) {
			t.Errorf("the log does not say %s:\n%s", want, said)
		}
	}
	if strings.Contains(said, "flood") {
		t.Errorf("the log has what is for debugging:\n%s", said)
	}
}

func size(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}
