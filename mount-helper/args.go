package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// Where things are when no option says otherwise.
const (
	defaultRoot   = "/var/lib/nydus-snapshotter"
	defaultRunDir = "/run/nydus-snapshotter"
)

// call is a parsed command line.
type call struct {
	source, target string
	options        []string
	sloppy, fake   bool
	verbose        bool
	help, version  bool
}

// parseArgs follows mount(8)'s "external helpers" and mount.fuse3's way of
// calling: SOURCE TARGET [-sfnv] [-N NS] [-o OPTIONS] [-t TYPE].
func parseArgs(args []string) (*call, error) {
	c := &call{}
	var positional []string
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--help" || arg == "-h":
			c.help = true
			return c, nil
		case arg == "--version" || arg == "-V":
			c.version = true
			return c, nil
		case arg == "-o" || arg == "-t" || arg == "-N":
			if len(args) == 0 {
				return nil, fmt.Errorf("%w: option %s needs a value", errUsage, arg)
			}
			if arg == "-N" {
				return nil, fmt.Errorf("%w: -N is not supported; use nsenter --mount=%s mount …", errUsage, args[0])
			}
			if arg == "-o" {
				c.options = append(c.options, splitQuoted(args[0])...)
			}
			args = args[1:]
		case len(arg) > 1 && arg[0] == '-':
			if err := c.flags(arg); err != nil {
				return nil, err
			}
		default:
			positional = append(positional, arg)
		}
	}
	if len(positional) != 2 {
		return nil, fmt.Errorf("%w: want SOURCE and TARGET, got %d arguments; see --help", errUsage, len(positional))
	}
	c.source = positional[0]
	target, err := filepath.Abs(positional[1])
	c.target = target
	return c, err
}

// splitQuoted splits at commas but those within double quotes: an SELinux label
// has some.
func splitQuoted(text string) []string {
	quoted := false
	return strings.FieldsFunc(text, func(c rune) bool {
		if c == '"' {
			quoted = !quoted
		}
		return c == ',' && !quoted
	})
}

// flags takes a cluster such as -sn.
func (c *call) flags(cluster string) error {
	for _, f := range cluster[1:] {
		switch f {
		case 's':
			c.sloppy = true
		case 'f':
			c.fake = true
		case 'n': // there is no mtab to write
		case 'v':
			c.verbose = true
		default:
			return fmt.Errorf("%w: unknown option -%c; see --help", errUsage, f)
		}
	}
	return nil
}

// mountFlags are the options that become flags of the mount.
var mountFlags = []string{
	"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "mand", "nomand",
	"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
}

// forOthers are options of mount(8) and fstab that do not concern a helper.
// The last line changes nothing for a read-only filesystem.
var forOthers = []string{
	"defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup",
	"silent", "loud", "lazytime", "nolazytime", "iversion", "noiversion",
}

// labels are SELinux's options, as containerd adds them to each mount of a
// container on a node that enforces it. They are the overlay's.
var labels = []string{"context", "fscontext", "defcontext", "rootcontext"}

// mappings are containerd's options for a root filesystem that is to be id-mapped. It leaves
// them out where it looks into one itself, so they stand beside the sealed option.
const uidMapping, gidMapping = "uidmap", "gidmap"

// split sorts the options into flags of the mount, SELinux labels among them,
// and settings of ours.
func (c *call) split() (flags []string, settings map[string]string, err error) {
	settings = map[string]string{}
	for _, o := range c.options {
		name, value, isSetting := strings.Cut(o, "=")
		switch {
		case isSetting && slices.Contains(labels, name):
			flags = append(flags, o)
		case o == "", slices.Contains(forOthers, o), strings.HasPrefix(o, "x-"), strings.HasPrefix(o, "X-"), name == "comment":
		case slices.Contains(mountFlags, o):
			flags = append(flags, o)
		case o == "remount":
			return nil, nil, fmt.Errorf("%w: a nydus image cannot be remounted; unmount it and mount it again, or change flags with mount -i -o remount,bind,…", errUsage)
		case name == "user" && isSetting:
			return nil, nil, fmt.Errorf("%w: a nydus image cannot be mounted for user %q, only for root", errUsage, value)
		case isSetting && slices.Contains(ourSettings, name):
			settings[name] = value
		case !c.sloppy:
			return nil, nil, fmt.Errorf("%w: unknown mount option %q; see --help", errUsage, name)
		}
	}
	return flags, settings, nil
}

var ourSettings = []string{mountspec.OptionName, uidMapping, gidMapping, "bootstrap", "config", "nydusd", "root", "run_dir", "log_level", "threads", "timeout"}

// request turns the command line into what to mount.
func (c *call) request(keys mountspec.Keys) (*request, error) {
	flags, settings, err := c.split()
	if err != nil {
		return nil, err
	}
	ids, err := idMap(settings)
	if err != nil {
		return nil, err
	}
	if _, ok := settings[mountspec.OptionName]; ok && len(settings) > 1 {
		return nil, fmt.Errorf("%w: option %s says everything; no other setting may stand beside it", errUsage, mountspec.OptionName)
	}
	// As the mount table will have it.
	real, err := filepath.EvalSymlinks(c.target)
	if err != nil {
		return nil, fmt.Errorf("mount point: %w", err)
	}
	c.target = real
	info, err := os.Stat(c.target)
	if err != nil {
		return nil, fmt.Errorf("mount point: %w", err)
	}
	if !info.IsDir() {
		return nil, errors.New("mount point is not a directory")
	}
	if _, ok := settings["bootstrap"]; ok {
		if ids != nil {
			return nil, fmt.Errorf("%w: %s and %s are for a container's root filesystem, not for an image alone", errUsage, uidMapping, gidMapping)
		}
		return direct(c.target, flags, settings)
	}
	value, err := mountspec.Find(c.options)
	if err != nil {
		return nil, err
	}
	spec, err := mountspec.Decode(value, keys)
	if err != nil {
		return nil, err
	}
	return fromSpec(c.target, flags, ids, spec)
}

