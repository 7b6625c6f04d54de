package e2e_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// noise is text that no compressor makes smaller.
func noise(seed uint64, size int) string {
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, seed))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

// imagesUsage is what du says of the snapshotter's root, but of its database and of the logs of
// instances, which are no image's.
func imagesUsage(t *testing.T, n *kit.Node) (total int64) {
	t.Helper()
	for _, dir := range []string{"cache", "snapshots"} {
		err := filepath.WalkDir(filepath.Join(n.SnapshotterRoot(), dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return nil // it is just going
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err == nil {
				total += st.Blocks * 512
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return total
}

// agrees waits until CRI tells kubelet what images really occupy, within a hundredth, or what
// some directories take. It adds that up every ten seconds, and the snapshotter has it ask again for a layer
// that has grown within two minutes.
func agrees(t *testing.T, n *kit.Node, what string) int64 {
	t.Helper()
	_, images := n.CRI()
	deadline := time.NewTimer(5 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		info, err := images.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		real, told := imagesUsage(t, n), int64(info.ImageFilesystems[0].UsedBytes.GetValue())
		if diff := real - told; max(diff, -diff) <= max(real/100, 128<<10) {
			t.Logf("%s: %d bytes, told are %d", what, real, told)
			return real
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: images occupy %d bytes, kubelet is told %d", what, real, told)
		}
	}
}

// TestImageFilesystem compares what kubelet learns of images through CRI with the disk, while
// containers read and after that: blobs that two images share count once.
func TestImageFilesystem(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	pause := r.MustPush(t, kit.SmallImage(t, "pause"), "pause:plain")
	const shared, own = 48 << 20, 16 << 20
	base := []kit.Layer{kit.BusyboxLayer(kit.MustTools(t)), kit.FileLayer(kit.File{Name: "shared", Data: noise(1, shared)})}
	refs := [2]string{}
	for i, name := range []string{"a", "b"} {
		img := kit.MustBuildImage(t, kit.Pause, append(base, kit.FileLayer(kit.File{Name: "own", Data: noise(uint64(2+i), own)}))...)
		refs[i] = r.MustPush(t, img.MustNydus(t, kit.NydusOptions{}), "app:"+name)
	}
	for _, s := range []style{managed24, helper16} {
		t.Run(s.name, func(t *testing.T) {
			n := s.node(t, kit.NodeConfig{CRI: true, SandboxImage: pause, Config: map[string]any{"cache.grace": "0s", "cache.sweep_interval": "1s"}})
			for _, ref := range refs {
				if err := n.CRIPull(t.Context(), ref, "", ""); err != nil {
					t.Fatal(err)
				}
			}
			empty := agrees(t, n, "pulled")
			pod := runPod(t, n, "pod")
			var ids []string
			start := func(ref, name string) {
				t.Helper()
				var id string
				err := again(t, n, func() (err error) {
					id, err = pod.Run(t.Context(), fmt.Sprintf("%s-%d", name, len(ids)), ref)
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
				ids = append(ids, id)
			}
			read := func(id, file string, bytes int) {
				t.Helper()
				podExec(t, pod, id, fmt.Sprintf("%d\n", bytes), "/bin/busybox", "sh", "-c", "/bin/busybox cat "+file+" | /bin/busybox wc -c")
			}
			at := func(what string, least int64) {
				t.Helper()
				if got := agrees(t, n, what) - empty; got < least {
					t.Errorf("%s: %d bytes more than at first, want at least %d", what, got, least)
				}
			}
			removeImage := func(ref string) {
				t.Helper()
				_, images := n.CRI()
				if _, err := images.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
					t.Fatal(err)
				}
			}
			start(refs[0], "a")
			read(ids[0], "/shared", shared)
			at("one has read what both share", shared)
			start(refs[1], "b")
			read(ids[1], "/shared", shared)
			read(ids[1], "/own", own)
			at("the other one has read all", shared+own)
			podExec(t, pod, ids[0], "", "/bin/busybox", "sh", "-c", "/bin/busybox cp /own /copy")
			at("one has read all and written", shared+3*own)
			if err := pod.Stop(t.Context(), ids[0]); err != nil {
				t.Error(err)
			}
			removeImage(refs[0])
			at("one is gone", shared+own)
			if err := pod.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			removeImage(refs[1])
			wantBlobs(t, n, nil)
			eventually(t, "what the images had is gone", func() bool { return imagesUsage(t, n)-empty < own })
			agrees(t, n, "all are gone")
		})
	}
}
