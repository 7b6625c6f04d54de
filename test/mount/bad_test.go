package mount_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// Exit statuses of the helper, as mount(8)'s.
const (
	exitUsage   = 1
	exitFailure = 32
)

// failure is how a mount must fail.
type failure struct {
	code     int
	want     []string
	within   time.Duration // startTimeout + slack if zero
	mounts   bool          // other mounts and daemons are there, and stay
	instance bool          // an instance is there, idle, and stays
}

// fails checks that a mount failed, that its text says what is wanted, and that
// nothing is left mounted or running.
func (e *env) fails(r result, f failure) {
	e.t.Helper()
	if r.code != f.code {
		e.t.Errorf("exit status %d, want %d: %s", r.code, f.code, r.out)
	}
	for _, want := range f.want {
		if !strings.Contains(r.out, want) {
			e.t.Errorf("the error does not say %q: %s", want, r.out)
		}
	}
	if strings.Count(strings.TrimSpace(r.out), "\n") > 0 {
		e.t.Errorf("the error has several lines: %s", r.out)
	}
	if f.within == 0 {
		f.within = startTimeout + slack
	}
	if r.took > f.within {
		e.t.Errorf("failed after %v, want at most %v", r.took, f.within)
	}
	if f.mounts {
		return
	}
	if f.instance {
		e.idle()
		return
	}
	if left := mounted(e.t, e.root); len(left) > 0 {
		e.t.Errorf("still mounted: %v", left)
	}
	if keys, err := instance.Keys(runDir); err != nil || len(keys) > 0 {
		e.t.Errorf("instances are left: %v, %v", keys, err)
	}
	e.daemons(0)
}

// idle checks that of the one instance nothing is mounted and running but its
// current generation, if it has one.
func (e *env) idle() {
	e.t.Helper()
	var want []string
	g := e.record().Current
	if g != nil {
		want = []string{g.Mountpoint}
	}
	for _, p := range e.daemons(len(want)) {
		if p.PID != g.PID {
			e.t.Errorf("nydusd %d runs, the instance's is %d", p.PID, g.PID)
		}
	}
	if left := mounted(e.t, e.root); !slices.Equal(left, want) {
		e.t.Errorf("mounted: %v, want %v", left, want)
	}
}

// tampered returns the option with a piece of its JSON text replaced, as
// somebody would who cannot seal.
func (e *env) tampered(s *mountspec.Spec, old, replacement string) string {
	e.t.Helper()
	text, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(e.option(s), "extraoption="))
	must(e.t, err)
	if bytes.Count(text, []byte(old)) != 1 {
		e.t.Fatalf("the option does not have %s once: %s", old, text)
	}
	return "extraoption=" + base64.StdEncoding.EncodeToString(bytes.Replace(text, []byte(old), []byte(replacement), 1))
}

