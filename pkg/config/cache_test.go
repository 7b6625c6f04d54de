package config

import (
	"strings"
	"testing"
	"time"
)

func TestScrubInterval(t *testing.T) {
	for interval, right := range map[time.Duration]bool{
		0: true, time.Second: true, 168 * time.Hour: true, time.Millisecond: false, -time.Hour: false, 10_000 * time.Hour: false,
	} {
		cfg := Default()
		cfg.Cache.ScrubInterval = interval
		faults := cfg.Validate()
		if (len(faults) == 0) != right || len(faults) > 0 && faults[0].Key != "cache.scrub_interval" {
			t.Errorf("%s: %v", interval, faults)
		}
	}
}

func TestWatermarks(t *testing.T) {
	for _, c := range []struct {
		high, low string
		want      [2]Watermark
		fault     string
	}{
		{"", "", [2]Watermark{}, ""},
		{"80%", "60%", [2]Watermark{{Part: 0.8}, {Part: 0.6}}, ""},
		{"100G", "", [2]Watermark{{Bytes: 100 << 30}, {Bytes: 100 << 30}}, ""},
		{"2T", "512M", [2]Watermark{{Bytes: 2 << 40}, {Bytes: 512 << 20}}, ""},
		{"1000", "1K", [2]Watermark{}, "above"},
		{"", "1G", [2]Watermark{}, "without"},
		{"80%", "1G", [2]Watermark{}, "both"},
		{"50%", "60%", [2]Watermark{}, "above"},
		{"101%", "", [2]Watermark{}, "up to 100%"},
		{"0", "", [2]Watermark{}, "whole number"},
		{"-1G", "", [2]Watermark{}, "whole number"},
		{"1.5G", "", [2]Watermark{}, "whole number"},
		{"9999999999T", "", [2]Watermark{}, "whole number"},
		{"1GG", "", [2]Watermark{}, "whole number"},
		{"10 GB", "", [2]Watermark{}, "whole number"},
	} {
		cfg := Default()
		cfg.Cache.HighWatermark, cfg.Cache.LowWatermark = c.high, c.low
		faults := cfg.Validate()
		if c.fault != "" {
			if len(faults) != 1 || !strings.Contains(faults[0].Problem, c.fault) {
				t.Errorf("%q, %q: %v, want %q", c.high, c.low, faults, c.fault)
			}
			continue
		}
		high, low, err := cfg.Cache.Watermarks()
		if got := [2]Watermark{high, low}; err != nil || len(faults) > 0 || got != c.want {
			t.Errorf("%q, %q: %v, %v, %v; want %v", c.high, c.low, got, err, faults, c.want)
		}
	}
}
