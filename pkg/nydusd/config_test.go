package nydusd

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

func TestFuseDev(t *testing.T) {
	for _, c := range []struct {
		name   string
		config Config
		want   string
	}{
		{"registry", Config{Backend: Backend{Type: BackendRegistry, Scheme: "https", Host: "r.test:5000", Repository: "a/b"}, CacheDir: "/c"},
			`{"device":{"backend":{"type":"registry","config":{"scheme":"https","host":"r.test:5000","repo":"a/b","connect_timeout":5,"timeout":30,"retry_limit":2}},` +
				`"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}`},
		{"registry, any certificate", Config{Backend: Backend{Type: BackendRegistry, Scheme: "http", Host: "h", Repository: "r", SkipVerify: true}},
			`{"device":{"backend":{"type":"registry","config":{"scheme":"http","host":"h","repo":"r","skip_verify":true,"connect_timeout":5,"timeout":30,"retry_limit":2}},` +
				`"cache":{"type":"blobcache","config":{"work_dir":""}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}`},
		{"localfs", Config{Backend: Backend{Type: BackendLocalFS, Dir: "/blobs"}, CacheDir: "/c"},
			`{"device":{"backend":{"type":"localfs","config":{"dir":"/blobs"}},` +
				`"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}`},
		{"s3", Config{Backend: Backend{Type: BackendS3, Scheme: "https", SkipVerify: true, Bucket: Bucket{"s3.test:9000", "eu-1", "b", "p/"}}, CacheDir: "/c"},
			`{"device":{"backend":{"type":"s3","config":{"scheme":"https","endpoint":"s3.test:9000","region":"eu-1","bucket_name":"b","object_prefix":"p/","skip_verify":true,"connect_timeout":5,"timeout":30,"retry_limit":2}},` +
				`"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}`},
		{"s3 of AWS", Config{Backend: Backend{Type: BackendS3, Scheme: "https", Bucket: Bucket{Region: "eu-1", Name: "b"}}, CacheDir: "/c"},
			`{"device":{"backend":{"type":"s3","config":{"scheme":"https","endpoint":"","region":"eu-1","bucket_name":"b","connect_timeout":5,"timeout":30,"retry_limit":2}},` +
				`"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}`},
		{"oss", Config{Backend: Backend{Type: BackendOSS, Scheme: "http", Bucket: Bucket{Endpoint: "oss.test", Name: "b"}}, CacheDir: "/c"},
			`{"device":{"backend":{"type":"oss","config":{"scheme":"http","endpoint":"oss.test","bucket_name":"b","connect_timeout":5,"timeout":30,"retry_limit":2}},` +
				`"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}`},
	} {
		got, err := c.config.FuseDev()
		if err != nil || got != c.want {
			t.Errorf("%s: %v\n got %s\nwant %s", c.name, err, got, c.want)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		backend Backend
		want    string
	}{
		"no type":        {Backend{}, `unknown backend type ""`},
		"unknown type":   {Backend{Type: "ftp"}, `unknown backend type "ftp"`},
		"no host":        {Backend{Type: BackendRegistry, Scheme: "https", Repository: "r"}, "needs scheme"},
		"no repository":  {Backend{Type: BackendRegistry, Scheme: "https", Host: "h"}, "needs scheme"},
		"other scheme":   {Backend{Type: BackendRegistry, Scheme: "ftp", Host: "h", Repository: "r"}, "http or https"},
		"no directory":   {Backend{Type: BackendLocalFS}, "absolute directory"},
		"no region":      {Backend{Type: BackendS3, Scheme: "https", Bucket: Bucket{Endpoint: "e", Name: "b"}}, "s3 backend needs"},
		"no bucket":      {Backend{Type: BackendS3, Scheme: "https", Bucket: Bucket{Region: "r"}}, "s3 backend needs"},
		"no scheme":      {Backend{Type: BackendOSS, Bucket: Bucket{Endpoint: "e", Name: "b"}}, "oss backend needs"},
		"no endpoint":    {Backend{Type: BackendOSS, Scheme: "https", Bucket: Bucket{Name: "b"}}, "oss backend needs"},
		"oss in regions": {Backend{Type: BackendOSS, Scheme: "https", Bucket: Bucket{Endpoint: "e", Name: "b", Region: "r"}}, "oss backend needs"},
		"relative there": {Backend{Type: BackendLocalFS, Dir: "blobs"}, `absolute directory, got "blobs"`},
	} {
		if text, err := (Config{Backend: c.backend}).FuseDev(); err == nil || !strings.Contains(err.Error(), c.want) || text != "" {
			t.Errorf("%s: %q, %v; want an error that says %s", name, text, err, c.want)
		}
	}
}

const (
	registryV1 = `{"device":{"backend":{"type":"registry","config":{"host":"h","repo":"r","future":{"a":[1]}}},"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","future":1.5}`
	registryV2 = `{"version":2,"backend":{"type":"registry","registry":{"host":"h","repo":"r"}},"cache":{"type":"filecache","filecache":{"work_dir":"/c"}},"rafs":{"mode":"direct"}}`
)

func tree(t *testing.T, text string) (out map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAddCredentials(t *testing.T) {
	for in, want := range map[string]string{
		registryV1: `{"device":{"backend":{"type":"registry","config":{"host":"h","repo":"r","future":{"a":[1]},"auth":"A","registry_token":"T"}},"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","future":1.5}`,
		registryV2: `{"version":2,"backend":{"type":"registry","registry":{"host":"h","repo":"r","auth":"A","registry_token":"T"}},"cache":{"type":"filecache","filecache":{"work_dir":"/c"}},"rafs":{"mode":"direct"}}`,
	} {
		got, err := AddCredentials(in, mountspec.Credentials{Auth: "A", RegistryToken: "T"})
		if err != nil || !reflect.DeepEqual(tree(t, got), tree(t, want)) {
			t.Errorf("%v\n got %s\nwant %s", err, got, want)
		}
	}
	if got, err := AddCredentials(registryV1, mountspec.Credentials{Auth: "A"}); err != nil || strings.Contains(got, "registry_token") {
		t.Errorf("without a token: %v: %s", err, got)
	}
}

// nydusd ignores credentials of the wrong kind, and would ask without any.
func TestAddCredentialsOfItsKind(t *testing.T) {
	key := mountspec.Credentials{AccessKeyID: "canary-id", AccessKeySecret: "canary-secret"}
	login := mountspec.Credentials{Auth: "canary-auth"}
	for _, c := range []struct {
		backend     Backend
		credentials mountspec.Credentials
		want        string // how it is refused
	}{
		{Backend{Type: BackendS3, Scheme: "https", Bucket: Bucket{Region: "r", Name: "b"}}, key, ""},
		{Backend{Type: BackendOSS, Scheme: "https", Bucket: Bucket{Endpoint: "e", Name: "b"}}, key, ""},
		{Backend{Type: BackendRegistry, Scheme: "https", Host: "h", Repository: "r"}, key, `a backend of type "registry" takes no access_key_id`},
		{Backend{Type: BackendS3, Scheme: "https", Bucket: Bucket{Region: "r", Name: "b"}}, login, `a backend of type "s3" takes no auth`},
		{Backend{Type: BackendLocalFS, Dir: "/d"}, login, `a backend of type "localfs" takes no auth`},
	} {
		config := Config{Backend: c.backend, CacheDir: "/c"}
		first, err1 := config.FuseDev()
		second, err2 := config.FSCache(FSCacheImage{"i", "d", "/b"})
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		for _, text := range []string{first, second} {
			got, err := AddCredentials(text, c.credentials)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "canary") {
					t.Errorf("%s: %v, want %s", text, err, c.want)
				}
				continue
			}
			if err != nil || !strings.Contains(got, `"access_key_id":"canary-id","access_key_secret":"canary-secret"`) {
				t.Errorf("%s: %v, got %s", text, err, got)
			}
			if o, err := OriginOf(got); err != nil || !o.Secret {
				t.Errorf("%s: %+v, %v", got, o, err)
			}
		}
	}
}

