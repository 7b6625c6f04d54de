package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// TestCandidates: an image's label counts before the configuration, and what is never to be
// completed is no candidate.
func TestCandidates(t *testing.T) {
	labels := []string{"", "never", "idle", "always"}
	for download, want := range map[config.Download]map[string]fetch.Policy{
		config.DownloadNever:  {"idle": fetch.Idle, "always": fetch.Always},
		config.DownloadIdle:   {"": fetch.Idle, "idle": fetch.Idle, "always": fetch.Always},
		config.DownloadAlways: {"": fetch.Always, "idle": fetch.Idle, "always": fetch.Always},
	} {
		cfg := config.Default()
		cfg.Root, cfg.Cache.Download = t.TempDir(), download
		layer := func(name, ref, label string) {
			t.Helper()
			dir := filepath.Join(cfg.Root, "snapshots", name)
			must(t, os.MkdirAll(dir, 0o700))
			must(t, os.WriteFile(filepath.Join(dir, "layer.json"), fmt.Appendf(nil,
				`{"version":1,"kind":"bootstrap","image":%q,"digest":"sha256:%064d","path":"image/image.boot","download":%q}`, ref, len(name), label), 0o600))
		}
		for i, label := range labels {
			layer(strings.Repeat("x", i+1), "r.example/app:v-"+label, label)
		}
		pulled := &pulled{now: time.Now, read: func() ([]pulledImage, error) { return pulledImages(cfg) }}
		policy := fetch.Policy(download)
		list, err := candidates(pulled, policy)
		must(t, err)
		got := map[string]fetch.Policy{}
		for _, c := range list {
			label := strings.TrimPrefix(c.Image.Name, "r.example/app:v-")
			got[label] = c.Policy
			i := slices.Index(labels, label)
			cache := mountspec.CacheDir(cfg.Root, "r.example", "app")
			digest := fmt.Sprintf("sha256:%064d", i+1)
			wanted := fetch.Image{
				Name: c.Image.Name, CacheDir: cache, Digest: digest,
				Bootstrap: filepath.Join(cfg.Root, "snapshots", strings.Repeat("x", i+1), "fs", "image", "image.boot"),
			}
			if c.Image != wanted || c.Instance != mountspec.InstanceKey(digest, "r.example", "app", cache) {
				t.Errorf("%s: a candidate is %+v, want the image %+v", download, c, wanted)
			}
			if im, err := pulled.find(c.Image); err != nil || im.Image != c.Image || im.instance != c.Instance {
				t.Errorf("%s: found again is %+v (%v), want %+v", download, im, err, c)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || len(list) != len(want) {
			t.Errorf("%s: by label %v, want %v", download, got, want)
		}

		// One that has no place in the cache is none, and hides no other.
		layer("homeless", "no reference at all", "always")
		pulled.Changed()
		if more, err := candidates(pulled, policy); err != nil || len(more) != len(list) {
			t.Errorf("%s: beside a homeless one: %+v, %v", download, more, err)
		}
		must(t, os.RemoveAll(filepath.Join(cfg.Root, "snapshots")))
		pulled.Changed()
		for _, c := range list {
			if _, err := pulled.find(c.Image); err == nil || !strings.Contains(err.Error(), "not there any more") {
				t.Errorf("%s: what was removed is found again: %v", download, err)
			}
		}
	}
}

// TestServers: only what a daemon fetches for a container is what a container waits for.
func TestServers(t *testing.T) {
	run := t.TempDir()
	if list, err := servers(filepath.Join(run, "none")); err != nil || len(list) != 0 {
		t.Errorf("no run directory: %+v, %v", list, err)
	}
	record := func(key string, g *instance.Generation) {
		t.Helper()
		path := instance.RecordPath(run, key)
		text, err := json.Marshal(instance.Record{Version: 1, Key: key, Current: g})
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, text, 0o600))
	}
	in := func(pool string, number int) *instance.Generation {
		return &instance.Generation{Ready: true, Berth: &instance.Berth{Pool: pool, Generation: number}}
	}
	record("alone", &instance.Generation{Ready: true, PID: 11, StartTime: 111})
	record("starting", &instance.Generation{PID: 12})
	record("held", &instance.Generation{Ready: true, Held: true, PID: 13})
	record("kernel", &instance.Generation{Ready: true, Driver: mountspec.DriverEROFS})
	record("idle", nil)
	record("pool", &instance.Generation{Number: 1, Ready: true, Shared: true, PID: 14, StartTime: 114})
	record("one", in("pool", 1))
	record("two", in("pool", 1))
	record("before", in("pool", 0)) // whose daemon has ended
	record("empty", nil)
	record("in-empty", in("empty", 1))
	record("in-none", in("gone", 1))
	// Somebody makes it, or removes it, just now.
	must(t, os.MkdirAll(filepath.Dir(instance.RecordPath(run, "no-record")), 0o700))

	want := []fetch.Server{
		{Instance: "alone", PID: 11, StartTime: 111},
		{Instance: "one", PID: 14, StartTime: 114},
		{Instance: "two", PID: 14, StartTime: 114},
	}
	is := func(list []fetch.Server) bool {
		slices.SortFunc(list, func(a, b fetch.Server) int { return strings.Compare(a.Instance, b.Instance) })
		return slices.Equal(list, want)
	}
	if list, err := servers(run); err != nil || !is(list) {
		t.Errorf("%+v, %v; want %+v", list, err, want)
	}
	// A record that cannot be read hides no other.
	must(t, os.WriteFile(instance.RecordPath(run, "kernel"), []byte("{"), 0o600))
	if list, err := servers(run); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), instance.RecordPath(run, "kernel")) || !is(list) {
		t.Errorf("beside a damaged one: %+v, %v; want %+v", list, err, want)
	}
}
