package conventions

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// top is the project's directory, seen from this package's.
const top = "../.."

// folders are the top-level ones and what each is for. A new kind of thing
// belongs below one of them.
var folders = map[string]string{
	"snapshotter":  "main of the snapshotter",
	"mount-helper": "main of nydus-overlayfs and mount.nydus",
	"shim-hook":    "main of the OCI hooks",
	"pkg":          "packages",
	"contrib":      "samples and packaging",
	"test":         "whatever tests more than one package",
	"docs":         "documentation",
}

func TestTopLevelFolders(t *testing.T) {
	entries, err := os.ReadDir(top)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		// bin is what make build makes; hidden ones are git's, CI's and editors'.
		if e.IsDir() && e.Name() != "bin" && !strings.HasPrefix(e.Name(), ".") {
			have = append(have, e.Name())
			if folders[e.Name()] == "" {
				t.Errorf("top-level folder %s: not one of the project's; put it below one of them", e.Name())
			}
		}
	}
	for name, use := range folders {
		if !slices.Contains(have, name) {
			t.Errorf("top-level folder %s (%s) is missing", name, use)
		}
	}
}

// TestPackageComments keeps every package explained: a reader decides by its
// comment whether to use it.
func TestPackageComments(t *testing.T) {
	comments := map[string]string{}
	for _, path := range goFiles(t) {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		comments[filepath.Dir(path)] += file.Doc.Text()
	}
	if len(comments) == 0 {
		t.Fatal("no package found below " + top)
	}
	for dir, text := range comments {
		if !strings.HasPrefix(text, "Package ") && !strings.HasPrefix(text, "Command ") {
			t.Errorf("%s has no package comment that starts with Package or Command: say what it is, what it promises and when not to use it", dir)
		}
	}
}

// goFiles lists the Go files of both modules.
func goFiles(t *testing.T) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && path != top && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata" || e.Name() == "bin") {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, ".go") {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// goPackage is what go list says about one package.
type goPackage struct {
	ImportPath string
	Standard   bool
	Module     *goModule
}

type goModule struct {
	Path, Version, Dir string
	Main               bool
}

// linked lists all packages that end up in a program, the program included.
func linked(t *testing.T, pkg string) []goPackage {
	t.Helper()
	out := command(t, "go", "list", "-deps", "-json=ImportPath,Standard,Module", pkg)
	var pkgs []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p goPackage
		if err := dec.Decode(&p); err != nil {
			t.Fatalf("read go list -deps %s: %v", pkg, err)
		}
		pkgs = append(pkgs, p)
	}
	return pkgs
}

// command runs a command in the project's directory, as a release is built:
// without cgo, which would link other packages.
func command(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = top
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = errors.Join(err, errors.New(string(exit.Stderr)))
		}
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return out
}
