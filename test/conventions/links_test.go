package conventions

import (
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/nydusfs/nydus-snapshotter/"

// mains are the programs that are released.
var mains = []string{"./snapshotter", "./mount-helper", "./shim-hook"}

// forbidden says what must not be linked into a program or package, and why.
// A path stands for itself and everything beneath it.
var forbidden = []struct {
	program string
	paths   []string
	why     string
}{
	{
		program: "./mount-helper",
		paths: []string{"net/http", "crypto/tls", "google.golang.org/grpc", "k8s.io", "sigs.k8s.io",
			module + "pkg/nydusd/client", module + "pkg/snapshot", module + "pkg/config", module + "pkg/registry", module + "pkg/credentials",
			module + "pkg/health", module + "pkg/hang", module + "pkg/probe", module + "pkg/blob/proof/prove"},
		why: "the helper runs once for every mount: it stays small, starts fast and talks to nobody",
	},
	{
		program: "./shim-hook",
		paths:   []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io", module + "pkg/snapshot", module + "pkg/health", module + "pkg/hang"},
		why:     "the hook runs twice for every container and works with a dead snapshotter",
	},
	{
		program: "./pkg/mountspec",
		paths:   []string{module + "pkg/config", module + "pkg/instance", "net/http", "os/exec"},
		why:     "the option's codec can be linked by anybody: hooks, shims, other projects",
	},
	{
		program: "./pkg/rafs",
		paths:   []string{"os/exec", "net", module + "pkg/nydusd", module + "pkg/instance"},
		why:     "it reads files that an image may have crafted, and does nothing else",
	},
	{
		program: "./pkg/blob/proof",
		paths:   []string{"net/http", "os/exec", "github.com/zeebo", module + "pkg/instance"},
		why:     "it is looked at for every mount: whoever compares data is another package",
	},
	{
		program: "./pkg/snapshot",
		paths:   []string{module + "pkg/nydusd", module + "pkg/rootfs", module + "pkg/instance"},
		why:     "answering Prepare and Mounts starts nothing and mounts nothing",
	},
}

func TestForbiddenDependencies(t *testing.T) {
	for _, rule := range forbidden {
		t.Run(strings.TrimPrefix(rule.program, "./"), func(t *testing.T) {
			for _, p := range linked(t, rule.program) {
				if i := slices.IndexFunc(rule.paths, func(path string) bool { return within(p.ImportPath, path) }); i >= 0 {
					t.Errorf("%s links %s (go list -deps %s): %s", rule.program, p.ImportPath, rule.program, rule.why)
				}
			}
		})
	}
}

// TestMountspecIsStandardLibraryOnly is the contract's promise to others.
func TestMountspecIsStandardLibraryOnly(t *testing.T) {
	for _, p := range linked(t, "./pkg/mountspec") {
		if !p.Standard && p.ImportPath != module+"pkg/mountspec" {
			t.Errorf("pkg/mountspec links %s: it promises the standard library alone", p.ImportPath)
		}
	}
}

// TestLibrariesDoNotImportMains keeps pkg below the programs.
func TestLibrariesDoNotImportMains(t *testing.T) {
	for _, p := range linked(t, "./pkg/...") {
		for _, m := range mains {
			if within(p.ImportPath, module+strings.TrimPrefix(m, "./")) {
				t.Errorf("a package below pkg links %s: a library that needs a main is upside down", p.ImportPath)
			}
		}
	}
}

// maxHelper bounds the helper in bytes: it is read for every mount.
const maxHelper = 6 << 20

func TestBinariesAreStaticAndHelperIsSmall(t *testing.T) {
	for _, m := range mains {
		path := build(t, m)
		f, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, prog := range f.Progs {
			if prog.Type == elf.PT_INTERP {
				t.Errorf("%s is linked dynamically: it must run on any distribution and inside a host's mount namespace", m)
			}
		}
		f.Close()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %.1f MiB", m, float64(info.Size())/(1<<20))
		if m == "./mount-helper" && info.Size() > maxHelper {
			t.Errorf("the mount helper has %d bytes, more than %d: see what go list -deps ./mount-helper lists", info.Size(), maxHelper)
		}
	}
}

// build makes a program as make build does and returns where it is.
func build(t *testing.T, pkg string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), filepath.Base(pkg))
	command(t, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, pkg)
	return path
}

// within tells whether path is root or lies beneath it.
func within(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}