func TestBadOption(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	good := e.option(s)
	foreign, err := mountspec.NewKey()
	must(t, err)
	sealedElsewhere, err := mountspec.Encode(s, foreign)
	must(t, err)
	for name, c := range map[string]struct {
		option string
		want   []string
	}{
		"missing":           {"rw", []string{"no extraoption among the mount options", "made by nydus-snapshotter"}},
		"empty":             {"extraoption=", []string{"no extraoption among the mount options"}},
		"truncated":         {good[:len(good)/2], []string{"decode mount option extraoption", "truncated or malformed"}},
		"truncated by one":  {good[:len(good)-1], []string{"truncated or malformed", "base64"}},
		"no base64":         {"extraoption=!!!", []string{"truncated or malformed", "base64"}},
		"not JSON":          {"extraoption=" + base64.StdEncoding.EncodeToString([]byte("nothing")), []string{"truncated or malformed", "JSON"}},
		"altered bootstrap": {e.tampered(s, `"source":"`+s.Bootstrap+`"`, `"source":"/etc/shadow"`), []string{"altered after it was sealed"}},
		"altered daemon":    {e.tampered(s, `"path":"`+s.Daemon.Path+`"`, `"path":"/bin/sh"`), []string{"altered after it was sealed"}},
		"other instance":    {e.tampered(s, `"instance":"`+s.Instance, `"instance":"`+strings.Repeat("0", 32)), []string{"altered after it was sealed"}},
		"respelt":           {e.tampered(s, `{"source"`, `{ "source"`), []string{"altered after it was sealed"}},
		"foreign key":       {sealedElsewhere, []string{"sealed with a key that this node does not hold", "another node or before the last boot"}},
		"oversized":         {"extraoption=" + strings.Repeat("A", mountspec.MaxSize+4), []string{"larger than", fmt.Sprint(mountspec.MaxSize)}},
		"future":            {e.tampered(s, `"version":1`, `"version":2`), []string{"unknown version", "it has 2, this program reads 1", "install the same version"}},
		"no version":        {e.tampered(s, `"version":1`, `"version":0`), []string{"no version", "another program"}},
		"key's a path":      {e.tampered(s, `"key":"`+e.key.ID()+`"`, `"key":"../../etc/passwd"`), []string{"16 hex digits"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			target := e.target()
			r := e.run(e.tools.MountFuse, s.SnapshotDir, target, "-o", c.option, "-t", "nydus-overlayfs")
			e.fails(r, failure{code: exitFailure, within: atOnce, want: append(c.want, "nydus-overlayfs: mount "+target+": ")})
		})
	}

	t.Run("no keys", func(t *testing.T) {
		e := e.in(t)
		must(t, os.Rename(mountspec.DefaultKeyDir, mountspec.DefaultKeyDir+".away"))
		defer func() { must(t, os.Rename(mountspec.DefaultKeyDir+".away", mountspec.DefaultKeyDir)) }()
		e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"does not hold", mountspec.DefaultKeyDir, "is nydus-snapshotter not running?"}})
	})
	t.Run("keys for all to read", func(t *testing.T) {
		e := e.in(t)
		must(t, os.Chmod(mountspec.DefaultKeyDir, 0o755))
		defer func() { must(t, os.Chmod(mountspec.DefaultKeyDir, 0o700)) }()
		e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"cannot be trusted", "mode 0700"}})
	})

	// Still good after all that.
	target := e.mustMount(s)
	e.unmount(target)
}

// resealed returns the option with a piece of its JSON text replaced, as somebody
// would who holds the key and does not care what makes sense.
func (e *env) resealed(s *mountspec.Spec, old, replacement string) string {
	e.t.Helper()
	text, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(e.tampered(s, old, replacement), "extraoption="))
	must(e.t, err)
	before, seal, ok := strings.Cut(string(text), `"sealed":`)
	if !ok {
		e.t.Fatalf("the option has no seal: %s", text)
	}
	after := strings.TrimLeft(seal[1:], "+/=ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")[1:]
	block, err := aes.NewCipher(e.key[:])
	must(e.t, err)
	aead, err := cipher.NewGCM(block)
	must(e.t, err)
	nonce := make([]byte, aead.NonceSize()) // used once with this key
	sealed := aead.Seal(nonce, nonce, nil, []byte(before+`"sealed":null`+after))
	return "extraoption=" + base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `%s"sealed":%q%s`, before, base64.StdEncoding.EncodeToString(sealed), after))
}

