package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// The whole path of an image, as containerd goes it, with every field of the
// option.
func TestHelperMount(t *testing.T) {
	n := newNode(t)
	n.credentials["registry.example"] = &mountspec.Credentials{Auth: canary}
	text := bootstrap(t, "v6-merged")
	chain := n.pull(n.data(), n.data(), n.bootstrap("v6-merged"))
	mounts, key := n.container(chain)
	if len(mounts) != 1 {
		t.Fatalf("got %v", mounts)
	}
	s := n.decode(mounts[0])

	snaps := filepath.Join(n.root, "snapshots")
	if filepath.Dir(s.SnapshotDir) != snaps || !strings.HasPrefix(s.Bootstrap, snaps) {
		t.Fatalf("bootstrap %s, snapshot directory %s", s.Bootstrap, s.SnapshotDir)
	}
	if got, err := os.ReadFile(s.Bootstrap); err != nil || string(got) != string(text) {
		t.Fatalf("the bootstrap is not the image's: %v", err)
	}
	for _, dir := range []string{s.Upper(), s.Work()} {
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			t.Errorf("%s: %v", dir, err)
		}
	}
	cache := mountspec.CacheDir(n.root, "registry.example", "team/app")
	want := &mountspec.Spec{
		Bootstrap: s.Bootstrap, BootstrapDigest: digestOf(text), FSVersion: "v6",
		Config: fmt.Sprintf(`{"host":"registry.example","cache":%q}`, cache), SnapshotDir: s.SnapshotDir,
		Kind: mountspec.KindRootfs, OverlayOptions: n.overlayOfPlain(),
		Instance: mountspec.InstanceKey(digestOf(text), "registry.example", "team/app", cache),
		Image:    testImage, Host: "registry.example", Repository: "team/app",
		Root: n.root, RunDir: "/run/test", CacheDir: cache, Driver: mountspec.DriverFUSE, Daemon: testDaemon(),
		Credentials: &mountspec.Credentials{Auth: canary},
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got\n%+v\nwant\n%+v", s, want)
	}
	kataTakes(t, mounts, want)
	if strings.Contains(mounts[0].Options[0], canary) || strings.Contains(s.Config, canary) {
		t.Error("the option tells the password")
	}
	if _, err := os.Stat(cache); !os.IsNotExist(err) {
		t.Errorf("Prepare made the cache directory, which is the mount helper's: %v", err)
	}

	again, err := n.top.Mounts(n.ctx, key)
	if err != nil || !reflect.DeepEqual(n.decode(again[0]), want) {
		t.Errorf("Mounts differs from Prepare: %v, %v", again, err)
	}
}

// overlayOfPlain returns the options of a plain image's overlay mount.
func (n *node) overlayOfPlain() []string {
	n.t.Helper()
	mounts, _ := n.container(n.pull(n.plain("a"), n.plain("b")))
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		n.t.Fatalf("a plain image has mounts %v", mounts)
	}
	var options []string
	for _, o := range mounts[0].Options {
		if !strings.Contains(o, "dir=") {
			options = append(options, o)
		}
	}
	return options
}

func TestView(t *testing.T) {
	for _, managed := range []bool{false, true} {
		t.Run(style(managed), func(t *testing.T) {
			n := newNode(t, func(o *Options) { o.Managed = managed })
			image := n.pull(n.data(), n.bootstrap("v5-merged"))
			above := n.pull(n.data(), n.bootstrap("v5-merged"), n.plain("etc/above"))
			for parent, kind := range map[string]mountspec.Kind{image: mountspec.KindImage, above: mountspec.KindRootfs} {
				mounts, err := n.top.View(n.ctx, "view-"+parent, parent)
				if err != nil || len(mounts) != 1 {
					t.Fatalf("got %v, %v", mounts, err)
				}
				s := n.decode(mounts[0])
				if !managed {
					kind = mountspec.KindRootfs
					kataTakes(t, mounts, s)
				}
				if s.Kind != kind || !s.ReadOnly || s.Upper() != "" || s.FSVersion != "v5" || len(s.Lower) != len(map[bool][]int{true: {0}}[parent == above]) {
					t.Errorf("got %+v", s)
				}
			}
		})
	}
}

