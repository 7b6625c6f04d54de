package config

import (
	_ "embed"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// Version is the version of the format that this package reads.
const Version = 1

// DefaultPath is where the configuration file is looked for; it may be missing.
const DefaultPath = "/etc/nydus-snapshotter/config.toml"

// DefaultTOML is a configuration file that sets every key to its default, with
// an explanation of each.
//
//go:embed default.toml
var DefaultTOML string

// Config is the whole configuration. The tags are the keys of the file.
type Config struct {
	// Version is the format's version, always 1.
	Version int `toml:"version"`
	// Root holds layers, database and cache; absolute and clean.
	Root string `toml:"root"`
	// RunDir holds what ends with the boot; absolute and clean.
	RunDir string `toml:"run_dir"`
	// Address is the path of the gRPC socket; absolute and clean.
	Address string `toml:"address"`

	Daemon Daemon `toml:"daemon"`
	Cgroup Cgroup `toml:"cgroup"`
	Mount  Mount  `toml:"mount"`
	Image  Image  `toml:"image"`
	Cache  Cache  `toml:"cache"`
	Log    Log    `toml:"log"`
	Remote Remote `toml:"remote"`

	// Backends says of which images the blobs are elsewhere than in their registry.
	Backends    []Backend         `toml:"backend"`
	Credentials CredentialSources `toml:"credentials"`
}

// Daemon says how nydusd is started.
type Daemon struct {
	// NydusdPath is the executable; empty means that PATH is searched.
	NydusdPath string `toml:"nydusd_path"`
	// ConfigTemplate is a file with settings of nydusd's configuration, or empty.
	ConfigTemplate string `toml:"config_template"`
	// Validate has nydusd compare what it reads with the digests in the image.
	Validate bool `toml:"validate"`
	// LogLevel is one of LogLevels.
	LogLevel string `toml:"log_level"`
	// LogMaxSize bounds the log of one nydusd; what is older takes as much again.
	LogMaxSize Size `toml:"log_max_size"`
	// Threads is the number of FUSE threads, 0 for nydusd's own choice.
	Threads int `toml:"threads"`
	// StartTimeout bounds the time from exec to a filesystem that answers.
	StartTimeout time.Duration `toml:"start_timeout"`
	// HangTimeout is how long a daemon may be stopped, or stuck, while somebody
	// waits for it.
	HangTimeout time.Duration `toml:"hang_timeout"`
	// OOMScoreAdj is -1000 to 1000.
	OOMScoreAdj int `toml:"oom_score_adj"`
	// CgroupParent is an absolute path within the cgroup hierarchy, or empty.
	CgroupParent string `toml:"cgroup_parent"`
	// RecoverPolicy says what happens to an image whose daemon dies.
	RecoverPolicy RecoverPolicy `toml:"recover_policy"`
	// Mode says how many images one daemon serves.
	Mode DaemonMode `toml:"daemon_mode"`
}

// Cgroup limits each nydusd within the cgroup that Daemon.CgroupParent gives it.
// Empty texts are no limits; Limits has the numbers.
type Cgroup struct {
	// Memory is in bytes, with K, M or G behind it, or a percentage of the
	// machine's.
	Memory string `toml:"memory"`
	// CPU is in cores, such as "1.5", or a percentage of all CPUs.
	CPU string `toml:"cpu"`
}

// DaemonMode says how many images one daemon serves.
type DaemonMode string

// The modes.
const (
	ModeDedicated DaemonMode = "dedicated"
	ModeShared    DaemonMode = "shared"
)

// Size is a number of bytes, written with K, M or G behind it: "16M".
type Size int64

// String returns the size as it is written.
func (s Size) String() string {
	unit := ""
	for _, larger := range []string{"K", "M", "G"} {
		if s == 0 || s%1024 != 0 {
			break
		}
		s, unit = s/1024, larger
	}
	return strconv.FormatInt(int64(s), 10) + unit
}

// MarshalText returns the size as it is written.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// parseSize reads a size.
func parseSize(text string) (Size, bool) {
	n, ok := scaled(text, "KMG")
	return Size(n), ok
}

// scaled reads a whole number of bytes, with one of units, the first of "KMGT", behind it or
// none. What the unit makes too large is refused, and n the largest that there is.
func scaled(text, units string) (n int64, ok bool) {
	digits := strings.TrimRight(text, units)
	unit, shift := text[len(digits):], 0
	if unit != "" {
		shift = 10 * (1 + strings.Index(units, unit))
	}
	v, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || len(unit) > 1 {
		return 0, false
	}
	if v > math.MaxInt64>>shift {
		return math.MaxInt64, false
	}
	return int64(v) << shift, true
}

// RecoverPolicy is what to do about a daemon that died; see package recovery.
type RecoverPolicy string

// The policies.
const (
	RecoverNone     RecoverPolicy = "none"
	RecoverRestart  RecoverPolicy = "restart"
	RecoverFailover RecoverPolicy = "failover"
)

// Style is how a mount is handed to containerd.
type Style string

// The styles.
const (
	// StyleHelper is one mount, made by the mount helper as a whole.
	StyleHelper Style = "helper"
	// StyleManaged is two mounts, the first made by containerd's mount manager.
	StyleManaged Style = "managed"
)

// Credentials is how registry credentials travel.
type Credentials string

// The ways in which credentials travel.
const (
	// CredentialsSealed encrypts them with the node's key.
	CredentialsSealed Credentials = "sealed"
	// CredentialsPlain puts them into nydusd's configuration, for Kata.
	CredentialsPlain Credentials = "plain"
)

// Mount says how root filesystems are mounted.
type Mount struct {
	Style Style `toml:"style"`
	// Driver is how images' filesystems are made.
	Driver mountspec.Driver `toml:"driver"`
	// IdleLinger is how long an unused image stays mounted.
	IdleLinger  time.Duration `toml:"idle_linger"`
	Credentials Credentials   `toml:"credentials"`
}

// Image says which nydus images may be used.
type Image struct {
	// ValidateSignature asks for a signature of each image's bootstrap, see package
	// signature.
	ValidateSignature bool `toml:"validate_signature"`
	// PublicKeyFile has the keys that are trusted, in PEM; absolute and clean, or empty.
	PublicKeyFile string `toml:"public_key_file"`
}

// Cache says what may go from the cache of blobs.
type Cache struct {
	// HighWatermark and LowWatermark are bytes with K, M, G or T behind them, or a
	// percentage of the filesystem; empty for none. Watermarks has the numbers.
	HighWatermark string `toml:"high_watermark"`
	LowWatermark  string `toml:"low_watermark"`
	// Grace is how long after it was last written a blob stays in any case.
	Grace time.Duration `toml:"grace"`
	// SweepInterval is how often the cache is looked at without a reason.
	SweepInterval time.Duration `toml:"sweep_interval"`
	// ScrubInterval is how often all of it is compared with the images' digests, 0 for
	// never.
	ScrubInterval time.Duration `toml:"scrub_interval"`
	// Download says which images are completed in the background; images may say it of
	// themselves by their label. DownloadRate is how many bytes a second are fetched for
	// it; 0 for no bound.
	Download     Download `toml:"download"`
	DownloadRate Size     `toml:"download_rate"`
}

// Log is the snapshotter's own log.
type Log struct {
	// Level is one of LogLevels.
	Level string `toml:"level"`
	// Format is "text" or "json".
	Format string `toml:"format"`
}

// Gateway says when nydusd reads through the gateway.
type Gateway string

// When nydusd reads through the gateway.
const (
	// GatewayAuto is for registries that need what nydusd cannot do by itself.
	GatewayAuto   Gateway = "auto"
	GatewayAlways Gateway = "always"
	GatewayNever  Gateway = "never"
)

// Remote says how registries are read, which is where blobs come from unless
// Config.Backends says otherwise.
type Remote struct {
	// ConfigPath is containerd's config_path: directories with hosts.toml files,
	// with colons between them; empty for none.
	ConfigPath string `toml:"config_path"`
	// Gateway says when nydusd reads through the gateway, GatewayAddress where that
	// listens: a loopback IP address and a port.
	Gateway        Gateway `toml:"gateway"`
	GatewayAddress string  `toml:"gateway_address"`
	// GatewayVerify has the gateway compare what it passes on with the digests in the
	// image's bootstrap.
	GatewayVerify bool `toml:"gateway_verify"`
	// HostStreams bounds how many requests the gateway has under way at one host,
	// HostBandwidth how many bytes it reads from one in a second; 0 for no bound.
	HostStreams   int  `toml:"host_streams"`
	HostBandwidth Size `toml:"host_bandwidth"`
	// PlainHTTP and SkipVerify list registries as host or host:port, of which
	// ConfigPath says nothing.
	PlainHTTP  []string `toml:"plain_http"`
	SkipVerify []string `toml:"skip_verify"`
}

// Default returns the configuration that an empty machine gets. It equals
// DefaultTOML.
func Default() Config {
	return Config{
		Version: Version,
		Root:    "/var/lib/nydus-snapshotter",
		RunDir:  "/run/nydus-snapshotter",
		Address: "/run/nydus-snapshotter/nydus-snapshotter.sock",
		Daemon: Daemon{
			Validate:     true,
			LogLevel:     "info",
			LogMaxSize:   mountspec.DefaultLogMaxSize,
			StartTimeout: 20 * time.Second,
			HangTimeout:  10 * time.Second,
			OOMScoreAdj:  mountspec.DefaultOOMScoreAdj,
			CgroupParent: mountspec.DefaultCgroupParent,

			RecoverPolicy: RecoverFailover,
			Mode:          ModeDedicated,
		},
		Mount: Mount{
			Style:       StyleHelper,
			Driver:      mountspec.DriverAuto,
			IdleLinger:  30 * time.Second,
			Credentials: CredentialsSealed,
		},
		Cache: Cache{
			Grace: 10 * time.Minute, SweepInterval: 10 * time.Minute, ScrubInterval: 7 * 24 * time.Hour,
			Download: DownloadNever, DownloadRate: 16 << 20,
		},
		Log: Log{Level: "info", Format: "text"},
		Remote: Remote{
			ConfigPath: "/etc/containerd/certs.d", Gateway: GatewayAuto, GatewayAddress: "127.0.0.1:476", GatewayVerify: true,
			PlainHTTP: []string{}, SkipVerify: []string{},
		},
		Credentials: defaultCredentials(),
	}
}
