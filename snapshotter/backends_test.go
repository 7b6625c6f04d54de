package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

func rules() []config.Backend {
	return []config.Backend{
		{Name: "own", Type: config.BackendRegistry, Match: config.Match{Host: "r.example", Repository: "team/own/**"}},
		{Name: "team", Type: config.BackendS3, Match: config.Match{Repository: "team/**"}, Region: "r", BucketName: "b", ObjectPrefix: "p/", CredentialsFile: "/nonexistent/keys"},
		{Name: "files", Type: config.BackendLocalFS, Match: config.Match{Host: "r.example:5000"}, AllowLabel: true, Dir: "/files"},
		{Name: "asked", Type: config.BackendLocalFS, AllowLabel: true, Dir: "/asked"},
		{Name: "hub", Type: config.BackendOSS, Match: config.Match{Host: "docker.io"}, Endpoint: "oss.example", BucketName: "hub", CredentialsFile: "/nonexistent/keys"},
	}
}

func TestSelectRule(t *testing.T) {
	for _, c := range []struct{ ref, wanted, want, refused string }{
		{ref: "r.example/other:1"},
		{ref: "r.example/team/app:1", want: "team"},
		{ref: "r.example:5000/team/app@sha256:" + strings.Repeat("0", 64), want: "team"}, // the first one
		{ref: "r.example/team/own/app:1", want: "own"},
		{ref: "other.example/team/own/app:1", want: "team"},
		{ref: "r.example:5000/other:1", want: "files"},
		{ref: "alpine", want: "hub"},
		{ref: "library/alpine:3", want: "hub"},
		{ref: "r.example/other:1", wanted: "asked", want: "asked"},
		{ref: "r.example/team/app:1", wanted: "asked", want: "asked"}, // before what matches
		{ref: "r.example:5000/team/app:1", wanted: "files", want: "files"},
		{ref: "r.example/other:1", wanted: "files", refused: `image "r.example/other:1" asks by its label containerd.io/snapshot/nydus-backend for [[backend]] "files", which is for images of host "r.example:5000" only`},
		{ref: "r.example/team/app:1", wanted: "team", refused: `for [[backend]] "team", which does not allow it (allow_label = false)`},
		{ref: "r.example/team/app:1", wanted: "../x", refused: `image "r.example/team/app:1" asks by its label containerd.io/snapshot/nydus-backend for backend "../x", and no [[backend]] has that name`},
		{ref: "Not A Reference", refused: `read image reference "Not A Reference"`},
	} {
		got, err := selectRule(rules(), c.ref, c.wanted)
		name := ""
		if got != nil {
			name = got.Name
		}
		if c.refused != "" {
			if err == nil || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%s, %q: %v, want %s", c.ref, c.wanted, err, c.refused)
			}
		} else if err != nil || name != c.want {
			t.Errorf("%s, %q: %q, %v; want %q", c.ref, c.wanted, name, err, c.want)
		}
	}
}

func testBackends(rules []config.Backend, template string) backends {
	return backends{rules: rules, tuning: tuningOf(template)}
}

const awsKeys = "[default]\naws_access_key_id = canary-id\naws_secret_access_key = canary-secret\n"