func TestManagedMount(t *testing.T) {
	n := newNode(t, func(o *Options) { o.Managed = true })
	n.credentials["registry.example"] = &mountspec.Credentials{RegistryToken: canary}
	options := n.overlayOfPlain()
	chain := n.pull(n.data(), n.bootstrap("v6-merged"), n.plain("one"), n.plain("two"))
	mounts, _ := n.container(chain)
	if len(mounts) != 2 {
		t.Fatalf("got %v", mounts)
	}
	s := n.decode(mounts[0])
	if s.Kind != mountspec.KindImage || !s.ReadOnly || len(s.Lower)+len(s.OverlayOptions) > 0 || s.Credentials.RegistryToken != canary {
		t.Errorf("got %+v", s)
	}
	two, one := n.layerWith("two"), n.layerWith("one")
	want := mount.Mount{Type: "format/overlay", Source: "overlay", Options: append([]string{
		"workdir=" + filepath.Join(s.SnapshotDir, "work"),
		"upperdir=" + filepath.Join(s.SnapshotDir, "fs"),
		"lowerdir=" + two + ":" + one + ":{{ mount 0 }}",
	}, options...)}
	if !reflect.DeepEqual(mounts[1], want) {
		t.Errorf("got\n%+v\nwant\n%+v", mounts[1], want)
	}
}

// layerWith returns the layer whose content has a file.
func (n *node) layerWith(file string) string {
	n.t.Helper()
	found, err := filepath.Glob(filepath.Join(n.root, "snapshots", "*", "fs", file))
	if err != nil || len(found) != 1 {
		n.t.Fatalf("%s is in %v, %v", file, found, err)
	}
	return strings.TrimSuffix(found[0], "/"+file)
}

// applied is a layer that containerd's applier unpacks from a tar.
func (n *node) applied(entries ...tar.Header) layer {
	return layer{labels: map[string]string{labelImage: testImage, "layer": fmt.Sprint(entries)}, apply: func(mounts []mount.Mount) {
		store, err := local.NewStore(n.t.TempDir())
		must(n.t, err)
		var text bytes.Buffer
		w := tar.NewWriter(&text)
		for _, e := range entries {
			must(n.t, w.WriteHeader(&e))
		}
		must(n.t, w.Close())
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(text.Bytes()), Size: int64(text.Len())}
		must(n.t, content.WriteBlob(n.ctx, store, "x", &text, desc))
		_, err = apply.NewFileSystemApplier(store).Apply(n.ctx, desc, mounts)
		must(n.t, err)
	}}
}

// A layer above the image is unpacked by containerd's own applier, with
// whiteouts as overlayfs knows them, without the image being there.
func TestApplyAboveTheImage(t *testing.T) {
	for _, managed := range []bool{false, true} {
		t.Run(style(managed), func(t *testing.T) {
			n := newNode(t, func(o *Options) { o.Managed = managed })
			chain := n.pull(n.data(), n.bootstrap("v6-merged"), n.applied(
				tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o750},
				tar.Header{Name: "etc/applied", Typeflag: tar.TypeReg, Mode: 0o4755},
				tar.Header{Name: "etc/.wh.passwd", Typeflag: tar.TypeReg},
				tar.Header{Name: "var/", Typeflag: tar.TypeDir, Mode: 0o755},
				tar.Header{Name: "var/.wh..wh..opq", Typeflag: tar.TypeReg},
			))
			above := n.layerWith("etc/applied")
			var st unix.Stat_t
			must(t, unix.Lstat(filepath.Join(above, "etc/passwd"), &st))
			if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
				t.Errorf("the whiteout is %o, %d", st.Mode, st.Rdev)
			}
			opaque := make([]byte, 1)
			if _, err := unix.Lgetxattr(filepath.Join(above, "var"), "trusted.overlay.opaque", opaque); err != nil || opaque[0] != 'y' {
				t.Errorf("opaque: %q, %v", opaque, err)
			}
			mounts, _ := n.container(chain)
			if !managed && !slices.Equal(n.decode(mounts[0]).Lower, []string{above}) || managed && len(mounts) != 2 {
				t.Errorf("got %v", mounts)
			}
		})
	}
}

