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
)

// systemctl asks systemd, over its own socket: there is no D-Bus.
func systemctl(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "/bin/systemctl", args...).CombinedOutput(); err != nil {
		status, _ := exec.CommandContext(ctx, "/bin/systemctl", "--no-pager", "status", guest.SnapshotterUnit, guest.EngineUnit).CombinedOutput()
		return fmt.Errorf("systemctl %s: %w: %s: %s", strings.Join(args, " "), err, out, status)
	}
	return nil
}

// engine mounts both images, as containerd would.
func engine() error {
	for _, name := range []string{guest.Limited, guest.Other} {
		if err := mount(name); err != nil {
			return err
		}
	}
	return nil
}

// image is one that is mounted.
type image struct {
	name, key, target string
	files             map[string]string
}

// find describes an image.
func find(name string) (*image, *mountspec.Spec, error) {
	dir := filepath.Join(guest.Images, name)
	var about guest.Image
	text, err := os.ReadFile(filepath.Join(dir, "files.json"))
	if err == nil {
		err = json.Unmarshal(text, &about)
	}
	if err != nil {
		return nil, nil, err
	}
	s, err := specOf(name, dir)
	if err != nil {
		return nil, nil, err
	}
	return &image{name: name, key: s.Instance, target: filepath.Join("/tmp/rootfs", name), files: about.Files}, s, nil
}

// mount does what snapshotter and containerd do for a container of an image.
func mount(name string) error {
	m, s, err := find(name)
	if err != nil {
		return err
	}
	if name == guest.Limited {
		s.Daemon.MemoryLimit, s.Daemon.CPULimit = guest.MemoryLimit, guest.CPULimit
	}
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Ensure(root)
	if err != nil {
		return err
	}
	option, err := mountspec.Encode(s, key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command(filepath.Join(guest.Bin, "nydus-overlayfs"), s.SnapshotDir, m.target, "-o", option).CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(root, "instances", s.Instance, "nydusd.log"))
		return fmt.Errorf("mount %s: %w: %s: %s", name, err, out, log)
	}
	return nil
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
		Daemon: mountspec.Daemon{Path: guest.Stand, LogLevel: "info", Threads: 2, StartTimeout: time.Minute, CgroupParent: guest.CgroupParent},
	}
	s.CacheDir = mountspec.CacheDir(root, "", s.Repository)
	s.Instance = mountspec.InstanceKey(s.BootstrapDigest, "", s.Repository, s.CacheDir)
	s.Config, err = nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: s.Repository}, CacheDir: s.CacheDir}.FuseDev()
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
	cmd := exec.CommandContext(ctx, guest.Init, m.cgroup())
	cmd.Args[0] = "hog"
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("use up the memory of %s: %w: %s", m.name, err, out)
	}
	return nil
}

// leftovers lists what no mounted image explains.
func leftovers() (left []string) {
	for _, dir := range []string{filepath.Join("/sys/fs/cgroup", guest.CgroupParent), filepath.Join(runDir, "i")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.IsDir() { // a cgroup's others are its settings
				left = append(left, filepath.Join(dir, e.Name()))
			}
		}
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
