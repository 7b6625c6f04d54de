package mountspec

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// update writes the golden files anew. A change of them is a change of the
// contract: what is running was mounted with the old one.
var update = flag.Bool("update", false, "write testdata/*.golden")

// testKey and testNonce are fixed, for golden files.
var (
	testKey   = Key([]byte("0123456789abcdef0123456789ABCDEF"))
	testNonce = []byte("twelve bytes")
)

// keyRing is a Keys in memory.
type keyRing map[string]Key

func (r keyRing) Key(id string) (Key, error) {
	if k, ok := r[id]; ok {
		return k, nil
	}
	if !isHex(id, 16) {
		return Key{}, ErrMalformed
	}
	return Key{}, fmt.Errorf("%w: %s", ErrUnknownKey, id)
}

func ring(keys ...Key) keyRing {
	r := keyRing{}
	for _, k := range keys {
		r[k.ID()] = k
	}
	return r
}

// variants are the Specs that a snapshotter makes.
func variants() map[string]*Spec {
	m := map[string]*Spec{}
	add := func(name string, change func(*Spec)) {
		s := testSpec()
		change(s)
		m[name] = s
	}
	add("rootfs-auth", func(*Spec) {})
	add("rootfs-token", func(s *Spec) { s.Credentials = &Credentials{RegistryToken: testToken} })
	add("rootfs-keys", func(s *Spec) {
		s.Host, s.Repository = "", `{"bucket_name":"b","endpoint":"s3.example","object_prefix":"p/","region":"r","type":"s3"}`
		s.Credentials = &Credentials{AccessKeyID: testKeyID, AccessKeySecret: testKeySecret}
	})
	add("rootfs-none", func(s *Spec) { s.Credentials = nil })
	add("rootfs-view", func(s *Spec) { s.ReadOnly, s.Credentials = true, nil })
	add("image-auth", func(s *Spec) { s.Kind, s.Lower, s.OverlayOptions = KindImage, nil, nil })
	add("image-v5", func(s *Spec) {
		s.Kind, s.FSVersion, s.Lower, s.Driver, s.Credentials = KindImage, "v5", nil, DriverFUSE, nil
	})
	add("rootfs-erofs", func(s *Spec) { s.Driver, s.Credentials = DriverEROFS, nil })
	add("rootfs-shared", func(s *Spec) { s.Daemon.Mode = ModeShared })
	add("plain-config", func(s *Spec) {
		s.Credentials = nil
		s.Config = `{"device":{"backend":{"type":"registry","config":{"auth":"` + testAuth + `"}}}}`
	})
	add("odd-text", func(s *Spec) {
		s.Image, s.Host = "régistre.example/<app>&\u2028:тест", "[::1]:5000"
		s.Config = "{\"a\":\"\\u0000 \\\" \\\\ \n\t</script>\u2029\"}"
		s.Lower = []string{s.Root + "/snapshots/ü 漢字/fs"}
	})
	add("limits", func(s *Spec) { s.Credentials, s.Daemon.MemoryLimit, s.Daemon.CPULimit = nil, 256<<20, 1500 })
	add("ca-file", func(s *Spec) { s.Daemon.CAFile = "/etc/containerd/certs.d/registry.example/ca.crt" })
	add("least", func(s *Spec) {
		s.Credentials, s.Lower, s.OverlayOptions, s.Image, s.Host = nil, nil, nil, "", ""
		s.Repository = "/srv/blobs"
		s.Daemon = Daemon{Path: "/nydusd"}
	})
	return m
}

// valueOf encodes s and returns the value of the option.
func valueOf(t testing.TB, s *Spec, key Key) string {
	t.Helper()
	option, err := Encode(s, key)
	if err != nil {
		t.Fatal(err)
	}
	value, err := Find([]string{option})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func same(t *testing.T, what string, got, want *Spec) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: read\n%+v\nwant\n%+v", what, got, want)
	}
}

func TestRoundTrip(t *testing.T) {
	for name, s := range variants() {
		got, err := Decode(valueOf(t, s, testKey), ring(testKey))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		same(t, name, got, s)
	}
}