// Layers above the image, as a commit makes them, are unpacked with overlayfs's
// mounts and lie above the image in the container.
func TestLayersAboveTheImage(t *testing.T) {
	n := newNode(t)
	chain := n.pull(n.data(), n.bootstrap("v6-merged"), n.plain("one"), n.plain("two"))
	mounts, _ := n.container(chain)
	s := n.decode(mounts[0])
	if want := []string{n.layerWith("two"), n.layerWith("one")}; !slices.Equal(s.Lower, want) {
		t.Fatalf("got %v, want %v", s.Lower, want)
	}
}

// A second bootstrap would hide the files that are in the lower one alone.
func TestSecondBootstrapIsRefused(t *testing.T) {
	n := newNode(t)
	first := n.pull(n.data(), n.bootstrap("v5-merged"), n.plain("between"))
	_, err := n.tryPull(n.ctx, n.data(), n.bootstrap("v5-merged"), n.plain("between"), n.data(), n.bootstrap("v6-merged"))
	if err == nil || !strings.Contains(err.Error(), "layer 2 of 5 is another nydus bootstrap") {
		t.Fatalf("got %v", err)
	}
	if got := len(n.records(kindBootstrap)); got != 1 {
		t.Errorf("got %d records of bootstraps, want that of the first image", got)
	}
	mounts, _ := n.container(first)
	if s := n.decode(mounts[0]); s.FSVersion != "v5" || len(s.Lower) != 1 {
		t.Errorf("the first image suffers: %+v", s)
	}
}

// A pod chooses labels of its container's snapshot. None of them does anything.
func TestPodLabelsSelectNothing(t *testing.T) {
	n := newNode(t)
	victim := chainID("victim")
	plain := n.pull(n.plain("a"))
	attack := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: victim, labelData: "true", labelBootstrap: "true", labelImage: testImage,
	})
	key := "extract-1-x " + chainID("another")
	for _, key := range []string{"0123456789abcdef", key} {
		for _, parent := range []string{"", plain} {
			mounts, err := n.top.Prepare(n.ctx, key+parent, parent, attack)
			if err != nil || len(mounts) != 1 || mounts[0].Type == mountspec.MountType {
				t.Fatalf("got %v, %v", mounts, err)
			}
			place(t, filepath.Join(upperOf(t, mounts), "image/image.boot"), bootstrap(t, "v6-merged"))
			if err := n.top.Commit(n.ctx, "committed"+key+parent, key+parent, attack); err != nil {
				t.Fatal(err)
			}
			mounts, err = n.top.View(n.ctx, "view"+key+parent, "committed"+key+parent)
			if err != nil || mounts[0].Type == mountspec.MountType {
				t.Fatalf("the pod made itself an image: %v, %v", mounts, err)
			}
		}
	}
	if _, err := n.top.Stat(n.ctx, victim); !errdefs.IsNotFound(err) {
		t.Fatalf("the pod planted a layer: %v", err)
	}
	if len(n.records(kindData))+len(n.records(kindBootstrap)) > 0 {
		t.Fatal("the pod made a record")
	}
	// The victim's own layer is unpacked as ever.
	if got := n.pull(n.plain("victim")); got == "" {
		t.Fatal("the victim cannot be pulled")
	}
}

// The guest of a VM has its snapshot's directory, where it can write a record.
func TestForgedRecordIsDropped(t *testing.T) {
	n := newNode(t)
	mounts, key := n.container(n.pull(n.plain("a"), n.plain("b")))
	must(t, writeRecord(filepath.Dir(upperOf(t, mounts)), record{Kind: kindBootstrap, Path: bootstrapPaths()[0], Image: testImage}))
	must(t, n.top.Commit(n.ctx, "committed", key))
	mounts, _ = n.container("committed")
	if mounts[0].Type != "overlay" {
		t.Fatalf("the record counted: %v", mounts)
	}
}

func TestMissingImageReference(t *testing.T) {
	n := newNode(t)
	for _, l := range []layer{n.data(), n.bootstrap("v6-merged")} {
		delete(l.labels, labelImage)
		delete(l.labels, labelParent)
		_, err := n.tryPull(n.ctx, l)
		if err == nil || !strings.Contains(err.Error(), labelImage) || !strings.Contains(err.Error(), "crictl") {
			t.Fatalf("got %v", err)
		}
	}
}

