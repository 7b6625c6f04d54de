package kit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Version is a supported version of containerd.
type Version string

// The newest and the oldest supported containerd.
const (
	V24 Version = "2.4"
	V16 Version = "1.6"
)

// Namespace is the containerd namespace of the kit's client. CRI has its own, k8s.io.
const Namespace = "kit"

// NodeConfig says what a test's node consists of. The zero value is containerd
// 2.4 alone, with overlayfs.
type NodeConfig struct {
	Containerd  Version        // V24 if empty
	Snapshotter bool           // run nydus-snapshotter, and use it by default
	Style       string         // [mount] style: "helper" (default) or "managed"
	Config      map[string]any // further keys of the snapshotter's configuration, such as "mount.idle_linger": "200ms"; nil removes a key
	RunDir      string         // the project's run directory; /run/nydus-snapshotter if empty
	CRI         bool           // with CRI plugin; needs SandboxImage
	// SandboxImage is the full reference of the pods' sandbox image, pushed by
	// the test: any SmallImage will do.
	SandboxImage string
	// Hook adds nydus-shim-hook to CRI's base runtime specification and to containers of Run.
	Hook bool
	// Bin is the directory of the project's binaries; Binaries' if empty. It is
	// needed with Snapshotter or Hook only.
	Bin string
	// Path comes first in the PATH of containerd, the snapshotter and, until the
	// test ends, of the program itself, since containerd's client mounts images too.
	Path string
	// Capabilities are those of the snapshotter's proxy plugin, which containerd 1.6
	// knows none of.
	Capabilities []string
	// Env is added to the environment of containerd and the snapshotter.
	Env []string
}

// Node is a private containerd, and a snapshotter if asked for, with all their
// files in directories of their own. They end with the test.
type Node struct {
	Containerd  *Daemon // nil before the first start
	Snapshotter *Daemon // nil without

	t      TB
	cfg    NodeConfig
	tools  Tools
	bin    string // the project's binaries
	dir    string // on the private /run: sockets, state, configuration
	data   string // on disk: containerd's and the snapshotter's roots, logs
	client *containerd.Client
	conn   *grpc.ClientConn
}

var nodes atomic.Int32

// NewNode starts a node.
func NewNode(t TB, cfg NodeConfig) *Node {
	t.Helper()
	Baseline(t)
	n := &Node{t: t, cfg: cfg, tools: MustTools(t)}
	if err := n.prepare(); err != nil {
		t.Fatalf("new node: %v", err)
	}
	t.Cleanup(n.remove)
	n.adoptPath()
	t.Cleanup(func() { dumpOnFailure(t, n.SnapshotterLog(), n.ContainerdLog()) })
	t.Cleanup(n.close)
	if cfg.Snapshotter {
		if err := n.StartSnapshotter(t.Context()); err != nil {
			t.Fatalf("new node: %v", err)
		}
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatalf("new node: %v", err)
	}
	return n
}

