package guest_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/guest"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// targets are what units depend on unless they say otherwise.
var targets = []string{"sysinit", "basic", "shutdown", "umount", "local-fs", "slices", "sockets", "paths", "timers"}

// addSystemd makes systemd the guest's first process, with the project's units, and
// the test's program as what it boots into.
func addSystemd(t *testing.T, d *archive) {
	t.Helper()
	const units = "/lib/systemd/system/"
	d.program(t, "/lib/systemd/systemd", "/lib/systemd/systemd")
	d.program(t, "/bin/systemctl", "/bin/systemctl")
	for _, name := range targets {
		d.copy(t, units+name+".target", units+name+".target")
	}
	top, err := kit.Checkout()
	must(t, err)
	for _, name := range []string{guest.SnapshotterUnit, "nydus.slice"} {
		d.copy(t, filepath.Join(top, "contrib/systemd", name), units+name)
	}
	for name, text := range files {
		d.add(name, 0o644, []byte(text))
	}
}

// files are a node's settings.
var files = map[string]string{
	"/etc/os-release": "ID=guest\n",
	// Without one systemd takes this for a first boot and enables every unit.
	"/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
	// There is no journal.
	"/etc/systemd/system.conf": "[Manager]\nDefaultStandardOutput=null\nDefaultStandardError=kmsg\n",
	"/etc/systemd/system/default.target": `[Unit]
Requires=guest.service basic.target
After=basic.target
AllowIsolate=yes
`,
	"/etc/systemd/system/guest.service": fmt.Sprintf(`[Service]
ExecStart=%s
Environment=PATH=/usr/local/bin:/usr/bin:/bin
`, guest.Init),
	// As containerd: all that is in its cgroup is killed with it. It has started what
	// it was to start, and rests.
	"/etc/systemd/system/" + guest.EngineUnit: fmt.Sprintf(`[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=%s
KillMode=control-group
`, guest.Engine),
	"/etc/systemd/system/" + guest.SnapshotterUnit + ".d/log.conf": fmt.Sprintf("[Service]\nStandardError=append:%s\n", guest.SnapshotterLog),
	// An image that is let go at once shows what is left.
	"/etc/nydus-snapshotter/config.toml": fmt.Sprintf(`version = 1
[daemon]
nydusd_path = "%s"
cgroup_parent = "%s"
recover_policy = "failover"
[mount]
idle_linger = "0s"
[log]
level = "debug"
`, guest.Stand, guest.CgroupParent),
}
