package tuning

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
)

// rule says what may be at a key: an object, a value that check accepts, or nothing, for
// the reason foreign.
type rule struct {
	object  *struct{}
	what    string
	check   func(value json.Token) (problem string)
	foreign string
}

func (r rule) wants() string {
	if r.object != nil {
		return "an object"
	}
	return r.what
}

// Why a key that nydusd knows is not the operator's.
const (
	perImage = "is decided for each image; remove it"
	secret   = "is a secret, which a template must not hold: logins are docker's, access keys are in the credentials_file of a [[backend]]"
	perHost  = "is said of registries in [remote] skip_verify or hosts.toml, and of buckets in their [[backend]]; remove it"
)

// maxBatch is the most that nydusd takes for the size of a request.
const maxBatch = 1 << 28

// rules are those of the keys that nydusd 2.2 and 2.4 both know in the first version of
// the configuration (nydus-api, src/config.rs).
func rules() map[string]rule {
	const backend = "device.backend.config."
	all := map[string]rule{
		"device": object(), "device.backend": object(), "device.backend.type": one("registry", "oss", "s3"), "device.backend.config": object(),
		"device.id": {foreign: perImage}, "device.cache": object(), "device.cache.type": one("blobcache"), "device.cache.config": {foreign: perImage},
		"device.cache.validate":   {foreign: "is [daemon] validate; remove it"},
		"device.cache.compressed": {foreign: "means nothing to nydusd any more; remove it"},

		backend + "connect_timeout": whole(1, 3600), backend + "timeout": whole(1, 3600), backend + "retry_limit": whole(0, 255),
		backend + "blob_url_scheme": one("", "http", "https"), backend + "blob_redirected_host": host(), backend + "skip_verify": {foreign: perHost},
		backend + "mirrors": {foreign: "newer versions of nydusd do not know it; say it in hosts.toml, see [remote] config_path"},

		backend + "proxy": object(), backend + "proxy.url": address(), backend + "proxy.ping_url": address(), backend + "proxy.fallback": boolean(),
		backend + "proxy.check_interval": whole(1, 86400), backend + "proxy.use_http": boolean(),

		"mode": one("direct"), "digest_validate": never(), "enable_xattr": boolean(), "iostats_files": boolean(), "access_pattern": boolean(),
		"latest_read_files": boolean(), "amplify_io": whole(0, maxBatch),

		"fs_prefetch": object(), "fs_prefetch.enable": boolean(), "fs_prefetch.threads_count": whole(1, 1024), "fs_prefetch.merging_size": whole(1, maxBatch),
		"fs_prefetch.bandwidth_rate": whole(0, 1<<32-1), "fs_prefetch.prefetch_all": boolean(),
	}
	for _, key := range []string{"scheme", "host", "repo", "endpoint", "region", "bucket_name", "object_prefix", "dir", "alt_dirs", "blob_file", "device_path", "addr", "path"} {
		all[backend+key] = rule{foreign: perImage}
	}
	for _, key := range []string{"auth", "registry_token", "access_key_id", "access_key_secret"} {
		all[backend+key] = rule{foreign: secret}
	}
	return all
}

func object() rule { return rule{object: &struct{}{}} }

func boolean() rule {
	return value("true or false", func(v json.Token) string {
		if _, ok := v.(bool); !ok {
			return "want true or false"
		}
		return ""
	})
}

// never is for a switch that has to stay off.
func never() rule {
	return value("false", func(v json.Token) string {
		if v != false {
			return "want false: with anything else nydusd refuses images of RAFS version 6"
		}
		return ""
	})
}

func whole(least, most int64) rule {
	want := fmt.Sprintf("a whole number from %d to %d", least, most)
	return value(want, func(v json.Token) string {
		n, ok := v.(json.Number)
		if i, err := n.Int64(); !ok || err != nil || i < least || i > most {
			return "want " + want
		}
		return ""
	})
}

func text(want string, fits func(string) bool) rule {
	return value(want, func(v json.Token) string {
		if s, ok := v.(string); !ok || !fits(s) {
			return "want " + want
		}
		return ""
	})
}

func one(allowed ...string) rule {
	return text(fmt.Sprintf("one of %q", allowed), func(s string) bool {
		for _, a := range allowed {
			if s == a {
				return true
			}
		}
		return false
	})
}

func host() rule {
	return text("a host with or without a port", func(s string) bool { return !strings.ContainsAny(s, "/@? ") })
}

// address is of a proxy: nydusd ends at one that it cannot read. A password would show in
// the mount option.
func address() rule {
	return text("a URL such as http://127.0.0.1:65001, without user and password", func(s string) bool {
		u, err := url.Parse(s)
		return s == "" || err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil && u.RawQuery == "" && !strings.Contains(s, "@")
	})
}

func value(what string, check func(json.Token) string) rule { return rule{what: what, check: check} }