// Another image's data without its bootstrap would silently be missing.
func TestDataWithoutBootstrap(t *testing.T) {
	n := newNode(t)
	for i, chain := range []string{
		n.pull(n.data()),
		n.pull(n.data(), n.plain("x")),
		n.pull(n.data(), n.bootstrap("v6-merged"), n.data()),
	} {
		key := fmt.Sprint("c", i)
		_, err := n.top.Prepare(n.ctx, key, chain)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "bootstrap") || !strings.Contains(err.Error(), testImage) {
			t.Fatalf("%d: got %v", i, err)
		}
		if _, err := n.top.Stat(n.ctx, key); !errdefs.IsNotFound(err) {
			t.Fatalf("%d: the snapshot stays: %v", i, err)
		}
	}
	n.wantNoActive()
}

// wantNoActive checks the backend, below containerd's metadata.
func (n *node) wantNoActive() {
	n.t.Helper()
	must(n.t, n.sn.Walk(n.ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			n.t.Errorf("left behind: %s", i.Name)
		}
		return nil
	}))
}

func TestDataLayerIsSharedAndIdempotent(t *testing.T) {
	n := newNode(t)
	first := n.pull(n.data(), n.data())
	if again := n.pull(n.data(), n.data()); again != first {
		t.Fatalf("got %s and %s", first, again)
	}
	// Another namespace of containerd does not know the layers, the backend does.
	other := namespaces.WithNamespace(n.ctx, "default")
	if chain, err := n.tryPull(other, n.data(), n.data()); err != nil || chain != first {
		t.Fatalf("got %s, %v", chain, err)
	}
	if got := len(n.records(kindData)); got != 2 {
		t.Fatalf("got %d data layers, want 2", got)
	}
	// What only one namespace lets go stays; what both let go, goes.
	root := "containerd.io/gc.root"
	_, err := n.top.Update(other, snapshots.Info{Name: first, Labels: map[string]string{root: "yes"}}, "labels."+root)
	must(t, err)
	n.collect(2)
	if _, err := n.top.Stat(n.ctx, first); !errdefs.IsNotFound(err) {
		t.Fatalf("the first namespace still has the layer: %v", err)
	}
	_, err = n.top.Update(other, snapshots.Info{Name: first}, "labels")
	must(t, err)
	n.collect(0)
	n.wantNoActive()
}

// collect runs containerd's garbage collection and counts the data layers that
// stay.
func (n *node) collect(want int) {
	n.t.Helper()
	_, err := n.db.GarbageCollect(n.ctx)
	must(n.t, err)
	if got := len(n.records(kindData)); got != want {
		n.t.Fatalf("got %d data layers, want %d", got, want)
	}
}

