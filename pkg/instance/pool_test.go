package instance

import (
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// What a daemon is started with decides who shares it.
func TestPoolKey(t *testing.T) {
	base := Spec{Key: testKey, Root: "/r", RunDir: "/run", Daemon: mountspec.Daemon{Path: "/n", Mode: mountspec.ModeShared}}
	key := func(change func(*Spec)) string {
		s := base
		change(&s)
		k, err := poolKey(&s)
		must(t, err)
		if len(k) != 32 || strings.Trim(k, "0123456789abcdef") != "" {
			t.Errorf("key %q, want 32 hex digits", k)
		}
		return k
	}
	own := key(func(*Spec) {})
	for name, change := range map[string]func(*Spec){
		"image":   func(s *Spec) { s.Key, s.Image, s.Host = strings.Repeat("0", 32), "i", "h" },
		"timeout": func(s *Spec) { s.Daemon.StartTimeout = time.Second },
	} {
		if key(change) != own {
			t.Errorf("another %s has another daemon", name)
		}
	}
	seen := map[string]string{own: "base"}
	for name, change := range map[string]func(*Spec){
		"root":      func(s *Spec) { s.Root = "/other" },
		"run dir":   func(s *Spec) { s.RunDir = "/other" },
		"nydusd":    func(s *Spec) { s.Daemon.Path = "/other" },
		"log level": func(s *Spec) { s.Daemon.LogLevel = "debug" },
		"threads":   func(s *Spec) { s.Daemon.Threads = 1 },
		"oom score": func(s *Spec) { s.Daemon.OOMScoreAdj = 1 },
		"cgroup":    func(s *Spec) { s.Daemon.CgroupParent = "/c" },
	} {
		k := key(change)
		if other, ok := seen[k]; ok {
			t.Errorf("another %s shares the daemon with %s", name, other)
		}
		seen[k] = name
	}
}

func TestRoom(t *testing.T) {
	g := Generation{}
	if !g.room(10 * maxPoolState) {
		t.Error("an empty daemon has no room; then there would be none for it anywhere")
	}
	for n := range maxPassengers {
		if !g.room(1) {
			t.Fatalf("no room for image %d", n+1)
		}
		g.Passengers = append(g.Passengers, Passenger{Size: 1})
	}
	if g.room(1) {
		t.Errorf("room for image %d", maxPassengers+1)
	}
	g.Passengers = []Passenger{{Size: maxPoolState - 10}}
	if !g.room(10) || g.room(11) {
		t.Errorf("with 10 bytes left: room for 10: %v, for 11: %v", g.room(10), g.room(11))
	}
}

// Of a shared filesystem an image has its directory and what lies in it.
func TestHolds(t *testing.T) {
	own := Generation{Dev: "0:7", Berth: &Berth{Name: "a.1"}}
	alone := Generation{Dev: "0:7"}
	for _, c := range []struct {
		m          rootfs.Mount
		own, alone bool
	}{
		{rootfs.Mount{Dev: "0:7", Root: "/a.1"}, true, true},
		{rootfs.Mount{Dev: "0:7", Root: "/a.1/etc"}, true, true},
		{rootfs.Mount{Dev: "0:7", Root: "/a.10"}, false, true},
		{rootfs.Mount{Dev: "0:7", Root: "/"}, false, true},
		{rootfs.Mount{Dev: "0:8", Root: "/a.1"}, false, false},
	} {
		if own.holds(c.m) != c.own || alone.holds(c.m) != c.alone {
			t.Errorf("%+v: %v in a pool, %v alone; want %v, %v", c.m, own.holds(c.m), alone.holds(c.m), c.own, c.alone)
		}
	}
}