func TestSecretsOfABucket(t *testing.T) {
	got := Secrets(`{"device":{"backend":{"type":"s3","config":{"access_key_id":"AKID","access_key_secret":"a/b+c=="}}}}`)
	for _, want := range []string{"AKID", "a/b+c==", "a%2Fb%2Bc%3D%3D"} {
		if !slices.Contains(got, want) {
			t.Errorf("%q lacks %s", got, want)
		}
	}
}

// What an operator tunes is in both writers' texts, each in its names, and nothing else
// changes. What is fixed, or for another type of backend, is not touched.
func TestTuning(t *testing.T) {
	n := func(i int) *int { return &i }
	yes, no := true, false
	s3 := Config{Backend: Backend{Type: BackendS3, Scheme: "https", Bucket: Bucket{"e", "r", "b", ""}}, CacheDir: "/c", Tuning: Tuning{
		Transfer:    Transfer{Only: BackendS3, ConnectTimeout: n(1), Timeout: n(2), Retries: n(0), Proxy: &Proxy{URL: "http://p", PingURL: "http://p/x", Fallback: &no, CheckInterval: n(3), UseHTTP: true}, BlobURLScheme: "http"},
		Prefetch:    &Prefetch{Enable: true, Threads: n(4), BatchSize: n(5), Bandwidth: n(6), All: &yes},
		EnableXattr: &no, IOStatsFiles: true, AccessPattern: true, LatestReadFiles: true, AmplifyIO: n(7),
	}}
	const settings = `{"scheme":"https","endpoint":"e","region":"r","bucket_name":"b","connect_timeout":1,"timeout":2,"retry_limit":0,` +
		`"proxy":{"url":"http://p","ping_url":"http://p/x","fallback":false,"check_interval":3,"use_http":true}}`
	first := `{"device":{"backend":{"type":"s3","config":` + settings + `},"cache":{"type":"blobcache","config":{"work_dir":"/c"}}},"mode":"direct","digest_validate":false,` +
		`"iostats_files":true,"enable_xattr":false,"access_pattern":true,"latest_read_files":true,"amplify_io":7,` +
		`"fs_prefetch":{"enable":true,"threads_count":4,"merging_size":5,"bandwidth_rate":6,"prefetch_all":true}}`
	if got, err := s3.FuseDev(); err != nil || got != first {
		t.Errorf("%v\n got %s\nwant %s", err, got, first)
	}
	second := `{"type":"bootstrap","id":"img","domain_id":"dom","config_v2":{"version":2,"id":"img","backend":{"s3":` + settings + `,"type":"s3"},` +
		`"cache":{"type":"fscache","prefetch":{"enable":true,"threads":4,"batch_size":5,"bandwidth_limit":6,"prefetch_all":true},"fscache":{"work_dir":"/c"}},"metadata_path":"/b"}}`
	if got, err := s3.FSCache(FSCacheImage{"img", "dom", "/b"}); err != nil || got != second {
		t.Errorf("%v\n got %s\nwant %s", err, got, second)
	}
	plain := `"connect_timeout":5,"timeout":30,"retry_limit":2}`
	for name, change := range map[string]func(*Config){
		"fixed":         func(c *Config) { c.Backend.Fixed = true },
		"of a registry": func(c *Config) { c.Tuning.Transfer.Only = BackendRegistry },
	} {
		c := s3
		change(&c)
		if got, err := c.FuseDev(); err != nil || !strings.Contains(got, plain) || !strings.Contains(got, `"amplify_io":7`) {
			t.Errorf("%s: %v: %s", name, err, got)
		}
	}
	reg := Config{Backend: Backend{Type: BackendRegistry, Scheme: "https", Host: "h", Repository: "r"}, CacheDir: "/c",
		Tuning: Tuning{Transfer: Transfer{BlobURLScheme: "http", BlobRedirectedHost: "x"}}}
	if got, err := reg.FuseDev(); err != nil || !strings.Contains(got, `"retry_limit":2,"blob_url_scheme":"http","blob_redirected_host":"x"}`) {
		t.Errorf("%v: %s", err, got)
	}
}

