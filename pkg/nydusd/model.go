package nydusd

import (
	"cmp"
	"fmt"
	"path/filepath"
)

// The backends that Config can describe.
const (
	BackendRegistry = "registry"
	BackendLocalFS  = "localfs"
	BackendOSS      = "oss"
	BackendS3       = "s3"
)

// Config is what is said to nydusd, the same for each way in which it serves an image.
// FuseDev and FSCache write it down; neither writes credentials.
type Config struct {
	Backend Backend
	// CacheDir receives the blobs.
	CacheDir string
	// Validate has nydusd compare a chunk with its digest before anybody gets it, when it
	// comes from the backend as well as each time when it comes from the cache: one that
	// is wrong in the cache is fetched again, one that comes wrong is an error. For RAFS
	// v6 that takes an image whose blobs hold the digests (rafs.FeatureInlinedDigests).
	// nydusd 2.2 does not read this in the first version of its configuration.
	Validate bool
	// Tuning is an operator's.
	Tuning Tuning
}

// Backend is where nydusd fetches blobs.
type Backend struct {
	// Type is one of the constants.
	Type string
	// Scheme is "http" or "https", but for BackendLocalFS.
	Scheme string
	// Host is the registry with its port, Repository the path without tag or digest.
	// For BackendRegistry.
	Host, Repository string
	// SkipVerify accepts any certificate.
	SkipVerify bool
	// Dir holds one file per blob, named by its id. For BackendLocalFS.
	Dir string
	// Bucket is for BackendOSS and BackendS3.
	Bucket Bucket
	// Retries is how often a request is made again that failed; 0 for the default.
	Retries int
	// Fixed says that how requests are made is not for an operator to tune.
	Fixed bool
}

// Bucket holds one object per blob, named by Prefix and its id, with nothing between
// them.
type Bucket struct {
	// Endpoint is a host with or without a port; of BackendS3, AWS's if empty.
	Endpoint string
	// Region is BackendS3's.
	Region       string
	Name, Prefix string
}

// Tuning is what an operator may say about how nydusd works, as opposed to where blobs
// are and where they go. What is nil or empty is left to our defaults, or to nydusd's.
type Tuning struct {
	Transfer Transfer
	Prefetch *Prefetch
	// EnableXattr shows extended attributes; the default is true.
	EnableXattr *bool
	// IOStatsFiles, AccessPattern and LatestReadFiles keep statistics for nydusd's API.
	IOStatsFiles, AccessPattern, LatestReadFiles bool
	// AmplifyIO is how many bytes a small read is enlarged to.
	AmplifyIO *int
}

// Transfer is how requests are made.
type Transfer struct {
	// Only is the type of backend that it is for, empty for all that have requests.
	Only string
	// ConnectTimeout and Timeout, for a whole request, are in seconds.
	ConnectTimeout, Timeout, Retries *int
	Proxy                            *Proxy
	// BlobURLScheme and BlobRedirectedHost replace those of the place that a registry
	// redirects to. For BackendRegistry.
	BlobURLScheme, BlobRedirectedHost string
}

// Proxy stands between nydusd and the backend. It is written as nydusd reads it.
type Proxy struct {
	URL     string `json:"url"`
	PingURL string `json:"ping_url,omitempty"`
	// Fallback goes past a proxy that does not answer PingURL.
	Fallback *bool `json:"fallback,omitempty"`
	// CheckInterval is in seconds.
	CheckInterval *int `json:"check_interval,omitempty"`
	UseHTTP       bool `json:"use_http,omitempty"`
}

// Prefetch reads ahead what nobody asked for yet.
type Prefetch struct {
	Enable bool
	// Threads do it, BatchSize is how many bytes one request has, Bandwidth how many
	// bytes a second are enough.
	Threads, BatchSize, Bandwidth *int
	// All prefetches everything, not only what the image lists.
	All *bool
}

// registrySettings and bucketSettings are the settings of backends under the names that
// both versions of nydusd's configuration have for them.
type registrySettings struct {
	Scheme     string `json:"scheme"`
	Host       string `json:"host"`
	Repo       string `json:"repo"`
	SkipVerify bool   `json:"skip_verify,omitempty"`
	transferSettings
	BlobURLScheme      string `json:"blob_url_scheme,omitempty"`
	BlobRedirectedHost string `json:"blob_redirected_host,omitempty"`
}

type bucketSettings struct {
	Scheme       string `json:"scheme"`
	Endpoint     string `json:"endpoint"`
	Region       string `json:"region,omitempty"`
	BucketName   string `json:"bucket_name"`
	ObjectPrefix string `json:"object_prefix,omitempty"`
	SkipVerify   bool   `json:"skip_verify,omitempty"`
	transferSettings
}

type transferSettings struct {
	ConnectTimeout int    `json:"connect_timeout"` // seconds
	Timeout        int    `json:"timeout"`         // seconds, for a whole request
	RetryLimit     int    `json:"retry_limit"`
	Proxy          *Proxy `json:"proxy,omitempty"`
}

// How nydusd treats a slow backend. A request is one range of a few MiB.
const (
	connectTimeout = 5
	requestTimeout = 30
	retryLimit     = 2
)

// settings are those of the backend.
func (c Config) settings() (any, error) {
	b, t := c.Backend, c.transfer()
	scheme := b.Scheme == "http" || b.Scheme == "https"
	switch b.Type {
	case BackendRegistry:
		if b.Host == "" || b.Repository == "" || !scheme {
			return nil, fmt.Errorf("nydusd configuration: registry backend needs scheme (http or https), host and repository, got %q, %q, %q", b.Scheme, b.Host, b.Repository)
		}
		return registrySettings{b.Scheme, b.Host, b.Repository, b.SkipVerify, t.settings(b), t.BlobURLScheme, t.BlobRedirectedHost}, nil
	case BackendLocalFS:
		if !filepath.IsAbs(b.Dir) {
			return nil, fmt.Errorf("nydusd configuration: localfs backend needs an absolute directory, got %q", b.Dir)
		}
		return map[string]string{"dir": b.Dir}, nil
	case BackendOSS, BackendS3:
		at := b.Bucket
		if at.Name == "" || !scheme || (b.Type == BackendS3) != (at.Region != "") || b.Type == BackendOSS && at.Endpoint == "" {
			return nil, fmt.Errorf("nydusd configuration: %s backend needs scheme (http or https), a bucket and, for s3 alone, a region, for oss an endpoint; got %q, %+v", b.Type, b.Scheme, at)
		}
		return bucketSettings{b.Scheme, at.Endpoint, at.Region, at.Name, at.Prefix, b.SkipVerify, t.settings(b)}, nil
	}
	return nil, fmt.Errorf("nydusd configuration: unknown backend type %q", b.Type)
}

// transfer is what of the tuning is for the backend.
func (c Config) transfer() Transfer {
	t := c.Tuning.Transfer
	if c.Backend.Fixed || t.Only != "" && t.Only != c.Backend.Type {
		return Transfer{}
	}
	return t
}

func (t Transfer) settings(b Backend) transferSettings {
	return transferSettings{
		ConnectTimeout: or(t.ConnectTimeout, connectTimeout), Timeout: or(t.Timeout, requestTimeout),
		RetryLimit: or(t.Retries, cmp.Or(b.Retries, retryLimit)), Proxy: t.Proxy,
	}
}

func or[T any](value *T, otherwise T) T {
	if value == nil {
		return otherwise
	}
	return *value
}