func (n *Node) prepare() error {
	number := nodes.Add(1)
	n.dir = filepath.Join(RunRoot, fmt.Sprintf("n%d", number))
	n.data = filepath.Join(Scratch(), fmt.Sprintf("node-%d", number))
	if n.cfg.Containerd == "" {
		n.cfg.Containerd = V24
	}
	if n.cfg.Style == "" {
		n.cfg.Style = "helper"
	}
	if n.cfg.RunDir == "" {
		n.cfg.RunDir = "/run/nydus-snapshotter"
	}
	if n.cfg.CRI && n.cfg.SandboxImage == "" {
		return errors.New("CRI needs NodeConfig.SandboxImage")
	}
	if n.cfg.Containerd == V16 && n.cfg.Style == "managed" {
		return errors.New("containerd 1.6 has no mount manager: the managed style needs 2.2 or newer")
	}
	n.bin = n.cfg.Bin
	if n.bin == "" && (n.cfg.Snapshotter || n.cfg.Hook) {
		n.bin = Binaries(n.t, "nydus-snapshotter", "nydus-overlayfs", "nydus-shim-hook")
	}
	for _, dir := range []string{n.dir, n.data, filepath.Join(n.dir, "bin"), n.SnapshotterRoot()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	// One directory with runc under its plain name: the shim finds it by PATH.
	if err := os.Symlink(n.tools.Runc, filepath.Join(n.dir, "bin", "runc")); err != nil {
		return err
	}
	return n.writeConfigs()
}

func (n *Node) writeConfigs() error {
	if n.cfg.Hook {
		out, err := exec.Command(filepath.Join(n.ContainerdBin(), "ctr"), "oci", "spec").Output()
		if err != nil {
			return fmt.Errorf("ctr oci spec: %w", err)
		}
		if err := n.writeBaseSpec(out); err != nil {
			return err
		}
	}
	text, err := n.containerdConfig()
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(n.dir, "containerd.toml"), text, 0o644)
}

// Dir is the node's directory on the private /run: sockets, containerd's state.
func (n *Node) Dir() string { return n.dir }

// Data is the node's directory on disk: containerd's root, logs.
func (n *Node) Data() string { return n.data }

// RunDir is the project's run directory.
func (n *Node) RunDir() string { return n.cfg.RunDir }

// SnapshotterRoot is the root directory of nydus-snapshotter.
func (n *Node) SnapshotterRoot() string { return filepath.Join(n.data, "nydus") }

// SnapshotterConfig is the path of the snapshotter's configuration file.
func (n *Node) SnapshotterConfig() string { return filepath.Join(n.dir, "nydus.toml") }

// SnapshotterName is what images are unpacked with by default: nydus, or
// overlayfs on a node without the snapshotter.
func (n *Node) SnapshotterName() string {
	if n.cfg.Snapshotter {
		return "nydus"
	}
	return "overlayfs"
}

// ContainerdBin is the directory of containerd, ctr and the shim of the node's version.
func (n *Node) ContainerdBin() string {
	if n.cfg.Containerd == V16 {
		return n.tools.Containerd16Bin
	}
	return n.tools.ContainerdBin
}

// ContainerdLog is the path of containerd's (and its shims') output.
func (n *Node) ContainerdLog() string { return filepath.Join(n.data, "containerd.log") }

// SnapshotterLog is the path of the snapshotter's output.
func (n *Node) SnapshotterLog() string { return filepath.Join(n.data, "nydus-snapshotter.log") }

// ContainerdAddress is the path of containerd's socket.
func (n *Node) ContainerdAddress() string { return n.containerdSocket() }

// SnapshotterAddress is the path of the snapshotter's socket.
func (n *Node) SnapshotterAddress() string { return n.snapshotterSocket() }

func (n *Node) containerdSocket() string  { return filepath.Join(n.dir, "containerd.sock") }
func (n *Node) snapshotterSocket() string { return filepath.Join(n.dir, "nydus.sock") }

// Env is the environment of containerd and the snapshotter: PATH holds the
// project's binaries, runc, containerd's own and the machine's.
func (n *Node) Env() []string {
	return append([]string{"PATH=" + n.path(), "HOME=/root", "TMPDIR=" + os.TempDir()}, n.cfg.Env...)
}

func (n *Node) path() string {
	var path []string
	for _, dir := range []string{n.cfg.Path, n.bin, filepath.Join(n.dir, "bin"), n.ContainerdBin(),
		filepath.Dir(n.tools.MountFuse), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if dir != "" {
			path = append(path, dir)
		}
	}
	return strings.Join(path, ":")
}

// adoptPath makes the node's PATH the program's own until the test ends:
// containerd's client mounts an image itself to look up users in it.
func (n *Node) adoptPath() {
	before := os.Getenv("PATH")
	if err := os.Setenv("PATH", n.path()); err != nil {
		n.t.Fatalf("new node: %v", err)
	}
	n.t.Cleanup(func() { _ = os.Setenv("PATH", before) })
}

