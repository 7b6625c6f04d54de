package config

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	maxGrace = 30 * 24 * time.Hour
	minSweep = time.Second
	maxSweep = 7 * 24 * time.Hour
	maxScrub = 366 * 24 * time.Hour
)

// Watermark is an amount of data: bytes, or a part of a filesystem, 0 to 1. Both are 0
// for none.
type Watermark struct {
	Bytes int64
	Part  float64
}

// Watermarks resolves what c asks for. Without a low one it is the high one.
func (c Cache) Watermarks() (high, low Watermark, err error) {
	if high, err = parseWatermark(c.HighWatermark); err != nil {
		return high, low, fmt.Errorf("cache.high_watermark: %w", err)
	}
	if low, err = parseWatermark(c.LowWatermark); err != nil {
		return high, low, fmt.Errorf("cache.low_watermark: %w", err)
	}
	if low == (Watermark{}) {
		low = high
	}
	return high, low, nil
}

func parseWatermark(text string) (Watermark, error) {
	if text == "" {
		return Watermark{}, nil
	}
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		a, err := parsePercent(text, percent)
		return Watermark{Part: a.part}, err
	}
	n, ok := scaled(text, "KMGT")
	if !ok || n == 0 {
		return Watermark{}, fmt.Errorf(`%q: want bytes as a whole number, with K, M, G or T behind it (of 1024) such as "100G", or a percentage of the filesystem such as "80%%", or nothing`, text)
	}
	return Watermark{Bytes: n}, nil
}

func (v *validator) cache(c Cache) {
	high, err := parseWatermark(c.HighWatermark)
	if err != nil {
		v.fail("cache.high_watermark", "%v", err)
	}
	low, lowErr := parseWatermark(c.LowWatermark)
	if lowErr != nil {
		v.fail("cache.low_watermark", "%v", lowErr)
	}
	switch {
	case errors.Join(err, lowErr) != nil || low == Watermark{}:
	case high == Watermark{}:
		v.fail("cache.low_watermark", "is set without cache.high_watermark, above which it would count; set both or none")
	case (high.Part > 0) != (low.Part > 0):
		v.fail("cache.low_watermark", "is %q and cache.high_watermark %q: want both as sizes or both as percentages", c.LowWatermark, c.HighWatermark)
	case low.Part > high.Part || low.Bytes > high.Bytes:
		v.fail("cache.low_watermark", "is %q, above cache.high_watermark %q", c.LowWatermark, c.HighWatermark)
	}
	v.between("cache.grace", c.Grace, 0, maxGrace)
	v.between("cache.sweep_interval", c.SweepInterval, minSweep, maxSweep)
	if c.ScrubInterval != 0 {
		v.between("cache.scrub_interval", c.ScrubInterval, minSweep, maxScrub)
	}
	v.download(c)
}