func TestPathOutsideTheRoot(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	for _, path := range []string{"/etc/image.boot", e.root + "/../etc/image.boot"} {
		s := e.spec(img)
		s.Bootstrap = path
		if _, err := mountspec.Encode(s, e.key); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("path %q is outside the snapshotter's root", path)) {
			t.Errorf("seal a path outside of the root: %v", err)
		}
	}

	// Sealed all the same. The files are there: only the path is wrong.
	s := e.spec(img)
	s.Lower = []string{e.root + "/lower"}
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "image.boot"), img.boot, 0o644))
	for _, dir := range []string{"fs", "work", "cache", "lower"} {
		must(t, os.Mkdir(filepath.Join(outside, dir), 0o755))
	}
	before := kit.MustWalk(t, outside)
	for name, c := range map[string]struct{ old, member, path string }{
		"bootstrap":          {s.Bootstrap, "source", filepath.Join(outside, "image.boot")},
		"bootstrap with ..":  {s.Bootstrap, "source", e.root + "/../" + filepath.Base(outside) + "/image.boot"},
		"snapshot directory": {s.SnapshotDir, "snapshotdir", outside},
		"cache directory":    {s.CacheDir, "cache_dir", filepath.Join(outside, "cache")},
		"root's neighbour":   {s.CacheDir, "cache_dir", e.root + "-cache"},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			option := e.resealed(s, fmt.Sprintf("%q:%q", c.member, c.old), fmt.Sprintf("%q:%q", c.member, c.path))
			e.refusedOutside(s, option, c.path)
		})
	}
	t.Run("lower directory", func(t *testing.T) {
		e := e.in(t)
		lower := filepath.Join(outside, "lower")
		e.refusedOutside(s, e.resealed(s, fmt.Sprintf("%q:[%q]", "lower", s.Lower[0]), fmt.Sprintf("%q:[%q]", "lower", lower)), lower)
	})
	kit.EqualTrees(t, "the directory outside of the root", before, kit.MustWalk(t, outside))

	// The seal is good: with a path beneath the root the option is taken.
	s.Lower = nil
	dir := e.snapshot()
	target := e.target()
	e.ok(e.run("nydus-overlayfs", dir, target, "-o", e.resealed(s, fmt.Sprintf("%q:%q", "snapshotdir", s.SnapshotDir), fmt.Sprintf("%q:%q", "snapshotdir", dir))))
	e.holds(img, target)
	e.unmount(target)
}

// refusedOutside checks that the helper takes no option with a path outside of the
// root, whoever sealed it.
func (e *env) refusedOutside(s *mountspec.Spec, option, path string) {
	e.t.Helper()
	target := e.target()
	r := e.run(e.tools.MountFuse, s.SnapshotDir, target, "-o", option, "-t", "nydus-overlayfs")
	e.fails(r, failure{code: exitFailure, within: atOnce, want: []string{
		"mount " + target, "option is invalid", fmt.Sprintf("path %q is outside the snapshotter's root %q", path, e.root),
	}})
}

func TestBadBootstrap(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	noise := bytes.Repeat([]byte{0x5a}, 1<<16)
	write := func(data []byte) func(string) error {
		return func(path string) error { return os.WriteFile(path, data, 0o644) }
	}
	half, blocks := img.boot[:len(img.boot)/2-1], img.boot[:len(img.boot)/2&^4095]
	changed := bytes.Clone(img.boot)
	changed[len(changed)-1] ^= 1
	for name, c := range map[string]struct {
		put  func(path string) error
		want string
	}{
		"missing": {func(string) error { return nil }, "no such file or directory"},
		"empty":   {write(nil), "empty"},
		"text":    {write(noise), "RAFS"},
		"half":    {write(half), fmt.Sprintf("bootstrap is truncated: %d bytes", len(half))},
		"blocks":  {write(blocks), "bootstrap is truncated"},
		"symbolic link": {func(path string) error {
			must(t, os.WriteFile(path+".real", img.boot, 0o644))
			return os.Symlink(path+".real", path)
		}, "symbolic link"},
		"link in a parent": {func(path string) error {
			dir := filepath.Dir(path)
			must(t, os.Rename(dir, dir+".real"))
			must(t, os.WriteFile(filepath.Join(dir+".real", filepath.Base(path)), img.boot, 0o644))
			return os.Symlink(dir+".real", dir)
		}, "symbolic link"},
		"directory": {func(path string) error { return os.Mkdir(path, 0o755) }, "not a regular file"},
		"device":    {func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, 1<<8|5) }, "not a regular file"},
		"FIFO":      {func(path string) error { return unix.Mkfifo(path, 0o600) }, "not a regular file"},
		"huge": {func(path string) error {
			must(t, os.WriteFile(path, img.boot, 0o644))
			return os.Truncate(path, 2<<30)
		}, "more than the limit of"},
		"changed": {write(changed), "was changed after the image was pulled; remove and pull the image again"},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			s := e.spec(img)
			must(t, os.Remove(s.Bootstrap))
			must(t, c.put(s.Bootstrap))
			e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{
				"image " + s.Image, "instance " + s.Instance, "bootstrap", s.Bootstrap, c.want,
			}})
		})
	}
}

