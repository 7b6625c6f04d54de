package e2e_test

import (
	"fmt"
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
