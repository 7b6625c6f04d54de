package nydusd

import "encoding/json"

// The shape of nydusd's configuration, first version: what 2.2 and 2.4 read
// alike and what Kata hands on.
type document struct {
	Device          device         `json:"device"`
	Mode            string         `json:"mode"`
	DigestValidate  bool           `json:"digest_validate"` // RAFS v6 refuses true
	IOStatsFiles    bool           `json:"iostats_files"`
	EnableXattr     bool           `json:"enable_xattr"`
	AccessPattern   bool           `json:"access_pattern,omitempty"`
	LatestReadFiles bool           `json:"latest_read_files,omitempty"`
	AmplifyIO       *int           `json:"amplify_io,omitempty"`
	Prefetch        *prefetchFirst `json:"fs_prefetch,omitempty"`
}

type device struct {
	Backend struct {
		Type   string `json:"type"`
		Config any    `json:"config"`
	} `json:"backend"`
	Cache struct {
		Type     string `json:"type"`
		Validate bool   `json:"validate,omitempty"`
		Config   struct {
			WorkDir string `json:"work_dir"`
		} `json:"config"`
	} `json:"cache"`
}

// prefetchFirst is Prefetch in the first version's names.
type prefetchFirst struct {
	Enable    bool  `json:"enable"`
	Threads   *int  `json:"threads_count,omitempty"`
	BatchSize *int  `json:"merging_size,omitempty"`
	Bandwidth *int  `json:"bandwidth_rate,omitempty"`
	All       *bool `json:"prefetch_all,omitempty"`
}

// FuseDev writes the configuration for a nydusd that serves over FUSE: for its
// command line, or for an image that it is given.
func (c Config) FuseDev() (string, error) {
	settings, err := c.settings()
	if err != nil {
		return "", err
	}
	t := c.Tuning
	d := document{
		Mode: "direct", EnableXattr: or(t.EnableXattr, true), IOStatsFiles: t.IOStatsFiles,
		AccessPattern: t.AccessPattern, LatestReadFiles: t.LatestReadFiles, AmplifyIO: t.AmplifyIO,
	}
	if p := t.Prefetch; p != nil {
		d.Prefetch = &prefetchFirst{p.Enable, p.Threads, p.BatchSize, p.Bandwidth, p.All}
	}
	d.Device.Backend.Type, d.Device.Backend.Config = c.Backend.Type, settings
	d.Device.Cache.Type, d.Device.Cache.Validate, d.Device.Cache.Config.WorkDir = "blobcache", c.Validate, c.CacheDir
	text, err := json.Marshal(d)
	return string(text), err
}
