package nydusd

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
)

// FSCacheImage is an image that nydusd serves to the kernel's EROFS over fscache.
type FSCacheImage struct {
	// ID is what the mount names as fsid, Domain as domain_id.
	ID, Domain string
	// Bootstrap is the path of the image's metadata.
	Bootstrap string
}

// The shape of a blob entry with nydusd's configuration, second version.
type blobEntry struct {
	Type     string      `json:"type"`
	ID       string      `json:"id"`
	DomainID string      `json:"domain_id"`
	Config   blobSection `json:"config_v2"`
}

type blobSection struct {
	Version      int            `json:"version"`
	ID           string         `json:"id"`
	Backend      map[string]any `json:"backend"`
	Cache        fsCache        `json:"cache"`
	MetadataPath string         `json:"metadata_path"`
}

type fsCache struct {
	Type     string          `json:"type"`
	Validate bool            `json:"validate,omitempty"`
	Prefetch *prefetchSecond `json:"prefetch,omitempty"`
	FSCache  struct {
		WorkDir string `json:"work_dir"`
	} `json:"fscache"`
}

// prefetchSecond is Prefetch in the second version's names.
type prefetchSecond struct {
	Enable    bool  `json:"enable"`
	Threads   *int  `json:"threads,omitempty"`
	BatchSize *int  `json:"batch_size,omitempty"`
	Bandwidth *int  `json:"bandwidth_limit,omitempty"`
	All       *bool `json:"prefetch_all,omitempty"`
}

// FSCache writes what PUT /api/v2/blobs of a nydusd that serves fscache takes for an
// image. CacheDir has to be the directory that this nydusd was started with. Of the
// Tuning it has Transfer and Prefetch; the rest is about FUSE. AddCredentials knows the
// result. Nothing here starts such a nydusd yet: this is where that begins.
func (c Config) FSCache(i FSCacheImage) (string, error) {
	settings, err := c.settings()
	if err != nil {
		return "", err
	}
	if i.ID == "" || i.Domain == "" {
		return "", errors.New("nydusd configuration: an image of fscache needs id and domain")
	}
	for _, path := range []string{i.Bootstrap, c.CacheDir} {
		if !filepath.IsAbs(path) {
			return "", fmt.Errorf("nydusd configuration: an image of fscache needs absolute paths of bootstrap and cache, got %q", path)
		}
	}
	e := blobEntry{Type: "bootstrap", ID: i.ID, DomainID: i.Domain, Config: blobSection{
		Version: 2, ID: i.ID, MetadataPath: i.Bootstrap,
		Backend: map[string]any{"type": c.Backend.Type, c.Backend.Type: settings}, Cache: fsCache{Type: "fscache", Validate: c.Validate},
	}}
	e.Config.Cache.FSCache.WorkDir = c.CacheDir
	if p := c.Tuning.Prefetch; p != nil {
		e.Config.Cache.Prefetch = &prefetchSecond{p.Enable, p.Threads, p.BatchSize, p.Bandwidth, p.All}
	}
	text, err := json.Marshal(e)
	return string(text), err
}