func TestFSCache(t *testing.T) {
	dir := Config{Backend: Backend{Type: BackendLocalFS, Dir: "/d"}, CacheDir: "/c"}
	want := `{"type":"bootstrap","id":"i","domain_id":"d","config_v2":{"version":2,"id":"i","backend":{"localfs":{"dir":"/d"},"type":"localfs"},` +
		`"cache":{"type":"fscache","fscache":{"work_dir":"/c"}},"metadata_path":"/b"}}`
	if got, err := dir.FSCache(FSCacheImage{"i", "d", "/b"}); err != nil || got != want {
		t.Errorf("%v\n got %s\nwant %s", err, got, want)
	}
	for _, i := range []FSCacheImage{{"", "d", "/b"}, {"i", "", "/b"}, {"i", "d", "b"}, {}} {
		if text, err := dir.FSCache(i); err == nil || text != "" {
			t.Errorf("%+v: %s", i, text)
		}
	}
	if text, err := (Config{CacheDir: "/c"}).FSCache(FSCacheImage{"i", "d", "/b"}); err == nil || text != "" {
		t.Errorf("no backend: %s", text)
	}
	dir.CacheDir = "c"
	if text, err := dir.FSCache(FSCacheImage{"i", "d", "/b"}); err == nil || text != "" {
		t.Errorf("relative cache: %s", text)
	}
}

