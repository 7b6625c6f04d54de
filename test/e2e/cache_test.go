package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// blobsIn lists the ids of what is cached, wherever it is.
func blobsIn(n *kit.Node) []string {
	var ids []string
	for _, where := range []string{"*", "*/private/*", "*/private/*/*"} {
		files, _ := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "cache", where, "*.blob.data"))
		for _, path := range files {
			ids = append(ids, strings.TrimSuffix(filepath.Base(path), ".blob.data"))
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// du is what blobs occupy in the cache.
func du(t *testing.T, n *kit.Node) (total int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(n.SnapshotterRoot(), "cache"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == "origin.json" {
			return err
		}
		var st unix.Stat_t
		err = unix.Lstat(path, &st)
		total += st.Blocks * 512
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// usage is what containerd is told that all nydus data layers have.
func usage(t *testing.T, n *kit.Node) (total int64) {
	t.Helper()
	sn := n.Client().SnapshotService(n.SnapshotterName())
	err := sn.Walk(t.Context(), func(ctx context.Context, info snapshots.Info) error {
		// Their kind is no sign: it tells CRI when to ask for their usage.
		if info.Labels["containerd.io/snapshot/nydus-blob"] != "true" {
			return nil
		}
		u, err := sn.Usage(ctx, info.Name)
		total += u.Size
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// wantBlobs waits until exactly these are cached.
func wantBlobs(t *testing.T, n *kit.Node, want []string) {
	t.Helper()
	slices.Sort(want)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for over := time.After(4 * soon); ; {
		have := blobsIn(n)
		if slices.Equal(have, want) {
			return
		}
		select {
		case <-tick.C:
		case <-over:
			t.Fatalf("cached are %q, want %q", have, want)
		}
	}
}

// cacheCommand runs `nydus-snapshotter cache` beside the running one.
func cacheCommand(t *testing.T, n *kit.Node, into any, args ...string) {
	t.Helper()
	args = append([]string{"cache", args[0], "--format", "json", "--config", n.SnapshotterConfig()}, args[1:]...)
	var text, said strings.Builder
	cmd := n.Command(t.Context(), "nydus-snapshotter", args...)
	cmd.Stdout, cmd.Stderr = &text, &said
	if err := errors.Join(cmd.Run(), json.Unmarshal([]byte(text.String()), into)); err != nil {
		t.Fatalf("%q: %v\n%s%s", args, err, said.String(), text.String())
	}
}

type listedBlob struct {
	ID        string
	Images    []string
	Instances []string
	Usage     int64
	Ready     int
}

// cacheList is what `cache ls` says once something of each blob is there: nydusd answers a read
// before it has written down what it fetched.
func cacheList(t *testing.T, n *kit.Node) []listedBlob {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for over := time.After(4 * soon); ; {
		var list []listedBlob
		cacheCommand(t, n, &list, "ls")
		if !slices.ContainsFunc(list, func(l listedBlob) bool { return l.Ready == 0 }) {
			return list
		}
		select {
		case <-tick.C:
		case <-over:
			t.Fatalf("cache ls says %+v, want something of each blob", list)
		}
	}
}

// TestCacheFollowsImages: a blob stays exactly as long as an image needs it, or a
// container whose image is gone.
func TestCacheFollowsImages(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	base := kit.BusyboxLayer(kit.MustTools(t))
	refs := [2]string{}
	for i, name := range []string{"a", "b"} {
		own := kit.FileLayer(kit.File{Name: name, Data: strings.Repeat(name, 100_000)})
		plain := kit.MustBuildImage(t, kit.Pause, base, own)
		refs[i] = r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "app:"+name)
	}
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{Config: map[string]any{"cache.grace": "0s", "cache.sweep_interval": "1s"}})
		a := run(t, n, pull(t, n, refs[0]), "a", kit.RunOptions{})
		exec(t, a, "/bin/busybox", "cat", "/a")
		ofA := blobsIn(n)
		b := run(t, n, pull(t, n, refs[1]), "b", kit.RunOptions{})
		exec(t, b, "/bin/busybox", "cat", "/b")
		all := blobsIn(n)
		if len(ofA) != 2 || len(all) != 3 {
			t.Fatalf("cached are %q, then %q: want two blobs of one image, and one more of the other", ofA, all)
		}

		list := cacheList(t, n)
		var ofB []string
		for _, l := range list {
			if slices.Contains(l.Images, refs[1]) {
				ofB = append(ofB, l.ID)
			}
			if len(l.Images) == 0 || len(l.Instances) == 0 || l.Usage == 0 {
				t.Errorf("cache ls says %+v", l)
			}
		}
		// A daemon that cannot share has copies of its own.
		slices.Sort(ofB)
		if ofB = slices.Compact(ofB); len(ofB) != 2 {
			t.Fatalf("cache ls says %+v, want two blobs of %s", list, refs[1])
		}
		var verdicts []struct {
			Checked, Bad int
			Problem      string
		}
		cacheCommand(t, n, &verdicts, "verify")
		for _, v := range verdicts {
			if v.Checked == 0 || v.Bad > 0 || v.Problem != "" {
				t.Errorf("cache verify says %+v", v)
			}
		}

		// What the kernel reads ahead may still come.
		before, said, after := du(t, n), usage(t, n), du(t, n)
		if said < before-before/100 || said > after+after/100 {
			t.Errorf("the cache occupies %d to %d bytes, the data layers have %d", before, after, said)
		}

		remove(t, a)
		if err := n.RemoveImage(t.Context(), refs[0]); err != nil {
			t.Fatal(err)
		}
		wantBlobs(t, n, ofB)
		if out := exec(t, b, "/bin/busybox", "cat", "/b"); len(out) != 100_000 {
			t.Errorf("the other image's file has %d bytes", len(out))
		}
		remove(t, b)
		if err := n.RemoveImage(t.Context(), refs[1]); err != nil {
			t.Fatal(err)
		}
		wantBlobs(t, n, nil)
		if left := du(t, n); left > 0 {
			t.Errorf("%d bytes are left in the cache", left)
		}
	})
}
