package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRI returns the clients of the node's CRI services.
func (n *Node) CRI() (cri.RuntimeServiceClient, cri.ImageServiceClient) {
	n.t.Helper()
	conn, err := n.dial()
	if err != nil {
		n.t.Fatalf("connect to CRI: %v", err)
	}
	return cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)
}

// criReady waits for the CRI plugin, which registers after containerd answers.
// There is no event for it, hence the ticker.
func (n *Node) criReady(ctx context.Context) error {
	if !n.cfg.CRI {
		return nil
	}
	conn, err := n.dial()
	if err != nil {
		return fmt.Errorf("connect to CRI: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn.ResetConnectBackoff()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{})
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("CRI does not answer: %w\n%s", err, tail(n.ContainerdLog(), 20))
		}
	}
}

// CRIPull pulls an image as kubelet does. User may be empty.
func (n *Node) CRIPull(ctx context.Context, ref, user, password string) error {
	_, images := n.CRI()
	req := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}
	if user != "" {
		req.Auth = &cri.AuthConfig{Username: user, Password: password}
	}
	if _, err := images.PullImage(ctx, req); err != nil {
		return fmt.Errorf("CRI pull %s: %w", ref, err)
	}
	return nil
}

// Pod is a sandbox with the machine's network.
type Pod struct {
	ID     string
	Config *cri.PodSandboxConfig
	node   *Node
}

// RunPod starts a sandbox. It is removed with the node, if not before.
func (n *Node) RunPod(ctx context.Context, name string) (*Pod, error) {
	logs := filepath.Join(n.data, "pods", name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "default"},
		LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: CgroupRoot(),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{
				Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_POD,
			}},
		},
	}
	runtime, _ := n.CRI()
	resp, err := runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", name, err)
	}
	return &Pod{ID: resp.PodSandboxId, Config: config, node: n}, nil
}

// Run creates and starts a container in the pod and returns its id. The image
// must have been pulled. args replaces the image's command if not empty.
func (p *Pod) Run(ctx context.Context, name, ref string, args ...string) (string, error) {
	runtime, _ := p.node.CRI()
	created, err := runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  p.ID,
		SandboxConfig: p.Config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name},
			Image:    &cri.ImageSpec{Image: ref},
			Command:  args,
			LogPath:  name + ".log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: p.Config.Linux.SecurityContext.NamespaceOptions,
			}},
		},
	})
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", name, err)
	}
	if _, err := runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return created.ContainerId, fmt.Errorf("start container %s: %w", name, err)
	}
	return created.ContainerId, nil
}

// PID is the first process of a running container of the pod.
func (p *Pod) PID(ctx context.Context, id string) (int, error) {
	task, err := p.node.criTask(ctx, id)
	if err != nil {
		return 0, err
	}
	return int(task.Pid()), nil
}

// Exec runs a command in a container and returns its output and exit code.
func (p *Pod) Exec(ctx context.Context, id string, args ...string) (string, int32, error) {
	runtime, _ := p.node.CRI()
	resp, err := runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: args, Timeout: 60})
	if err != nil {
		return "", 0, fmt.Errorf("exec in %s: %w", id, err)
	}
	return string(resp.Stdout) + string(resp.Stderr), resp.ExitCode, nil
}

// Stop stops a container, at once, and removes it.
func (p *Pod) Stop(ctx context.Context, id string) error {
	runtime, _ := p.node.CRI()
	if _, err := runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("stop %s: %w", id, err)
	}
	if _, err := runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	return nil
}

// Remove stops and removes the pod with its containers.
func (p *Pod) Remove(ctx context.Context) error {
	runtime, _ := p.node.CRI()
	if _, err := runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("stop pod %s: %w", p.ID, err)
	}
	if _, err := runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.ID, err)
	}
	return nil
}

// removePods removes all pods, as a drained node has none.
func (n *Node) removePods(ctx context.Context) error {
	if !n.cfg.CRI {
		return nil
	}
	runtime, _ := n.CRI()
	list, err := runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var faults []error
	for _, pod := range list.Items {
		faults = append(faults, (&Pod{ID: pod.Id, node: n}).Remove(ctx))
	}
	return errors.Join(faults...)
}
