package config

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/bmatcuk/doublestar/v4"
)

// BackendType says what kind of place blobs are in.
type BackendType string

// The types.
const (
	// BackendRegistry is the registry that the image was pulled from, as Remote says.
	BackendRegistry BackendType = "registry"
	// BackendLocalFS is a directory of files, each named by its digest in hex.
	BackendLocalFS BackendType = "localfs"
	// BackendOSS and BackendS3 are buckets, of Alibaba Cloud's object storage and of
	// what speaks S3, with objects named likewise.
	BackendOSS BackendType = "oss"
	BackendS3  BackendType = "s3"
)

// Backend says where the blobs of some images are.
type Backend struct {
	// Name is unique; images and errors call the backend by it.
	Name string      `toml:"name"`
	Type BackendType `toml:"type"`
	// Match says of which images; the first backend of the list that matches counts.
	Match Match `toml:"match"`
	// AllowLabel lets an image ask for the backend by name. With a Match, which then
	// has to fit too.
	AllowLabel bool `toml:"allow_label"`

	// Dir is the directory of BackendLocalFS.
	Dir string `toml:"dir"`

	// Endpoint is a host with or without a port, Scheme "https" (also if empty) or
	// "http". An object's name is ObjectPrefix and, with nothing between them, the
	// digest in hex. For BackendOSS and BackendS3, Region for BackendS3 alone.
	Endpoint     string `toml:"endpoint"`
	Region       string `toml:"region"`
	BucketName   string `toml:"bucket_name"`
	ObjectPrefix string `toml:"object_prefix"`
	Scheme       string `toml:"scheme"`
	// SkipVerify accepts any certificate.
	SkipVerify bool `toml:"skip_verify"`
	// CredentialsFile holds access keys, of which those of Profile ("default" if
	// empty) are used.
	CredentialsFile string `toml:"credentials_file"`
	Profile         string `toml:"profile"`
}

// Match is two patterns, of which an empty one fits everything. In both, * stands for
// anything but a slash, ? for one character, {a,b} for one of several and [a-z] for one
// of a class; in Repository ** stands for any number of parts.
type Match struct {
	// Host is of the registry, with its port, as in the image's reference.
	Host string `toml:"host"`
	// Repository is the path without tag and digest.
	Repository string `toml:"repository"`
}

// IsZero tells whether no pattern is there. Such a backend has only images that ask
// for it.
func (m Match) IsZero() bool { return m == Match{} }

// Fits tells whether an image's host and repository fit.
func (m Match) Fits(host, repository string) bool {
	return fits(m.Host, host) && fits(m.Repository, repository)
}

// String describes the patterns.
func (m Match) String() string {
	var parts []string
	if m.Host != "" {
		parts = append(parts, fmt.Sprintf("host %q", m.Host))
	}
	if m.Repository != "" {
		parts = append(parts, fmt.Sprintf("repository %q", m.Repository))
	}
	return strings.Join(parts, " and ")
}

func fits(pattern, name string) bool {
	// An IPv6 address in brackets would be a class.
	return pattern == "" || pattern == name || doublestar.MatchUnvalidated(pattern, name)
}

// settings are those of one type: its keys, and those of them that it cannot do without.
type settings struct{ takes, needs []string }

func settingsOf(t BackendType) (settings, bool) {
	bucket := []string{"endpoint", "bucket_name", "object_prefix", "scheme", "skip_verify", "credentials_file", "profile"}
	s, ok := map[BackendType]settings{
		BackendRegistry: {},
		BackendLocalFS:  {takes: []string{"dir"}, needs: []string{"dir"}},
		BackendOSS:      {takes: bucket, needs: []string{"endpoint", "bucket_name", "credentials_file"}},
		BackendS3:       {takes: append(bucket, "region"), needs: []string{"region", "bucket_name", "credentials_file"}},
	}[t]
	return s, ok
}

// set lists what an entry sets, in the order of the fields.
func (b Backend) set() []string {
	var keys []string
	for _, s := range []struct {
		key string
		set bool
	}{
		{"dir", b.Dir != ""}, {"endpoint", b.Endpoint != ""}, {"region", b.Region != ""}, {"bucket_name", b.BucketName != ""},
		{"object_prefix", b.ObjectPrefix != ""}, {"scheme", b.Scheme != ""}, {"skip_verify", b.SkipVerify},
		{"credentials_file", b.CredentialsFile != ""}, {"profile", b.Profile != ""},
	} {
		if s.set {
			keys = append(keys, s.key)
		}
	}
	return keys
}

