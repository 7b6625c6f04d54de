package instance

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prooftest"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

func TestClaim(t *testing.T) {
	dir := t.TempDir()
	must(t, claim(dir, "h", "r"))
	must(t, claim(dir, "h", "r"))
	for _, other := range [][2]string{{"h", "x"}, {"x", "r"}, {"", ""}} {
		err := claim(dir, other[0], other[1])
		if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "give each repository its own") {
			t.Errorf("%q: %v", other, err)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "origin.json"), []byte("{"), 0o600))
	if err := claim(dir, "h", "r"); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "origin.json")) {
		t.Errorf("of a damaged file: %v", err)
	}
}

// Of several that claim a cache directory at once, one gets it.
func TestClaimAtOnce(t *testing.T) {
	for range 50 {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, ".new-origin.json-left-by-a-killed-one"), nil, 0o600))
		errs := make([]error, 16)
		var wg sync.WaitGroup
		start := make(chan struct{})
		for n := range errs {
			wg.Go(func() {
				<-start
				errs[n] = claim(dir, "host", fmt.Sprint(n%8))
			})
		}
		close(start)
		wg.Wait()
		owners := map[int]bool{}
		for n, err := range errs {
			if err == nil {
				owners[n%8] = true
			}
		}
		if len(owners) != 1 {
			t.Fatalf("%d repositories got the directory, want 1", len(owners))
		}
		if left, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(left) > 0 {
			t.Fatalf("left behind: %v", left)
		}
	}
}

func TestWriteFileLeavesOldOrNew(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	must(t, writeFile(path, []byte("old")))
	var wg sync.WaitGroup
	for n := range 4 {
		text := []byte(strings.Repeat(fmt.Sprint(n), 10_000))
		wg.Go(func() {
			for range 50 {
				if err := writeFile(path, text); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		text, err := os.ReadFile(path)
		must(t, err)
		if string(text) != "old" && strings.Count(string(text), string(text[:1])) != 10_000 {
			t.Fatalf("half a file: %d bytes", len(text))
		}
	}
	wg.Wait()
	if err := writeFile(filepath.Join(dir, "missing", "file"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("into a missing directory: %v", err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("%d files, %v; want the one", len(names), err)
	}
}

func TestOpenBootstrap(t *testing.T) {
	root := t.TempDir()
	must(t, os.MkdirAll(root+"/s/1", 0o755))
	must(t, os.WriteFile(root+"/s/1/boot", []byte("boot"), 0o644))
	must(t, os.Symlink("boot", root+"/s/1/link"))
	must(t, os.Symlink("1", root+"/s/2"))
	must(t, os.Symlink("/proc/self/root", root+"/s/magic"))
	for path, want := range map[string]string{
		root + "/s/1/link":                   "symbolic link",
		root + "/s/2/boot":                   "symbolic link",
		root + "/s/magic" + root + "/s/boot": "symbolic link",
		root + "/s/1/none":                   "no such file",
		root + "/../etc/passwd":              "openat2",
	} {
		f, err := openBootstrap(Spec{Root: root, Bootstrap: path})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, %v; want an error that says %q", path, f, err, want)
		}
	}
	if f, err := openBootstrap(Spec{Root: "/elsewhere", Bootstrap: root + "/s/1/link"}); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("a link outside of the root: %v, %v", f, err)
	}
	for _, spec := range []Spec{{Root: root, Bootstrap: root + "/s/1/boot"}, {Root: "/elsewhere", Bootstrap: root + "/s/1/boot"}} {
		f, err := openBootstrap(spec)
		must(t, err)
		must(t, f.Close())
	}
	// Neither blocks on what is no file.
	must(t, unix.Mkfifo(root+"/fifo", 0o600))
	f, err := openBootstrap(Spec{Root: root, Bootstrap: root + "/fifo"})
	must(t, err)
	if _, _, err := rafs.OpenFile(f); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a FIFO: %v", err)
	}
	must(t, f.Close())
}

func TestCheckDigest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "boot")
	must(t, os.WriteFile(path, []byte("boot"), 0o600))
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	sum := sha256.Sum256([]byte("boot"))
	right := "sha256:" + hex.EncodeToString(sum[:])
	must(t, checkDigest(f, Spec{BootstrapDigest: right}))
	err = checkDigest(f, Spec{Bootstrap: path, BootstrapDigest: "sha256:0"})
	if err == nil || !strings.Contains(err.Error(), right) || !strings.Contains(err.Error(), "expected sha256:0") {
		t.Errorf("of another file: %v", err)
	}
}

