package config

import (
	"fmt"
	"net"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// LogLevels are the levels of nydusd's log and of the snapshotter's.
func LogLevels() []string { return []string{"trace", "debug", "info", "warn", "error"} }

const (
	// maxSocketPath is what sun_path holds, without its final NUL.
	maxSocketPath = 107
	// MaxRunDir bounds run_dir in bytes, so that an instance's socket beneath
	// it still has a path that fits.
	MaxRunDir = 55
	// MaxAddress bounds address in bytes: the socket is made under a name that
	// is 4 bytes longer and then renamed.
	MaxAddress = maxSocketPath - 4

	maxThreads      = 1024
	maxStartTimeout = 10 * time.Minute
	minHangTimeout  = time.Second
	maxHangTimeout  = time.Hour
	maxLinger       = 24 * time.Hour

	minLog = 64 << 10
	// minBandwidth lets a request of nydusd end before it gives up.
	minBandwidth = 1 << 20
	maxLog       = 1 << 30
)

// Validate returns every fault of c, without lines.
func (c Config) Validate() []Fault {
	v := &validator{}
	if c.Version != Version {
		v.fail("version", "is %d, this program reads %d", c.Version, Version)
	}
	v.paths(c)
	v.daemon(c.Daemon)
	v.cgroup(c.Cgroup, c.Daemon)
	v.oneOf("mount.style", string(c.Mount.Style), string(StyleHelper), string(StyleManaged))
	v.oneOf("mount.driver", string(c.Mount.Driver), string(mountspec.DriverAuto), string(mountspec.DriverFUSE), string(mountspec.DriverEROFS))
	v.oneOf("mount.credentials", string(c.Mount.Credentials), string(CredentialsSealed), string(CredentialsPlain))
	if c.Mount.Style == StyleManaged && c.Mount.Credentials == CredentialsPlain {
		v.fail("mount.credentials", `"plain" is for Kata Containers, which does not know mount.style "managed"; use "sealed", or style "helper"`)
	}
	v.between("mount.idle_linger", c.Mount.IdleLinger, 0, maxLinger)
	v.image(c.Image)
	v.cache(c.Cache)
	v.oneOf("log.level", c.Log.Level, LogLevels()...)
	v.oneOf("log.format", c.Log.Format, "text", "json")
	v.remote(c.Remote)
	v.backends(c.Backends)
	v.credentials(c)
	return v.faults
}

type validator struct{ faults []Fault }

func (v *validator) fail(key, format string, args ...any) {
	v.faults = append(v.faults, Fault{Key: key, Problem: fmt.Sprintf(format, args...)})
}

func (v *validator) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		v.fail(key, "is %q, want one of: %s", value, strings.Join(allowed, ", "))
	}
}

func (v *validator) between(key string, d, least, most time.Duration) {
	if d < least || d > most {
		v.fail(key, "is %s, want %s to %s", d, least, most)
	}
}

// path reports whether p is a path that every user of it can carry.
func (v *validator) path(key, p string) bool {
	switch {
	case p == "":
		v.fail(key, "is empty, want an absolute path")
	case !filepath.IsAbs(p) || filepath.Clean(p) != p:
		v.fail(key, "%q: want an absolute path without //, . or .. and without a slash at the end", p)
	case p == "/":
		v.fail(key, "must not be /")
	case strings.ContainsAny(p, ",:\\\n\x00"):
		v.fail(key, `%q has a character that an overlay option cannot carry (one of , : \ or a line break)`, p)
	case strings.Contains(p, "{{"):
		v.fail(key, "%q has {{, which containerd's mount manager takes for a template", p)
	case !utf8.ValidString(p):
		v.fail(key, "%q is not UTF-8", p)
	default:
		return true
	}
	return false
}

func (v *validator) paths(c Config) {
	root := v.path("root", c.Root)
	run := v.path("run_dir", c.RunDir)
	address := v.path("address", c.Address)
	if run && len(c.RunDir) > MaxRunDir {
		v.fail("run_dir", "%q has %d bytes; the sockets beneath it allow %d", c.RunDir, len(c.RunDir), MaxRunDir)
	}
	if address && len(c.Address) > MaxAddress {
		v.fail("address", "%q has %d bytes; a socket allows %d", c.Address, len(c.Address), MaxAddress)
	}
	if root && run && (within(c.Root, c.RunDir) || within(c.RunDir, c.Root)) {
		v.fail("run_dir", "%q and root %q must not lie within one another: one ends with the boot, the other stays", c.RunDir, c.Root)
	}
	if run && address && (c.RunDir == c.Address || within(c.Address, c.RunDir+"/i")) {
		v.fail("address", "%q is taken by what run_dir holds", c.Address)
	}
	if keys := mountspec.DefaultKeyDir; run && within(c.RunDir, keys) || address && within(c.Address, keys) {
		v.fail("run_dir", "%q and address %q must not lie in %s, where the sealing keys are", c.RunDir, c.Address, keys)
	}
	if tmpfs := path.Dir(mountspec.DefaultKeyDir); root && within(c.Root, tmpfs) && !within(c.Root, c.RunDir) {
		v.fail("root", "%q must not lie in %s, which is in memory and ends with the boot", c.Root, tmpfs)
	}
	if root && address && within(c.Root, c.Address) {
		v.fail("address", "%q must not be root %q or lie above it", c.Address, c.Root)
	}
}

// within tells whether p is dir or lies beneath it.
func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