// TestRoundTripAny: whatever passes Validate comes back as it was.
func TestRoundTripAny(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		s := anySpec(random)
		value := valueOf(t, s, testKey)
		got, err := Decode(value, ring(testKey))
		if err != nil {
			t.Fatalf("%v: %+v", err, s)
		}
		same(t, "any", got, s)
		if s.Credentials != nil {
			noLeak(t, "the option", decoded(t, value), "")
		}
	}
}

// anySpec makes a valid Spec of random text.
func anySpec(random *rand.Rand) *Spec {
	text := func() string {
		var b strings.Builder
		for range random.IntN(12) {
			b.WriteRune([]rune("aZ09 <>&\"'\\/\n\t\x00\x7f=+ü漢\u2028\ufffd😀")[random.IntN(23)])
		}
		return b.String()
	}
	pick := func(n int) bool { return random.IntN(n) == 0 }
	s := testSpec()
	name := func(r rune) rune {
		if strings.ContainsRune(",:\\\n/.", r) {
			return '-'
		}
		return r
	}
	beneath := func() string { return s.Root + "/" + strings.Map(name, "x"+text()) }
	s.Bootstrap, s.SnapshotDir, s.CacheDir, s.Lower = beneath(), beneath(), beneath(), nil
	for range random.IntN(5) {
		s.Lower = append(s.Lower, beneath())
	}
	s.Config, s.Image, s.Host, s.Repository = "{"+text(), text(), text(), text()
	s.OverlayOptions = nil
	if pick(2) {
		s.OverlayOptions = []string{text(), text()}
	}
	s.ReadOnly = pick(2)
	if pick(3) {
		s.Kind = KindImage
	}
	s.Daemon.LogLevel, s.Daemon.CgroupParent, s.Daemon.Threads = text(), text(), random.IntN(99)-9
	s.Daemon.MemoryLimit, s.Daemon.CPULimit = random.Int64N(1<<40), random.IntN(9000)
	switch random.IntN(3) {
	case 0:
		s.Credentials = nil
	case 1:
		s.Credentials = &Credentials{RegistryToken: testToken + text()}
	}
	return s
}

// decoded is the JSON object within an option's value.
func decoded(t testing.TB, value string) string {
	t.Helper()
	text, err := base64.StdEncoding.DecodeString(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestGolden: a helper of one build must read what a snapshotter of another
// wrote. Each file holds the option and, to be read by people, its JSON.
func TestGolden(t *testing.T) {
	for name, s := range variants() {
		option, err := encode(s, testKey, bytes.NewReader(testNonce))
		if err != nil {
			t.Fatal(err)
		}
		value := strings.TrimPrefix(option, "extraoption=")
		got := option + "\n" + decoded(t, value) + "\n"
		file := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s: Encode writes\n%swant\n%s", name, got, want)
		}
		old, _, _ := strings.Cut(string(want), "\n")
		read, err := Decode(strings.TrimPrefix(old, "extraoption="), ring(testKey))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		same(t, name, read, s)
	}
}

// TestSealed: the credentials are not in what travels, and no two options have
// the same nonce.
func TestSealed(t *testing.T) {
	a, b := valueOf(t, testSpec(), testKey), valueOf(t, testSpec(), testKey)
	noLeak(t, "the option", a+decoded(t, a), "")
	var w wire
	nonces := map[string]bool{}
	for _, v := range []string{a, b} {
		if err := json.Unmarshal([]byte(decoded(t, v)), &w); err != nil {
			t.Fatal(err)
		}
		nonces[string(w.Nydus.Sealed[:12])] = true
	}
	if len(nonces) != 2 {
		t.Error("two options share a nonce")
	}
}

func TestNoRandomness(t *testing.T) {
	if option, err := encode(testSpec(), testKey, bytes.NewReader(testNonce[:5])); err == nil || option != "" {
		t.Errorf("a short nonce was used: %v", err)
	}
}

// refused fails unless Decode refuses value for one of the reasons, with texts in
// its message and nothing secret.
func refused(t *testing.T, what, value string, keys Keys, reasons []error, texts ...string) {
	t.Helper()
	s, err := Decode(value, keys)
	if err == nil || s != nil {
		t.Errorf("%s: accepted: %v", what, s)
		return
	}
	found := false
	for _, r := range reasons {
		found = found || errors.Is(err, r)
	}
	if !found {
		t.Errorf("%s: %q is none of %q", what, err, reasons)
	}
	for _, text := range append(texts, OptionName) {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %q does not name %q", what, err, text)
		}
	}
	if len(err.Error()) > 2000 {
		t.Errorf("%s: an error of %d bytes", what, len(err.Error()))
	}
	noLeak(t, what, err.Error(), value)
}

