package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// shares is a nydusd that may share a cache directory with others: the real one, which
// says of itself that it is new. With one that is older no image ever becomes complete in
// a directory that outlives its daemon; here it is alone.
func shares(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nydusd")
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] && exec echo 'Version: v2.4.0'\nexec %s \"$@\"\n", kit.MustTools(t).Nydusd)
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// prefetchAll is a template that makes nydusd fetch all of an image.
func prefetchAll(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "template.json")
	text := `{"fs_prefetch": {"enable": true, "threads_count": 4, "merging_size": 1048576, "prefetch_all": true}}`
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// awaitProof waits until the snapshotter has found so many images complete and right.
func awaitProof(t *testing.T, n *kit.Node, want int) []string {
	t.Helper()
	deadline := time.NewTimer(2 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		proofs, err := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "cache", "*", "*.proven"))
		if err != nil {
			t.Fatal(err)
		}
		if len(proofs) == want {
			return proofs
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%q are proven, want %d", proofs, want)
		}
	}
}

// TestDaemonless runs an image for the first time, and again when all of it is there.
func TestDaemonless(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := kit.MustBuildImage(t, kit.Pause, kit.BusyboxLayer(kit.MustTools(t)), kit.OddLower(), kit.OddUpper())
	ref, want := r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "odd:nydus"), tree(t, plain)
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Hook: s.mount == "helper", Config: map[string]any{
			"mount.driver": "auto", "daemon.nydusd_path": shares(t), "daemon.config_template": prefetchAll(t),
		}})
		img := pull(t, n, ref)
		c := run(t, n, img, "cold", kit.RunOptions{})
		daemonsNow(t, n, 1)
		kit.EqualTrees(t, "through FUSE", want, kit.MustWalk(t, c.Root()))
		proofs := awaitProof(t, n, 1)
		daemonsNow(t, n, 1) // it keeps its driver
		remove(t, c)
		wantDaemons(t, n, 0, soon)

		r.ResetRequests()
		c = run(t, n, img, "warm", kit.RunOptions{})
		other := run(t, n, img, "beside", kit.RunOptions{})
		daemonsNow(t, n, 0)
		imageMounts(t, 1)
		kit.EqualTrees(t, "through EROFS", want, kit.MustWalk(t, c.Root()))
		if out := exec(t, c, "busybox", "sh", "-c", "echo written > /odd/written && cat /odd/written"); out != "written\n" {
			t.Errorf("the container writes and reads %q", out)
		}
		if got := r.BlobTotal(); got > 0 {
			t.Errorf("%d bytes were fetched of an image that is complete", got)
		}
		ps, err := n.Command(t.Context(), "nydus-snapshotter", "ps", "--config", n.SnapshotterConfig()).CombinedOutput()
		if err != nil || !strings.Contains(string(ps), "erofs") || !strings.Contains(string(ps), "serving") {
			t.Errorf("ps says (%v):\n%s", err, ps)
		}
		// Nobody misses a daemon.
		log, err := os.ReadFile(n.SnapshotterLog())
		if err != nil || strings.Contains(string(log), "event=death") {
			t.Errorf("the snapshotter says that a daemon has died (%v):\n%s", err, log)
		}
		remove(t, c)
		exec(t, other, "busybox", "cat", "/odd/sizes/4097")
		remove(t, other)
		if err := n.WaitRunEntries(soon); err != nil {
			t.Error(err)
		}

		// Somebody writes to the cache: it does not count as proven any more.
		data, _ := filepath.Glob(filepath.Join(filepath.Dir(proofs[0]), "*.blob.data"))
		if len(data) == 0 {
			t.Fatal("there is no data")
		}
		now := time.Now()
		if err := os.Chtimes(data[0], now, now); err != nil {
			t.Fatal(err)
		}
		c = run(t, n, img, "stale", kit.RunOptions{})
		daemonsNow(t, n, 1)
		kit.EqualTrees(t, "through FUSE again", want, kit.MustWalk(t, c.Root()))

		// It is compared once more, and nothing that runs then depends on the snapshotter.
		eventually(t, "another proof", func() bool {
			info, err := os.Stat(proofs[0])
			return err == nil && info.ModTime().After(now)
		})
		remove(t, c)
		wantDaemons(t, n, 0, soon)
		c = run(t, n, img, "again", kit.RunOptions{})
		daemonsNow(t, n, 0)
		if err := n.KillSnapshotter(); err != nil {
			t.Fatal(err)
		}
		exec(t, c, "busybox", "ls", "/odd")
		if err := n.StartSnapshotter(t.Context()); err != nil {
			t.Fatal(err)
		}
		remove(t, c)
		if err := n.WaitRunEntries(soon); err != nil {
			t.Error(err)
		}
	})
}

// TestDaemonlessOnly asks for what is not there yet.
func TestDaemonlessOnly(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "only")
	n := helper24.node(t, kit.NodeConfig{Config: map[string]any{"mount.driver": "erofs"}})
	_, err := n.Run(t.Context(), pull(t, n, ref), "only", kit.RunOptions{})
	if err == nil || !strings.Contains(err.Error(), "not proven") {
		t.Errorf("an image that nobody has proven: %v", err)
	}
	daemonsNow(t, n, 0)
}
