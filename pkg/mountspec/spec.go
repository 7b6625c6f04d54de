package mountspec

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"
)

// MountType is the mount type that makes containerd call the mount helper
// through mount.fuse, and by which Kata recognises a nydus root filesystem.
const MountType = "fuse.nydus-overlayfs"

// Kind says what the mount helper is asked to make at the target.
type Kind string

const (
	// KindRootfs is a whole root filesystem: the image with further lower
	// directories and, unless read-only, a writable layer on top.
	KindRootfs Kind = "rootfs"
	// KindImage is the image alone, read-only: the first of two mounts in the
	// managed style, where containerd makes the overlay itself.
	KindImage Kind = "image"
)

// Driver says how the image's filesystem may be made to exist.
type Driver string

const (
	// DriverAuto is DriverEROFS where that is possible, otherwise DriverFUSE. Helpers that
	// do not know DriverEROFS take it for DriverFUSE.
	DriverAuto Driver = "auto"
	// DriverFUSE is a nydusd that serves the image over FUSE.
	DriverFUSE Driver = "fuse"
	// DriverEROFS is the kernel's own filesystem upon blobs that were proven to be complete;
	// without that proof the mount fails.
	DriverEROFS Driver = "erofs"
)

// Mode says how many images a nydusd serves.
type Mode string

const (
	// ModeDedicated is a nydusd for each image.
	ModeDedicated Mode = ""
	// ModeShared is one nydusd for many images.
	ModeShared Mode = "shared"
)

// Names of the directories within Spec.SnapshotDir, fixed by Kata.
const (
	upperDir = "fs"
	workDir  = "work"
)

// Spec is everything that is needed to mount one image for one snapshot. All
// paths are absolute and clean, as the mount helper sees them.
type Spec struct {
	// Bootstrap is the image's metadata file within the snapshotter's root.
	Bootstrap string
	// BootstrapDigest is "sha256:" and the hex digest of that file's content.
	BootstrapDigest string
	// FSVersion is the RAFS version, "v5" or "v6".
	FSVersion string
	// Config is nydusd's configuration, a JSON object. It is public (Kata logs
	// it); credentials belong in Credentials.
	Config string
	// SnapshotDir holds fs, the upper directory, and work.
	SnapshotDir string

	// Kind is what to make at the target.
	Kind Kind
	// ReadOnly asks for a view: no upper directory.
	ReadOnly bool
	// Lower lists directories that lie above the image and below the upper
	// directory, uppermost first.
	Lower []string
	// OverlayOptions are further options of the overlay, such as "index=off".
	OverlayOptions []string

	// Instance is the key of the image's instance, see InstanceKey.
	Instance string
	// Image is the reference by which the image was pulled, for people.
	Image string
	// Host and Repository name the backend that the blobs come from. For a
	// backend that is no registry Host is empty, and Repository is the path of a
	// directory or says in canonical JSON which bucket it is.
	Host, Repository string

	// Root is the snapshotter's root directory; Bootstrap, SnapshotDir, Lower
	// and CacheDir lie beneath it.
	Root string
	// RunDir is the run directory, where instances live.
	RunDir string
	// CacheDir holds the image's blobs.
	CacheDir string

	// Driver is the preferred way to make the filesystem.
	Driver Driver
	// Daemon says how to start nydusd when one is needed.
	Daemon Daemon

	// Credentials open the backend; nil when it needs none.
	Credentials *Credentials
}

// How daemons live when nobody says otherwise: see Daemon.
const (
	DefaultLogMaxSize   = 16 << 20
	DefaultOOMScoreAdj  = -998
	DefaultCgroupParent = "/nydus"
)