func is(errs ...error) []error { return errs }

func TestTruncated(t *testing.T) {
	value := valueOf(t, testSpec(), testKey)
	for n := range value {
		refused(t, fmt.Sprintf("cut at %d", n), value[:n], ring(testKey), is(ErrMalformed), "truncated or malformed")
	}
	text := decoded(t, value)
	for n := range text {
		cut := base64.StdEncoding.EncodeToString([]byte(text[:n]))
		refused(t, fmt.Sprintf("JSON cut at %d", n), cut, ring(testKey), is(ErrMalformed))
	}
}

// TestFlipped changes every single bit of the JSON, and every letter of the
// base64.
func TestFlipped(t *testing.T) {
	value := valueOf(t, testSpec(), testKey)
	reasons := is(ErrMalformed, ErrVersion, ErrUnknownKey, ErrAltered)
	text := []byte(decoded(t, value))
	for i := range text {
		for bit := range 8 {
			text[i] ^= 1 << bit
			flipped := base64.StdEncoding.EncodeToString(text)
			refused(t, fmt.Sprintf("bit %d of byte %d", bit, i), flipped, ring(testKey), reasons)
			text[i] ^= 1 << bit
		}
	}
	for i := range value {
		for _, letter := range []string{"A", "B", "=", "/", "-", "\n", "\x00", " "} {
			if changed := value[:i] + letter + value[i+1:]; changed != value {
				refused(t, fmt.Sprintf("%q at %d", letter, i), changed, ring(testKey), reasons)
			}
		}
	}
}

// TestOtherSpellings: the same meaning in other words is not our option, since
// Kata may read it otherwise.
func TestOtherSpellings(t *testing.T) {
	value := valueOf(t, testSpec(), testKey)
	text := decoded(t, value)
	b64 := base64.StdEncoding.EncodeToString
	for what, other := range map[string]string{
		"a line break":         value[:76] + "\n" + value[76:],
		"a line break behind":  value + "\r\n",
		"white space":          b64([]byte(" " + text)),
		"white space behind":   b64([]byte(text + "\n")),
		"a second object":      b64([]byte(text + "{}")),
		"a member in capitals": b64([]byte(strings.Replace(text, `"source"`, `"Source"`, 1))),
		"a member given twice": b64([]byte(strings.Replace(text, `{"source"`, `{"source":"/etc/shadow","source"`, 1))),
		"an escape":            b64([]byte(strings.Replace(text, `"rootfs"`, `"\u0072ootfs"`, 1))),
		"a null":               b64([]byte(strings.Replace(text, `"kind":`, `"read_only":null,"kind":`, 1))),
		"an unknown member":    b64([]byte(strings.Replace(text, `{"source"`, `{"extra":1,"source"`, 1))),
		"an unknown of ours":   b64([]byte(strings.Replace(text, `"kind":`, `"canary":"canary","kind":`, 1))),
	} {
		if other == value {
			t.Fatalf("%s changed nothing", what)
		}
		refused(t, what, other, ring(testKey), is(ErrMalformed, ErrAltered))
	}
}

