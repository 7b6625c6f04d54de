package katatest

import (
	"encoding/base64"
	"strings"
	"testing"
)

const good = `{"source":"/boot","config":"{}","snapshotdir":"/snap","fs_version":"v6"}`

func option(object string) string {
	return "extraoption=" + base64.StdEncoding.EncodeToString([]byte(object))
}

// TestOracle proves the oracle against the observed table, row by row.
func TestOracle(t *testing.T) {
	without := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	whole := option(good)
	// An object whose base64 has padding, and letters that the two alphabets
	// write differently.
	padded := option(without("/boot", "/b???>>>>"))
	if !strings.HasSuffix(padded, "=") || !strings.ContainsAny(padded, "+/") {
		t.Fatalf("%s shows nothing", padded)
	}
	for what, row := range map[string]struct {
		options      []string
		inGo, inRust bool
	}{
		"as it should be":           {[]string{whole}, true, true},
		"among other options":       {[]string{"workdir=/w", whole, "lowerdir=/l"}, true, true},
		"with padding and + or /":   {[]string{padded}, true, true},
		"fs_version missing":        {[]string{option(without(`,"fs_version":"v6"`, ""))}, true, false},
		"fs_version a number":       {[]string{option(without(`"v6"`, "6"))}, true, false},
		"option given twice":        {[]string{option("nonsense"), whole}, true, false},
		"line break in base64":      {[]string{whole[:40] + "\n" + whole[40:]}, true, false},
		"no padding":                {[]string{strings.TrimRight(padded, "=")}, false, false},
		"URL-safe alphabet":         {[]string{strings.NewReplacer("+", "-", "/", "_").Replace(padded)}, false, false},
		"key in another case":       {[]string{option(without("source", "Source"))}, true, false},
		"unknown key":               {[]string{option(without("{", `{"nydus":{"version":1},`))}, true, true},
		"config an object":          {[]string{option(without(`"{}"`, "{}"))}, false, false},
		"config null":               {[]string{option(without(`"{}"`, "null"))}, false, false},
		"source an empty string":    {[]string{option(without("/boot", ""))}, false, true},
		"config an empty string":    {[]string{option(without("{}", ""))}, false, true},
		"directory an empty string": {[]string{option(without("/snap", ""))}, false, true},
	} {
		mount := Mount{"fuse.nydus-overlayfs", "/src", row.options}
		for runtime, c := range map[string]struct {
			read func(...Mount) (Volume, bool, error)
			want bool
		}{"the Go runtime": {GoRuntime, row.inGo}, "runtime-rs": {RustRuntime, row.inRust}} {
			if _, nydus, err := c.read(mount); !nydus || (err == nil) != c.want {
				t.Errorf("%s: %s: nydus %v, %v; want accepted %v", what, runtime, nydus, err, c.want)
			}
		}
	}
	if v, _, _ := GoRuntime(Mount{"fuse.nydus-overlayfs", "", []string{option("nonsense"), whole}}); v.Source != "/boot" {
		t.Errorf("the last option does not win: %+v", v)
	}
}

// TestMountTypes proves the oracle's rules for the kind and number of mounts.
func TestMountTypes(t *testing.T) {
	options := []string{option(good)}
	for kind, want := range map[string][2]bool{
		"fuse.nydus-overlayfs":                {true, true},
		"fuse./usr/local/bin/nydus-overlayfs": {true, false},
		"fuse.nydus-overlayfs-2":              {true, false},
		"fuse3.nydus-overlayfs":               {false, false},
		"nydus-overlayfs":                     {false, false},
		"fuse./nydus-overlayfs/other":         {false, false},
		"overlay":                             {false, false},
	} {
		m := Mount{kind, "/src", options}
		_, inGo, _ := GoRuntime(m)
		_, inRust, _ := RustRuntime(m)
		if got := [2]bool{inGo, inRust}; got != want {
			t.Errorf("%s: nydus for %v, want %v", kind, got, want)
		}
	}
	m := Mount{"fuse.nydus-overlayfs", "/src", options}
	for _, mounts := range [][]Mount{{}, {m, m}, {m, {"overlay", "overlay", nil}}} {
		_, inGo, _ := GoRuntime(mounts...)
		_, inRust, _ := RustRuntime(mounts...)
		if inGo || inRust {
			t.Errorf("%d mounts are taken for nydus", len(mounts))
		}
	}
}