// Blob ids become file names of nydusd's, which is root.
func TestHostileBlobIDs(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	victim := filepath.Join(e.root, "cache", "victim")
	var old string
	for n, l := range img.Layers {
		if n != img.Bootstrap() {
			old = l.Desc.Digest.Encoded()
			break
		}
	}
	for _, id := range []string{
		"../../victim", "../victim", "..", ".", "/etc/victim", "a/b", strings.Repeat("A", 64), strings.Repeat("0", 63),
		strings.Repeat("0", 63) + "/", "../" + strings.Repeat("0", 61), "\x00" + strings.Repeat("0", 63),
	} {
		t.Run(fmt.Sprintf("%q", id), func(t *testing.T) {
			e := e.in(t)
			hostile, err := kit.RenameBlob(img.boot, old, id)
			must(t, err)
			s := e.spec(&fixture{Image: img.Image, boot: hostile, blobs: img.blobs})
			e.fails(e.mount(s, e.target()), failure{code: exitFailure, within: atOnce, want: []string{"bootstrap " + s.Bootstrap, "blob"}})
			e.withHelper()
			e.fails(e.run("mount", "-t", "nydus", "-o", e.direct(&fixture{boot: hostile, blobs: img.blobs}), "none", e.target()),
				failure{code: exitFailure, within: atOnce, want: []string{"bootstrap", "blob"}})
		})
	}
	written, err := kit.Walk(e.root)
	must(t, err)
	for path := range written {
		if strings.Contains(path, "victim") {
			t.Errorf("%s was written (%s)", path, victim)
		}
	}
}

// Damage that the blob table does not show: nydusd meets it.
func TestDamagedMetadata(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	for name, damage := range map[string]func([]byte){
		"no root inode":   func(b []byte) { binary.LittleEndian.PutUint16(b[1024+14:], 0xffff) },
		"inodes of noise": func(b []byte) { copy(b[4096:], bytes.Repeat([]byte{0xa5}, len(b)-4096)) },
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			boot := bytes.Clone(img.boot)
			damage(boot)
			s := e.spec(&fixture{Image: img.Image, boot: boot, blobs: img.blobs})
			target := e.target()
			r := e.mount(s, target)
			if r.code == 0 {
				// It mounts: what is read through it is an error, not a hang.
				read := make(chan error, 1)
				go func() {
					_, err := os.ReadDir(filepath.Join(target, "etc"))
					read <- err
				}()
				select {
				case err := <-read:
					if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EINVAL) {
						t.Errorf("a read says %v, want an input/output error", err)
					}
				case <-time.After(soon):
					t.Error("a read hangs")
				}
				e.unmount(target)
				must(t, e.tidy(soon))
				return
			}
			e.fails(r, failure{code: exitFailure, want: []string{"image " + s.Image}})
		})
	}
}

func TestBadNydusd(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	file := filepath.Join(t.TempDir(), "nydusd")
	must(t, os.WriteFile(file, []byte("#!/bin/sh\n"), 0o644))
	text := filepath.Join(t.TempDir(), "nydusd")
	must(t, os.WriteFile(text, []byte("no program\n"), 0o755))
	mute := filepath.Join(t.TempDir(), "nydusd")
	must(t, os.WriteFile(mute, []byte("#!/bin/sh\ntail -f /dev/null\n"), 0o755))
	// Hangs in the shell itself, in a read that nobody answers.
	silent := filepath.Join(t.TempDir(), "silent")
	must(t, unix.Mkfifo(silent, 0o600))
	hanging := "exec 9<>'" + silent + "'; read -r -u 9 _"
	// Those that hang are waited for, the others must not be.
	const hangs, waits = 2 * time.Second, time.Minute
	for name, c := range map[string]struct {
		path    string
		want    []string
		timeout time.Duration
	}{
		"missing":          {"/nowhere/nydusd", []string{"find nydusd", "/nowhere/nydusd", "no such file", "install it or set [daemon] nydusd_path"}, waits},
		"not executable":   {file, []string{file, "permission denied", "is the file executable?"}, waits},
		"no program":       {text, []string{text, "exec format error"}, waits},
		"version hangs":    {mute, []string{"ask " + mute + " for its version", "no answer in time"}, hangs},
		"ends at once":     {e.wrapper("echo 'the cause' >&2; exit 3"), []string{"ended before it served", "exit status 3", "nydusd.log: ", "the cause"}, waits},
		"killed":           {e.wrapper("kill -9 $$"), []string{"ended before it served", "killed by SIGKILL"}, waits},
		"hangs":            {e.wrapper(hanging), []string{"did not mount: not within 2s"}, hangs},
		"mounts and ends":  {e.wrapper(mountOnly + "exit 1"), []string{"nydusd", "serve"}, waits},
		"mounts and hangs": {e.wrapper(mountOnly + hanging), []string{"mounted but does not serve: no answer: not within 2s"}, hangs},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			s := e.spec(img)
			s.Daemon.Path, s.Daemon.StartTimeout = c.path, c.timeout
			e.fails(e.mount(s, e.target()), failure{
				code: exitFailure, within: hangs + slack, want: append(c.want, "image "+s.Image, "instance "+s.Instance),
			})
			for _, p := range processesOf(t, c.path) {
				t.Errorf("left running: %v", p)
			}
		})
	}
}