// TestPasted puts parts of one authentic option into another one of the same key.
func TestPasted(t *testing.T) {
	a, b := testSpec(), testSpec()
	b.Host, b.Repository, b.Image = "evil.example", "evil/app", "evil.example/evil/app:latest"
	b.Bootstrap, b.BootstrapDigest = b.Root+"/snapshots/66/fs/image/image.boot", "sha256:"+strings.Repeat("66", 32)
	b.SnapshotDir, b.CacheDir, b.Lower = b.Root+"/snapshots/67", b.Root+"/cache/evil", nil
	b.Config, b.FSVersion, b.Kind, b.ReadOnly, b.Driver = `{"evil":1}`, "v5", KindImage, true, DriverFUSE
	b.Root, b.RunDir, b.OverlayOptions = "/var/lib", "/run/evil", nil
	b.Daemon = Daemon{Path: "/tmp/evil"}
	b.Instance = InstanceKey(b.BootstrapDigest, b.Host, b.Repository, b.CacheDir)
	b.Credentials = &Credentials{RegistryToken: testToken}
	for what, paste := range map[string]func(to, from *wire){
		"source":             func(to, from *wire) { to.Source = from.Source },
		"config":             func(to, from *wire) { to.Config = from.Config },
		"snapshot directory": func(to, from *wire) { to.SnapshotDir = from.SnapshotDir },
		"fs version":         func(to, from *wire) { to.FSVersion = from.FSVersion },
		"credentials":        func(to, from *wire) { to.Nydus.Sealed = from.Nydus.Sealed },
		"kind":               func(to, from *wire) { to.Nydus.Kind = from.Nydus.Kind },
		"read-only":          func(to, from *wire) { to.Nydus.ReadOnly = from.Nydus.ReadOnly },
		"lower":              func(to, from *wire) { to.Nydus.Lower = from.Nydus.Lower },
		"overlay options":    func(to, from *wire) { to.Nydus.OverlayOptions = from.Nydus.OverlayOptions },
		"instance":           func(to, from *wire) { to.Nydus.Instance = from.Nydus.Instance },
		"image":              func(to, from *wire) { to.Nydus.Image = from.Nydus.Image },
		"host":               func(to, from *wire) { to.Nydus.Host = from.Nydus.Host },
		"repository":         func(to, from *wire) { to.Nydus.Repository = from.Nydus.Repository },
		"bootstrap digest":   func(to, from *wire) { to.Nydus.BootstrapDigest = from.Nydus.BootstrapDigest },
		"root":               func(to, from *wire) { to.Nydus.Root = from.Nydus.Root },
		"run directory":      func(to, from *wire) { to.Nydus.RunDir = from.Nydus.RunDir },
		"cache directory":    func(to, from *wire) { to.Nydus.CacheDir = from.Nydus.CacheDir },
		"driver":             func(to, from *wire) { to.Nydus.Driver = from.Nydus.Driver },
		"nydusd":             func(to, from *wire) { to.Nydus.Daemon = from.Nydus.Daemon },
		"host and repository": func(to, from *wire) {
			to.Nydus.Host, to.Nydus.Repository = from.Nydus.Host, from.Nydus.Repository
		},
		"all but credentials": func(to, from *wire) {
			sealed := to.Nydus.Sealed
			*to = *from
			to.Nydus.Sealed = sealed
		},
	} {
		for _, pair := range [][2]*Spec{{a, b}, {b, a}} {
			to, err := parse(valueOf(t, pair[0], testKey))
			if err != nil {
				t.Fatal(err)
			}
			from, err := parse(valueOf(t, pair[1], testKey))
			if err != nil {
				t.Fatal(err)
			}
			paste(to, from)
			value, err := to.text()
			if err != nil {
				t.Fatal(err)
			}
			refused(t, what, value, ring(testKey), is(ErrAltered), "altered")
		}
	}
}

// TestPasteCoversEverything: a member that is added to the option must be sealed
// and, in TestPasted, tried.
func TestPasteCoversEverything(t *testing.T) {
	if n := reflect.TypeFor[ours]().NumField(); n != 17 {
		t.Errorf("the option has %d members of ours; add the new one to TestPasted, then correct this number", n)
	}
	if n := reflect.TypeFor[wire]().NumField(); n != 5 {
		t.Errorf("the option has %d members; add the new one to TestPasted, then correct this number", n)
	}
}

func TestForeignKey(t *testing.T) {
	other := Key([]byte(strings.Repeat("o", 32)))
	value := valueOf(t, testSpec(), testKey)
	refused(t, "no such key", value, ring(other), is(ErrUnknownKey), testKey.ID())
	refused(t, "another key", value, keyRing{testKey.ID(): other}, is(ErrAltered), "altered")
	for _, id := range []string{"", "../../../etc/hostname", strings.Repeat("F", 16), strings.Repeat("f", 17)} {
		w, err := parse(value)
		if err != nil {
			t.Fatal(err)
		}
		w.Nydus.Key = id
		changed, err := w.text()
		if err != nil {
			t.Fatal(err)
		}
		refused(t, "key id "+id, changed, KeyDir(t.TempDir()), is(ErrMalformed), "16 hex digits")
	}
}