// Daemon says how to start nydusd.
type Daemon struct {
	// Path is the executable.
	Path string `json:"path"`
	// LogLevel is nydusd's: trace, debug, info, warn or error.
	LogLevel string `json:"log_level,omitempty"`
	// LogMaxSize bounds its log in bytes, 0 for the default.
	LogMaxSize int64 `json:"log_max_size,omitempty"`
	// Threads is the number of FUSE threads, 0 for nydusd's default.
	Threads int `json:"threads,omitempty"`
	// StartTimeout bounds the time from exec to a filesystem that answers.
	StartTimeout time.Duration `json:"start_timeout,omitempty"`
	// HangTimeout bounds how long one that serves others already may take to
	// answer before it counts as hung.
	HangTimeout time.Duration `json:"hang_timeout,omitempty"`
	// OOMScoreAdj is the daemon's; see proc_pid_oom_score_adj(5).
	OOMScoreAdj int `json:"oom_score_adj,omitempty"`
	// CgroupParent is the cgroup below which daemons live, for example
	// "/nydus"; empty leaves them where the mount happens.
	CgroupParent string `json:"cgroup_parent,omitempty"`
	// MemoryLimit is the most that one daemon may use in its cgroup, in bytes,
	// and CPULimit in thousandths of a core; 0 is no limit.
	MemoryLimit int64 `json:"memory_limit,omitempty"`
	CPULimit    int   `json:"cpu_limit,omitempty"`
	// Mode says whether it serves this image alone.
	Mode Mode `json:"mode,omitempty"`
	// CAFile has the certificate authorities that it trusts beside those of the
	// machine; empty for none. Only one that serves an image alone can have it.
	CAFile string `json:"ca_file,omitempty"`
}

// Credentials open a backend. One of Auth, RegistryToken and the pair of the access
// key is set.
type Credentials struct {
	// Auth is base64 of user:password, for a registry.
	Auth string `json:"auth,omitempty"`
	// RegistryToken is a bearer token.
	RegistryToken string `json:"registry_token,omitempty"`
	// AccessKeyID and AccessKeySecret are for a bucket.
	AccessKeyID     string `json:"access_key_id,omitempty"`
	AccessKeySecret string `json:"access_key_secret,omitempty"`
}

// validate refuses what opens nothing, or more than one thing.
func (c *Credentials) validate() error {
	if (c.AccessKeyID == "") != (c.AccessKeySecret == "") {
		return errors.New("credentials: want both id and secret of an access key")
	}
	ways := 0
	for _, way := range []string{c.Auth, c.RegistryToken, c.AccessKeyID} {
		if way != "" {
			ways++
		}
	}
	if ways != 1 {
		return errors.New("credentials: want one of auth, a registry token and an access key")
	}
	return nil
}

// hidden is what is seen of credentials.
const hidden = "[credentials]"

// String hides the secret from loggers.
func (Credentials) String() string { return hidden }

// GoString does so for %#v.
func (Credentials) GoString() string { return hidden }

// Format does so for every verb, also those that pass by String.
func (Credentials) Format(f fmt.State, _ rune) { fmt.Fprint(f, hidden) }

// MarshalJSON does so for loggers that write JSON. Whoever has to write the
// secret takes it from the fields.
func (Credentials) MarshalJSON() ([]byte, error) { return []byte(`"` + hidden + `"`), nil }

// Upper is the overlay's upper directory, empty for a read-only mount.
func (s *Spec) Upper() string {
	if s.ReadOnly {
		return ""
	}
	return filepath.Join(s.SnapshotDir, upperDir)
}

// Work is the overlay's work directory, empty for a read-only mount.
func (s *Spec) Work() string {
	if s.ReadOnly {
		return ""
	}
	return filepath.Join(s.SnapshotDir, workDir)
}

