package config

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
)

var update = flag.Bool("update", false, "write golden files")

func TestDefaultTOMLIsTheDefault(t *testing.T) {
	got, err := Parse("default", []byte(DefaultTOML), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(got, want) {
		t.Fatalf("default.toml gives\n%+v\nwant\n%+v", got, want)
	}
}

// The documented file sets every key there is.
func TestDefaultTOMLIsComplete(t *testing.T) {
	at := lines([]byte(DefaultTOML))
	var check func(prefix string, t reflect.Type)
	check = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			key := join(prefix, typ.Field(i).Tag.Get("toml"))
			if isTables(reflect.New(typ.Field(i).Type).Elem()) {
				continue // see TestDefaultTOMLExplainsBackends
			}
			if at[key] == 0 {
				t.Errorf("default.toml does not have %s", key)
			}
			if typ.Field(i).Type.Kind() == reflect.Struct {
				check(key, typ.Field(i).Type)
			}
		}
	}
	check("", reflect.TypeFor[Config]())
}

func TestDefaultGolden(t *testing.T) {
	text, err := toml.Marshal(Default())
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "default.golden.toml")
	if *update {
		if err := os.WriteFile(golden, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(text) != string(want) {
		t.Fatalf("defaults changed (go test -update if meant):\n%s", text)
	}
}

func TestParseKeepsWhatIsSet(t *testing.T) {
	got, err := Parse("f", []byte(`
version = 1
root = "/data/nydus"
daemon.oom_score_adj = 0
daemon.cgroup_parent = ""
daemon.log_max_size = "65536"
mount = { idle_linger = "0s", style = "managed" }
[remote]
plain_http = ["registry.example:5000", "[::1]:5000", "[fd00::1]"]
`), Overrides{"address": "/run/other.sock", "log.level": "debug"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Root, want.Address, want.Log.Level = "/data/nydus", "/run/other.sock", "debug"
	want.Daemon.OOMScoreAdj, want.Daemon.CgroupParent = 0, ""
	want.Daemon.LogMaxSize = 64 << 10
	want.Mount.IdleLinger, want.Mount.Style = 0, StyleManaged
	want.Remote.PlainHTTP = []string{"registry.example:5000", "[::1]:5000", "[fd00::1]"}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("got\n%+v\nwant\n%+v", got, want)
	}
}

func TestFromDefaults(t *testing.T) {
	got, err := FromDefaults(Overrides{"run_dir": "/run/n"})
	if err != nil || got.RunDir != "/run/n" || got.Daemon.StartTimeout != 20*time.Second {
		t.Fatalf("got %+v, %v", got, err)
	}
	if _, err := FromDefaults(Overrides{"run_dir": "n", "nothing": "x"}); err == nil ||
		!strings.Contains(err.Error(), "run_dir: ") || !strings.Contains(err.Error(), "nothing: ") {
		t.Fatalf("got %v", err)
	}
}

// Every kind of fault, and no kind hides another.
func TestAllFaultsInOneError(t *testing.T) {
	text := `version = 2
root = "relative"
rot = "/x"
address = 7
Run-Dir = "/x"

[daemon]
threads = "many"
start_timeout = 20
log_level = "loud"
oom_score_adj = -1001
nydusd-path = "/x"
cgroup_parent = true

[cgroup]
memory = "64mb"
cpu = 2

[mount]
style = "managed"
credentials = "plain"
idle_linger = "soon"

[log]
format = ["text"]

[remote]
backend = "localfs"
plain_http = ["https://registry.example", "a.example", "a.example"]
skip_verify = ["a.example", 3]

[metrics]
address = ":9110"
`
	want := []string{
		"line 1: version: is 2",
		`line 2: root: "relative"`,
		"line 3: rot: unknown key",
		"line 4: address: want text, got the number 7",
		"line 5: Run-Dir: unknown key; did you mean run_dir?",
		"line 8: daemon.threads: want a whole number",
		"line 9: daemon.start_timeout: want a duration",
		`line 10: daemon.log_level: is "loud"`,
		"line 11: daemon.oom_score_adj: is -1001",
		"line 12: daemon.nydusd-path: unknown key; did you mean nydusd_path?",
		"line 13: daemon.cgroup_parent: want text, got true or false",
		`line 16: cgroup.memory: "64mb": want bytes`,
		"line 17: cgroup.cpu: want text, got the number 2",
		`line 21: mount.credentials: "plain" is for Kata`,
		`line 22: mount.idle_linger: "soon" is no duration`,
		"line 25: log.format: want text, got a list",
		"line 28: remote.backend: unknown key",
		`line 29: remote.plain_http: "https://registry.example": want a registry`,
		`line 29: remote.plain_http: "a.example" is listed twice`,
		"line 30: remote.skip_verify: want a list of texts, element 1 is the number 3",
		"line 32: metrics: unknown key",
	}
	_, err := Parse("f.toml", []byte(text), nil)
	var all *Error
	if !errors.As(err, &all) {
		t.Fatalf("got %v", err)
	}
	if len(all.Faults) != len(want) {
		t.Errorf("got %d faults, want %d", len(all.Faults), len(want))
	}
	for i, w := range want {
		if i < len(all.Faults) && !strings.HasPrefix(all.Faults[i].String(), w) {
			t.Errorf("fault %d is %q, want %q", i, all.Faults[i], w)
		}
	}
	if !strings.HasPrefix(err.Error(), "configuration f.toml has 21 faults:\n  line 1:") {
		t.Errorf("got %q", err)
	}
}

func TestSingleFaults(t *testing.T) {
	long := "/" + strings.Repeat("r", MaxRunDir)
	for text, want := range map[string]string{
		``:                                        "version: is missing",
		`root = "/data"`:                          "version: is missing",
		"version = 1\nroot = \"/data\nlog":        "line 2: ",
		"version = 1\nversion = 1":                "line 2: ",
		"version = 1\n[[daemon]]\nthreads=1":      "line 2: daemon: want a table, got a list",
		"version = 1\nlog = \"info\"":             "line 2: log: want a table, got text",
		"version = 1.0":                           "version: want a whole number",
		"version = 1\nroot = \"\"":                "line 2: root: is empty",
		"version = 1\nroot = \"/\"":               "root: must not be /",
		"version = 1\nroot = \"/a/\"":             "without a slash",
		"version = 1\nroot = \"/a:b\"":            "overlay option cannot carry",
		"version = 1\nroot = \"/a,b\"":            "overlay option cannot carry",
		"version = 1\nroot = '/a\\b'":             "overlay option cannot carry",
		"version = 1\nroot = \"/a\\nb\"":          "overlay option cannot carry",
		"version = 1\nroot = \"/a{{b\"":           "template",
		"version = 1\nrun_dir = \"" + long + "\"": "allow 55",
		"version = 1\naddress = \"/" + strings.Repeat("a", 103) + `"`:                                    "a socket allows",
		"version = 1\nrun_dir = \"/var/lib/nydus-snapshotter/run\"":                                      "must not lie within",
		"version = 1\nroot = \"/run/nydus-snapshotter/root\"":                                            "must not lie within",
		"version = 1\naddress = \"/run/nydus-snapshotter\"":                                              "taken by what run_dir holds",
		"version = 1\naddress = \"/run/nydus-snapshotter/i/s\"":                                          "taken by what run_dir holds",
		"version = 1\naddress = \"/run/nydus-snapshotter/keys/s\"":                                       "where the sealing keys are",
		"version = 1\nrun_dir = \"/run/n\"\nroot = \"/run/nydus-snapshotter/r\"\naddress = \"/run/n/s\"": "ends with the boot",
		"version = 1\naddress = \"/var/lib\"":                                                            "must not be root",
		"version = 1\ndaemon.nydusd_path = \"nydusd\"":                                                   "want an absolute path",
		"version = 1\ndaemon.config_template = \"x.json\"":                                               "want an absolute path",
		"version = 1\ndaemon.start_timeout = \"1ms\"":                                                    "want 100ms to 10m",
		"version = 1\ndaemon.log_max_size = 7":                                                           `want a size as text, such as "16M", got the number 7`,
		"version = 1\ndaemon.log_max_size = \"16KM\"":                                                    `"16KM" is no size`,
		"version = 1\ndaemon.log_max_size = \"\"":                                                        `"" is no size`,
		"version = 1\ndaemon.log_max_size = \"1M6\"":                                                     `"1M6" is no size`,
		"version = 1\ndaemon.log_max_size = \"63K\"":                                                     "is 63K, want 64K to 1G",
		"version = 1\ndaemon.log_max_size = \"1025M\"":                                                   "is 1025M, want 64K to 1G",
		"version = 1\ndaemon.threads = -1":                                                               "want 0",
		"version = 1\ndaemon.threads = 99999999999":                                                      "32 bits",
		"version = 1\ndaemon.cgroup_parent = \"/a/../b\"":                                                "cgroup hierarchy",
		"version = 1\ncgroup.memory = \"-1M\"":                                                           "want bytes",
		"version = 1\ncgroup.memory = \"1.5G\"":                                                          "want bytes",
		"version = 1\ncgroup.memory = \"M\"":                                                             "want bytes",
		"version = 1\ncgroup.memory = \"64MM\"":                                                          "want bytes",
		"version = 1\ncgroup.memory = \"15M\"":                                                           "want 16M",
		"version = 1\ncgroup.memory = \"0\"":                                                             "want 16M",
		"version = 1\ncgroup.memory = \"9999999999G\"":                                                   "want 16M",
		"version = 1\ncgroup.memory = \"99999999999999999999\"":                                          "want bytes",
		"version = 1\ncgroup.memory = \"0%\"":                                                            "above 0% and up to 100%",
		"version = 1\ncgroup.memory = \"101%\"":                                                          "above 0% and up to 100%",
		"version = 1\ncgroup.memory = \"NaN%\"":                                                          "above 0% and up to 100%",
		"version = 1\ncgroup.cpu = \"two\"":                                                              "want a number of cores",
		"version = 1\ncgroup.cpu = \"1e3\"":                                                              "want a number of cores",
		"version = 1\ncgroup.cpu = \"-1\"":                                                               "want a number of cores",
		"version = 1\ncgroup.cpu = \"0\"":                                                                "want 0.01",
		"version = 1\ncgroup.cpu = \"0.009\"":                                                            "want 0.01",
		"version = 1\ncgroup.cpu = \"%\"":                                                                "above 0% and up to 100%",
		"version = 1\ncgroup.cpu = \"1\"\ndaemon.cgroup_parent = \"\"":                                   "without a cgroup nothing can be limited",
		"version = 1\ncgroup.memory = \"1G\"\ndaemon.oom_score_adj = -1000":                              "use -999 or more",
		"version = 1\nmount.idle_linger = \"-1s\"":                                                       "want 0s to 24h",
		"version = 1\nmount.driver = \"loop\"":                                                           "want one of: auto, fuse, erofs",
		"version = 1\nmount.style = \"kata\"":                                                            "want one of: helper, managed",
		"version = 1\nremote.plain_http = [\"a\"]\nremote.skip_verify = [\"a\"]":                         "also in plain_http",
		"version = 1\nremote.plain_http = [\"a:0\"]":                                                     "host or host:port",
		"version = 1\nremote.plain_http = [\"a/b\"]":                                                     "host or host:port",
		"version = 1\nremote.plain_http = [\"\"]":                                                        "host or host:port",
		"version = 1\ndaemon.threads = 2026-01-01":                                                       "a date or time",
		"version = 1\n#" + strings.Repeat("x", MaxSize):                                                  "more than the limit",
	} {
		_, err := Parse("f", []byte(text), nil)
		var all *Error
		if !errors.As(err, &all) {
			t.Errorf("%.60q: got %v", text, err)
			continue
		}
		if len(all.Faults) != 1 || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: want one fault with %q, got: %v", text, want, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(DefaultTOML))
	f.Add([]byte("version = 1\nmount = {style = 'managed', a.b = [1, {c = 2}]}\n[[x]]\n[x.y]\n"))
	f.Add([]byte("version = 1\n\"a.b\".c = 1979-05-27T07:32:00Z\n[remote]\nplain_http=['a',]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("fuzz", text, nil)
		if err != nil {
			var all *Error
			if !errors.As(err, &all) || len(all.Faults) == 0 {
				t.Fatalf("error without faults: %v", err)
			}
			return
		}
		if faults := c.Validate(); len(faults) > 0 {
			t.Fatalf("accepted although %v", faults)
		}
	})
}
