// Package katatest restates how the two runtimes of Kata Containers 4.1 read a root
// filesystem, as it was observed: an oracle for tests of whatever makes mounts. It
// shares no code with the package that writes the option. Use it in tests only.
package katatest

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path"
	"regexp"
	"strings"
	"testing"
)

// Mount is what containerd hands to a shim.
type Mount struct {
	Type, Source string
	Options      []string
}

// Volume is what a runtime took from the option.
type Volume struct{ Source, Config, SnapshotDir, FSVersion string }

var errRefused = errors.New("refused")

// GoRuntime reads mounts as the Go runtime does; nydus says whether it takes them
// for one of ours.
func GoRuntime(mounts ...Mount) (v Volume, nydus bool, err error) {
	if len(mounts) != 1 {
		return v, false, nil
	}
	rest, fuse := strings.CutPrefix(mounts[0].Type, "fuse.")
	if !fuse || !strings.HasPrefix(path.Base(rest), "nydus-overlayfs") {
		return v, false, nil
	}
	option := ""
	for _, o := range mounts[0].Options {
		if value, ok := strings.CutPrefix(o, "extraoption="); ok {
			option = value // the last one counts
		}
	}
	text, err := base64.StdEncoding.DecodeString(option) // takes line breaks
	if err != nil {
		return v, true, errRefused
	}
	var object struct { // keys in any case
		Source      string `json:"source"`
		Config      string `json:"config"`
		SnapshotDir string `json:"snapshotdir"`
		FSVersion   any    `json:"fs_version"` // never looked at
	}
	if json.Unmarshal(text, &object) != nil {
		return v, true, errRefused
	}
	if object.Source == "" || object.Config == "" || object.SnapshotDir == "" {
		return v, true, errRefused
	}
	version, _ := object.FSVersion.(string)
	return Volume{object.Source, object.Config, object.SnapshotDir, version}, true, nil
}

var strictBase64 = regexp.MustCompile(`^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$`)

// RustRuntime reads mounts as runtime-rs does.
func RustRuntime(mounts ...Mount) (v Volume, nydus bool, err error) {
	if len(mounts) != 1 || mounts[0].Type != "fuse.nydus-overlayfs" {
		return v, false, nil
	}
	var options []string
	for _, o := range mounts[0].Options {
		if value, ok := strings.CutPrefix(o, "extraoption="); ok {
			options = append(options, value)
		}
	}
	if len(options) != 1 || !strictBase64.MatchString(options[0]) || strings.ContainsAny(options[0], "\r\n") {
		return v, true, errRefused
	}
	text, err := base64.StdEncoding.DecodeString(options[0])
	if err != nil {
		return v, true, errRefused
	}
	var object map[string]json.RawMessage // keys in their own case
	if json.Unmarshal(text, &object) != nil {
		return v, true, errRefused
	}
	for name, to := range map[string]*string{
		"source": &v.Source, "config": &v.Config, "snapshotdir": &v.SnapshotDir, "fs_version": &v.FSVersion,
	} {
		member := object[name]
		if len(member) == 0 || member[0] != '"' || json.Unmarshal(member, to) != nil {
			return Volume{}, true, errRefused // missing, null or no string
		}
	}
	return v, true, nil
}

// Takes fails the test unless both runtimes take the mounts, which is exactly one, for
// a nydus root filesystem, find its source, and read want from its option.
func Takes(t testing.TB, what string, want Volume, mounts ...Mount) {
	t.Helper()
	if len(mounts) != 1 {
		t.Errorf("%s: %d mounts, Kata takes exactly one", what, len(mounts))
		return
	}
	// Both resolve the source before they look at the option.
	if _, err := os.Stat(mounts[0].Source); err != nil || !path.IsAbs(mounts[0].Source) {
		t.Errorf("%s: the source %q is no absolute path that exists: %v", what, mounts[0].Source, err)
	}
	for runtime, read := range map[string]func(...Mount) (Volume, bool, error){"the Go runtime": GoRuntime, "runtime-rs": RustRuntime} {
		got, nydus, err := read(mounts...)
		if !nydus || err != nil || got != want {
			t.Errorf("%s: %s reads %+v, nydus %v, %v; want %+v", what, runtime, got, nydus, err, want)
		}
	}
}
