package mountspec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// The secrets of the tests, for whoever looks for leaks.
const (
	testAuth  = "dXNlcjpjYW5hcnktYXV0aC1zZWNyZXQ="
	testToken = "canary-token-secret"

	testKeyID, testKeySecret = "AKIDCanarycanary", "Y2FuYXJ5/canary+secret"
)

// testSpec is a whole Spec, with every member set.
func testSpec() *Spec {
	const root = "/var/lib/nydus-snapshotter"
	digest := "sha256:" + strings.Repeat("ab", 32)
	s := &Spec{
		Bootstrap:       root + "/snapshots/7/fs/image/image.boot",
		BootstrapDigest: digest,
		FSVersion:       "v6",
		Config:          `{"device":{"backend":{"type":"registry","config":{"host":"registry.example:5000","repo":"library/app"}}},"mode":"direct"}`,
		SnapshotDir:     root + "/snapshots/9",
		Kind:            KindRootfs,
		Lower:           []string{root + "/snapshots/8/fs", root + "/snapshots/6/fs"},
		OverlayOptions:  []string{"index=off", "metacopy=off"},
		Image:           "registry.example:5000/library/app:latest",
		Host:            "registry.example:5000",
		Repository:      "library/app",
		Root:            root,
		RunDir:          "/run/nydus-snapshotter",
		CacheDir:        root + "/cache/registry.example",
		Driver:          DriverAuto,
		Daemon: Daemon{Path: "/usr/local/bin/nydusd", LogLevel: "info", Threads: 4, StartTimeout: 10 * time.Second,
			OOMScoreAdj: -500, CgroupParent: "/nydus"},
		Credentials: &Credentials{Auth: testAuth},
	}
	s.Instance = InstanceKey(digest, s.Host, s.Repository, s.CacheDir)
	return s
}

func TestValidateNamesEveryFault(t *testing.T) {
	if err := testSpec().Validate(); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		spoil func(*Spec)
		want  []string
	}{
		"kind":                {func(s *Spec) { s.Kind = "disk" }, []string{`kind "disk"`}},
		"fs version":          {func(s *Spec) { s.FSVersion = "6" }, []string{`fs_version "6"`}},
		"daemon mode":         {func(s *Spec) { s.Daemon.Mode = "dedicated" }, []string{`daemon mode "dedicated"`}},
		"driver":              {func(s *Spec) { s.Driver = "" }, []string{`driver ""`}},
		"instance":            {func(s *Spec) { s.Instance = "../../x" }, []string{`instance "../../x"`}},
		"instance in capital": {func(s *Spec) { s.Instance = strings.Repeat("AB", 16) }, []string{"instance"}},
		"digest":              {func(s *Spec) { s.BootstrapDigest = "sha512:00" }, []string{"sha512:00"}},
		"config":              {func(s *Spec) { s.Config = "" }, []string{"config is empty"}},
		"no credentials":      {func(s *Spec) { s.Credentials = &Credentials{} }, []string{"credentials"}},
		"both credentials":    {func(s *Spec) { s.Credentials.RegistryToken = testToken }, []string{"credentials"}},
		"auth and key":        {func(s *Spec) { s.Credentials.AccessKeyID, s.Credentials.AccessKeySecret = "I", "S" }, []string{"credentials"}},
		"half a key":          {func(s *Spec) { s.Credentials = &Credentials{AccessKeyID: "I"} }, []string{"both id and secret"}},
		"the other half":      {func(s *Spec) { s.Credentials = &Credentials{AccessKeySecret: "S"} }, []string{"both id and secret"}},
		"bootstrap outside":   {func(s *Spec) { s.Bootstrap = "/etc/passwd" }, []string{`"/etc/passwd" is outside`}},
		"snapshot outside":    {func(s *Spec) { s.SnapshotDir = s.Root + "/../x" }, []string{"/../x", "outside"}},
		"snapshot is root":    {func(s *Spec) { s.SnapshotDir = s.Root }, []string{"outside"}},
		"cache outside":       {func(s *Spec) { s.CacheDir = "/var/lib/nydus-snapshotter-2/cache" }, []string{"nydus-snapshotter-2", "outside"}},
		"cache relative":      {func(s *Spec) { s.CacheDir = "cache" }, []string{`"cache"`}},
		"lower outside":       {func(s *Spec) { s.Lower[1] = "/" }, []string{`"/" is outside`}},
		"lower with colon":    {func(s *Spec) { s.Lower[0] = s.Root + "/a:b" }, []string{"a:b", "overlay option"}},
		"lower with comma":    {func(s *Spec) { s.Lower[0] = s.Root + "/a,b" }, []string{"a,b", "overlay option"}},
		"root relative":       {func(s *Spec) { s.Root = "var" }, []string{`root "var"`}},
		"root is everything":  {func(s *Spec) { s.Root = "/" }, []string{"outside"}},
		"nydusd relative":     {func(s *Spec) { s.Daemon.Path = "nydusd" }, []string{`nydusd "nydusd"`}},
		"CA file relative":    {func(s *Spec) { s.Daemon.CAFile = "ca.crt" }, []string{`CA file "ca.crt"`}},
		"CA file, shared":     {func(s *Spec) { s.Daemon.CAFile, s.Daemon.Mode = "/ca.crt", ModeShared }, []string{`CA file "/ca.crt"`, "shared"}},
		"memory below none":   {func(s *Spec) { s.Daemon.MemoryLimit = -1 }, []string{"limits of -1 bytes"}},
		"CPU below none":      {func(s *Spec) { s.Daemon.CPULimit = -5 }, []string{"-5 thousandths"}},
		"not UTF-8":           {func(s *Spec) { s.Config += "\xff"; s.Image = "\xff" }, []string{"config is not UTF-8", "image is not UTF-8"}},
		"all at once": {func(s *Spec) { *s = Spec{} }, []string{"kind", "fs_version", "driver", "instance", "digest", "config",
			"root", "run directory", "nydusd", "outside"}},
	} {
		s := testSpec()
		c.spoil(s)
		err := s.Validate()
		if err == nil {
			t.Errorf("%s: accepted", what)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not name %q", what, err, w)
			}
		}
		if _, err := Encode(s, Key{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: Encode: %v", what, err)
		}
		noLeak(t, what, err.Error(), "")
	}
}

