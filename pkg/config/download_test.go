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
		{"download_rate = \"1024G\"", "", Cache{Download: DownloadNever, DownloadRate: 1 << 40}},
		{"download_rate = \"1025G\"", "at most 1024G", Cache{}},
		{"download_rate = \"99999999999G\"", "is no size", Cache{}},
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
	for _, text := range []string{"3 MB", "99999999999G", "9223372036854775807K", "9223372036854775808"} {
		if n, err := ParseSize(text); err == nil {
			t.Errorf("%s is a size of %d bytes", text, n)
		}
	}
}

func TestHostBandwidth(t *testing.T) {
	for rate, right := range map[Size]bool{0: true, 1 << 20: true, 1 << 40: true, 1<<40 + 1: false, 1<<20 - 1: false, -1: false} {
		cfg := Default()
		cfg.Remote.HostBandwidth = rate
		faults := cfg.Validate()
		if (len(faults) == 0) != right || len(faults) > 0 && faults[0].Key != "remote.host_bandwidth" {
			t.Errorf("%s: %v", rate, faults)
		}
	}
}