func TestDataLayerAtOnce(t *testing.T) {
	n := newNode(t)
	var wg sync.WaitGroup
	labels := map[string]string{snapshots.LabelSnapshotRef: chainA, labelData: "true", labelImage: testImage}
	for i := range 32 {
		wg.Go(func() {
			key := fmt.Sprintf("k8s.io/%d/extract-%d-x %s", i, i, chainA)
			if _, err := n.sn.Prepare(n.ctx, key, "", snapshots.WithLabels(labels)); !errdefs.IsAlreadyExists(err) {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	n.wantNoActive()
	if got := len(n.records(kindData)); got != 1 {
		t.Errorf("got %d layers", got)
	}
}

// What a crash between creation and commit leaves is no obstacle.
func TestDataLayerAfterCrash(t *testing.T) {
	n := newNode(t)
	labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chainA, labelData: "true", labelImage: testImage})
	left := "k8s.io/1/extract-1-x " + chainA
	if _, err := n.sn.Snapshotter.Prepare(n.ctx, left, "", labels); err != nil {
		t.Fatal(err)
	}
	n.restart()
	if _, err := n.sn.Prepare(n.ctx, "k8s.io/2/extract-2-x "+chainA, "", labels); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("got %v", err)
	}
	// The very same key again is no success: the layer of another target is not
	// there, and containerd must not believe that it is.
	must(t, n.sn.Remove(n.ctx, dataName("", chainA)))
	if _, err := n.sn.Prepare(n.ctx, left, "", labels); err == nil || errdefs.IsAlreadyExists(err) {
		t.Fatalf("got %v", err)
	}
	must(t, n.sn.Remove(n.ctx, left))
}

func TestRestartInBetween(t *testing.T) {
	n := newNode(t)
	mounts, _ := n.container(n.pull(n.data(), n.bootstrap("v6-merged")))
	before := n.decode(mounts[0])
	n.restart()
	var keys []string
	must(t, n.sn.Walk(n.ctx, func(_ context.Context, i snapshots.Info) error {
		keys = append(keys, i.Name)
		return nil
	}, "kind==active"))
	if len(keys) != 1 {
		t.Fatalf("got %v", keys)
	}
	mounts, err := n.sn.Mounts(n.ctx, keys[0])
	if err != nil || !reflect.DeepEqual(n.decode(mounts[0]), before) {
		t.Fatalf("got %v, %v", mounts, err)
	}
}

func TestRemoveAndCleanup(t *testing.T) {
	n := newNode(t)
	mounts, key := n.container(n.pull(n.data(), n.bootstrap("v6-merged")))
	s := n.decode(mounts[0])
	// An instance keeps the bootstrap by a hard link.
	link := filepath.Join(n.root, "instances", s.Instance, "image.boot")
	must(t, os.MkdirAll(filepath.Dir(link), 0o700), os.Link(s.Bootstrap, link))
	must(t, n.top.Remove(n.ctx, key))
	_, err := n.db.GarbageCollect(n.ctx)
	must(t, err)
	entries, err := os.ReadDir(filepath.Join(n.root, "snapshots"))
	if err != nil || len(entries) > 0 {
		t.Fatalf("left: %v, %v", entries, err)
	}
	if _, err := os.Stat(link); err != nil {
		t.Fatalf("the instance's link went: %v", err)
	}
	// What a crash leaves between database and directory, and what is in use.
	chain := n.pull(n.data(), n.bootstrap("v6-merged"))
	mounts, _ = n.container(chain)
	s = n.decode(mounts[0])
	want, err := os.ReadDir(filepath.Join(n.root, "snapshots"))
	must(t, err)
	for _, orphan := range []string{"new-123", "4711"} {
		place(t, filepath.Join(n.root, "snapshots", orphan, "fs", "file"), []byte("orphan"))
	}
	// To remove one is not to look at all.
	_, err = n.sn.Prepare(n.ctx, "another", "")
	must(t, err, n.sn.Remove(n.ctx, "another"))
	if _, err := os.Stat(filepath.Join(n.root, "snapshots", "4711")); err != nil {
		t.Errorf("removing one looks at all: %v", err)
	}
	must(t, n.sn.Cleanup(n.ctx))
	left, err := os.ReadDir(filepath.Join(n.root, "snapshots"))
	if err != nil || fmt.Sprint(left) != fmt.Sprint(want) {
		t.Fatalf("left: %v, %v; want %v", left, err, want)
	}
	if _, err := os.Stat(s.Bootstrap); err != nil {
		t.Fatal(err)
	}
}

func TestUsageUpdateAndWalkOverGRPC(t *testing.T) {
	n := newNode(t)
	chain := n.pull(n.data(), n.bootstrap("v6-merged"))
	_, key := n.container(chain)
	usage, err := n.top.Usage(n.ctx, chain)
	if size := int64(len(bootstrap(t, "v6-merged"))); err != nil || usage.Size < size || usage.Inodes < 3 {
		t.Errorf("usage %+v, %v", usage, err)
	}
	// Of a container it is what it wrote, and grows with that.
	mounts, err := n.top.Mounts(n.ctx, key)
	must(t, err)
	upper := n.decode(mounts[0]).Upper()
	for i, c := range []struct {
		sn  snapshots.Snapshotter
		key string
	}{{n.top, key}, {proxied(t, n.sn), n.backendName(key)}} {
		place(t, filepath.Join(upper, fmt.Sprint("written", i)), make([]byte, 3<<20))
		size := int64(i+1) * 3 << 20
		usage, err = c.sn.Usage(n.ctx, c.key)
		if err != nil || usage.Size < size || usage.Size > size+64<<10 || usage.Inodes != int64(2+i) {
			t.Errorf("usage of a container that wrote %d bytes in %d files: %+v, %v", size, i+1, usage, err)
		}
	}
	if _, err := n.top.Update(n.ctx, snapshots.Info{Name: key, Labels: map[string]string{"containerd.io/snapshot/x": "y"}}, "labels.containerd.io/snapshot/x"); err != nil {
		t.Error(err)
	}
	for filter, want := range map[string]int{
		"": 3, "kind==committed": 2, "kind==active": 1, "parent==" + chain: 1, "name==" + key: 1,
		`labels."containerd.io/snapshot/x"==y`: 1, `labels."` + labelData + `"==true`: 1, "kind==view": 0,
	} {
		got := 0
		err := n.top.Walk(n.ctx, func(context.Context, snapshots.Info) error { got++; return nil }, filter)
		if err != nil || got != want {
			t.Errorf("filter %q: got %d, %v, want %d", filter, got, err, want)
		}
		backend := 0 // the names differ there
		if strings.HasPrefix(filter, "kind") || strings.HasPrefix(filter, "labels") {
			err = proxied(t, n.sn).Walk(n.ctx, func(context.Context, snapshots.Info) error { backend++; return nil }, filter)
			if err != nil || backend != want {
				t.Errorf("backend, filter %q: got %d, %v, want %d", filter, backend, err, want)
			}
		}
	}
	// One of several is enough, and what meets two comes once.
	several := []string{"kind==active", `labels."containerd.io/snapshot/x"==y`, `labels."` + labelData + `"==true`, "kind==view"}
	for name, sn := range map[string]snapshots.Snapshotter{"containerd": n.top, "backend": proxied(t, n.sn)} {
		var got []snapshots.Kind
		err := sn.Walk(n.ctx, func(_ context.Context, i snapshots.Info) error { got = append(got, i.Kind); return nil }, several...)
		slices.Sort(got)
		if want := []snapshots.Kind{snapshots.KindActive, snapshots.KindCommitted}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%s, filters %q: got %v, %v, want %v", name, several, got, err, want)
		}
	}
}