// TestValidateOrder: the same faults make the same text.
func TestValidateOrder(t *testing.T) {
	first := (&Spec{}).Validate().Error()
	for range 50 {
		if again := (&Spec{}).Validate().Error(); again != first {
			t.Fatalf("%q, before it was %q", again, first)
		}
	}
}

func TestUpperAndWork(t *testing.T) {
	s := testSpec()
	if s.Upper() != s.SnapshotDir+"/fs" || s.Work() != s.SnapshotDir+"/work" {
		t.Errorf("%s, %s", s.Upper(), s.Work())
	}
	if s.ReadOnly = true; s.Upper() != "" || s.Work() != "" {
		t.Errorf("read-only: %s, %s", s.Upper(), s.Work())
	}
}

func TestInstanceKey(t *testing.T) {
	base := []string{"sha256:1", "host", "repo", "/cache"}
	key := func(p []string) string { return InstanceKey(p[0], p[1], p[2], p[3]) }
	if !isHex(key(base), 32) {
		t.Fatal(key(base))
	}
	seen := map[string]bool{key(base): true}
	for i := range base {
		other := append([]string{}, base...)
		other[i] += "x"
		seen[key(other)] = true
	}
	seen[InstanceKey("sha256:1", "hos", "trepo", "/cache")] = true
	seen[InstanceKey("sha256:1", "", "hostrepo", "/cache")] = true
	seen[InstanceKey("sha256:1", "host4:repo", "", "/cache")] = true
	if len(seen) != 8 {
		t.Errorf("%d different keys of 8", len(seen))
	}
}

// noLeak fails when text shows a secret or a piece of an option.
func noLeak(t *testing.T, what, text, option string) {
	t.Helper()
	for _, secret := range []string{testAuth, testToken, testKeyID, testKeySecret, "canary", "Y2FuYXJ5"} {
		if strings.Contains(text, secret) {
			t.Errorf("%s shows the secret: %s", what, text)
		}
	}
	const piece = 24
	for i := 0; i+piece <= len(option); i++ {
		if strings.Contains(text, option[i:i+piece]) {
			t.Errorf("%s repeats the option: %s", what, text)
			return
		}
	}
}

// TestSecretsAreHidden: whatever a logger does with a Spec.
func TestSecretsAreHidden(t *testing.T) {
	auth, token := testSpec(), testSpec()
	token.Credentials = &Credentials{RegistryToken: testToken}
	pair := testSpec()
	pair.Credentials = &Credentials{AccessKeyID: testKeyID, AccessKeySecret: testKeySecret}
	key := Key([]byte(strings.Repeat("K", 32)))
	type wrapped struct {
		C Credentials
		P *Credentials
		K Key
		S Spec
	}
	for _, s := range []*Spec{auth, token, pair} {
		c := *s.Credentials
		w := wrapped{c, &c, key, *s}
		for _, v := range []any{s, *s, c, &c, &w, w, key, &key, []Credentials{c}, map[string]Credentials{"c": c}, []any{s}, []Key{key}} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%c", "%U", "%e"} {
				hidesAll(t, fmt.Sprintf("%s of %T", verb, v), fmt.Sprintf(verb, v))
			}
			text, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			hidesAll(t, fmt.Sprintf("JSON of %T", v), string(text))
			var log bytes.Buffer
			slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "v", v)
			slog.New(slog.NewTextHandler(&log, nil)).Info("x", "v", v)
			hidesAll(t, fmt.Sprintf("log of %T", v), log.String())
		}
	}
	var none *Credentials
	if text := fmt.Sprintf("%v %+v", none, &Spec{}); strings.Contains(text, "PANIC") {
		t.Errorf("nil credentials: %s", text)
	}
	if text := fmt.Sprint(key); !strings.Contains(text, key.ID()) {
		t.Errorf("%s does not tell which key it is", text)
	}
}

// hidesAll looks for the secrets in all the spellings that fmt and JSON have.
func hidesAll(t *testing.T, what, text string) {
	t.Helper()
	noLeak(t, what, text, "")
	lower := strings.ToLower(text)
	for _, s := range []string{
		"KKKK", "75 75 75", "75,75,75", "0x4b, 0x4b", "4b4b4b4b", "U+004B U+004B", "S0tLS0tLS0t",
		fmt.Sprintf("%x", testAuth), fmt.Sprintf("%x", testToken), fmt.Sprintf("%x", testKeyID), fmt.Sprintf("%x", testKeySecret),
	} {
		if strings.Contains(lower, strings.ToLower(s)) {
			t.Errorf("%s shows %q: %.200s", what, s, text)
		}
	}
}

func TestCacheDirsAreApart(t *testing.T) {
	dirs := map[string]bool{}
	for _, at := range [][2]string{{"a", "bc"}, {"ab", "c"}, {"", "abc"}, {"abc", ""}, {"a", "b/c"}, {"a/b", "c"}} {
		dirs[CacheDir("/r", at[0], at[1])] = true
	}
	if len(dirs) != 6 {
		t.Fatalf("got %v", dirs)
	}
}