// Command is a command in the node's environment.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	for _, dir := range filepath.SplitList(n.path()) {
		if path := filepath.Join(dir, name); unix.Access(path, unix.X_OK) == nil {
			name = path
			break
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = n.Env()
	return cmd
}

// Ctr runs the ctr of containerd's version, in the kit's namespace, and returns
// what it printed. The error holds that as well.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	cmd := n.Command(ctx, filepath.Join(n.ContainerdBin(), "ctr"),
		append([]string{"--address", n.containerdSocket(), "--namespace", Namespace}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// Configure changes a key of the snapshotter's configuration, such as
// "mount.idle_linger", for its next start. A nil value removes the key.
func (n *Node) Configure(key string, value any) {
	config := map[string]any{key: value}
	for k, v := range n.cfg.Config {
		if k != key {
			config[k] = v
		}
	}
	n.cfg.Config = config
}

// Client is a client of this containerd, whichever version, in the kit's namespace.
func (n *Node) Client() *containerd.Client { return n.client }

// Daemons lists the nydusd processes that run now.
func (n *Node) Daemons() []Process {
	n.t.Helper()
	list, err := DaemonProcesses()
	if err != nil {
		n.t.Fatalf("list daemons: %v", err)
	}
	return list
}

// WaitDaemons waits until exactly want nydusd processes run. The error lists them.
func (n *Node) WaitDaemons(want int, within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		list, err := DaemonProcesses()
		if err != nil || len(list) == want {
			return err
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("%d nydusd run after %v, want %d: %v", len(list), within, want, list)
		}
		// A process that ends makes an event; one that starts mounts something.
		w, err := newWatch()
		if err != nil {
			return err
		}
		if w.follow(leftovers{procs: list}) {
			w.poll(time.Until(deadline))
		}
		w.close()
	}
}

// RunEntries lists what lies in the run directory beside plain files at its top,
// keys and credentials: instances with all their directories, sockets, records, mounts. It is
// empty when no image is mounted. It touches no mount.
func (n *Node) RunEntries() []string {
	mounts, files := n.runEntries()
	return append(mounts, files...)
}

func (n *Node) runEntries() (mounts, files []string) {
	n.t.Helper()
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.cfg.RunDir))
	if err != nil {
		n.t.Fatalf("read mounts: %v", err)
	}
	mounted := map[string]bool{}
	for _, m := range list {
		if m.Mountpoint != n.cfg.RunDir {
			mounted[m.Mountpoint] = true
			mounts = append(mounts, m.Mountpoint)
		}
	}
	_ = filepath.WalkDir(n.cfg.RunDir, func(path string, d fs.DirEntry, err error) error {
		if mounted[path] || path == filepath.Join(n.cfg.RunDir, "keys") || path == filepath.Join(n.cfg.RunDir, "credentials") {
			return fs.SkipDir
		}
		top := filepath.Dir(path) == n.cfg.RunDir
		if err != nil || path == n.cfg.RunDir || path == n.HolderSocket() || top && (d.IsDir() || d.Type().IsRegular()) {
			return nil
		}
		files = append(files, path)
		return nil
	})
	return mounts, files
}

// WaitRunEntries waits until the run directory holds no instance any more.
func (n *Node) WaitRunEntries(within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		w, err := newWatch()
		if err != nil {
			return err
		}
		mounts, files := n.runEntries()
		list := append(mounts, files...)
		if len(list) == 0 {
			w.close()
			return nil
		}
		if !time.Now().Before(deadline) {
			w.close()
			return fmt.Errorf("the run directory still holds %v after %v: %s", len(list), within, strings.Join(list, " "))
		}
		if w.follow(leftovers{entries: files}) {
			w.poll(time.Until(deadline))
		}
		w.close()
	}
}