// backendName is a snapshot's name below containerd's metadata.
func (n *node) backendName(key string) string {
	n.t.Helper()
	var name string
	must(n.t, n.sn.Walk(n.ctx, func(_ context.Context, i snapshots.Info) error {
		if strings.HasSuffix(i.Name, "/"+key) {
			name = i.Name
		}
		return nil
	}))
	return name
}

func TestCredentials(t *testing.T) {
	n := newNode(t)
	chain := n.pull(n.data(), n.bootstrap("v6-merged"))
	mounts, key := n.container(chain)
	if c := n.decode(mounts[0]).Credentials; c != nil {
		t.Fatalf("got %v, want none", c)
	}
	// They are looked up each time.
	n.credentials["registry.example"] = &mountspec.Credentials{Auth: canary}
	mounts, err := n.top.Mounts(n.ctx, key)
	if err != nil || n.decode(mounts[0]).Credentials.Auth != canary {
		t.Fatalf("got %v, %v", mounts, err)
	}
	// A failed lookup fails the mount and leaves no snapshot.
	n.failure = errors.New("helper is broken")
	if _, err := n.top.Prepare(n.ctx, "failing", chain); err == nil || !strings.Contains(err.Error(), "helper is broken") || !strings.Contains(err.Error(), testImage) {
		t.Fatalf("got %v", err)
	}
	if _, err := n.top.View(n.ctx, "failing", chain); err == nil {
		t.Fatal("the view did not fail")
	}
	must(t, n.sn.Walk(n.ctx, func(_ context.Context, i snapshots.Info) error {
		if strings.HasSuffix(i.Name, "/failing") {
			t.Errorf("%s stays", i.Name)
		}
		return nil
	}))
}

func TestPlainCredentials(t *testing.T) {
	n := newNode(t, func(o *Options) {
		o.Plain = func(config string, c *mountspec.Credentials) (string, error) { return config + c.Auth, nil }
	})
	n.credentials["registry.example"] = &mountspec.Credentials{Auth: canary}
	mounts, _ := n.container(n.pull(n.data(), n.bootstrap("v6-merged")))
	if s := n.decode(mounts[0]); s.Credentials != nil || !strings.HasSuffix(s.Config, canary) {
		t.Fatalf("got %+v", s)
	}
}

