package nydusd

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// AddCredentials returns the configuration text with credentials in its backend,
// which has to be one that takes such: nydusd would ignore others silently. What it
// returns is a secret.
func AddCredentials(config string, c mountspec.Credentials) (string, error) {
	return edit(config, func(d parsed) error {
		for _, s := range []struct{ name, value string }{
			{"auth", c.Auth}, {"registry_token", c.RegistryToken}, {"access_key_id", c.AccessKeyID}, {"access_key_secret", c.AccessKeySecret},
		} {
			if s.value == "" {
				continue
			}
			if !slices.Contains(secretsOf(d.kind), s.name) {
				return fmt.Errorf("a backend of type %q takes no %s", d.kind, s.name)
			}
			d.backend[s.name] = s.value
		}
		return nil
	})
}

// secretsOf lists the secrets that a type of backend takes.
func secretsOf(kind string) []string {
	switch kind {
	case BackendRegistry:
		return []string{"auth", "registry_token"}
	case BackendOSS, BackendS3:
		return []string{"access_key_id", "access_key_secret"}
	}
	return nil
}

// SetCacheDir returns the configuration text with another cache directory. One
// that says nothing of a cache gets one; one that wants none keeps to it.
func SetCacheDir(config, dir string) (string, error) {
	return edit(config, func(d parsed) error {
		d.addCache()
		d.cache["work_dir"] = dir
		return nil
	})
}

// SetID returns the configuration text with a name for what it configures. Of two
// images in one daemon nydusd takes the same backend and the same memory of blobs
// when their configurations are equal: what one says of a blob would count for the
// other.
func SetID(config, id string) (string, error) {
	return edit(config, func(d parsed) error {
		d.named["id"] = id
		return nil
	})
}

// Origin tells which blobs a configuration reads and where it keeps them.
type Origin struct {
	// Host and Repository name a registry; for any other backend Host is empty
	// and Repository says in canonical JSON where its blobs are.
	Host, Repository string
	// CacheDir is empty when the configuration has no cache.
	CacheDir string
	// Secret tells that the configuration holds credentials.
	Secret bool
}

// places lists, for each backend but the registry, the settings that say where
// its blobs are. The others say how to get at them, and some are secrets.
func places() map[string][]string {
	return map[string][]string{
		BackendLocalFS: {"dir", "blob_file"},
		"localdisk":    {"device_path"},
		BackendOSS:     {"endpoint", "bucket_name", "object_prefix"},
		BackendS3:      {"endpoint", "region", "bucket_name", "object_prefix"},
		"http-proxy":   {"addr", "path"},
	}
}

// OriginOf reads a configuration that somebody else wrote, of either of
// nydusd's two versions.
func OriginOf(config string) (Origin, error) {
	var o Origin
	_, err := edit(config, func(d parsed) error {
		o.CacheDir, _ = d.cache["work_dir"].(string)
		o.Secret = holdsSecret(d.backend)
		if d.kind == BackendRegistry {
			o.Host, _ = d.backend["host"].(string)
			o.Repository, _ = d.backend["repo"].(string)
			if o.Host == "" || o.Repository == "" {
				return errors.New("registry backend without host or repo")
			}
			return nil
		}
		names, ok := places()[d.kind]
		if !ok {
			return fmt.Errorf("unknown backend type %q", d.kind)
		}
		where := map[string]any{"type": d.kind}
		for _, name := range names {
			if v, ok := d.backend[name]; ok {
				where[name] = v
			}
		}
		text, err := json.Marshal(where) // sorts its keys
		o.Repository = string(text)
		return err
	})
	return o, err
}

// BackendOf returns the type of a configuration's backend and its settings, among
// which there may be secrets.
func BackendOf(config string) (kind string, settings map[string]any, err error) {
	_, err = edit(config, func(d parsed) error {
		kind, settings = d.kind, d.backend
		return nil
	})
	return kind, settings, err
}