// A bucket is what mount.nydus takes it for, whoever opens it.
func TestBucketBackend(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys")
	all := rules()
	all[1].CredentialsFile = file
	b, err := testBackends(all, "").Backend(t.Context(), "r.example/team/app:1", "")
	if err != nil {
		t.Fatal(err)
	}
	text, err := b.Config("/cache")
	if err != nil {
		t.Fatal(err)
	}
	origin, err := nydusd.OriginOf(text)
	if err != nil || b.Host != "" || origin.Host != "" || b.Repository != origin.Repository || b.Repository != `{"bucket_name":"b","endpoint":"","object_prefix":"p/","region":"r","type":"s3"}` {
		t.Errorf("got %q %q, want what mount.nydus makes of it: %+v, %v", b.Host, b.Repository, origin, err)
	}
	if origin.Secret || !strings.Contains(text, `"scheme":"https"`) {
		t.Errorf("got %s", text)
	}
	_, err = b.Credentials(t.Context(), "instance")
	for _, want := range []string{`[[backend]] "team"`, file, "no such file"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("without keys: %v, want %s", err, want)
		}
	}
	write(t, file, awsKeys)
	c, err := b.Credentials(t.Context(), "instance")
	if err != nil || c.AccessKeyID != "canary-id" || c.AccessKeySecret != "canary-secret" || c.Auth+c.RegistryToken != "" {
		t.Errorf("%v, %v", c, err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if c, err := b.Credentials(t.Context(), "instance"); err == nil || c != nil || !strings.Contains(err.Error(), "chmod 0600") || strings.Contains(err.Error(), "canary") {
		t.Errorf("keys that all can read: %v, %v", c, err)
	}
}

// Alibaba's keys have other names.
func TestOSSBackend(t *testing.T) {
	all := rules()
	all[4].CredentialsFile = write(t, filepath.Join(t.TempDir(), "keys"), "[default]\naccess_key_id = I\naccess_key_secret = S\n")
	b, err := testBackends(all, "").Backend(t.Context(), "alpine", "")
	if err != nil {
		t.Fatal(err)
	}
	if c, err := b.Credentials(t.Context(), ""); err != nil || c.AccessKeyID != "I" || c.AccessKeySecret != "S" {
		t.Errorf("%v, %v", c, err)
	}
	if b.Repository != `{"bucket_name":"hub","endpoint":"oss.example","type":"oss"}` {
		t.Errorf("got %q", b.Repository)
	}
}

// A template counts from the next mount on, and a broken one fails it with the image's
// name. What makes an instance the same one does not change.
func TestTemplate(t *testing.T) {
	template := write(t, filepath.Join(t.TempDir(), "t.json"), `{"amplify_io": 4096}`)
	b, err := testBackends(rules(), template).Backend(t.Context(), "r.example/x:1", "asked")
	if err != nil || b.Repository != "/asked" || b.Credentials != nil {
		t.Fatalf("%+v, %v", b, err)
	}
	if text, err := b.Config("/cache"); err != nil || !strings.Contains(text, `"amplify_io":4096`) || !strings.Contains(text, `"dir":"/asked"`) {
		t.Errorf("%v: %s", err, text)
	}
	write(t, template, "{\n\"mode\": \"cached\"}")
	_, err = b.Config("/cache")
	for _, want := range []string{`[[backend]] "asked"`, template, "line 2: mode: want"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("broken: %v, want %s", err, want)
		}
	}
	write(t, template, `{"fs_prefetch": {"enable": true}}`)
	if text, err := b.Config("/cache"); err != nil || strings.Contains(text, "amplify_io") || !strings.Contains(text, `"fs_prefetch":{"enable":true}`) {
		t.Errorf("%v: %s", err, text)
	}
}

// The whole way: keys travel sealed, and show nowhere.
func TestServeBucket(t *testing.T) {
	dir := shortDir(t)
	keys := write(t, filepath.Join(dir, "keys"), awsKeys)
	file := write(t, filepath.Join(dir, "c.toml"), `version = 1
log.level = "trace"
[[backend]]
name = "bucket"
type = "s3"
match = { repository = "team/*" }
region = "r"
bucket_name = "b"
credentials_file = "`+keys+`"
`)
	p := start(t, dir, "--config", file)
	sn := p.client()
	image := pull(t, sn, "registry.example/team/app", 1)
	mounts, err := sn.Prepare(testContext(t), "k8s.io/9/c1", image)
	if err != nil {
		t.Fatal(err)
	}
	spec := decode(t, p, mounts[0])
	want := mountspec.Credentials{AccessKeyID: "canary-id", AccessKeySecret: "canary-secret"}
	if spec.Credentials == nil || *spec.Credentials != want || spec.Host != "" || !strings.Contains(spec.Config, `"s3"`) || strings.Contains(spec.Config, "canary") {
		t.Errorf("got %+v", spec)
	}
	write(t, keys, "[default]\naws_access_key_id = other-canary\naws_secret_access_key = canary\n")
	if mounts, err = sn.Mounts(testContext(t), "k8s.io/9/c1"); err != nil {
		t.Fatal(err)
	}
	if again := decode(t, p, mounts[0]); again.Credentials.AccessKeyID != "other-canary" || again.Instance != spec.Instance {
		t.Errorf("another key makes another instance: %+v", again)
	}
	write(t, keys, "[default]\naws_access_key_id = canary\n")
	_, err = sn.Mounts(testContext(t), "k8s.io/9/c1")
	for _, part := range []string{`"registry.example/team/app"`, `[[backend]] "bucket"`, keys, "aws_secret_access_key is missing"} {
		if err == nil || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "canary") {
			t.Errorf("got %v, want %s", err, part)
		}
	}
	if said := p.stop(); strings.Contains(said, "canary") {
		t.Errorf("the log shows a key:\n%s", said)
	}
}