// A backend that is a directory needs no credentials, and none is asked for.
func TestDirectoryBackend(t *testing.T) {
	n := newNode(t)
	l := n.bootstrap("v6-merged")
	l.labels[labelImage] = "dir/blobs"
	mounts, _ := n.container(n.pull(n.data(), l))
	if s := n.decode(mounts[0]); s.Host != "" || s.Repository != "/blobs" || s.Credentials != nil {
		t.Fatalf("got %+v", s)
	}
}

// What the image's own layer asks for counts, and survives a restart. What a container's
// labels say, which a pod can set, does not.
func TestImageAsksForABackend(t *testing.T) {
	n := newNode(t)
	asks, plain := n.bootstrap("v6-merged"), n.bootstrap("v6-zstd")
	asks.labels[LabelBackend] = "/wanted"
	chain, other := n.pull(n.data(), asks), n.pull(n.data(), plain)
	mounts, key := n.container(chain)
	if s := n.decode(mounts[0]); s.Repository != "/wanted" || !strings.Contains(s.Config, "wanted") {
		t.Fatalf("got %+v", s)
	}
	mounts, err := n.top.Prepare(n.ctx, "pod", other, snapshots.WithLabels(map[string]string{LabelBackend: "/wanted"}))
	if err != nil {
		t.Fatal(err)
	}
	if s := n.decode(mounts[0]); s.Host != "registry.example" {
		t.Errorf("a container's label chose %+v", s)
	}
	mounts, err = n.top.Mounts(n.ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if s := n.decode(mounts[0]); s.Repository != "/wanted" {
		t.Errorf("later: got %+v", s)
	}
	asks.labels[LabelBackend] = "forbidden"
	if _, err := n.tryPull(n.ctx, n.data(), asks); err == nil || !strings.Contains(err.Error(), testImage) || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("an image that asks for what it must not have: %v", err)
	}
}

func TestBadImageReference(t *testing.T) {
	n := newNode(t)
	l := n.bootstrap("v6-merged")
	l.labels[labelImage] = "nonsense"
	// It is refused when it is pulled, not when a container is to start.
	key := "extract-1-x " + chainA
	l.labels[snapshots.LabelSnapshotRef] = chainA
	_, err := n.top.Prepare(n.ctx, key, "", snapshots.WithLabels(l.labels))
	if err == nil || !strings.Contains(err.Error(), `"nonsense"`) || errdefs.IsAlreadyExists(err) {
		t.Fatalf("got %v", err)
	}
}

// idMapping are the labels of a container in a user namespace.
func idMapping(uids, gids string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: uids, snapshots.LabelSnapshotGIDMapping: gids})
}

func TestIDMapping(t *testing.T) {
	n := newNode(t)
	chain := n.pull(n.data(), n.bootstrap("v6-merged"))
	mapped := idMapping("0:100000:65536", "0:200000:65536")
	_, err := n.top.Prepare(n.ctx, "mapped", chain, mapped)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "remap-ids") || !strings.Contains(err.Error(), "auto") {
		t.Fatalf("got %v", err)
	}
	// containerd changes the owners itself, in a layer of its own.
	mounts, key := n.container(chain)
	must(t, os.Chown(n.decode(mounts[0]).Upper(), 100000, 200000), n.top.Commit(n.ctx, "remapped", key))
	mounts, err = n.top.Prepare(n.ctx, "mapped", "remapped", mapped)
	if err != nil {
		t.Fatal(err)
	}
	if s := n.decode(mounts[0]); len(s.Lower) != 1 {
		t.Fatalf("got %+v", s)
	}
}

