package kit

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Tools names the real parts that tests run against, as `make tools`
// (test/tools/install.sh) left them. All paths are absolute and exist.
type Tools struct {
	Nydusd          string // nydusd: the one that users run, or the oldest supported, see FindTools
	NydusdOld       string // the oldest supported nydusd, which cannot be succeeded
	NydusImage      string // nydus-image
	ContainerdBin   string // directory of containerd 2.4, ctr and its shim
	Containerd16Bin string // directory of Debian's containerd 1.6, ctr and its shim
	Runc            string
	Registry        string // docker-registry
	MountFuse       string // mount.fuse3 or mount.fuse
	FixtureDebs     string // directory of the Debian packages of the image fixture
	Qemu            string // qemu-system-x86_64
	GuestKernel     string // directory of a Linux for it: vmlinuz, and overlay.ko.xz
	Cache           string // the tool cache itself; fixtures are kept there too
}

// FindTools reads the tool cache's env file. With NYDUS_DAEMON=old in the
// environment nydusd is the oldest one that is supported, otherwise (or with
// "current") the one that users run. The error says what to do.
func FindTools() (Tools, error) {
	cache, err := toolCache()
	if err != nil {
		return Tools{}, err
	}
	vars, err := readEnvFile(filepath.Join(cache, "env"))
	if err != nil {
		return Tools{}, fmt.Errorf("find tools: %w: run 'make tools'", err)
	}
	tools := Tools{Cache: cache}
	var faults []error
	daemon := "NYDUSD"
	switch which := os.Getenv("NYDUS_DAEMON"); which {
	case "", "current":
	case "old":
		daemon = "NYDUSD_OLD"
	default:
		faults = append(faults, fmt.Errorf("NYDUS_DAEMON is %q, want current or old", which))
	}
	tools.Nydusd = vars[daemon]
	for name, dst := range map[string]*string{
		"NYDUSD_OLD": &tools.NydusdOld, "NYDUS_IMAGE": &tools.NydusImage,
		"CONTAINERD_BIN": &tools.ContainerdBin, "CONTAINERD16_BIN": &tools.Containerd16Bin,
		"RUNC": &tools.Runc, "REGISTRY": &tools.Registry,
		"MOUNT_FUSE": &tools.MountFuse, "FIXTURE_DEBS": &tools.FixtureDebs,
		"QEMU": &tools.Qemu, "GUEST_KERNEL": &tools.GuestKernel,
	} {
		*dst = vars[name]
		if *dst == "" {
			faults = append(faults, fmt.Errorf("%s is not set", name))
		} else if _, err := os.Stat(*dst); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", name, err))
		}
	}
	if _, err := os.Stat(tools.Nydusd); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", daemon, err))
	}
	if len(faults) > 0 {
		return Tools{}, fmt.Errorf("find tools in %s: %w: run 'make tools'", cache, errors.Join(faults...))
	}
	return tools, nil
}

// MustTools is FindTools for a test.
func MustTools(t TB) Tools {
	t.Helper()
	tools, err := FindTools()
	if err != nil {
		t.Fatalf("%v", err)
	}
	return tools
}

// toolCache follows install.sh's rule for the cache folder.
func toolCache() (string, error) {
	if dir := os.Getenv("NYDUS_TOOLS"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir() // XDG_CACHE_HOME, then ~/.cache
	if err != nil {
		return "", fmt.Errorf("find tools: no cache folder: %w: set NYDUS_TOOLS", err)
	}
	return filepath.Join(dir, "nydus-tools"), nil
}

func readEnvFile(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	vars := map[string]string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if name, value, ok := strings.Cut(lines.Text(), "="); ok {
			vars[name] = value
		}
	}
	return vars, lines.Err()
}

// Checkout is the project's top folder: the nearest one above the working
// directory whose go.mod is not the tests' own.
func Checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		text, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && !strings.Contains(strings.SplitN(string(text), "\n", 2)[0], "/test") {
			return d, nil
		}
		if d == "/" {
			return "", fmt.Errorf("no checkout of the project above %s", dir)
		}
	}
}

// Binaries is the directory with the project's built programs: NYDUS_BIN, or
// bin/ of the checkout. It fails the test when one of names is missing there.
func Binaries(t TB, names ...string) string {
	t.Helper()
	dir := os.Getenv("NYDUS_BIN")
	if dir == "" {
		top, err := Checkout()
		if err != nil {
			t.Fatalf("find binaries: %v", err)
		}
		dir = filepath.Join(top, "bin")
	}
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Fatalf("find binaries: %v: run 'make build'", err)
		}
	}
	return dir
}
