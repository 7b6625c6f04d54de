package config

import (
	"strings"
	"testing"
)

func TestLimits(t *testing.T) {
	const memory, cpus = 8 << 30, 6
	for _, c := range []struct {
		memory, cpu string
		want        Limits
	}{
		{"", "", Limits{}},
		{"16777216", "0.01", Limits{16 << 20, 10}},
		{"65536K", "1.5", Limits{64 << 20, 1500}},
		{"512M", "2", Limits{512 << 20, 2000}},
		{"3G", "", Limits{3 << 30, 0}},
		{"10%", "25%", Limits{memory / 10, 1500}},
		{"100%", "100%", Limits{memory, 6000}},
		{"12.5%", "0.5%", Limits{1 << 30, 30}},
		{"", "0.01%", Limits{0, 10}}, // as little as the kernel does
	} {
		if got, err := (Cgroup{c.memory, c.cpu}).Limits(memory, cpus); err != nil || got != c.want {
			t.Errorf("%q, %q: %+v, %v; want %+v", c.memory, c.cpu, got, err, c.want)
		}
	}
	if _, err := (Cgroup{Memory: "1%"}).Limits(1<<30, 1); err == nil || !strings.Contains(err.Error(), "cgroup.memory: 1% of this machine's memory is 10737418 bytes, and nydusd needs 16777216") {
		t.Errorf("of a small machine: %v", err)
	}
	if _, err := (Cgroup{CPU: "x"}).Limits(1, 1); err == nil {
		t.Error("what is not valid was taken")
	}
}