// Validates tells whether a daemon compares chunks with the digests that lie in their blobs, by
// a configuration of either version (nydus-api 0.2.2 and 0.4.1, ConfigV2's
// is_chunk_validation_enabled). One that cannot be read may have it do so.
func Validates(config string) bool {
	type section struct {
		Validate bool `json:"validate"`
	}
	var c struct {
		Device struct {
			Cache section `json:"cache"`
		} `json:"device"`
		DigestValidate bool    `json:"digest_validate"`
		Cache          section `json:"cache"`
		RAFS           section `json:"rafs"`
	}
	return json.Unmarshal([]byte(config), &c) != nil ||
		c.Device.Cache.Validate || c.DigestValidate || c.Cache.Validate || c.RAFS.Validate
}

// holdsSecret looks for secrets. A URL may hold a password.
func holdsSecret(backend map[string]any) bool {
	for _, name := range secrets() {
		if v, ok := backend[name].(string); ok && v != "" {
			return true
		}
	}
	proxy, _ := object(backend, "proxy")["url"].(string)
	return strings.Contains(proxy, "@")
}

// Secrets lists what must not be shown of a configuration, in the forms in which a
// daemon writes it into its log.
func Secrets(config string) []string {
	var all []string
	// A configuration that cannot be read tells a daemon nothing either.
	_, _ = edit(config, func(d parsed) error {
		for _, name := range secrets() {
			value, _ := d.backend[name].(string)
			if value == "" {
				continue
			}
			all = append(all, value)
			if name == "access_key_secret" {
				all = append(all, url.QueryEscape(value), url.PathEscape(value))
			}
			if _, password, ok := strings.Cut(decode(value), ":"); ok && name == "auth" {
				all = append(all, password, url.QueryEscape(password), url.PathEscape(password))
			}
		}
		return nil
	})
	return all
}

func decode(text string) string {
	b, _ := base64.StdEncoding.DecodeString(text)
	return string(b)
}

// secrets are the settings of backends that let somebody in.
func secrets() []string { return append(secretsOf(BackendRegistry), secretsOf(BackendS3)...) }

// parsed gives access to the two parts of a configuration that we touch.
type parsed struct {
	kind           string
	backend, cache map[string]any
	// named is the object with the configuration's id.
	named map[string]any
	// addCache makes cache a part of the configuration if it is not yet.
	addCache func()
}

// edit changes a configuration in place and keeps everything it does not know.
// Its errors never repeat the text, which may hold secrets.
func edit(config string, change func(parsed) error) (string, error) {
	var tree map[string]any
	if json.Unmarshal([]byte(config), &tree) != nil || tree == nil {
		return "", errors.New("nydusd configuration is not a JSON object")
	}
	var p parsed
	top := tree
	if entry := object(tree, "config_v2"); entry != nil {
		top = entry // of fscache
	}
	if device := object(top, "device"); device != nil {
		backend := object(device, "backend")
		p.kind, _ = backend["type"].(string)
		p.backend = object(backend, "config")
		p.named = device
		p.findCache(device, "blobcache", "config")
	} else {
		backend := object(top, "backend")
		p.kind, _ = backend["type"].(string)
		p.backend = object(backend, p.kind)
		p.named = top
		p.findCache(top, "filecache", "filecache")
	}
	if p.kind == "" || p.backend == nil {
		return "", errors.New("nydusd configuration names no backend (device.backend.type and .config, or backend.type and its table)")
	}
	if err := change(p); err != nil {
		return "", fmt.Errorf("nydusd configuration: %w", err)
	}
	text, err := json.Marshal(tree)
	if err != nil {
		return "", errors.New("nydusd configuration cannot be written as JSON")
	}
	return string(text), nil
}

// findCache looks for the settings of a cache in files, called name within the
// section "cache" of parent.
func (p *parsed) findCache(parent map[string]any, kind, name string) {
	section := object(parent, "cache")
	p.cache = object(section, name)
	p.addCache = func() {}
	if p.cache != nil {
		return
	}
	p.cache = map[string]any{}
	switch section["type"] {
	case nil, "", "blobcache", "filecache":
		p.addCache = func() {
			if section == nil {
				section = map[string]any{}
				parent["cache"] = section
			}
			section["type"], section[name] = kind, p.cache
		}
	}
}

func object(parent map[string]any, name string) map[string]any {
	o, _ := parent[name].(map[string]any)
	return o
}