// mountOnly is a wrapper's body that mounts, as nydusd does, and serves nothing.
const mountOnly = `exec 3<>/dev/fuse
mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 rafs "$7" || exit 2
`

func processesOf(t *testing.T, path string) []kit.Process {
	t.Helper()
	all, err := kit.Processes()
	must(t, err)
	var list []kit.Process
	for _, p := range all {
		if strings.Contains(strings.Join(p.Cmdline, " "), path) {
			list = append(list, p)
		}
	}
	return list
}

func TestBadTarget(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	missing := filepath.Join(t.TempDir(), "missing")
	e.fails(e.mount(s, missing), failure{code: exitFailure, within: atOnce, want: []string{"mount " + missing, "mount point", "no such file or directory"}})
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	e.fails(e.mount(s, file), failure{code: exitFailure, within: atOnce, want: []string{"mount " + file, "mount point is not a directory"}})
}

func TestBadOverlay(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	s := e.spec(img)
	must(t, os.RemoveAll(s.Upper()))
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"mount overlay", "no such file or directory"}})

	s = e.spec(img)
	s.OverlayOptions = []string{"no_such_option=1"}
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"mount overlay", "invalid argument", "dmesg"}})

	// An instance that others use stays as it is.
	other := e.mustMount(e.spec(img))
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, mounts: true})
	e.daemons(1)
	e.answers(other, "one")
	e.unmount(other)
}

func TestNoFuseDevice(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	// Another /dev without it.
	dev := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dev, "null"), nil, 0o666))
	must(t, rootfs.Bind("/dev/null", filepath.Join(dev, "null"), nil))
	must(t, rootfs.Bind(dev, "/dev", []string{"rec"}))
	defer func() {
		must(t, rootfs.Detach("/dev"))
		must(t, rootfs.Detach(filepath.Join(dev, "null")))
	}()
	r := e.run("nydus-overlayfs", s.SnapshotDir, e.target(), "-o", e.option(s))
	e.fails(r, failure{code: exitFailure, within: atOnce, want: []string{"no FUSE on this node", "/dev/fuse", "modprobe fuse"}})
}

