package mountspec

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"path"
	"regexp"
	"strings"
	"testing"
)

// This file restates how the two runtimes of Kata Containers 4.1 read a root
// filesystem, as it was observed: an oracle that shares no code with the package.

// kataMount is what containerd hands to a shim.
type kataMount struct {
	kind, source string
	options      []string
}

// kataVolume is what a runtime took from the option.
type kataVolume struct{ source, config, snapshotDir, fsVersion string }

var errKata = errors.New("refused")

// goRuntime reads as the Go runtime does.
func goRuntime(mounts ...kataMount) (v kataVolume, nydus bool, err error) {
	if len(mounts) != 1 {
		return v, false, nil
	}
	rest, fuse := strings.CutPrefix(mounts[0].kind, "fuse.")
	if !fuse || !strings.HasPrefix(path.Base(rest), "nydus-overlayfs") {
		return v, false, nil
	}
	option := ""
	for _, o := range mounts[0].options {
		if value, ok := strings.CutPrefix(o, "extraoption="); ok {
			option = value // the last one counts
		}
	}
	text, err := base64.StdEncoding.DecodeString(option) // takes line breaks
	if err != nil {
		return v, true, errKata
	}
	var object struct { // keys in any case
		Source      string `json:"source"`
		Config      string `json:"config"`
		SnapshotDir string `json:"snapshotdir"`
		FSVersion   any    `json:"fs_version"` // never looked at
	}
	if json.Unmarshal(text, &object) != nil {
		return v, true, errKata
	}
	if object.Source == "" || object.Config == "" || object.SnapshotDir == "" {
		return v, true, errKata
	}
	version, _ := object.FSVersion.(string)
	return kataVolume{object.Source, object.Config, object.SnapshotDir, version}, true, nil
}

var strictBase64 = regexp.MustCompile(`^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$`)

// rustRuntime reads as runtime-rs does.
func rustRuntime(mounts ...kataMount) (v kataVolume, nydus bool, err error) {
	if len(mounts) != 1 || mounts[0].kind != "fuse.nydus-overlayfs" {
		return v, false, nil
	}
	var options []string
	for _, o := range mounts[0].options {
		if value, ok := strings.CutPrefix(o, "extraoption="); ok {
			options = append(options, value)
		}
	}
	if len(options) != 1 || !strictBase64.MatchString(options[0]) || strings.ContainsAny(options[0], "\r\n") {
		return v, true, errKata
	}
	text, err := base64.StdEncoding.DecodeString(options[0])
	if err != nil {
		return v, true, errKata
	}
	var object map[string]json.RawMessage // keys in their own case
	if json.Unmarshal(text, &object) != nil {
		return v, true, errKata
	}
	for name, to := range map[string]*string{
		"source": &v.source, "config": &v.config, "snapshotdir": &v.snapshotDir, "fs_version": &v.fsVersion,
	} {
		member := object[name]
		if len(member) == 0 || member[0] != '"' || json.Unmarshal(member, to) != nil {
			return kataVolume{}, true, errKata // missing, null or no string
		}
	}
	return v, true, nil
}

const kataGood = `{"source":"/boot","config":"{}","snapshotdir":"/snap","fs_version":"v6"}`

func kataOption(object string) string {
	return "extraoption=" + base64.StdEncoding.EncodeToString([]byte(object))
}