// close ends everything, in the order in which a node is drained, and reports
// what does not end by itself.
func (n *Node) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if n.Containerd != nil && !n.Containerd.Running() && n.leftTasks() {
		if err := n.StartContainerd(ctx); err != nil {
			n.t.Errorf("close node: %v", err)
		}
	}
	if n.Containerd.Running() {
		if err := errors.Join(n.removePods(ctx), n.removeContainers(ctx)); err != nil {
			n.t.Errorf("close node: %v", err)
		}
	}
	if n.cfg.Snapshotter && len(n.RunEntries()) > 0 {
		n.drainInstances(ctx)
	}
	if n.conn != nil {
		_ = n.conn.Close()
	}
	if n.client != nil {
		_ = n.client.Close()
	}
	if err := n.StopContainerd(); err != nil {
		n.t.Errorf("close node: %v", err)
	}
	if err := n.StopSnapshotter(); err != nil {
		n.t.Errorf("close node: %v", err)
	}
}

// drainInstances gives the snapshotter the time to release what became idle,
// starting it again if the test left it stopped.
func (n *Node) drainInstances(ctx context.Context) {
	if !n.Snapshotter.Running() {
		if err := n.StartSnapshotter(ctx); err != nil {
			n.t.Errorf("close node: %v", err)
			return
		}
	}
	if err := n.WaitRunEntries(settle); err != nil {
		n.t.Errorf("close node: %v", err)
	}
}

// leftTasks reports whether containers' bundles are left in containerd's state.
func (n *Node) leftTasks() bool {
	bundles, _ := filepath.Glob(filepath.Join(n.dir, "state", "io.containerd.runtime.v2.task", "*", "*"))
	return len(bundles) > 0
}

// remove deletes the node's directories, never across a mount: what is still
// mounted there is a leak that the baseline names.
func (n *Node) remove() {
	for n.unmountRunDir() {
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !within(n.dir, m.Mountpoint) && !within(n.data, m.Mountpoint) && !within(n.cfg.RunDir, m.Mountpoint), false
	})
	if err != nil || len(mounts) > 0 {
		n.t.Errorf("close node: %d mounts are left below its directories: the directories stay (%v)", len(mounts), err)
		return
	}
	n.reportSockets()
	for _, dir := range []string{n.dir, n.data} {
		if err := os.RemoveAll(dir); err != nil {
			n.t.Errorf("close node: %v", err)
		}
	}
	if len(n.RunEntries()) == 0 {
		_ = os.RemoveAll(n.cfg.RunDir)
	}
}

// unmountRunDir unmounts the project's own tmpfs, which stays while the machine
// is up, unless something is in use in it.
func (n *Node) unmountRunDir() bool {
	if mounted, err := mountinfo.Mounted(n.cfg.RunDir); err != nil || !mounted || len(n.RunEntries()) > 0 {
		return false
	}
	return unix.Unmount(n.cfg.RunDir, 0) == nil
}

// reportSockets fails the test for sockets other than the servers' own.
func (n *Node) reportSockets() {
	own := map[string]bool{n.containerdSocket(): true, n.containerdSocket() + ".ttrpc": true, n.snapshotterSocket(): true}
	for _, dir := range []string{n.dir, n.data} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			// containerd 2.x puts CRI's streams and its debug socket there as well.
			if err == nil && d.Type()&fs.ModeSocket != 0 && !own[path] && !within(filepath.Join(n.dir, "state"), path) &&
				!within(filepath.Join(n.data, "containerd"), path) {
				n.t.Errorf("left behind by %s: socket %s", n.t.Name(), path)
			}
			return nil
		})
	}
}

func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// dial connects to containerd for CRI.
func (n *Node) dial() (*grpc.ClientConn, error) {
	if n.conn != nil {
		return n.conn, nil
	}
	conn, err := grpc.NewClient("unix://"+n.containerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	n.conn = conn
	return conn, err
}
