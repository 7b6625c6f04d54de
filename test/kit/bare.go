package kit

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// BareMount is a nydus image mounted by nydusd alone, its blobs on local disk:
// what the project's own mounts are compared with.
type BareMount struct {
	Mountpoint string
	Daemon     *Daemon
	Started    time.Duration // from exec to mounted
}

// MountBare mounts a nydus image with nydusd and nothing else. The mount ends with the test.
func MountBare(t TB, img *Image) *BareMount {
	t.Helper()
	Baseline(t)
	dir := t.TempDir()
	b := &BareMount{Mountpoint: filepath.Join(dir, "mnt")}
	argv, err := prepareBare(MustTools(t), img, dir)
	if err != nil {
		t.Fatalf("mount bare: %v", err)
	}
	t.Cleanup(func() { dumpOnFailure(t, filepath.Join(dir, "nydusd.log")) })
	start := time.Now()
	b.Daemon, err = startDaemon("nydusd", filepath.Join(dir, "nydusd.log"), os.Environ(), argv)
	if err != nil {
		t.Fatalf("mount bare: %v", err)
	}
	t.Cleanup(b.unmount)
	if err := b.wait(settle); err != nil {
		t.Fatalf("mount bare: %v\n%s", err, tail(b.Daemon.Log, 20))
	}
	b.Started = time.Since(start)
	return b
}

// prepareBare writes what nydusd reads, and returns its command line.
func prepareBare(tools Tools, img *Image, dir string) ([]string, error) {
	boot, err := img.BootstrapBytes()
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"mnt", "blobs", "cache"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	for _, l := range img.Layers {
		if err := os.Symlink(l.Path, filepath.Join(dir, "blobs", l.Desc.Digest.Encoded())); err != nil {
			return nil, err
		}
	}
	config, err := json.Marshal(map[string]any{
		"device": map[string]any{
			"backend": map[string]any{"type": "localfs", "config": map[string]any{"dir": filepath.Join(dir, "blobs")}},
			"cache":   map[string]any{"type": "blobcache", "config": map[string]any{"work_dir": filepath.Join(dir, "cache")}},
		},
		"mode": "direct", "digest_validate": false, "enable_xattr": true,
	})
	if err != nil {
		return nil, err
	}
	for name, text := range map[string][]byte{"config.json": config, "image.boot": boot} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return nil, err
		}
	}
	return []string{tools.Nydusd, "fuse", "--config", filepath.Join(dir, "config.json"),
		"--bootstrap", filepath.Join(dir, "image.boot"), "--mountpoint", filepath.Join(dir, "mnt"),
		"--rlimit-nofile", "0", "--log-level", "warn"}, nil
}

// wait follows the mount table until nydusd has mounted.
func (b *BareMount) wait(within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		w, err := newWatch()
		if err != nil {
			return err
		}
		mounted, err := mountinfo.Mounted(b.Mountpoint)
		if err == nil && !mounted && b.Daemon.Running() && time.Now().Before(deadline) {
			w.poll(time.Until(deadline))
			w.close()
			continue
		}
		w.close()
		switch {
		case err != nil || mounted:
			return err
		case !b.Daemon.Running():
			return fmt.Errorf("nydusd ended: %w", b.Daemon.Err())
		}
		return fmt.Errorf("nydusd did not mount within %v", within)
	}
}

func (b *BareMount) unmount() {
	_ = unix.Unmount(b.Mountpoint, unix.MNT_DETACH)
	_ = b.Daemon.end(0, settle) // it ends by itself; signal 0 sends nothing
}