// What goes into names, labels and, as it is, into URLs.
var (
	nameText   = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	bucketText = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	prefixText = regexp.MustCompile(`^[A-Za-z0-9._-][A-Za-z0-9._/-]*$`)
)

func (v *validator) backends(list []Backend) {
	for i, b := range list {
		at := elementKey("backend", i)
		switch {
		case !nameText.MatchString(b.Name):
			v.fail(at+".name", "%q: want 1 to 63 of a-z, 0-9, dot, hyphen and underscore, beginning with a letter or digit", b.Name)
		case slices.ContainsFunc(list[:i], func(o Backend) bool { return o.Name == b.Name }):
			v.fail(at+".name", "%q is there twice", b.Name)
		}
		v.match(at, b)
		if s, ok := settingsOf(b.Type); ok {
			v.settings(at, b, s)
		} else {
			v.oneOf(at+".type", string(b.Type), string(BackendRegistry), string(BackendLocalFS), string(BackendOSS), string(BackendS3))
		}
	}
}

func (v *validator) match(at string, b Backend) {
	if b.Match.IsZero() && !b.AllowLabel {
		v.fail(at+".match", `is missing, so that no image would use the backend; for all of them say host = "*"`)
	}
	for key, pattern := range map[string]string{"host": b.Match.Host, "repository": b.Match.Repository} {
		if !doublestar.ValidatePattern(pattern) && !isHost(pattern) {
			v.fail(at+".match."+key, "%q is no pattern", pattern)
		}
	}
	if strings.Contains(b.Match.Host, "/") {
		v.fail(at+".match.host", "%q: want a registry as host or host:port, without a scheme or path", b.Match.Host)
	}
}

func (v *validator) settings(at string, b Backend, s settings) {
	set := b.set()
	for _, key := range set {
		if !slices.Contains(s.takes, key) {
			v.fail(at+"."+key, "means nothing for type %q; remove it", b.Type)
		}
	}
	for _, key := range s.needs {
		if !slices.Contains(set, key) {
			v.fail(at+"."+key, "is missing, which type %q needs", b.Type)
		}
	}
	if b.Type == BackendLocalFS && b.Dir != "" {
		v.path(at+".dir", b.Dir)
	}
	if slices.Contains(s.takes, "bucket_name") {
		v.bucket(at, b)
	}
}

func (v *validator) bucket(at string, b Backend) {
	if b.Endpoint != "" && !isHost(b.Endpoint) {
		v.fail(at+".endpoint", "%q: want host or host:port, without a scheme or path", b.Endpoint)
	}
	if b.BucketName != "" && !bucketText.MatchString(b.BucketName) {
		v.fail(at+".bucket_name", "%q: want letters, digits, dots, hyphens and underscores", b.BucketName)
	}
	if b.ObjectPrefix != "" && !prefixText.MatchString(b.ObjectPrefix) {
		v.fail(at+".object_prefix", "%q: want letters, digits, dots, hyphens, underscores and slashes, without one in front; it stands before a blob's digest as it is", b.ObjectPrefix)
	}
	if b.Region != "" && !bucketText.MatchString(b.Region) {
		v.fail(at+".region", `%q: want a region such as "eu-central-1"`, b.Region)
	}
	if b.Scheme != "" {
		v.oneOf(at+".scheme", b.Scheme, "https", "http")
	}
	if b.SkipVerify && b.Scheme == "http" {
		v.fail(at+".skip_verify", `is set, but with scheme "http" there is no certificate`)
	}
	if f := b.CredentialsFile; f != "" && (!filepath.IsAbs(f) || filepath.Clean(f) != f) {
		v.fail(at+".credentials_file", "%q: want an absolute path without //, . or ..", f)
	}
	if b.Type == BackendOSS && net.ParseIP(hostOf(b.Endpoint)) != nil {
		v.fail(at+".endpoint", "%q: want a name, since nydusd puts the bucket's in front of it", b.Endpoint)
	}
}

// hostOf is an address without its port.
func hostOf(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return strings.Trim(address, "[]")
}
