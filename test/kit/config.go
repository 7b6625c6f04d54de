package kit

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// table is a TOML table under construction.
type table = map[string]any

// containerdConfig is the configuration of a private containerd, as the
// project's README tells users to write it.
func (n *Node) containerdConfig() ([]byte, error) {
	c := table{
		"root":             filepath.Join(n.data, "containerd"),
		"state":            filepath.Join(n.dir, "state"),
		"oom_score":        0,
		"grpc":             table{"address": n.containerdSocket()},
		"disabled_plugins": []string{},
	}
	if n.cfg.Containerd == V16 {
		n.fillVersion2(c)
	} else {
		n.fillVersion3(c)
	}
	return toml.Marshal(c)
}

func (n *Node) proxyPlugin() table {
	plugin := table{"type": "snapshot", "address": n.snapshotterSocket()}
	if len(n.cfg.Capabilities) > 0 {
		plugin["capabilities"] = n.cfg.Capabilities
	}
	return plugin
}

// runtimes is CRI's table of runtimes, with the hooks in a base specification if asked for.
func (n *Node) runtimes() table {
	runc := table{"runtime_type": "io.containerd.runc.v2", "options": table{}}
	if n.cfg.Hook {
		runc["base_runtime_spec"] = n.baseSpec()
	}
	return table{"runc": runc}
}

func (n *Node) fillVersion2(c table) {
	c["version"] = 2
	disabled := []string{"io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
		"io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.opt"}
	if !n.cfg.CRI {
		disabled = append(disabled, "io.containerd.grpc.v1.cri")
	}
	c["disabled_plugins"] = disabled
	plugins := table{}
	if n.cfg.CRI {
		plugins["io.containerd.grpc.v1.cri"] = table{
			"sandbox_image":          n.cfg.SandboxImage,
			"restrict_oom_score_adj": true,
			"stream_server_port":     "0",
			"containerd": table{
				"snapshotter":                  n.SnapshotterName(),
				"disable_snapshot_annotations": false,
				"runtimes":                     n.runtimes(),
			},
		}
	}
	c["plugins"] = plugins
	if n.cfg.Snapshotter {
		c["proxy_plugins"] = table{"nydus": n.proxyPlugin()}
	}
}

func (n *Node) fillVersion3(c table) {
	c["version"] = 3
	disabled := []string{"io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
		"io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs", "io.containerd.differ.v1.erofs",
		"io.containerd.mount-handler.v1.erofs"}
	if !n.cfg.CRI {
		disabled = append(disabled, "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")
	}
	c["disabled_plugins"] = disabled
	plugins := table{}
	if n.cfg.CRI {
		plugins["io.containerd.cri.v1.images"] = table{
			"snapshotter":                  n.SnapshotterName(),
			"disable_snapshot_annotations": false,
			"pinned_images":                table{"sandbox": n.cfg.SandboxImage},
		}
		plugins["io.containerd.cri.v1.runtime"] = table{
			"restrict_oom_score_adj": true,
			"containerd":             table{"default_runtime_name": "runc", "runtimes": n.runtimes()},
		}
	}
	if n.cfg.Snapshotter {
		proxy := n.proxyPlugin()
		proxy["exports"] = table{"enable_remote_snapshot_annotations": "true", "root": n.SnapshotterRoot()}
		c["proxy_plugins"] = table{"nydus": proxy}
		plugins["io.containerd.transfer.v1.local"] = table{"unpack_config": []table{
			{"platform": "linux", "snapshotter": "nydus", "differ": "walking"},
			{"platform": "linux", "snapshotter": "overlayfs", "differ": "walking"},
		}}
	}
	c["plugins"] = plugins
}

// snapshotterConfig is the project's own configuration with the test's changes.
func (n *Node) snapshotterConfig() ([]byte, error) {
	c := table{
		"version": 1,
		"root":    n.SnapshotterRoot(),
		"run_dir": n.cfg.RunDir,
		"address": n.snapshotterSocket(),
		"daemon":  table{"nydusd_path": n.tools.Nydusd, "cgroup_parent": filepath.Join(CgroupRoot(), DaemonCgroup)},
		// Most tests look at daemons: whether an image became complete meanwhile must not
		// decide whether there are any. Those of complete images ask for "auto".
		"mount": table{"style": n.cfg.Style, "idle_linger": "1s", "driver": "fuse"},
		"log":   table{"level": "debug"},
	}
	for key, value := range n.cfg.Config {
		t := c
		section, name, nested := strings.Cut(key, ".")
		if nested {
			if t[section] == nil {
				t[section] = table{}
			}
			sub, ok := t[section].(table)
			if !ok {
				return nil, fmt.Errorf("snapshotter configuration: %s is not in a table", key)
			}
			t = sub
		} else {
			name = section
		}
		if value == nil {
			delete(t, name)
			continue
		}
		t[name] = value
	}
	return toml.Marshal(c)
}

func (n *Node) baseSpec() string { return filepath.Join(n.dir, "base-spec.json") }

// writeBaseSpec makes containerd's own default specification call the hook.
func (n *Node) writeBaseSpec(defaults []byte) error {
	var spec map[string]any
	if err := json.Unmarshal(defaults, &spec); err != nil {
		return fmt.Errorf("base runtime specification: %w", err)
	}
	hook := filepath.Join(n.bin, "nydus-shim-hook")
	spec["hooks"] = map[string]any{
		"createRuntime": []any{map[string]any{"path": hook, "args": []string{hook, "createRuntime"}}},
		"poststop":      []any{map[string]any{"path": hook, "args": []string{hook, "poststop"}}},
	}
	text, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(n.baseSpec(), text, 0o644)
}
