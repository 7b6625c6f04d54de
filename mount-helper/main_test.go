package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestParseArgs(t *testing.T) {
	for _, c := range []struct {
		args []string
		want call
	}{
		// As mount.fuse3 calls it.
		{[]string{"src", "/t", "-o", "extraoption=AA==,rw,dev,suid"}, call{source: "src", target: "/t", options: []string{"extraoption=AA==", "rw", "dev", "suid"}}},
		// As mount(8) does, with and without its flags.
		{[]string{"none", "/t", "-s", "-n", "-v", "-o", "rw", "-t", "nydus"}, call{source: "none", target: "/t", options: []string{"rw"}, sloppy: true, verbose: true}},
		{[]string{"-sfnv", "none", "/t"}, call{source: "none", target: "/t", sloppy: true, fake: true, verbose: true}},
		{[]string{"none", "/t", "-o", "a", "-o", "b,c"}, call{source: "none", target: "/t", options: []string{"a", "b", "c"}}},
		// "-" may be a source.
		{[]string{"-", "/t"}, call{source: "-", target: "/t"}},
		{[]string{"--help"}, call{help: true}},
		{[]string{"x", "-h"}, call{help: true}},
		{[]string{"-V"}, call{version: true}},
	} {
		got, err := parseArgs(c.args)
		if err != nil || !reflect.DeepEqual(*got, c.want) {
			t.Errorf("%q: %+v, %v; want %+v", c.args, got, err, c.want)
		}
	}
	wd, err := os.Getwd()
	must(t, err)
	if c, err := parseArgs([]string{"none", "dir"}); err != nil || c.target != filepath.Join(wd, "dir") {
		t.Errorf("a relative target: %+v, %v", c, err)
	}
}

// As containerd calls on a node with SELinux.
func TestLabels(t *testing.T) {
	const label = `context="system_u:object_r:container_file_t:s0:c1,c2"`
	c, err := parseArgs([]string{"src", "/t", "-o", "extraoption=AA==," + label + ",rw,dev"})
	must(t, err)
	if want := []string{"extraoption=AA==", label, "rw", "dev"}; !reflect.DeepEqual(c.options, want) {
		t.Fatalf("options %q, want %q", c.options, want)
	}
	flags, _, err := c.split()
	must(t, err)
	r, err := fromSpec("/t", flags, nil, &mountspec.Spec{SnapshotDir: "/s", OverlayOptions: []string{"index=off"}})
	must(t, err)
	if want := []string{"index=off", label, "rw", "dev"}; !reflect.DeepEqual(r.above("/image").Options, want) {
		t.Errorf("the overlay gets %q, want %q", r.above("/image").Options, want)
	}
	if _, err := direct("/t", flags, map[string]string{}); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), "context=") {
		t.Errorf("on an image alone: %v, want a usage error", err)
	}
}

func TestReadOnlyOverlayHasNoUpper(t *testing.T) {
	for _, c := range []struct {
		flags []string
		upper string
		lower []string
	}{
		{[]string{"rw"}, "/s/fs", []string{"/l", "/image"}},
		{[]string{"ro", "rw"}, "/s/fs", []string{"/l", "/image"}},
		{[]string{"rw", "ro"}, "", []string{"/s/fs", "/l", "/image"}},
	} {
		r, err := fromSpec("/t", c.flags, nil, &mountspec.Spec{SnapshotDir: "/s", Lower: []string{"/l"}})
		must(t, err)
		if o := r.above("/image"); o.Upper != c.upper || !reflect.DeepEqual(o.Lower, c.lower) || (o.Work == "") != (c.upper == "") {
			t.Errorf("%q: %+v", c.flags, o)
		}
	}
}

func TestParseArgsRefuses(t *testing.T) {
	for _, args := range [][]string{{}, {"a"}, {"a", "b", "c"}, {"a", "b", "-o"}, {"a", "b", "-t"}, {"a", "b", "-x"}, {"a", "b", "--fake"}, {"a", "b", "-N", "ns"}} {
		if c, err := parseArgs(args); !errors.Is(err, errUsage) {
			t.Errorf("%q: %+v, %v; want a usage error", args, c, err)
		}
	}
}

func TestSplitOptions(t *testing.T) {
	c := call{options: strings.Split("rw,,defaults,noauto,nofail,_netdev,user,x-systemd.automount,x-a=b,X-mount.mkdir,comment=x,noatime,suid,bootstrap=/b,root=/r=1", ",")}
	flags, settings, err := c.split()
	if err != nil || !reflect.DeepEqual(flags, []string{"rw", "noatime", "suid"}) || !reflect.DeepEqual(settings, map[string]string{"bootstrap": "/b", "root": "/r=1"}) {
		t.Errorf("flags %q, settings %q, %v", flags, settings, err)
	}
	for _, o := range []string{"size=1", "unknown", "bootstrap", "user=app", "RW", "lowerdir=/"} {
		c := call{options: []string{o}}
		if _, _, err := c.split(); !errors.Is(err, errUsage) {
			t.Errorf("%s: %v, want a usage error", o, err)
		}
		c.sloppy = true
		if _, settings, err := c.split(); (err != nil) != (o == "user=app") || len(settings) > 0 {
			t.Errorf("%s, sloppy: %q, %v", o, settings, err)
		}
	}
}

// The value of an unknown option may be a secret.
func TestUnknownOptionIsNotRepeated(t *testing.T) {
	c := call{options: []string{"passwort=canary"}}
	if _, _, err := c.split(); err == nil || strings.Contains(err.Error(), "canary") || !strings.Contains(err.Error(), `"passwort"`) {
		t.Errorf("%v", err)
	}
}

