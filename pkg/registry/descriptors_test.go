package registry

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A process that is out of descriptors cannot read a registry's files. That says nothing
// of the files: they count as soon as they can be read.
func TestNoDescriptors(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, "r.test", "hosts.toml")
	put(t, file, "server = \"https://first.test\"\n")
	e := NewEndpoints(EndpointsConfig{Dirs: []string{root}, Log: slog.New(slog.DiscardHandler)})
	host := func() string {
		t.Helper()
		hosts, err := e.For(t.Context(), "r.test")
		if err != nil {
			t.Errorf("with descriptors: %v", err)
			return ""
		}
		return hosts[0].Host
	}
	for range 500 {
		e.known = map[string]*known{}
		withDescriptors(t, 1, func() { _, _ = e.For(t.Context(), "r.test") })
		if got := host(); got != "first.test" {
			t.Errorf("never read before: %q", got)
			break
		}
	}
	put(t, file, "server = \"https://second.test\" # another\n")
	for spare := range 2 {
		withDescriptors(t, spare, func() {
			if hosts, err := e.For(t.Context(), "r.test"); err != nil || hosts[0].Host == "" {
				t.Errorf("known from before, and %d descriptors: %v", spare, err)
			}
		})
	}
	if got := host(); got != "second.test" {
		t.Errorf("edited since: %q", got)
	}
}

// withDescriptors calls f while only so many files can be opened.
func withDescriptors(t *testing.T, spare int, f func()) {
	t.Helper()
	next, err := os.Open(os.DevNull) // has the lowest number that is free
	if err != nil {
		t.Fatal(err)
	}
	lowest := next.Fd()
	next.Close()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = uint64(lowest) + uint64(spare)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
	}()
	// Somebody else takes one now and then.
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				if f, err := os.Open(os.DevNull); err == nil {
					f.Close()
				}
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	f()
}