func TestBadRunDirectory(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	const dir = kit.RunRoot + "/spoilt"
	mode := func(m os.FileMode) func() {
		return func() { must(t, os.Mkdir(dir, 0o700)); must(t, os.Chmod(dir, m)) }
	}
	own := func(data string) func() {
		return func() {
			must(t, os.Mkdir(dir, 0o700))
			must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,"+data))
		}
	}
	long := "/run/" + strings.Repeat("l", instance.MaxRunDir)
	for name, c := range map[string]struct {
		path    string
		prepare func()
		want    []string
	}{
		"readable by all": {dir, mode(0o755), []string{"run directory " + dir, "is not trusted", "mode 0755", "want owner 0 and mode 0700", "correct or remove it"}},
		"of another user": {dir, func() { mode(0o700)(); must(t, os.Chown(dir, 1000, 1000)) }, []string{"is not trusted", "owner 1000"}},
		"symbolic link": {dir, func() {
			must(t, os.Mkdir(dir+".real", 0o700))
			must(t, os.Symlink(dir+".real", dir))
		}, []string{"run directory " + dir, "symbolic link", "configure the path it leads to"}},
		"file":     {dir, func() { must(t, os.WriteFile(dir, nil, 0o600)) }, []string{"run directory", dir, "not a directory"}},
		"too long": {long, func() {}, []string{"run directory " + long, "too long for the sockets", "set a shorter run_dir"}},
		"full": {dir, func() {
			own("size=64k")()
			_ = os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600)
		}, []string{"no space left on device"}},
		"without inodes": {dir, own("nr_inodes=4"), []string{"no space left on device"}},
		"read-only": {dir, func() {
			own("size=1m")()
			must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		}, []string{"create instance", "read-only file system"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			c.prepare()
			defer func() {
				must(t, rootfs.Detach(dir))
				must(t, os.RemoveAll(dir))
				must(t, os.RemoveAll(dir+".real"))
			}()
			s := e.spec(img)
			s.RunDir = c.path
			e.fails(e.mount(s, e.target()), failure{code: exitFailure, within: atOnce, want: c.want})
			if begun, _ := filepath.Glob(filepath.Join(c.path, "i", "*", "g*")); len(begun) > 0 {
				t.Errorf("generations are left: %v", begun)
			}
			if exists(long) {
				t.Error("the directory whose name is too long was made")
			}
		})
	}
}

func TestBadDiskDirectories(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	for _, name := range []string{"instances", "cache"} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			s := e.spec(img)
			file := filepath.Join(e.root, name)
			must(t, os.RemoveAll(file))
			must(t, os.WriteFile(file, nil, 0o600))
			e.fails(e.mount(s, e.target()), failure{code: exitFailure, within: atOnce, want: []string{"create", file, "not a directory"}})
			must(t, os.Remove(file))
		})
	}
}

func TestBadCommandLine(t *testing.T) {
	e := newEnv(t)
	e.withHelper()
	img := small(t, "one")
	options := e.direct(img)
	target := e.target()
	plain := filepath.Join(t.TempDir(), "text")
	must(t, os.WriteFile(plain, []byte("no JSON, but a password: canary-1d2e"), 0o600))
	noBackend := filepath.Join(t.TempDir(), "json")
	must(t, os.WriteFile(noBackend, []byte(`{"device":{"auth":"canary-1d2e"}}`), 0o600))
	swap := func(name, value string) string {
		parts := strings.Split(options, ",")
		for i, p := range parts {
			if strings.HasPrefix(p, name+"=") {
				parts[i] = name + "=" + value
			}
		}
		return strings.Join(parts, ",")
	}
	for name, c := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"nothing":            {nil, exitUsage, []string{"want SOURCE and TARGET", "--help"}},
		"no target":          {[]string{"none"}, exitUsage, []string{"want SOURCE and TARGET", "got 1"}},
		"three":              {[]string{"none", target, "more"}, exitUsage, []string{"got 3"}},
		"-o without value":   {[]string{"none", target, "-o"}, exitUsage, []string{"option -o needs a value"}},
		"unknown flag":       {[]string{"none", target, "-x"}, exitUsage, []string{"unknown option -x"}},
		"namespace":          {[]string{"none", target, "-N", "/proc/1/ns/mnt"}, exitUsage, []string{"-N is not supported", "nsenter --mount=/proc/1/ns/mnt"}},
		"unknown option":     {[]string{"none", target, "-o", options + ",cache_size=3"}, exitUsage, []string{`unknown mount option "cache_size"`, "--help"}},
		"for a user":         {[]string{"none", target, "-o", options + ",user=app"}, exitUsage, []string{"only for root"}},
		"both ways":          {[]string{"none", target, "-o", options + ",extraoption=AAAA"}, exitUsage, []string{"option extraoption says everything"}},
		"no configuration":   {[]string{"none", target, "-o", "bootstrap=/x"}, exitUsage, []string{"option config=… is missing"}},
		"threads":            {[]string{"none", target, "-o", options + ",threads=0"}, exitUsage, []string{"threads=0 is not a number above 0"}},
		"timeout":            {[]string{"none", target, "-o", options + ",timeout=10"}, exitUsage, []string{"timeout=10 is not a duration such as 10s"}},
		"relative nydusd":    {[]string{"none", target, "-o", options + ",nydusd=nydusd"}, exitUsage, []string{"nydusd=nydusd is not an absolute path"}},
		"missing bootstrap":  {[]string{"none", target, "-o", swap("bootstrap", "/nowhere/image.boot")}, exitFailure, []string{"open bootstrap", "/nowhere/image.boot", "no such file"}},
		"no bootstrap":       {[]string{"none", target, "-o", swap("bootstrap", plain)}, exitFailure, []string{"bootstrap " + plain}},
		"bootstrap a folder": {[]string{"none", target, "-o", swap("bootstrap", "/etc")}, exitFailure, []string{"bootstrap /etc: ", "not a regular file"}},
		"missing config":     {[]string{"none", target, "-o", swap("config", "/nowhere/c.json")}, exitFailure, []string{"read configuration", "/nowhere/c.json", "no such file"}},
		"config is text":     {[]string{"none", target, "-o", swap("config", plain)}, exitFailure, []string{plain, "not a JSON object"}},
		"config without":     {[]string{"none", target, "-o", swap("config", noBackend)}, exitFailure, []string{noBackend, "names no backend"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			r := e.run("/sbin/mount.nydus", c.args...)
			e.fails(r, failure{code: c.code, within: atOnce, want: append(c.want, "mount.nydus: ")})
			if strings.Contains(r.out, "canary") {
				t.Errorf("the error repeats the configuration: %s", r.out)
			}
		})
	}
}