func TestIDMapOptions(t *testing.T) {
	for _, c := range []struct {
		options string
		want    string // of the uids; empty for none, "!" for an error
	}{
		{"rw", ""},
		{"uidmap=0:100000:65536,gidmap=0:7:1,rw", "[{0 100000 65536}]"},
		{`uidmap="0:100000:10,10:5:1",gidmap=0:7:1`, "[{0 100000 10} {10 5 1}]"},
		{"uidmap=0:100000:65536", "!"},
		{"gidmap=0:100000:65536", "!"},
		{"uidmap=0:1,gidmap=0:1:1", "!"},
		{"uidmap=0:1:0,gidmap=0:1:1", "!"},
	} {
		call := call{options: splitQuoted(c.options)}
		_, settings, err := call.split()
		must(t, err)
		m, err := idMap(settings)
		got := "!"
		switch {
		case err != nil && !errors.Is(err, errUsage):
			t.Errorf("%s: %v", c.options, err)
		case err == nil && m == nil:
			got = ""
		case err == nil:
			got = fmt.Sprint(m.UIDs)
		}
		if got != c.want || len(settings) > 0 {
			t.Errorf("%s: read as %s, %q is left, %v; want %s", c.options, got, settings, err, c.want)
		}
	}
	ids, err := rootfs.ParseIDMap("0:1:1", "0:1:1")
	must(t, err)
	if _, err := fromSpec("/t", nil, ids, &mountspec.Spec{Kind: mountspec.KindImage}); !errors.Is(err, errUsage) {
		t.Errorf("an image alone that is to be id-mapped: %v", err)
	}
	r, err := fromSpec("/t", []string{"ro"}, ids, &mountspec.Spec{Kind: mountspec.KindRootfs, SnapshotDir: "/s"})
	must(t, err)
	// The container's own layer has the right owners.
	if o := r.above("/image"); !r.image.IDMapped || o.IDMap != ids || o.Unmapped != 1 || o.Lower[0] != "/s/fs" {
		t.Errorf("%+v", o)
	}
}

func TestDirectDaemon(t *testing.T) {
	d, err := directDaemon(map[string]string{"nydusd": "/n", "threads": "4", "timeout": "1m", "log_level": "warn"})
	if want := (mountspec.Daemon{Path: "/n", Threads: 4, StartTimeout: time.Minute, LogLevel: "warn",
		OOMScoreAdj: mountspec.DefaultOOMScoreAdj, CgroupParent: mountspec.DefaultCgroupParent}); err != nil || d != want {
		t.Errorf("%+v, %v; want %+v", d, err, want)
	}
	for name, set := range map[string]map[string]string{
		"relative": {"nydusd": "n"}, "no threads": {"nydusd": "/n", "threads": "0"}, "threads": {"nydusd": "/n", "threads": "x"},
		"no unit": {"nydusd": "/n", "timeout": "3"}, "past": {"nydusd": "/n", "timeout": "-1s"},
	} {
		if d, err := directDaemon(set); !errors.Is(err, errUsage) {
			t.Errorf("%s: %+v, %v; want a usage error", name, d, err)
		}
	}
}

func TestReadOnlyMountsDropRW(t *testing.T) {
	r := request{flags: []string{"rw", "noexec", "rw"}}
	if got := r.withoutRW(); !reflect.DeepEqual(got, []string{"noexec"}) {
		t.Errorf("%q", got)
	}
}

func TestFromSpecAddsCredentials(t *testing.T) {
	s := &mountspec.Spec{
		Config:      `{"device":{"backend":{"type":"registry","config":{"host":"h","repo":"r"}}}}`,
		Credentials: &mountspec.Credentials{Auth: "canary"},
	}
	r, err := fromSpec("/t", nil, nil, s)
	if err != nil || !strings.Contains(r.image.Config, `"auth":"canary"`) {
		t.Errorf("%v", err)
	}
	s.Config = "canary"
	if _, err := fromSpec("/t", nil, nil, s); err == nil || strings.Contains(err.Error(), "canary") {
		t.Errorf("of a bad configuration: %v", err)
	}
}

func TestRunTells(t *testing.T) {
	var out bytes.Buffer
	must(t, run("mount.nydus", []string{"--help"}, &out))
	for _, want := range []string{"Usage: mount.nydus SOURCE TARGET", defaultRoot, defaultRunDir} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the help does not say %q", want)
		}
	}
	// What the program takes, the help explains.
	for _, name := range ourSettings {
		if !strings.Contains(out.String(), name+"=") {
			t.Errorf("the help does not explain %s", name)
		}
	}
	out.Reset()
	must(t, run("nydus-overlayfs", []string{"--version"}, &out))
	if out.String() != "nydus-overlayfs "+version+"\n" {
		t.Errorf("version: %q", out.String())
	}
	if err := run("nydus-overlayfs", nil, io.Discard); !errors.Is(err, errUsage) {
		t.Errorf("without arguments: %v", err)
	}
}

func TestDigestOpensOnlyFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/text", []byte("text"), 0o600))
	must(t, os.Symlink(dir+"/text", dir+"/link"))
	for path, want := range map[string]string{
		dir + "/none": "no such file", dir: "not a regular file", dir + "/link": "symbolic link", dir + "/text": "bootstrap " + dir + "/text", "/dev/null": "not a regular file",
	} {
		if d, err := digest(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %q, %v; want an error that says %q", path, d, err, want)
		}
	}
}
