package e2e_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// scrubState is what the snapshotter writes down of its scrub.
type scrubState struct {
	Next string
	Last *struct {
		Blobs, Checked, Removed, Damaged, Failed int
		Ended                                    string
	}
	Damaged []struct{ Blob, Problem string }
}

func scrubOf(n *kit.Node) (s scrubState) {
	text, err := os.ReadFile(filepath.Join(n.SnapshotterRoot(), "scrub.json"))
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		return scrubState{}
	}
	return s
}

// nextPass waits until a pass has begun and ended after this moment.
func nextPass(t *testing.T, n *kit.Node) (s scrubState) {
	t.Helper()
	ended := ""
	if last := scrubOf(n).Last; last != nil {
		ended = last.Ended
	}
	for range 2 { // one may have been under way
		eventually(t, "a pass of the scrub", func() bool {
			s = scrubOf(n)
			return s.Last != nil && s.Last.Ended != ended
		})
		ended = s.Last.Ended
	}
	return s
}

// rot changes bytes of a file as a disk does: neither the file's times tell, nor does
// anybody else.
func rot(t *testing.T, path string, off int64) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text := make([]byte, 1)
	if _, err := f.ReadAt(text, off); err != nil {
		t.Fatal(err)
	}
	text[0] ^= 0xff
	if _, err := f.WriteAt(text, off); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
}

// scrubNode is a node that scrubs every few seconds, and an image on it of which all is
// cached; damage makes one byte of it wrong.
func scrubNode(t *testing.T, r *kit.Registry, name string, config map[string]any) (n *kit.Node, want kit.Tree, img string, damage func() string) {
	t.Helper()
	plain := kit.SmallImage(t, name)
	img, want = r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), name+":1"), tree(t, plain)
	all := map[string]any{
		"cache.scrub_interval": "1s", "daemon.nydusd_path": shares(t), "daemon.config_template": prefetchAll(t), "daemon.validate": false,
	}
	maps.Copy(all, config)
	n = helper24.node(t, kit.NodeConfig{Config: all})
	return n, want, img, func() string {
		t.Helper()
		data, _ := filepath.Glob(filepath.Join(n.SnapshotterRoot(), "cache", "*", "*.blob.data"))
		if len(data) != 2 {
			t.Fatalf("cached are %q, want two blobs", data)
		}
		// Of a chunk that another layer hides the bootstrap has no digest; busybox is not.
		largest, most := "", int64(0)
		for _, path := range data {
			if info, err := os.Stat(path); err != nil {
				t.Fatal(err)
			} else if info.Size() > most {
				largest, most = path, info.Size()
			}
		}
		rot(t, largest, most/2)
		return strings.TrimSuffix(filepath.Base(largest), ".blob.data")
	}
}

// logs tells whether the snapshotter's log has a line with all of the texts.
func logs(t *testing.T, n *kit.Node, texts ...string) bool {
	t.Helper()
	log, err := os.ReadFile(n.SnapshotterLog())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(log), "\n") {
		all := true
		for _, text := range texts {
			all = all && strings.Contains(line, text)
		}
		if all {
			return true
		}
	}
	return false
}

// TestScrub: what a disk has lost of an image that nobody uses is found and fetched again.
func TestScrub(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	n, want, ref, damage := scrubNode(t, r, "scrubbed", nil)
	img := pull(t, n, ref)
	c := run(t, n, img, "first", kit.RunOptions{})
	kit.EqualTrees(t, "the first time", want, kit.MustWalk(t, c.Root()))
	remove(t, c)
	wantDaemons(t, n, 0, soon)
	if s := nextPass(t, n); s.Last.Blobs != 2 || s.Last.Checked == 0 || s.Last.Removed+s.Last.Damaged+s.Last.Failed > 0 {
		t.Errorf("nothing is wrong: %+v", s.Last)
	}
	bad := damage()
	eventually(t, "the damaged blob is removed", func() bool { return len(blobsIn(n)) == 1 })
	eventually(t, "the log tells", func() bool { return logs(t, n, "event=damaged", bad, ref, "fetched again") })
	c = run(t, n, img, "again", kit.RunOptions{})
	kit.EqualTrees(t, "fetched again", want, kit.MustWalk(t, c.Root()))
	remove(t, c)
}

// TestScrubInUse: what is in use stays until it is not, and everybody is told; neither a
// restart nor the kernel keeps it.
func TestScrubInUse(t *testing.T) {
	for _, driver := range []string{"fuse", "auto"} {
		t.Run(driver, func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			n, want, ref, damage := scrubNode(t, r, "in-use-"+driver, map[string]any{"mount.driver": driver})
			img := pull(t, n, ref)
			c := run(t, n, img, "first", kit.RunOptions{})
			kit.EqualTrees(t, "the first time", want, kit.MustWalk(t, c.Root()))
			// Nobody writes any more to what is damaged, and there is a proof to lose.
			awaitComplete(t, n, ref)
			awaitProof(t, n, 1)
			if driver == "auto" {
				remove(t, c)
				wantDaemons(t, n, 0, soon)
				c = run(t, n, img, "warm", kit.RunOptions{})
				daemonsNow(t, n, 0)
			}
			bad := damage()
			eventually(t, "the damage is noted", func() bool { return len(scrubOf(n).Damaged) == 1 })
			s := scrubOf(n)
			if s.Damaged[0].Blob != bad || len(blobsIn(n)) != 2 {
				t.Errorf("damaged is %+v, want %s; cached are %q", s.Damaged, bad, blobsIn(n))
			}
			eventually(t, "the log tells", func() bool {
				return logs(t, n, "event=damaged", bad, ref, "in use", map[string]string{"fuse": "fuse)", "auto": "erofs)"}[driver])
			})
			awaitProof(t, n, 0)
			out, err := n.Command(t.Context(), "nydus-snapshotter", "cache", "ls", "--config", n.SnapshotterConfig()).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "damaged") || !strings.Contains(string(out), "scrub") {
				t.Errorf("cache ls says (%v):\n%s", err, out)
			}
			// It is not forgotten.
			if err := n.RestartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := scrubOf(n); len(s.Damaged) != 1 {
				t.Errorf("after a restart: %+v", s)
			}
			remove(t, c)
			wantDaemons(t, n, 0, soon)
			eventually(t, "the damaged blob is removed", func() bool { return len(blobsIn(n)) == 1 && len(scrubOf(n).Damaged) == 0 })
			c = run(t, n, img, "again", kit.RunOptions{})
			daemonsNow(t, n, 1)
			kit.EqualTrees(t, "fetched again", want, kit.MustWalk(t, c.Root()))
			remove(t, c)
		})
	}
}
