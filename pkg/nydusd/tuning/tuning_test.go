package tuning

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

const everything = `{
  "device": {
    "backend": {"type": "registry", "config": {
      "connect_timeout": 3, "timeout": 7, "retry_limit": 4, "blob_url_scheme": "https", "blob_redirected_host": "blobs.example:8443",
      "proxy": {"url": "http://127.0.0.1:65001", "ping_url": "http://127.0.0.1:40901/server/ping", "fallback": true, "check_interval": 5, "use_http": true}
    }},
    "cache": {"type": "blobcache"}
  },
  "mode": "direct", "digest_validate": false, "enable_xattr": false, "iostats_files": true, "access_pattern": true, "latest_read_files": true,
  "amplify_io": 1048576,
  "fs_prefetch": {"enable": true, "threads_count": 8, "merging_size": 131072, "bandwidth_rate": 4294967295, "prefetch_all": false}
}`

func ptr[T any](v T) *T { return &v }

func TestParse(t *testing.T) {
	for text, want := range map[string]nydusd.Tuning{
		"{}": {},
		` {"device": {"backend": {"config": {"timeout": 9, "proxy": {"url": ""}}}}} `: {Transfer: nydusd.Transfer{Timeout: ptr(9)}},
		everything: {
			Transfer: nydusd.Transfer{
				Only: "registry", ConnectTimeout: ptr(3), Timeout: ptr(7), Retries: ptr(4), BlobURLScheme: "https", BlobRedirectedHost: "blobs.example:8443",
				Proxy: &nydusd.Proxy{URL: "http://127.0.0.1:65001", PingURL: "http://127.0.0.1:40901/server/ping", Fallback: ptr(true), CheckInterval: ptr(5), UseHTTP: true},
			},
			EnableXattr: ptr(false), IOStatsFiles: true, AccessPattern: true, LatestReadFiles: true, AmplifyIO: ptr(1 << 20),
			Prefetch: &nydusd.Prefetch{Enable: true, Threads: ptr(8), BatchSize: ptr(131072), Bandwidth: ptr(1<<32 - 1), All: ptr(false)},
		},
	} {
		got, err := Parse("f", []byte(text))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n got %+v\nwant %+v", text, err, got, want)
		}
	}
}

// Whatever the rules take as a value is in the result.
func TestEveryRuleCounts(t *testing.T) {
	for key, r := range rules() {
		if _, name := filepath.Split(strings.ReplaceAll(key, ".", "/")); (r.check != nil || r.object != nil) && !strings.Contains(everything, `"`+name+`"`) {
			t.Errorf("the test does not set %s", key)
		}
	}
}