func TestOversized(t *testing.T) {
	refused(t, "too large", strings.Repeat("A", MaxSize+1), ring(testKey), is(ErrTooLarge), "98304", "98305")
	refused(t, "just fits", strings.Repeat("A", MaxSize), ring(testKey), is(ErrMalformed))
	s := testSpec()
	for len(s.Lower) < 2000 {
		s.Lower = append(s.Lower, fmt.Sprintf("%s/snapshots/%d/fs", s.Root, len(s.Lower)))
	}
	option, err := Encode(s, testKey)
	if !errors.Is(err, ErrTooLarge) || option != "" {
		t.Fatalf("%v", err)
	}
	for _, want := range []string{"2000 layers", "98304", s.SnapshotDir} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not name %q", err, want)
		}
	}
	// 500 layers, the most that containerd lets an image have by far.
	s.Lower = s.Lower[:500]
	if value := valueOf(t, s, testKey); len(value) > MaxSize {
		t.Errorf("%d bytes", len(value))
	}
}

// TestFutureVersion: a newer snapshotter may put anything beside its number.
func TestFutureVersion(t *testing.T) {
	object := func(nydus string) string {
		return base64.StdEncoding.EncodeToString([]byte(`{"source":"/s","config":"{}","snapshotdir":"/d","fs_version":"v6","new":[{}],"nydus":` + nydus + `}`))
	}
	for what, nydus := range map[string]string{
		"alone":                `{"version":2}`,
		"with unknown members": `{"version":2,"frobnicate":{"a":[1,2]},"kind":"novel"}`,
		"with other types":     `{"version":2,"kind":{"deep":true},"sealed":17,"lower":"x"}`,
		"far ahead":            `{"version":2000000}`,
		"below zero":           `{"version":-1}`,
	} {
		refused(t, what, object(nydus), ring(testKey), is(ErrVersion), "this program reads 1", "install")
	}
	refused(t, "of another program", object(`{}`), ring(testKey), is(ErrMalformed), "no version")
	refused(t, "not a number", object(`{"version":"canary-token-secret"}`), ring(testKey), is(ErrMalformed), "nydus.version")
	_, err := Decode(object(`{"version":1,"kind":4242424242}`), ring(testKey))
	if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "nydus.kind") || strings.Contains(err.Error(), "4242") {
		t.Errorf("a number for a string: %v", err)
	}
	kata := base64.StdEncoding.EncodeToString([]byte(`{"source":"/s","config":"{}","snapshotdir":"/d","fs_version":"v6"}`))
	refused(t, "Kata's four alone", kata, ring(testKey), is(ErrMalformed), "another program")
}

// TestAuthenticButInvalid: a snapshotter with a fault must not lead the helper,
// which is root, out of its root.
func TestAuthenticButInvalid(t *testing.T) {
	for what, c := range map[string]struct {
		change func(*Spec)
		text   string
	}{
		"bootstrap outside": {func(s *Spec) { s.Bootstrap = "/etc/shadow" }, "/etc/shadow"},
		"snapshot outside":  {func(s *Spec) { s.SnapshotDir = "/home" }, "/home"},
		"lower outside":     {func(s *Spec) { s.Lower = []string{s.Root + "/../../etc"} }, "/../../etc"},
		"cache outside":     {func(s *Spec) { s.CacheDir = "/var/lib/docker" }, "/var/lib/docker"},
		"instance climbs":   {func(s *Spec) { s.Instance = "../../../../etc" }, "../../../../etc"},
		"no nydusd":         {func(s *Spec) { s.Daemon.Path = "" }, "nydusd"},
		"two credentials":   {func(s *Spec) { s.Credentials.RegistryToken = testToken }, "credentials"},
	} {
		s := testSpec()
		c.change(s)
		w := toWire(s)
		w.Nydus.Key = testKey.ID()
		if err := w.seal(s.Credentials, testKey, bytes.NewReader(testNonce)); err != nil {
			t.Fatal(err)
		}
		value, err := w.text()
		if err != nil {
			t.Fatal(err)
		}
		refused(t, what, value, ring(testKey), is(ErrInvalid), c.text)
	}
}