// InstanceKey names the instance that serves an image: 32 hex digits. Two
// containers share one instance, and so one daemon and one page cache, exactly
// when bootstrap, backend and cache directory are the same. Credentials do not
// count: what they open is the same.
func InstanceKey(bootstrapDigest, host, repository, cacheDir string) string {
	h := sha256.New()
	for _, part := range []string{bootstrapDigest, host, repository, cacheDir} {
		// Length first, so that no two lists of parts run into one another.
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Validate reports every fault of s, joined into one error.
func (s *Spec) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if s.Kind != KindRootfs && s.Kind != KindImage {
		fail("kind %q: want %q or %q", s.Kind, KindRootfs, KindImage)
	}
	if s.FSVersion != "v5" && s.FSVersion != "v6" {
		fail("fs_version %q: want v5 or v6", s.FSVersion)
	}
	if s.Driver != DriverAuto && s.Driver != DriverFUSE && s.Driver != DriverEROFS {
		fail("driver %q: want %q, %q or %q", s.Driver, DriverAuto, DriverFUSE, DriverEROFS)
	}
	if s.Daemon.Mode != ModeDedicated && s.Daemon.Mode != ModeShared {
		fail("daemon mode %q: want %q, or nothing for one of its own", s.Daemon.Mode, ModeShared)
	}
	if !isHex(s.Instance, 32) {
		fail("instance %q: want 32 hex digits", s.Instance)
	}
	if d, ok := strings.CutPrefix(s.BootstrapDigest, "sha256:"); !ok || !isHex(d, 64) {
		fail("bootstrap digest %q: want sha256: and 64 hex digits", s.BootstrapDigest)
	}
	if s.Config == "" {
		fail("config is empty")
	}
	if c := s.Credentials; c != nil {
		errs = append(errs, c.validate())
	}
	if s.Daemon.CAFile != "" && s.Daemon.Mode == ModeShared {
		fail("CA file %q: a daemon that is shared has none", s.Daemon.CAFile)
	}
	if d := s.Daemon; d.MemoryLimit < 0 || d.CPULimit < 0 {
		fail("daemon limits of %d bytes and %d thousandths of a core: want 0 or more", d.MemoryLimit, d.CPULimit)
	}
	errs = append(errs, s.validatePaths()...)
	errs = append(errs, s.validateText()...)
	return errors.Join(errs...)
}

// validatePaths keeps the helper, which is root, within the snapshotter's root
// whatever else is wrong.
func (s *Spec) validatePaths() []error {
	var errs []error
	type named struct{ name, path string }
	absolute := []named{{"root", s.Root}, {"run directory", s.RunDir}, {"nydusd", s.Daemon.Path}}
	if s.Daemon.CAFile != "" {
		absolute = append(absolute, named{"CA file", s.Daemon.CAFile})
	}
	for _, p := range absolute {
		if !filepath.IsAbs(p.path) || filepath.Clean(p.path) != p.path {
			errs = append(errs, fmt.Errorf("%s %q: want an absolute path, free of . and .. elements", p.name, p.path))
		}
	}
	beneath := append([]string{s.Bootstrap, s.SnapshotDir, s.CacheDir}, s.Lower...)
	for _, p := range beneath {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || !strings.HasPrefix(p, s.Root+"/") {
			errs = append(errs, fmt.Errorf("path %q is outside the snapshotter's root %q", p, s.Root))
		}
		if strings.ContainsAny(p, ",:\\\n") {
			errs = append(errs, fmt.Errorf("path %q has a character that an overlay option cannot carry (one of , : \\ or a line break)", p))
		}
	}
	return errs
}

// validateText refuses what JSON would silently replace. It does not show the
// text: a plain configuration holds a secret.
func (s *Spec) validateText() []error {
	type text struct{ name, value string }
	texts := []text{{"bootstrap", s.Bootstrap}, {"config", s.Config}, {"snapshot directory", s.SnapshotDir}, {"image", s.Image},
		{"host", s.Host}, {"repository", s.Repository}, {"root", s.Root}, {"run directory", s.RunDir}, {"cache directory", s.CacheDir},
		{"nydusd", s.Daemon.Path}, {"log level", s.Daemon.LogLevel}, {"cgroup parent", s.Daemon.CgroupParent},
		{"CA file", s.Daemon.CAFile}}
	for _, l := range s.Lower {
		texts = append(texts, text{"lower directory", l})
	}
	for _, o := range s.OverlayOptions {
		texts = append(texts, text{"overlay option", o})
	}
	if c := s.Credentials; c != nil {
		texts = append(texts, text{"auth", c.Auth}, text{"registry token", c.RegistryToken}, text{"access key id", c.AccessKeyID}, text{"access key secret", c.AccessKeySecret})
	}
	var errs []error
	for _, t := range texts {
		if !utf8.ValidString(t.value) {
			errs = append(errs, fmt.Errorf("%s is not UTF-8", t.name))
		}
	}
	return errs
}

func isHex(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789abcdef") == ""
}

// CacheDir is where the blobs of one host and repository are kept beneath the
// snapshotter's root. No two repositories share one: a server could return
// other bytes under the id of a foreign blob.
func CacheDir(root, host, repository string) string {
	h := sha256.New()
	for _, part := range []string{host, repository} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return filepath.Join(root, "cache", hex.EncodeToString(h.Sum(nil)[:16]))
}