func TestSetCacheDir(t *testing.T) {
	for _, in := range []string{registryV1, registryV2} {
		got, err := SetCacheDir(in, "/elsewhere")
		if err != nil {
			t.Fatal(err)
		}
		want := tree(t, strings.Replace(in, `"work_dir":"/c"`, `"work_dir":"/elsewhere"`, 1))
		if !reflect.DeepEqual(tree(t, got), want) {
			t.Errorf("got %s", got)
		}
		if o, err := OriginOf(got); err != nil || o.CacheDir != "/elsewhere" {
			t.Errorf("the cache directory is %+v, %v", o, err)
		}
	}
}

// A configuration without a cache section of its own gets one: nydusd would
// otherwise run without, and a daemon of before 2.3 with somebody else's.
func TestSetCacheDirWhereThereIsNone(t *testing.T) {
	for _, in := range []string{
		`{"device":{"backend":{"type":"localfs","config":{"dir":"/b"}}},"mode":"direct"}`,
		`{"device":{"backend":{"type":"localfs","config":{"dir":"/b"}},"cache":{"type":"blobcache"}},"mode":"direct"}`,
		`{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/b"}}}`,
		`{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/b"}},"cache":{}}`,
	} {
		got, err := SetCacheDir(in, "/c")
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		if o, err := OriginOf(got); err != nil || o.CacheDir != "/c" {
			t.Errorf("%s: the cache directory is %+v, %v; the text %s", in, o, err, got)
		}
	}
}

func TestSetCacheDirWhereNoneIsWanted(t *testing.T) {
	for _, in := range []string{
		`{"device":{"backend":{"type":"localfs","config":{"dir":"/b"}},"cache":{"type":"dummycache"}},"mode":"direct"}`,
		`{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/b"}},"cache":{"type":"fscache","fscache":{"work_dir":"/f"}}}`,
	} {
		if got, err := SetCacheDir(in, "/c"); err != nil || !reflect.DeepEqual(tree(t, got), tree(t, in)) {
			t.Errorf("%v: %s, want %s", err, got, in)
		}
	}
}

func TestOriginOf(t *testing.T) {
	oss := `{"version":2,"backend":{"type":"oss","oss":{"endpoint":"e","bucket_name":"b","access_key_id":"ID","access_key_secret":"SECRET"}}}`
	for in, want := range map[string]Origin{
		registryV1: {Host: "h", Repository: "r", CacheDir: "/c"},
		registryV2: {Host: "h", Repository: "r", CacheDir: "/c"},
		strings.Replace(registryV1, `"repo"`, `"auth":"canary","repo"`, 1):                      {Host: "h", Repository: "r", CacheDir: "/c", Secret: true},
		strings.Replace(registryV2, `"repo"`, `"registry_token":"canary","repo"`, 1):            {Host: "h", Repository: "r", CacheDir: "/c", Secret: true},
		strings.Replace(registryV2, `"repo"`, `"proxy":{"url":"http://u:canary@p"},"repo"`, 1):  {Host: "h", Repository: "r", CacheDir: "/c", Secret: true},
		strings.Replace(registryV2, `"repo"`, `"auth":"","proxy":{"url":"http://p"},"repo"`, 1): {Host: "h", Repository: "r", CacheDir: "/c"},
		`{"device":{"backend":{"type":"localfs","config":{"dir":"/b","readahead":true}}}}`:      {Repository: `{"dir":"/b","type":"localfs"}`},
		oss: {Repository: `{"bucket_name":"b","endpoint":"e","type":"oss"}`, Secret: true},
	} {
		if got, err := OriginOf(in); err != nil || got != want {
			t.Errorf("OriginOf(%s) = %+v, %v; want %+v", in, got, err, want)
		}
	}
	// Other credentials, another order: the same origin.
	other := `{"backend":{"oss":{"access_key_secret":"OTHER","bucket_name":"b","endpoint":"e"},"type":"oss"},"version":2}`
	a, errA := OriginOf(oss)
	b, errB := OriginOf(other)
	if errA != nil || errB != nil || a != b {
		t.Errorf("origins %+v, %v and %+v, %v; want the same", a, errA, b, errB)
	}
}