func (v *validator) daemon(d Daemon) {
	if d.NydusdPath != "" {
		if !filepath.IsAbs(d.NydusdPath) || filepath.Clean(d.NydusdPath) != d.NydusdPath || !utf8.ValidString(d.NydusdPath) {
			v.fail("daemon.nydusd_path", "%q: want an absolute path without . or .., or nothing to search PATH", d.NydusdPath)
		}
	}
	if f := d.ConfigTemplate; f != "" && (!filepath.IsAbs(f) || filepath.Clean(f) != f) {
		v.fail("daemon.config_template", "%q: want an absolute path without //, . or .., or nothing", f)
	}
	v.oneOf("daemon.log_level", d.LogLevel, LogLevels()...)
	if d.LogMaxSize < minLog || d.LogMaxSize > maxLog {
		v.fail("daemon.log_max_size", "is %s, want %s to %s", d.LogMaxSize, Size(minLog), Size(maxLog))
	}
	if d.Threads < 0 || d.Threads > maxThreads {
		v.fail("daemon.threads", "is %d, want 0 (nydusd's choice) to %d", d.Threads, maxThreads)
	}
	v.oneOf("daemon.recover_policy", string(d.RecoverPolicy), string(RecoverNone), string(RecoverRestart), string(RecoverFailover))
	v.oneOf("daemon.daemon_mode", string(d.Mode), string(ModeDedicated), string(ModeShared))
	v.between("daemon.start_timeout", d.StartTimeout, 100*time.Millisecond, maxStartTimeout)
	v.between("daemon.hang_timeout", d.HangTimeout, minHangTimeout, maxHangTimeout)
	if d.OOMScoreAdj < -1000 || d.OOMScoreAdj > 1000 {
		v.fail("daemon.oom_score_adj", "is %d, want -1000 to 1000", d.OOMScoreAdj)
	}
	if p := d.CgroupParent; p != "" && (!filepath.IsAbs(p) || filepath.Clean(p) != p || strings.ContainsAny(p, "\n\x00") || !utf8.ValidString(p)) {
		v.fail("daemon.cgroup_parent", "%q: want an absolute path within the cgroup hierarchy, such as \"/nydus\", or nothing", p)
	}
}

func (v *validator) cgroup(c Cgroup, d Daemon) {
	if _, err := parseMemory(c.Memory); err != nil {
		v.fail("cgroup.memory", "%v", err)
	}
	if _, err := parseCPU(c.CPU); err != nil {
		v.fail("cgroup.cpu", "%v", err)
	}
	for _, l := range []struct{ key, value string }{{"cgroup.memory", c.Memory}, {"cgroup.cpu", c.CPU}} {
		if l.value != "" && d.CgroupParent == "" {
			v.fail(l.key, "is set, but daemon.cgroup_parent is empty: without a cgroup nothing can be limited; set it, or remove the limit")
		}
	}
	if c.Memory != "" && d.OOMScoreAdj == -1000 {
		v.fail("cgroup.memory", "is set, but with daemon.oom_score_adj = -1000 the kernel may not end a nydusd that reaches it, which would hang; use -999 or more")
	}
}

func (v *validator) image(c Image) {
	switch f := c.PublicKeyFile; {
	case f != "" && (!filepath.IsAbs(f) || filepath.Clean(f) != f):
		v.fail("image.public_key_file", "%q: want an absolute path without //, . or .., or nothing", f)
	case f == "" && c.ValidateSignature:
		v.fail("image.public_key_file", "is empty, but image.validate_signature is set: name the file with the public keys whose signatures count")
	}
}

func (v *validator) remote(r Remote) {
	for _, dir := range filepath.SplitList(r.ConfigPath) {
		if !filepath.IsAbs(dir) {
			v.fail("remote.config_path", "%q: want absolute paths with colons between them, as containerd's config_path, or nothing", r.ConfigPath)
		}
	}
	v.oneOf("remote.gateway", string(r.Gateway), string(GatewayAuto), string(GatewayAlways), string(GatewayNever))
	if at, err := netip.ParseAddrPort(r.GatewayAddress); err != nil || !at.Addr().IsLoopback() || at.Port() == 0 {
		v.fail("remote.gateway_address", `%q: want an address of this machine only, such as "127.0.0.1:476" or "[::1]:476": whoever reaches it could try capabilities`, r.GatewayAddress)
	}
	if r.HostStreams < 0 {
		v.fail("remote.host_streams", "is %d, want 0 or more", r.HostStreams)
	}
	if b := r.HostBandwidth; b != 0 && (b < minBandwidth || b > maxRate) {
		v.fail("remote.host_bandwidth", "is %s, want 0 for no bound, or at least %s in a second, since nydusd waits for a request no longer than half a minute, and at most %s", b, Size(minBandwidth), Size(maxRate))
	}
	v.hosts("remote.plain_http", r.PlainHTTP)
	v.hosts("remote.skip_verify", r.SkipVerify)
	for _, h := range r.SkipVerify {
		if slices.Contains(r.PlainHTTP, h) {
			v.fail("remote.skip_verify", "%q is also in plain_http, where there is no certificate", h)
		}
	}
}

// hosts checks names as they stand at the front of an image reference.
func (v *validator) hosts(key string, list []string) {
	for i, h := range list {
		if !isHost(h) {
			v.fail(key, "%q: want a registry as host or host:port, without a scheme or path", h)
		} else if slices.Contains(list[:i], h) {
			v.fail(key, "%q is listed twice", h)
		}
	}
}

func isHost(h string) bool {
	name := h
	if host, port, err := net.SplitHostPort(h); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
		name = host
		if strings.Contains(name, ":") {
			return net.ParseIP(name) != nil
		}
	} else if strings.HasPrefix(h, "[") && strings.HasSuffix(h, "]") {
		return net.ParseIP(h[1:len(h)-1]) != nil
	}
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"
	return name != "" && strings.Trim(name, allowed) == "" && !strings.HasPrefix(name, ".") && !strings.HasPrefix(name, "-")
}