func TestNoNydusdToBeFound(t *testing.T) {
	e := newEnv(t)
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/opt/nydus/bin"} {
		if path := filepath.Join(dir, "nydusd"); exists(path) {
			must(t, rootfs.Bind("/dev/null", path, nil))
			defer func() { must(t, rootfs.Detach(path)) }()
		}
	}
	e.fails(e.run(filepath.Join(e.bin, "mount.nydus"), "none", e.target(), "-o", e.direct(small(t, "one"))),
		failure{code: exitFailure, within: atOnce, want: []string{"no nydusd in the usual directories", "nydusd=FILE"}})
}

func TestOnlyRootMayMount(t *testing.T) {
	e := newEnv(t)
	s := e.spec(small(t, "one"))
	// The program where another user can reach it.
	dir, err := os.MkdirTemp(kit.RunRoot, "bin")
	must(t, err)
	defer os.RemoveAll(dir)
	must(t, os.Chmod(dir, 0o755))
	program, err := os.ReadFile(filepath.Join(e.bin, "nydus-overlayfs"))
	must(t, err)
	path := filepath.Join(dir, "nydus-overlayfs")
	must(t, os.WriteFile(path, program, 0o755))
	cmd := exec.CommandContext(t.Context(), path, "none", "/mnt", "-o", e.option(s))
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	started := time.Now()
	out, _ := cmd.CombinedOutput()
	e.fails(result{string(out), cmd.ProcessState.ExitCode(), time.Since(started)},
		failure{code: exitFailure, within: atOnce, want: []string{"mount /mnt", "only root may mount a nydus image"}})
}

// The configuration of another backend, the digest of another bootstrap.
func TestBadConfiguration(t *testing.T) {
	e := newEnv(t)
	img := small(t, "one")
	for name, c := range map[string]struct {
		config string
		want   string
	}{
		"no JSON":     {"canary-55aa", "not a JSON object"},
		"no backend":  {`{"device":{}}`, "names no backend"},
		"bad backend": {`{"device":{"backend":{"type":"localfs","config":{}},"cache":{"type":"blobcache","config":{"work_dir":"x"}}},"mode":"direct"}`, "ended before it served"},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			s := e.spec(img)
			s.Config = c.config
			r := e.mount(s, e.target())
			e.fails(r, failure{code: exitFailure, want: []string{"image " + s.Image, c.want}})
			if strings.Contains(r.out, "canary") {
				t.Errorf("the error repeats the configuration: %s", r.out)
			}
		})
	}
	s := e.spec(img)
	s.BootstrapDigest = digest.FromString("another").String()
	e.fails(e.mount(s, e.target()), failure{code: exitFailure, want: []string{"has digest", "expected " + s.BootstrapDigest}})
}