func TestOriginOfAnUnknownBackend(t *testing.T) {
	_, err := OriginOf(`{"version":2,"backend":{"type":"ftp","ftp":{"host":"h","password":"canary"}}}`)
	if err == nil || !strings.Contains(err.Error(), `unknown backend type "ftp"`) || strings.Contains(err.Error(), "canary") {
		t.Errorf("%v", err)
	}
}

func TestBadConfigurationsKeepTheirSecrets(t *testing.T) {
	for _, in := range []string{
		"", "canary", `"canary"`, `["canary"]`, "null", `{"device":{"auth":"canary"}`, `{"device":"canary"}`, `{"auth":"canary"}`,
		`{"device":{"backend":{"type":"registry","auth":"canary"}}}`, `{"device":{"backend":{"config":{"auth":"canary"}}}}`,
		`{"version":2,"backend":{"type":"registry","auth":"canary"}}`,
		`{"device":{"backend":{"type":"registry","config":{"repo":"r","auth":"canary"}}}}`,
		`{"device":{"backend":{"type":"registry","config":{"host":7,"repo":"r","auth":"canary"}}}}`,
	} {
		_, err := OriginOf(in)
		if err == nil {
			t.Errorf("OriginOf(%s) took it", in)
			continue
		}
		if strings.Contains(err.Error(), "canary") || !strings.Contains(err.Error(), "nydusd configuration") {
			t.Errorf("OriginOf(%s): %v", in, err)
		}
	}
	for _, in := range []string{"", "canary", `{"device":{"auth":"canary"}}`} {
		_, err := AddCredentials(in, mountspec.Credentials{Auth: "secret-canary"})
		if err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("AddCredentials(%s): %v", in, err)
		}
	}
}

func FuzzEdit(f *testing.F) {
	for _, s := range []string{registryV1, registryV2, "", "null", "[]", `{"device":null}`, `{"backend":{"type":"x","x":{}}}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		o, err := OriginOf(in)
		if err != nil {
			return
		}
		// What can be read can be changed, and stays readable.
		out, err := SetCacheDir(in, "/c")
		if err != nil {
			t.Fatalf("SetCacheDir: %v", err)
		}
		now, err := OriginOf(out)
		// A cache that lies not in files has no directory.
		if err != nil || now.Host != o.Host || now.Repository != o.Repository || (now.CacheDir != "/c" && now.CacheDir != "") {
			t.Fatalf("was %+v, is %+v, %v", o, now, err)
		}
	})
}

func TestSetID(t *testing.T) {
	for in, want := range map[string]string{
		registryV1: strings.Replace(registryV1, `"device":{`, `"device":{"id":"x.1",`, 1),
		registryV2: strings.Replace(registryV2, `"version":2`, `"version":2,"id":"x.1"`, 1),
	} {
		if got, err := SetID(in, "x.1"); err != nil || !reflect.DeepEqual(tree(t, got), tree(t, want)) {
			t.Errorf("%v\n got %s\nwant %s", err, got, want)
		}
	}
}

// Validation is said to both ways of serving.
func TestValidate(t *testing.T) {
	c := Config{Backend: Backend{Type: BackendLocalFS, Dir: "/b"}, CacheDir: "/c", Validate: true}
	if got, err := c.FuseDev(); err != nil || !strings.Contains(got, `"cache":{"type":"blobcache","validate":true,"config":{"work_dir":"/c"}}`) {
		t.Errorf("%s, %v", got, err)
	}
	if got, err := c.FSCache(FSCacheImage{ID: "i", Domain: "d", Bootstrap: "/boot"}); err != nil || !strings.Contains(got, `"cache":{"type":"fscache","validate":true,`) {
		t.Errorf("%s, %v", got, err)
	}
}

func TestValidates(t *testing.T) {
	for config, want := range map[string]bool{
		`{"device":{"cache":{"type":"blobcache","validate":true}}}`: true,
		`{"device":{"cache":{"type":"blobcache"}}}`:                 false,
		`{"device":{"cache":{"validate":false}}}`:                   false,
		`{"digest_validate":true}`:                                  true,
		`{"cache":{"validate":true}}`:                               true,
		`{"rafs":{"validate":true}}`:                                true,
		`{}`:                                                        false,
		`{`:                                                         true,
	} {
		if got := Validates(config); got != want {
			t.Errorf("%s: %v, want %v", config, got, want)
		}
	}
}