// TestIDMapped has the mount helper shift the owners.
func TestIDMapped(t *testing.T) {
	for _, managed := range []bool{false, true} {
		n := newNode(t, func(o *Options) { o.Driver, o.Managed = mountspec.DriverAuto, managed })
		chain := n.pull(n.data(), n.bootstrap("v6-merged"))
		mapped := idMapping("0:100000:1000,1000:300000:1", "0:200000:65536")
		prepared, err := n.top.Prepare(n.ctx, "mapped", chain, mapped)
		must(t, err)
		view, err := n.top.View(n.ctx, "view", chain, mapped)
		must(t, err)
		again, err := n.top.Mounts(n.ctx, "mapped")
		must(t, err)
		for i, m := range [][]mount.Mount{prepared, view, again} {
			if len(m) != 1 || len(m[0].Options) != 3 {
				t.Fatalf("managed %v: got %+v", managed, m)
			}
			// As one word with commas between them the helper gets them.
			if got, want := strings.Join(m[0].Options[1:], ","), `uidmap="0:100000:1000,1000:300000:1",gidmap=0:200000:65536`; got != want {
				t.Errorf("options %s, want %s", got, want)
			}
			m[0].Options = m[0].Options[:1]
			s := n.decode(m[0])
			if s.Kind != mountspec.KindRootfs || s.ReadOnly != (i == 1) {
				t.Errorf("managed %v: got %+v", managed, s)
			}
			if s.ReadOnly {
				continue
			}
			var st unix.Stat_t
			must(t, unix.Stat(s.Upper(), &st))
			if st.Uid != 100000 || st.Gid != 200000 {
				t.Errorf("the upper directory belongs to %d:%d", st.Uid, st.Gid)
			}
		}
		// Others are as they were.
		if mounts, _ := n.container(chain); len(mounts[0].Options) != 1 {
			t.Errorf("without a mapping: %+v", mounts)
		}
	}
}

// TestIDMappedPlain gives an ordinary image what overlayfs's snapshotter would.
func TestIDMappedPlain(t *testing.T) {
	n := newNode(t)
	chain := n.pull(n.plain("a"), n.plain("b"))
	one, err := n.top.Prepare(n.ctx, "mapped", chain, idMapping("0:100000:65536", "0:200000:65536"))
	must(t, err)
	if len(one) != 1 || one[0].Type != "overlay" || !reflect.DeepEqual(one[0].Options[:2], []string{"uidmap=0:100000:65536", "gidmap=0:200000:65536"}) {
		t.Errorf("got %+v", one)
	}
	mounts, key := n.container(chain)
	if strings.Contains(strings.Join(mounts[0].Options, " "), "idmap") {
		t.Errorf("without a mapping: %+v", mounts)
	}
	must(t, os.Chown(upperOf(t, mounts), 100000, 200000), n.top.Commit(n.ctx, "remapped", key))
	mounts, err = n.top.Prepare(n.ctx, "copied", "remapped", idMapping("0:100000:65536", "0:200000:65536"))
	must(t, err)
	if strings.Contains(strings.Join(mounts[0].Options, " "), "idmap") {
		t.Errorf("what containerd has changed is mapped once more: %+v", mounts)
	}
	if mounts, err = n.top.Prepare(n.ctx, "empty", "", idMapping("0:100000:65536", "0:200000:65536")); err != nil || len(mounts) != 1 || len(mounts[0].Options) != 2 {
		t.Errorf("an empty one: %+v, %v", mounts, err)
	}
}

func TestOptionTooLarge(t *testing.T) {
	n := newNode(t)
	n.credentials["registry.example"] = &mountspec.Credentials{Auth: strings.Repeat("x", mountspec.MaxSize)}
	_, err := n.top.Prepare(n.ctx, "c", n.pull(n.data(), n.bootstrap("v6-merged")))
	if err == nil || !strings.Contains(err.Error(), "larger than") || len(err.Error()) > 2000 {
		t.Fatalf("got %.2000v", err)
	}
}

func TestSecondSnapshotterOnTheSameRoot(t *testing.T) {
	n := newNode(t)
	_, err := New(n.ctx, n.opts)
	if err == nil || !strings.Contains(err.Error(), "another nydus-snapshotter") || !strings.Contains(err.Error(), n.root) {
		t.Fatalf("got %v", err)
	}
}

// containerd may ask again for the mounts of a layer that it unpacks.
func TestMountsOfAnUnpackAboveTheImage(t *testing.T) {
	n := newNode(t)
	image := n.pull(n.data(), n.bootstrap("v6-merged"))
	key := "extract-1-x " + chainA
	prepared, err := n.top.Prepare(n.ctx, key, image, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chainA}))
	must(t, err)
	again, err := n.top.Mounts(n.ctx, key)
	if err != nil || prepared[0].Type != "overlay" || !reflect.DeepEqual(again, prepared) {
		t.Fatalf("got %v, %v, before %v", again, err, prepared)
	}
}
