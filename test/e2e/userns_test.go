package e2e_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestUserNamespace asks for a root filesystem that is to be shifted by an
// id-mapped mount, which FUSE cannot do: the answer says so, and what helps.
func TestUserNamespace(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref := r.MustPush(t, kit.SmallImage(t, "userns").MustNydus(t, kit.NydusOptions{}), "userns:nydus")
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		diffs, err := img.RootFS(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sn := n.Client().SnapshotService("nydus")
		_, err = sn.Prepare(t.Context(), "mapped", identity.ChainID(diffs).String(), snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:100000:65536",
		}))
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "cannot be id-mapped into a user namespace") {
			t.Errorf("a user namespace was answered with: %v", err)
		}
		if _, err := sn.Stat(t.Context(), "mapped"); !errdefs.IsNotFound(err) {
			t.Errorf("the refused snapshot is there: %v", err)
		}
		daemonsNow(t, n, 0)
	})
}

// inUserNS are the options of a container whose user namespace has ids of the host from
// 100000 on, with a root filesystem that the snapshotter is asked to shift, as CRI asks.
func inUserNS(id string, img containerd.Image) kit.RunOptions {
	mapping := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 3_000_000}}
	return kit.RunOptions{
		Spec: []oci.SpecOpts{
			oci.WithUserNamespace(mapping, mapping),
			oci.WithoutMounts("/sys"), // belongs to the machine's network namespace
		},
		Container: []containerd.NewContainerOpts{
			containerd.WithNewSnapshot(id+"-mapped", img, containerd.WithUserNSRemapperLabels(mapping, mapping)),
		},
	}
}

// shifted is a tree as a user namespace's owner sees it from the host.
func shifted(tree kit.Tree) kit.Tree {
	out := kit.Tree{}
	for path, e := range tree {
		e.UID, e.GID = e.UID+100000, e.GID+100000
		if c := e.Xattrs["security.capability"]; len(c) == 20 && c[3] == 2 {
			// File capabilities become those of the namespace with this root (capabilities(7)).
			e.Xattrs = maps.Clone(e.Xattrs)
			e.Xattrs["security.capability"] = string(binary.LittleEndian.AppendUint32([]byte(c[:3]+"\x03"+c[4:]), 100000))
		}
		out[path] = e
	}
	return out
}

// TestUserNamespaceMapped runs containers in user namespaces on a snapshotter that says of
// itself that it shifts owners: a complete image by the kernel, without a copy of any file.
func TestUserNamespaceMapped(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	plain := kit.MustBuildImage(t, kit.Pause, kit.BusyboxLayer(kit.MustTools(t)), kit.OddLower(), kit.OddUpper())
	ref, want := r.MustPush(t, plain.MustNydus(t, kit.NydusOptions{}), "odd:nydus"), tree(t, plain)
	ordinary := r.MustPush(t, plain, "odd:oci")
	for _, s := range []style{helper24, managed24} {
		t.Run(s.name, func(t *testing.T) {
			n := s.node(t, kit.NodeConfig{Hook: s.mount == "helper", Capabilities: []string{"remap-ids"}, Config: map[string]any{
				"mount.driver": "auto", "daemon.nydusd_path": shares(t), "daemon.config_template": prefetchAll(t),
			}})
			img := pull(t, n, ref)

			// Nobody has compared it yet.
			_, err := n.Run(t.Context(), img, "early", inUserNS("early", img))
			if err == nil || !strings.Contains(err.Error(), "which FUSE cannot do") || !strings.Contains(err.Error(), "not proven") {
				t.Fatalf("before the image is complete: %v", err)
			}
			wantDaemons(t, n, 0, soon)
			imageMounts(t, 0)
			c := run(t, n, img, "cold", kit.RunOptions{})
			_, err = n.Run(t.Context(), img, "beside", inUserNS("beside", img))
			if err == nil || !strings.Contains(err.Error(), "which FUSE cannot do") {
				t.Fatalf("beside a nydusd, before the image is complete: %v", err)
			}
			awaitProof(t, n, 1)

			// Who has nydusd keeps it.
			first := run(t, n, img, "first", inUserNS("first", img))
			daemonsNow(t, n, 1)
			kit.EqualTrees(t, "in a user namespace", shifted(want), kit.MustWalk(t, first.Root()))
			kit.EqualTrees(t, "through nydusd meanwhile", want, kit.MustWalk(t, c.Root()))
			remove(t, c)
			wantDaemons(t, n, 0, soon)

			again := run(t, n, img, "again", inUserNS("again", img))
			without := run(t, n, img, "without", kit.RunOptions{})
			imageMounts(t, 1)
			kit.EqualTrees(t, "without a user namespace", want, kit.MustWalk(t, without.Root()))
			out := exec(t, first, "busybox", "sh", "-c",
				"stat -c %u:%g /bin/busybox && echo more >> /name && echo new > /new && chown 7:8 /new && stat -c %u:%g /new /name && cat /name /new")
			if want := "0:0\n7:8\n0:0\nmore\nnew\n"; out != want {
				t.Errorf("the container says %q, want %q", out, want)
			}
			if e := kit.MustWalk(t, first.Root())["new"]; e.UID != 100007 || e.GID != 100008 {
				t.Errorf("what it writes belongs to %d:%d on the host", e.UID, e.GID)
			}
			if err := n.KillSnapshotter(); err != nil {
				t.Fatal(err)
			}
			exec(t, again, "busybox", "ls", "/odd")
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, c := range []*kit.Container{first, again, without} {
				remove(t, c)
			}
			if err := n.WaitRunEntries(soon); err != nil {
				t.Error(err)
			}
			imageMounts(t, 0)

			oci := pull(t, n, ordinary)
			c = run(t, n, oci, "ordinary", inUserNS("ordinary", oci))
			kit.EqualTrees(t, "of an ordinary image", shifted(want), kit.MustWalk(t, c.Root()))
			remove(t, c)
		})
	}
}

// TestUserNamespaceByCopy runs a container in a user namespace the way containerd
// does for snapshotters that do not map ids themselves: it changes every file's
// owner in a layer of its own. That needs the helper style.
func TestUserNamespaceByCopy(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _ := smallNydus(t, r, "copied")
	mapping := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	spec := []oci.SpecOpts{
		oci.WithUserNamespace(mapping, mapping),
		oci.WithoutMounts("/sys"), // belongs to the machine's network namespace
	}
	eachStyle(t, func(t *testing.T, s style) {
		n := s.node(t, kit.NodeConfig{})
		img := pull(t, n, ref)
		var c *kit.Container
		attempt := 0
		err := again(t, n, func() (err error) {
			attempt++
			remapped := containerd.WithUserNSRemappedSnapshot(fmt.Sprintf("remapped-%d", attempt), img, mapping, mapping)
			c, err = n.Run(t.Context(), img, fmt.Sprintf("mapped-%d", attempt),
				kit.RunOptions{Spec: spec, Container: []containerd.NewContainerOpts{remapped}})
			return err
		})
		if s.mount == "managed" {
			if err == nil || !strings.Contains(err.Error(), "no such device") {
				t.Errorf("a user namespace in the managed style: %v", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if out := exec(t, c, "busybox", "cat", "/name", "/proc/self/uid_map"); !strings.HasPrefix(out, "copied") || !strings.Contains(out, "100000") {
			t.Errorf("the container reads %q", out)
		}
		if e := kit.MustWalk(t, c.Root()+"/etc")["passwd"]; e.UID != 100000 {
			t.Errorf("/etc/passwd belongs to %d", e.UID)
		}
		remove(t, c)
	})
}