// TestBootstrapOnce: a start that tries another way does not read the file again.
func TestBootstrapOnce(t *testing.T) {
	dir := t.TempDir()
	im := prooftest.New(t, "../blobcheck/testdata", "v6-merged", dir)
	s := Spec{Root: dir, Bootstrap: im.Bootstrap, BootstrapDigest: im.Digest}
	var b bootstrap
	defer b.close()
	must(t, b.link(s, dir+"/one"))
	must(t, b.check(t.Context()))
	if len(b.head.Blobs) != len(im.Head.Blobs) {
		t.Errorf("it has %d blobs, want %d", len(b.head.Blobs), len(im.Head.Blobs))
	}
	must(t, os.Remove(dir+"/one"))
	must(t, os.WriteFile(im.Bootstrap, []byte("something else"), 0o600))
	must(t, b.link(s, dir+"/two"))
	must(t, b.check(t.Context()))
	one, err := os.Stat(im.Bootstrap)
	must(t, err)
	two, err := os.Stat(dir + "/two")
	must(t, err)
	if !os.SameFile(one, two) {
		t.Error("the second link is another file")
	}
	// Another start looks anew.
	var other bootstrap
	defer other.close()
	if err := other.link(s, dir+"/three"); err == nil {
		t.Error("the next start did not look at the file")
	}
}

// TestBootstrapDigest tells of a wrong digest each time.
func TestBootstrapDigest(t *testing.T) {
	dir := t.TempDir()
	im := prooftest.New(t, "../blobcheck/testdata", "v6-merged", dir)
	s := Spec{Root: dir, Bootstrap: im.Bootstrap, BootstrapDigest: "sha256:0"}
	var b bootstrap
	defer b.close()
	for range 2 {
		must(t, b.link(s, dir+"/link"))
		if err := b.check(t.Context()); err == nil || !strings.Contains(err.Error(), im.Digest) {
			t.Errorf("%v", err)
		}
	}
}

func TestLinkFile(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/boot", []byte("boot"), 0o600))
	must(t, os.WriteFile(dir+"/dst.new", []byte("left by a killed one"), 0o600))
	f, err := os.Open(dir + "/boot")
	must(t, err)
	defer f.Close()
	for range 2 {
		must(t, linkFile(f, dir+"/dst"))
	}
	a, err := os.Stat(dir + "/boot")
	must(t, err)
	b, err := os.Stat(dir + "/dst")
	must(t, err)
	if !os.SameFile(a, b) {
		t.Error("a copy was made where a link could be")
	}
	if _, err := os.Stat(dir + "/dst.new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary name is left: %v", err)
	}

	// Another file system takes a copy.
	other, err := os.MkdirTemp("/dev/shm", "instance-test")
	must(t, err)
	defer os.RemoveAll(other)
	must(t, linkFile(f, other+"/dst"))
	if text, err := os.ReadFile(other + "/dst"); err != nil || string(text) != "boot" {
		t.Errorf("the copy is %q, %v", text, err)
	}
}

func TestOpenLogBounds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	write := func(text string) {
		f, err := openLog(path, 1<<20)
		must(t, err)
		_, err = f.WriteString(text)
		must(t, errors.Join(err, f.Close()))
	}
	write("one\n")
	write("two\n")
	if text, err := os.ReadFile(path); err != nil || string(text) != "one\ntwo\n" {
		t.Errorf("the log is %q, %v", text, err)
	}
	// An earlier daemon still writes: its log must stay the one that is bounded.
	earlier, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	defer earlier.Close()
	write(strings.Repeat("0123456\n", 1<<17))
	write("three\n")
	_, err = earlier.WriteString("four\n")
	must(t, err)
	if text, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(text), "3456\nthree\nfour\n") && string(text) != "three\nfour\n" || len(text) > 8<<10 {
		t.Errorf("after it was bounded %d bytes, %v", len(text), err)
	}
	if info, err := os.Stat(path + ".1"); err != nil || info.Size() > 1<<20 || info.Size() < 1<<19 || info.Mode().Perm() != 0o600 {
		t.Errorf("set aside: %v, %v", info, err)
	}
}

// The longest path that is taken fits a socket address, with the terminating
// zero byte.
func TestMaxRunDirFitsASocket(t *testing.T) {
	run := "/" + strings.Repeat("r", MaxRunDir-1)
	socket := dirOf(run, testKey).gen(999_999).socket()
	if len(socket) > 107 {
		t.Errorf("%d bytes", len(socket))
	}
	if err := SetupRunDir("/run/a:b"); err == nil || !strings.Contains(err.Error(), "cannot carry") {
		t.Errorf("a colon: %v", err)
	}
	if err := SetupRunDir(run + "r"); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("one more is taken: %v", err)
	}
}
