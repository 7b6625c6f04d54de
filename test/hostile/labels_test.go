package hostile_test

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestPodLabels runs pods whose author set every annotation that means something
// to the snapshotter. containerd makes labels of the pod's snapshots of them. They
// select nothing and plant nothing: the pod sees its own image, the registry that
// they name is not asked, no layer appears, and the image that they aimed at is
// pulled and read as if they were not there.
func TestPodLabels(t *testing.T) {
	for _, version := range []kit.Version{kit.V24, kit.V16} {
		t.Run(string(version), func(t *testing.T) {
			r := kit.NewRegistry(t, kit.RegistryOptions{})
			evil := kit.NewRegistry(t, kit.RegistryOptions{})
			pod := nydusImage(t, "pod")
			// It shares no layer with the pods' image: containerd itself refuses a
			// label that names a layer which exists.
			victim := kit.MustBuildImage(t, kit.Pause, kit.FileLayer(kit.File{Name: "./"}, kit.File{Name: "victim", Data: "victim"}),
				kit.BusyboxLayer(kit.MustTools(t))).MustNydus(t, kit.NydusOptions{})
			podRef, victimRef := r.MustPush(t, pod, "pod:1"), r.MustPush(t, victim, "victim:1")
			evilRef := evil.MustPush(t, copyOf(t, victim, "evil"), "evil:1")
			n := newNode(t, kit.NodeConfig{Containerd: version, CRI: true, SandboxImage: podRef})
			ctx := t.Context()
			if err := n.CRIPull(ctx, podRef, "", ""); err != nil {
				t.Fatal(err)
			}
			layers := committed(t, n)
			for i, annotations := range podAnnotations(victim, evilRef) {
				id := runPod(t, n, fmt.Sprintf("attacker-%d", i), podRef, annotations)
				compareContainer(t, n, id, pod)
			}
			if now := committed(t, n); !maps.Equal(now, layers) {
				t.Errorf("layers are %v now, were %v", now, layers)
			}
			if err := n.CRIPull(ctx, victimRef, "", ""); err != nil {
				t.Fatalf("the image that the labels aim at cannot be pulled: %v", err)
			}
			compareContainer(t, n, runPod(t, n, "victim", victimRef, nil), victim)
			if asked := evil.Requests(); len(asked) > 0 {
				t.Errorf("the registry that only a label names was asked: %v", asked)
			}
		})
	}
}

// podAnnotations are what an attacker sets. They aim at an image that is not on
// the node yet: at its lowest layer, its bootstrap layer, and at no layer.
func podAnnotations(victim *kit.Image, evilRef string) []map[string]string {
	var diffs []digest.Digest
	for _, l := range victim.Layers[:victim.Bootstrap()] {
		diffs = append(diffs, l.Desc.Digest)
	}
	var all []map[string]string
	for _, target := range []string{"", diffs[0].String(), identity.ChainID(diffs).String()} {
		for _, kind := range []string{dataLabel, bootstrapLabel} {
			a := map[string]string{
				kind: "true", imageLabel: evilRef, "containerd.io/snapshot/nydus-fs-version": "6",
				"containerd.io/snapshot/parent-chain-id": diffs[0].String(),
			}
			if target != "" {
				a[refLabel] = target
			}
			all = append(all, a)
		}
	}
	return all
}

// runPod starts a pod with one container, both annotated, and returns the
// container's id. Like kubelet it tries again, but only after the one failure that
// is containerd 1.6's own: its shim's reaper takes the exit status of mount.fuse
// away from it, now and then ten times in a row.
func runPod(t *testing.T, n *kit.Node, name, ref string, annotations map[string]string) string {
	t.Helper()
	const attempts = 5
	for attempt := uint32(0); ; attempt++ {
		id, err := tryPod(t, n, name, ref, annotations, attempt)
		if err == nil {
			return id
		}
		if attempt == attempts || !strings.Contains(err.Error(), "failed with ECHILD (retired 10 times)") {
			t.Fatalf("pod %s: %v", name, err)
		}
	}
}

func tryPod(t *testing.T, n *kit.Node, name, ref string, annotations map[string]string, attempt uint32) (string, error) {
	t.Helper()
	runtime, _ := n.CRI()
	options := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_POD}
	pod := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "default", Attempt: attempt},
		LogDirectory: t.TempDir(), Annotations: annotations,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: kit.CgroupRoot(), SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: options},
		},
	}
	sandbox, err := runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return "", err
	}
	created, err := runtime.CreateContainer(t.Context(), &cri.CreateContainerRequest{
		PodSandboxId: sandbox.PodSandboxId, SandboxConfig: pod,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c", Attempt: attempt}, Image: &cri.ImageSpec{Image: ref}, Annotations: annotations, LogPath: "c.log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: options}},
		},
	})
	if err != nil {
		return "", fmt.Errorf("create container: %w", err)
	}
	if _, err := runtime.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return "", fmt.Errorf("start container: %w", err)
	}
	return created.ContainerId, nil
}

// compareContainer compares what a CRI container sees with its image.
func compareContainer(t *testing.T, n *kit.Node, id string, want *kit.Image) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	c, err := n.Client().LoadContainer(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.Task(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := want.Tree()
	if err != nil {
		t.Fatal(err)
	}
	got := kit.MustWalk(t, fmt.Sprintf("/proc/%d/root", task.Pid()))
	for path, e := range tree {
		if e.Type != "file" || path == "etc/passwd" || path == "etc/group" {
			continue
		}
		if g := got[path]; g.SHA256 != e.SHA256 && g.Type != "mount" {
			t.Errorf("container %s: %s is not what the image has: %+v", id, path, g)
		}
	}
}

// committed lists the layers on a node with their labels, of all namespaces.
func committed(t *testing.T, n *kit.Node) map[string]string {
	t.Helper()
	list := map[string]string{}
	for _, ns := range []string{"k8s.io", kit.Namespace} {
		ctx := namespaces.WithNamespace(t.Context(), ns)
		err := n.Client().SnapshotService("nydus").Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Kind == snapshots.KindCommitted {
				list[ns+"/"+info.Name] = fmt.Sprint(info.Labels)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return list
}
