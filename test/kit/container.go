package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// PullOptions says how Pull pulls.
type PullOptions struct {
	Snapshotter    string // the node's default if empty
	User, Password string
	NoAnnotations  bool // tell the snapshotter nothing about the image, as ctr of containerd 1.6 does
	Labels         map[string]string
}

// Pull pulls and unpacks an image through the client, with the annotations that
// remote snapshotters need. Tests of other ways in use Ctr and CRI.
func (n *Node) Pull(ctx context.Context, ref string, opts PullOptions) (containerd.Image, error) {
	if opts.Snapshotter == "" {
		opts.Snapshotter = n.SnapshotterName()
	}
	hosts := docker.ConfigureDefaultRegistries(
		docker.WithPlainHTTP(docker.MatchLocalhost),
		docker.WithAuthorizer(docker.NewDockerAuthorizer(docker.WithAuthCreds(func(string) (string, string, error) {
			return opts.User, opts.Password, nil
		}))),
	)
	remote := []containerd.RemoteOpt{
		containerd.WithPullUnpack,
		containerd.WithPullSnapshotter(opts.Snapshotter, snapshots.WithLabels(opts.Labels)),
		containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
	}
	if !opts.NoAnnotations {
		remote = append(remote, containerd.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(ref)))
	}
	img, err := n.client.Pull(ctx, ref, remote...)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	return img, nil
}

// MustPull is Pull for a test.
func (n *Node) MustPull(t TB, ref string, opts PullOptions) containerd.Image {
	t.Helper()
	img, err := n.Pull(t.Context(), ref, opts)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return img
}

// RemoveImage removes an image and waits for the collection of its snapshots and content.
func (n *Node) RemoveImage(ctx context.Context, ref string) error {
	err := n.client.ImageService().Delete(ctx, ref, images.SynchronousDelete())
	if err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	return nil
}

// RunOptions says how Run starts a container. The zero value runs the image's
// own command with the node's default snapshotter.
type RunOptions struct {
	Args        []string
	Snapshotter string
	Spec        []oci.SpecOpts                // applied last
	Container   []containerd.NewContainerOpts // applied last
}

// Container is a started container without a network of its own.
type Container struct {
	containerd.Container
	Task containerd.Task

	node   *Node
	output *output
	exit   <-chan containerd.ExitStatus
}

// output collects what a container writes, while it writes.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// Run creates a container and starts it. On an error nothing of it is left.
// Containers that the test does not delete go with the node.
func (n *Node) Run(ctx context.Context, img containerd.Image, id string, opts RunOptions) (*Container, error) {
	if opts.Snapshotter == "" {
		opts.Snapshotter = n.SnapshotterName()
	}
	spec := []oci.SpecOpts{oci.WithImageConfig(img)}
	if len(opts.Args) > 0 {
		spec = append(spec, oci.WithProcessArgs(opts.Args...))
	}
	spec = append(spec, oci.WithHostNamespace(specs.NetworkNamespace), oci.WithCgroup(filepath.Join(CgroupRoot(), id)), n.withHooks)
	create := []containerd.NewContainerOpts{
		containerd.WithImage(img),
		containerd.WithSnapshotter(opts.Snapshotter),
		containerd.WithNewSnapshot(id, img),
		containerd.WithNewSpec(append(spec, opts.Spec...)...),
		containerd.WithRuntime("io.containerd.runc.v2", nil),
	}
	c := &Container{node: n, output: &output{}}
	var err error
	c.Container, err = n.client.NewContainer(ctx, id, append(create, opts.Container...)...)
	if err != nil {
		// The snapshot is made before the container's record.
		gone := n.client.SnapshotService(opts.Snapshotter).Remove(ctx, id)
		if errdefs.IsNotFound(gone) {
			gone = nil
		}
		return nil, errors.Join(fmt.Errorf("create container %s: %w", id, err), gone)
	}
	if err := c.Start(ctx); err != nil {
		return nil, errors.Join(err, c.Container.Delete(ctx, containerd.WithSnapshotCleanup))
	}
	return c, nil
}

// MustRun is Run for a test.
func (n *Node) MustRun(t TB, img containerd.Image, id string, opts RunOptions) *Container {
	t.Helper()
	c, err := n.Run(t.Context(), img, id, opts)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return c
}

// Start makes and starts the container's task: for the second time after DeleteTask.
func (c *Container) Start(ctx context.Context) error {
	streams := cio.NewCreator(cio.WithStreams(nil, c.output, c.output), cio.WithFIFODir(filepath.Join(c.node.dir, "fifo")))
	var err error
	if c.Task, err = c.NewTask(ctx, streams); err != nil {
		return fmt.Errorf("create task of %s: %w", c.ID(), err)
	}
	c.exit, err = c.Task.Wait(ctx)
	if err == nil {
		err = c.Task.Start(ctx)
	}
	if err != nil {
		_, gone := c.Task.Delete(ctx, containerd.WithProcessKill)
		return fmt.Errorf("start %s: %w", c.ID(), errors.Join(err, gone))
	}
	return nil
}

