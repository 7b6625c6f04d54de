package config

import (
	"strings"
	"testing"
)

func TestDownload(t *testing.T) {
	for _, c := range []struct {
		text, fault string
		want        Cache
	}{
		{"", "", Cache{Download: DownloadNever, DownloadRate: 16 << 20}},
		{"download = \"always\"\ndownload_rate = \"0\"", "", Cache{Download: DownloadAlways}},
		{"download = \"idle\"\ndownload_rate = \"2G\"", "", Cache{Download: DownloadIdle, DownloadRate: 2 << 30}},
		{"download = \"often\"", `"often"`, Cache{}},
		{"download_rate = \"1K\"", "at least 64K a second", Cache{}},
	} {
		cfg, err := Parse("test", []byte("version = 1\n[cache]\n"+c.text), nil)
		if c.fault != "" {
			if err == nil || !strings.Contains(err.Error(), "cache.download") || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("%q: %v, want %q", c.text, err, c.fault)
			}
			continue
		}
		if err != nil || cfg.Cache.Download != c.want.Download || cfg.Cache.DownloadRate != c.want.DownloadRate {
			t.Errorf("%q: %+v, %v", c.text, cfg.Cache, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	if n, err := ParseSize("3M"); n != 3<<20 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := ParseSize("3 MB"); err == nil {
		t.Error("3 MB is a size")
	}
}