// The sample is a right one, and has everything.
func TestSample(t *testing.T) {
	text, err := os.ReadFile("../../../contrib/snapshotter/nydusd-template.json")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse("sample", text); err != nil {
		t.Error(err)
	}
	for key, r := range rules() {
		if name := key[strings.LastIndexByte(key, '.')+1:]; r.foreign == "" && !strings.Contains(string(text), `"`+name+`":`) {
			t.Errorf("the sample does not have %s", key)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	in := func(member string) string { return "{\n\"device\": {\"backend\": {\"config\": {\n" + member + "\n}}}}" }
	for text, want := range map[string][]string{
		"":                      {"line 1: the JSON breaks off"},
		"[]":                    {"line 1: want a JSON object"},
		"\"canary\"":            {"line 1: want a JSON object"},
		"{\n\"mode\": canary}":  {"line 2: the JSON breaks off or is malformed"},
		"{\n\"mode\": \"canary": {"line 2: the JSON breaks off"},
		"{} {\"x\":\"canary\"}": {"line 1: something follows"},
		"{}\n]":                 {"something follows"},
		"{\n\n\"colour\": {\"a\":[1]}, \"size\": 1}":                      {"line 3: colour: unknown key", "line 3: size: unknown key"},
		"{\"Mode\": \"direct\"}":                                          {"line 1: Mode: unknown key"},
		"{\"mode\": \"cached\"}":                                          {`line 1: mode: want one of ["direct"]`},
		"{\"mode\": \"direct\",\n\"mode\": \"direct\"}":                   {"line 2: mode: is there twice"},
		"{\"digest_validate\": true}":                                     {"digest_validate: want false: with anything else nydusd refuses"},
		"{\"digest_validate\": null}":                                     {"digest_validate: want false"},
		"{\"enable_xattr\": \"canary\"}":                                  {"enable_xattr: want true or false"},
		"{\"enable_xattr\": [\n[1]]}":                                     {"line 1: enable_xattr: want true or false"},
		"{\"enable_xattr\": {\"canary\": {}}, \"x\": 1}":                  {"enable_xattr: want true or false", "x: unknown key"},
		"{\"amplify_io\": 1.5}":                                           {"amplify_io: want a whole number"},
		"{\"amplify_io\": 268435457}":                                     {"amplify_io: want a whole number from 0 to 268435456"},
		"{\"amplify_io\": 1e3}":                                           {"amplify_io: want a whole number"},
		"{\"fs_prefetch\": true}":                                         {"fs_prefetch: want an object"},
		"{\"fs_prefetch\": [{}]}":                                         {"fs_prefetch: want an object"},
		"{\"fs_prefetch\": {\"threads_count\": 0}}":                       {"fs_prefetch.threads_count: want a whole number from 1 to 1024"},
		"{\"fs_prefetch\": {\"threads\": 1}}":                             {"fs_prefetch.threads: unknown key"},
		"{\"fs_prefetch\": {\"bandwidth_rate\": 4294967296}}":             {"fs_prefetch.bandwidth_rate: want a whole number"},
		"{\"version\": 2}":                                                {"version: unknown key"},
		"{\"device\": {\"cache\": {\"type\": \"fscache\"}}}":              {`device.cache.type: want one of ["blobcache"]`},
		"{\"device\": {\"cache\": {\"config\": {\"work_dir\": \"/x\"}}}}": {"device.cache.config: is decided for each image"},
		"{\"device\": {\"backend\": {\"type\": \"localfs\"}}}":            {`device.backend.type: want one of ["registry" "oss" "s3"]`},
		in("\"host\": \"x\""):                                             {"line 3: device.backend.config.host: is decided for each image"},
		in("\"skip_verify\": true"):                                       {"line 3: device.backend.config.skip_verify: is said of registries in [remote] skip_verify"},
		in("\"auth\": \"canary\""):                                        {"line 3: device.backend.config.auth: is a secret"},
		in("\"access_key_secret\": \"canary\""):                           {"device.backend.config.access_key_secret: is a secret"},
		in("\"mirrors\": []"):                                             {"device.backend.config.mirrors: newer versions"},
		in("\"timeout\": 0"):                                              {"device.backend.config.timeout: want a whole number from 1"},
		in("\"retry_limit\": 256"):                                        {"device.backend.config.retry_limit: want a whole number from 0 to 255"},
		in("\"blob_redirected_host\": \"u:canary@h\""):                    {"device.backend.config.blob_redirected_host: want a host"},
		in("\"proxy\": {\"url\": \"http://u:canary@proxy\"}"):             {"device.backend.config.proxy.url: want a URL"},
		in("\"proxy\": {\"url\": \"http://proxy?token=canary\"}"):         {"device.backend.config.proxy.url: want a URL"},
		in("\"proxy\": {\"url\": \"proxy:3128\"}"):                        {"device.backend.config.proxy.url: want a URL"},
		in("\"proxy\": {\"check_pause_elapsed\": 1}"):                     {"device.backend.config.proxy.check_pause_elapsed: unknown key"},
		strings.Repeat(" ", MaxSize+1):                                    {"more than 1048576 bytes"},
	} {
		got, err := Parse("/etc/t.json", []byte(text))
		var all *Error
		if !errors.As(err, &all) || !reflect.DeepEqual(got, nydusd.Tuning{}) {
			t.Errorf("%.80q: got %+v, %v", text, got, err)
			continue
		}
		if len(all.Faults) != len(want) {
			t.Errorf("%.80q: want %d faults, got %v", text, len(want), err)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) || !strings.Contains(err.Error(), "/etc/t.json") {
				t.Errorf("%.80q: want %s, got %v", text, w, err)
			}
		}
		if strings.Contains(err.Error(), "canary") && !strings.Contains(text, `{"canary": {}}`) {
			t.Errorf("%.80q: the error repeats it: %v", text, err)
		}
	}
}

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.json")
	if _, err := Read(path); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	for text, want := range map[string]int{`{"amplify_io": 1}`: 1, `{"amplify_io": 2}`: 2} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := Read(path); err != nil || *got.AmplifyIO != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(everything))
	f.Add([]byte(`{"device":{"backend":{"config":{"proxy":[{"a":[]}]}}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		tuned, err := Parse("f", text)
		if err != nil {
			return
		}
		// nydusd gets what can be written.
		c := nydusd.Config{Backend: nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "https", Host: "h", Repository: "r"}, CacheDir: "/c", Tuning: tuned}
		if _, err := c.FuseDev(); err != nil {
			t.Fatal(err)
		}
	})
}