// TestKataOracle proves the oracle against the observed table, row by row.
func TestKataOracle(t *testing.T) {
	without := func(old, new string) string {
		if !strings.Contains(kataGood, old) {
			t.Fatalf("no %q", old)
		}
		return strings.Replace(kataGood, old, new, 1)
	}
	good := kataOption(kataGood)
	// An object whose base64 has padding, and letters that the two alphabets
	// write differently.
	padded := kataOption(without("/boot", "/b???>>>>"))
	if !strings.HasSuffix(padded, "=") || !strings.ContainsAny(padded, "+/") {
		t.Fatalf("%s shows nothing", padded)
	}
	for what, row := range map[string]struct {
		options      []string
		inGo, inRust bool
	}{
		"as it should be":           {[]string{good}, true, true},
		"among other options":       {[]string{"workdir=/w", good, "lowerdir=/l"}, true, true},
		"with padding and + or /":   {[]string{padded}, true, true},
		"fs_version missing":        {[]string{kataOption(without(`,"fs_version":"v6"`, ""))}, true, false},
		"fs_version a number":       {[]string{kataOption(without(`"v6"`, "6"))}, true, false},
		"option given twice":        {[]string{kataOption("nonsense"), good}, true, false},
		"line break in base64":      {[]string{good[:40] + "\n" + good[40:]}, true, false},
		"no padding":                {[]string{strings.TrimRight(padded, "=")}, false, false},
		"URL-safe alphabet":         {[]string{strings.NewReplacer("+", "-", "/", "_").Replace(padded)}, false, false},
		"key in another case":       {[]string{kataOption(without("source", "Source"))}, true, false},
		"unknown key":               {[]string{kataOption(without("{", `{"nydus":{"version":1},`))}, true, true},
		"config an object":          {[]string{kataOption(without(`"{}"`, "{}"))}, false, false},
		"config null":               {[]string{kataOption(without(`"{}"`, "null"))}, false, false},
		"source an empty string":    {[]string{kataOption(without("/boot", ""))}, false, true},
		"config an empty string":    {[]string{kataOption(without("{}", ""))}, false, true},
		"directory an empty string": {[]string{kataOption(without("/snap", ""))}, false, true},
	} {
		mount := kataMount{"fuse.nydus-overlayfs", "/src", row.options}
		for runtime, c := range map[string]struct {
			read func(...kataMount) (kataVolume, bool, error)
			want bool
		}{"the Go runtime": {goRuntime, row.inGo}, "runtime-rs": {rustRuntime, row.inRust}} {
			if _, nydus, err := c.read(mount); !nydus || (err == nil) != c.want {
				t.Errorf("%s: %s: nydus %v, %v; want accepted %v", what, runtime, nydus, err, c.want)
			}
		}
	}
	if v, _, _ := goRuntime(kataMount{"fuse.nydus-overlayfs", "", []string{kataOption("nonsense"), good}}); v.source != "/boot" {
		t.Errorf("the last option does not win: %+v", v)
	}
}

// TestKataMountTypes proves the oracle's rules for the kind and number of mounts.
func TestKataMountTypes(t *testing.T) {
	options := []string{kataOption(kataGood)}
	for kind, want := range map[string][2]bool{
		"fuse.nydus-overlayfs":                {true, true},
		"fuse./usr/local/bin/nydus-overlayfs": {true, false},
		"fuse.nydus-overlayfs-2":              {true, false},
		"fuse3.nydus-overlayfs":               {false, false},
		"nydus-overlayfs":                     {false, false},
		"fuse./nydus-overlayfs/other":         {false, false},
		"overlay":                             {false, false},
	} {
		m := kataMount{kind, "/src", options}
		_, inGo, _ := goRuntime(m)
		_, inRust, _ := rustRuntime(m)
		if got := [2]bool{inGo, inRust}; got != want {
			t.Errorf("%s: nydus for %v, want %v", kind, got, want)
		}
	}
	m := kataMount{"fuse.nydus-overlayfs", "/src", options}
	for _, mounts := range [][]kataMount{{}, {m, m}, {m, {"overlay", "overlay", nil}}} {
		_, inGo, _ := goRuntime(mounts...)
		_, inRust, _ := rustRuntime(mounts...)
		if inGo || inRust {
			t.Errorf("%d mounts are taken for nydus", len(mounts))
		}
	}
}

// kataReads fails unless both runtimes take option, and take from it what s says.
func kataReads(t *testing.T, what string, s *Spec, option string) {
	t.Helper()
	want := kataVolume{s.Bootstrap, s.Config, s.SnapshotDir, s.FSVersion}
	m := kataMount{MountType, s.SnapshotDir, []string{"workdir=" + s.Work(), "upperdir=" + s.Upper(), "lowerdir=/x", option}}
	for runtime, read := range map[string]func(...kataMount) (kataVolume, bool, error){"the Go runtime": goRuntime, "runtime-rs": rustRuntime} {
		got, nydus, err := read(m)
		if !nydus || err != nil || got != want {
			t.Errorf("%s: %s reads %+v, nydus %v, %v; want %+v", what, runtime, got, nydus, err, want)
		}
	}
}

// TestKataReadsOurOption: every Spec that a snapshotter makes.
func TestKataReadsOurOption(t *testing.T) {
	for name, s := range variants() {
		option, err := Encode(s, testKey)
		if err != nil {
			t.Fatal(err)
		}
		kataReads(t, name, s, option)
	}
}