// idMap takes the mappings out of the settings; nil when there are none.
func idMap(settings map[string]string) (*rootfs.IDMap, error) {
	uids, gids := settings[uidMapping], settings[gidMapping]
	delete(settings, uidMapping)
	delete(settings, gidMapping)
	if uids == "" && gids == "" {
		return nil, nil
	}
	// Several entries have commas between them, and so quotes around them.
	m, err := rootfs.ParseIDMap(strings.Trim(uids, `"`), strings.Trim(gids, `"`))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUsage, err)
	}
	return m, nil
}

// direct is a mount without a snapshotter: root says what to do.
func direct(target string, flags []string, set map[string]string) (*request, error) {
	for _, f := range flags {
		if name, _, isLabel := strings.Cut(f, "="); isLabel {
			return nil, fmt.Errorf("%w: %s=… cannot be set on an image, only on a container's root filesystem", errUsage, name)
		}
	}
	for name, value := range map[string]string{"root": defaultRoot, "run_dir": defaultRunDir} {
		if set[name] == "" {
			set[name] = value
		}
	}
	for _, name := range []string{"bootstrap", "config", "root", "run_dir"} {
		if set[name] == "" {
			return nil, fmt.Errorf("%w: option %s=… is missing", errUsage, name)
		}
		abs, err := filepath.Abs(set[name])
		if err != nil {
			return nil, err
		}
		set[name] = abs
	}
	s := instance.Spec{Image: set["bootstrap"], Bootstrap: set["bootstrap"], Root: set["root"], RunDir: set["run_dir"], Driver: mountspec.DriverFUSE}
	var err error
	if s.Daemon, err = directDaemon(set); err != nil {
		return nil, err
	}
	var private bool
	if s.Config, private, err = readConfig(set["config"]); err != nil {
		return nil, err
	}
	if s.BootstrapDigest, err = digest(s.Bootstrap); err != nil {
		return nil, err
	}
	origin, err := nydusd.OriginOf(s.Config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", set["config"], err)
	}
	if origin.Secret && !private {
		return nil, fmt.Errorf("configuration %s holds credentials, and others than root may read it: chown root and chmod 0600", set["config"])
	}
	s.Host, s.Repository, s.CacheDir = origin.Host, origin.Repository, origin.CacheDir
	if s.CacheDir == "" {
		s.CacheDir = mountspec.CacheDir(s.Root, s.Host, s.Repository)
	}
	s.Key = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
	return &request{target: target, flags: flags, kind: mountspec.KindImage, readOnly: true, image: s}, nil
}

// readConfig also tells whether the file is root's alone.
func readConfig(path string) (text string, private bool, err error) {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return "", false, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", false, fmt.Errorf("read configuration: %w", err)
	}
	all, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return "", false, fmt.Errorf("read configuration: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return string(all), ok && st.Uid == 0 && info.Mode().Perm()&0o077 == 0, nil
}

// maxConfig bounds a configuration in bytes.
const maxConfig = 1 << 20

func directDaemon(set map[string]string) (d mountspec.Daemon, err error) {
	d.LogLevel, d.Path = set["log_level"], set["nydusd"]
	d.OOMScoreAdj, d.CgroupParent = mountspec.DefaultOOMScoreAdj, mountspec.DefaultCgroupParent
	if d.Path == "" {
		if d.Path, err = findNydusd(); err != nil {
			return d, err
		}
	}
	if !filepath.IsAbs(d.Path) {
		return d, fmt.Errorf("%w: nydusd=%s is not an absolute path", errUsage, d.Path)
	}
	if text := set["threads"]; text != "" {
		if d.Threads, err = strconv.Atoi(text); err != nil || d.Threads < 1 {
			return d, fmt.Errorf("%w: threads=%s is not a number above 0", errUsage, text)
		}
	}
	if text := set["timeout"]; text != "" {
		if d.StartTimeout, err = time.ParseDuration(text); err != nil || d.StartTimeout <= 0 {
			return d, fmt.Errorf("%w: timeout=%s is not a duration such as 10s", errUsage, text)
		}
	}
	return d, nil
}

// findNydusd looks in fixed places: mount(8) passes on the caller's PATH.
func findNydusd() (string, error) {
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/opt/nydus/bin"} {
		path := filepath.Join(dir, "nydusd")
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", errors.New("no nydusd in the usual directories; install it or name it with the option nydusd=FILE")
}

// digest of a bootstrap that root names: the instance's key needs it.
func digest(path string) (string, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDONLY|oNonblock, 0)
	if err != nil {
		return "", fmt.Errorf("open bootstrap: %w", err)
	}
	defer f.Close()
	_, size, err := rafs.OpenFile(f)
	if err != nil {
		return "", fmt.Errorf("bootstrap %s: %w", path, err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return "", fmt.Errorf("read bootstrap: %w", err)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}