// withHooks adds the project's hook as the README says, if the node has it.
func (n *Node) withHooks(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	if !n.cfg.Hook {
		return nil
	}
	path := filepath.Join(n.bin, "nydus-shim-hook")
	s.Hooks = &specs.Hooks{
		CreateRuntime: []specs.Hook{{Path: path, Args: []string{path, "createRuntime"}}},
		Poststop:      []specs.Hook{{Path: path, Args: []string{path, "poststop"}}},
	}
	return nil
}

// PID is the container's first process.
func (c *Container) PID() int { return int(c.Task.Pid()) }

// Root is the container's root directory as its processes see it.
func (c *Container) Root() string { return "/proc/" + strconv.Itoa(c.PID()) + "/root" }

// Rootfs is the mount of the root file system in the bundle, outside of the container.
func (c *Container) Rootfs() string {
	return filepath.Join(c.node.dir, "state", "io.containerd.runtime.v2.task", Namespace, c.ID(), "rootfs")
}

// Output is what the container has written so far.
func (c *Container) Output() string { return c.output.String() }

// Wait waits until the container ends and returns its exit code.
func (c *Container) Wait(ctx context.Context) (uint32, error) {
	select {
	case status := <-c.exit:
		code, _, err := status.Result()
		c.Task.IO().Wait() // output is complete
		return code, err
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for %s: %w", c.ID(), ctx.Err())
	}
}

// Kill sends a signal to the container's first process.
func (c *Container) Kill(ctx context.Context, s syscall.Signal) error { return c.Task.Kill(ctx, s) }

// Exec runs a command in the container and returns its output and exit code.
func (c *Container) Exec(ctx context.Context, args ...string) (string, uint32, error) {
	spec, err := c.Spec(ctx)
	if err != nil {
		return "", 0, err
	}
	process := *spec.Process
	process.Args, process.Terminal = args, false
	var out output
	id := "exec-" + strconv.FormatInt(execs.Add(1), 10)
	streams := cio.NewCreator(cio.WithStreams(nil, &out, &out), cio.WithFIFODir(filepath.Join(c.node.dir, "fifo")))
	p, err := c.Task.Exec(ctx, id, &process, streams)
	if err != nil {
		return "", 0, fmt.Errorf("exec in %s: %w", c.ID(), err)
	}
	defer func() { _, _ = p.Delete(context.WithoutCancel(ctx), containerd.WithProcessKill) }()
	exit, err := p.Wait(ctx)
	if err != nil {
		return "", 0, err
	}
	if err := p.Start(ctx); err != nil {
		return "", 0, fmt.Errorf("exec %q in %s: %w", args, c.ID(), err)
	}
	select {
	case status := <-exit:
		p.IO().Wait()
		return out.String(), status.ExitCode(), status.Error()
	case <-ctx.Done():
		return out.String(), 0, ctx.Err()
	}
}

var execs atomic.Int64

// DeleteTask kills the container and unmounts its root file system; Start makes it run again.
func (c *Container) DeleteTask(ctx context.Context) error {
	if _, err := c.Task.Delete(ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete task of %s: %w", c.ID(), err)
	}
	return nil
}

// Remove kills the container and deletes it with its snapshot.
func (c *Container) Remove(ctx context.Context) error {
	if err := c.DeleteTask(ctx); err != nil {
		return err
	}
	if err := c.Container.Delete(ctx, containerd.WithSnapshotCleanup); err != nil {
		return fmt.Errorf("delete %s: %w", c.ID(), err)
	}
	return nil
}

// removeContainers removes all containers of all namespaces.
func (n *Node) removeContainers(ctx context.Context) error {
	names, err := n.client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var faults []error
	for _, name := range names {
		ctx := namespaces.WithNamespace(ctx, name)
		list, err := n.client.Containers(ctx)
		faults = append(faults, err)
		for _, c := range list {
			faults = append(faults, removeContainer(ctx, c))
		}
	}
	return errors.Join(faults...)
}

func removeContainer(ctx context.Context, c containerd.Container) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	task, err := c.Task(ctx, nil)
	if err == nil {
		_, err = task.Delete(ctx, containerd.WithProcessKill)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove task of %s: %w", c.ID(), err)
	}
	if err := c.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove %s: %w", c.ID(), err)
	}
	return nil
}

// MountFlags returns the options of the mount at path as mountinfo tells them,
// of the mount and of its superblock.
func MountFlags(path string) (mount, super string, err error) {
	path, err = filepath.EvalSymlinks(path)
	if err != nil {
		return "", "", err
	}
	var fd int
	if fd, err = unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
		return "", "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return mountFlags(fd)
}

// criTask is the task of a CRI container.
func (n *Node) criTask(ctx context.Context, id string) (containerd.Task, error) {
	ctx = namespaces.WithNamespace(ctx, "k8s.io")
	c, err := n.client.LoadContainer(ctx, id)
	if err != nil {
		return nil, err
	}
	return c.Task(ctx, nil)
}