// TestSealFaults: seals that hold no credentials, or none at all.
func TestSealFaults(t *testing.T) {
	seal := func(change func(*wire)) string {
		w := toWire(testSpec())
		w.Nydus.Key = testKey.ID()
		change(w)
		value, err := w.text()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	refused(t, "no seal", seal(func(*wire) {}), ring(testKey), is(ErrMalformed), "seal")
	refused(t, "half a nonce", seal(func(w *wire) { w.Nydus.Sealed = testNonce[:6] }), ring(testKey), is(ErrMalformed), "seal")
	refused(t, "no tag", seal(func(w *wire) { w.Nydus.Sealed = testNonce }), ring(testKey), is(ErrAltered))
	text := seal(func(w *wire) {
		aead, additional, err := w.aead(testKey)
		if err != nil {
			t.Fatal(err)
		}
		w.Nydus.Sealed = aead.Seal(testNonce, testNonce[:12:12], []byte(`{"auth":"canary`), additional)
	})
	refused(t, "not credentials", text, ring(testKey), is(ErrInvalid), "sealed credentials")
}

func TestFind(t *testing.T) {
	for what, c := range map[string]struct {
		options []string
		want    string
	}{
		"alone":                  {[]string{"extraoption=abc="}, "abc="},
		"among others":           {[]string{"workdir=/w", "extraoption=abc=", "lowerdir=/a:/b"}, "abc="},
		"joined by mount.fuse":   {[]string{"lowerdir=/a:/b,extraoption=abc=,dev,suid,rw"}, "abc="},
		"the last of two":        {[]string{"extraoption=one", "extraoption=two"}, "two"},
		"the last of two joined": {[]string{"extraoption=one,ro,extraoption=two,rw"}, "two"},
	} {
		if got, err := Find(c.options); err != nil || got != c.want {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
	for what, options := range map[string][]string{
		"none": nil, "others": {"ro", "lowerdir=/a"}, "empty": {"extraoption="}, "name alone": {"extraoption"},
		"another name": {"xextraoption=abc"}, "within another": {"lowerdir=extraoption=abc"},
	} {
		got, err := Find(options)
		if !errors.Is(err, ErrMissing) || got != "" || !strings.Contains(err.Error(), "nydus-snapshotter") {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
}

// FuzzDecode: nothing but what Encode wrote is ever read, and no error tells what
// was in it.
func FuzzDecode(f *testing.F) {
	issued := map[string]bool{}
	for _, s := range variants() {
		option, err := encode(s, testKey, bytes.NewReader(testNonce))
		if err != nil {
			f.Fatal(err)
		}
		value := strings.TrimPrefix(option, "extraoption=")
		issued[value] = true
		f.Add([]byte(decoded(f, value)), true)
		f.Add([]byte(value), false)
	}
	f.Fuzz(func(t *testing.T, data []byte, encode bool) {
		value := string(data)
		if encode {
			value = base64.StdEncoding.EncodeToString(data)
		}
		s, err := Decode(value, ring(testKey))
		if err == nil {
			if !issued[value] {
				t.Fatalf("accepted %+v of\n%s", s, value)
			}
			return
		}
		if issued[value] || s != nil {
			t.Fatalf("%v, %v", s, err)
		}
		noLeak(t, "the error", err.Error(), value)
	})
}

// FuzzRoundTrip: what Encode accepts comes back as it was, here and in Kata.
func FuzzRoundTrip(f *testing.F) {
	f.Add("a/image.boot", "b", "cache", "lower", `{"x":1}`, "image", "host", "repo", "secret", true)
	f.Add("ü", "漢", " ", "\x7f", "\x00", "\xff", "<>&", "\u2028", "=", false)
	f.Fuzz(func(t *testing.T, boot, snapshot, cache, lower, config, image, host, repo, secret string, readOnly bool) {
		s := testSpec()
		s.Bootstrap, s.SnapshotDir, s.CacheDir = s.Root+"/"+boot, s.Root+"/"+snapshot, s.Root+"/"+cache
		s.Lower, s.Config, s.Image, s.Host, s.Repository = []string{s.Root + "/" + lower}, config, image, host, repo
		s.Credentials, s.ReadOnly = &Credentials{Auth: secret}, readOnly
		option, err := Encode(s, testKey)
		if err != nil {
			if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrTooLarge) {
				t.Fatal(err)
			}
			return
		}
		value, err := Find([]string{"lowerdir=/x," + option + ",rw"})
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(value, ring(testKey))
		if err != nil {
			t.Fatal(err)
		}
		same(t, "fuzzed", got, s)
		kataReads(t, "fuzzed", s, option)
	})
}
