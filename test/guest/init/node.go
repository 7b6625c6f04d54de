package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/test/guest"
)

const (
	root   = "/var/lib/nydus-snapshotter"
	runDir = "/run/nydus-snapshotter"
	logOf  = "/tmp/snapshotter.log"
	config = "/tmp/config.toml"
)

// settings are the snapshotter's. That an image is let go at once shows what is
// left.
const settings = `version = 1
[daemon]
nydusd_path = "` + stand + `"
cgroup_parent = "` + guest.CgroupParent + `"
recover_policy = "failover"
[mount]
idle_linger = "0s"
[log]
level = "debug"
`

// snapshotter is the running one.
type snapshotter struct{ cmd *exec.Cmd }

func startSnapshotter(ctx context.Context) (*snapshotter, error) {
	if err := os.WriteFile(config, []byte(settings), 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(logOf)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s := &snapshotter{exec.Command(guest.Snapshotter, "serve", "--config", config)}
	s.cmd.Stdout, s.cmd.Stderr, s.cmd.Env = log, log, []string{"PATH=/bin"}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	socket := filepath.Join(runDir, "nydus-snapshotter.sock")
	return s, await(ctx, "the snapshotter serves", func() (bool, error) {
		_, err := os.Stat(socket)
		return err == nil, nil
	})
}

func (s *snapshotter) stop(r *guest.Report) error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	err := s.cmd.Wait()
	text, _ := os.ReadFile(logOf)
	r.Log = string(text[max(0, len(text)-8000):])
	if err != nil {
		return fmt.Errorf("the snapshotter: %w: %s", err, r.Log)
	}
	return nil
}

// image is one that is mounted.
type image struct {
	name, key, target string
	files             map[string]string
}

// mount does what snapshotter and containerd do for a container of an image.
func mount(ctx context.Context, name string, memory int64, cpu int) (*image, error) {
	dir := filepath.Join(guest.Images, name)
	var about guest.Image
	text, err := os.ReadFile(filepath.Join(dir, "files.json"))
	if err == nil {
		err = json.Unmarshal(text, &about)
	}
	if err != nil {
		return nil, err
	}
	s, err := specOf(name, dir)
	if err != nil {
		return nil, err
	}
	s.Daemon.MemoryLimit, s.Daemon.CPULimit = memory, cpu
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(root)
	if err != nil {
		return nil, err
	}
	option, err := mountspec.Encode(s, key)
	if err != nil {
		return nil, err
	}
	m := &image{name: name, key: s.Instance, target: filepath.Join("/tmp/rootfs", name), files: about.Files}
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, guest.Helper, s.SnapshotDir, m.target, "-o", option).CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(root, "instances", s.Instance, "nydusd.log"))
		return nil, fmt.Errorf("mount %s: %w: %s: %s", name, err, out, log)
	}
	return m, nil
}

func specOf(name, dir string) (*mountspec.Spec, error) {
	boot, err := os.ReadFile(filepath.Join(dir, "bootstrap"))
	if err != nil {
		return nil, err
	}
	snapshots := filepath.Join(root, "snapshots", name)
	bootstrap := filepath.Join(snapshots, "image", "fs", "image.boot")
	for _, d := range []string{filepath.Dir(bootstrap), filepath.Join(snapshots, "top", "fs"), filepath.Join(snapshots, "top", "work")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(bootstrap, boot, 0o644); err != nil {
		return nil, err
	}
	s := &mountspec.Spec{
		Bootstrap: bootstrap, BootstrapDigest: digestOf(boot), FSVersion: "v6", SnapshotDir: filepath.Join(snapshots, "top"),
		Kind: mountspec.KindRootfs, Image: "registry.test/" + name, Repository: filepath.Join(dir, "blobs"), Root: root, RunDir: runDir,
		Driver: mountspec.DriverAuto,
		Daemon: mountspec.Daemon{Path: stand, LogLevel: "info", Threads: 2, StartTimeout: time.Minute, CgroupParent: guest.CgroupParent},
	}
	s.CacheDir = mountspec.CacheDir(root, "", s.Repository)
	s.Instance = mountspec.InstanceKey(s.BootstrapDigest, "", s.Repository, s.CacheDir)
	s.Config, err = nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: s.Repository}, CacheDir: s.CacheDir}.JSON()
	return s, err
}

// generation is the one in use.
func (m *image) generation() (instance.Generation, error) {
	rec, err := instance.ReadRecord(runDir, m.key)
	if err != nil {
		return instance.Generation{}, err
	}
	if rec.Current == nil {
		return instance.Generation{}, fmt.Errorf("image %s is not served any more", m.name)
	}
	return *rec.Current, nil
}

// born lists what was started for the image, in its order.
func (m *image) born() (list []guest.Birth, err error) {
	names, err := filepath.Glob(filepath.Join(births, m.key+".*"))
	slices.Sort(names)
	for _, name := range names {
		var b guest.Birth
		text, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(text, &b)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, b)
	}
	return list, err
}

// cgroup is the directory of the first daemon's cgroup.
func (m *image) cgroup() string {
	return filepath.Join("/sys/fs/cgroup", guest.CgroupParent, m.key+".g1")
}

// starve makes the kernel kill the image's daemon for its memory limit.
func (m *image) starve(ctx context.Context) error {
	dir, err := os.Open(m.cgroup())
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd := exec.CommandContext(ctx, "/init", m.cgroup())
	cmd.Args[0] = "hog"
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("use up the memory of %s: %w: %s", m.name, err, out)
	}
	return nil
}

// leftovers lists what no mounted image explains.
func leftovers() (left []string) {
	for _, pattern := range []string{filepath.Join("/sys/fs/cgroup", guest.CgroupParent, "*/"), filepath.Join(runDir, "i", "*")} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		if word(name) == "nydusd" && !strings.Contains(word(filepath.Join(filepath.Dir(name), "stat")), ") Z ") {
			left = append(left, "nydusd: "+filepath.Dir(name))
		}
	}
	return left
}

func (m *image) unmount() error { return unix.Unmount(m.target, 0) }