func TestConfigCheckLooksIntoFiles(t *testing.T) {
	dir := t.TempDir()
	cfg := config.Default()
	cfg.Backends = rules()
	cfg.Backends[1].CredentialsFile = write(t, filepath.Join(dir, "keys"), awsKeys)
	cfg.Daemon.ConfigTemplate = write(t, filepath.Join(dir, "t.json"), `{"colour": 1}`)
	cfg.Credentials.Kubelet.Config = "/nonexistent/providers.yaml"
	cfg.Image = config.Image{ValidateSignature: true, PublicKeyFile: "/nonexistent/keys.pem"}
	err := checkFiles("f.toml", cfg)
	for _, want := range []string{"configuration f.toml has 4 faults", "image.public_key_file: open /nonexistent/keys.pem", "credentials.kubelet.config: read kubelet's credential providers: stat /nonexistent/providers.yaml", "daemon.config_template: nydusd template " + cfg.Daemon.ConfigTemplate + ": line 1: colour: unknown key", "backend[5].credentials_file: read access key from /nonexistent/keys"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	cfg.Daemon.ConfigTemplate, cfg.Backends, cfg.Credentials.Kubelet.Config = "", cfg.Backends[:4], ""
	cfg.Image.ValidateSignature = false // then nobody reads them
	if err := checkFiles("f.toml", cfg); err != nil {
		t.Error(err)
	}
}

// oneLogin has one login for everything.
type oneLogin registry.Credentials

func (k oneLogin) Credentials(context.Context, string, string) (*registry.Credentials, error) {
	c := registry.Credentials(k)
	return &c, nil
}

// Credentials that nydusd could not renew take the gateway, unless that is never used. It
// is then needed when the image is mounted, and not before.
func TestCredentialsThatExpire(t *testing.T) {
	nobody := "127.0.0.1:1"
	for name, c := range map[string]struct {
		login   registry.Credentials
		gateway config.Gateway
		through bool
		refused string
	}{
		"lasting":        {registry.Credentials{Auth: "dTpw", Source: "a"}, config.GatewayAuto, false, ""},
		"expiring":       {registry.Credentials{Auth: "dTpw", Source: "plugin x", Expires: time.Now().Add(time.Hour)}, config.GatewayAuto, true, "credentials that expire (plugin x)"},
		"identity":       {registry.Credentials{IdentityToken: "canary", Source: "b"}, config.GatewayAuto, true, "identity token (b)"},
		"several":        {registry.Credentials{Auth: "dTpw", Source: "s", OneOfSeveral: true}, config.GatewayAuto, true, "one of several logins (s)"},
		"never":          {registry.Credentials{Auth: "dTpw", Source: "a", Expires: time.Now()}, config.GatewayNever, false, ""},
		"never identity": {registry.Credentials{IdentityToken: "canary", Source: "b"}, config.GatewayNever, false, "identity token"},
	} {
		r := config.Remote{Gateway: c.gateway, GatewayAddress: nobody}
		b := backends{tuning: tuningOf(""), remote: r, keychain: oneLogin(c.login), endpoints: endpoints(r, oneLogin(c.login))}
		got, err := b.Backend(t.Context(), "r.example/a/b:1", "")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.ForMount != nil {
			if got, err = got.ForMount(t.Context()); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if got.Host != "r.example" || got.Repository != "a/b" {
			t.Errorf("%s: it is %s %s", name, got.Host, got.Repository)
		}
		text, err := got.Config("/cache")
		if err != nil || strings.Contains(text, nobody) != c.through || strings.Contains(text, `"r.example"`) == c.through {
			t.Errorf("%s: %s, %v", name, text, err)
		}
		opened, err := got.Credentials(t.Context(), "instance")
		if c.refused == "" && (err != nil || opened.Auth != c.login.Auth) {
			t.Errorf("%s: %v", name, err)
		}
		if c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused) || strings.Contains(err.Error(), "canary")) {
			t.Errorf("%s: %v, want %s", name, err, c.refused)
		}
	}
}
