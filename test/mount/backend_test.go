package mount_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/tuning"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	keyID     = "AKIDcanary5c1e"
	keySecret = "canary/7d0b+91c4=="
)

// backendSpec is spec for an image whose blobs are at some backend.
func (e *env) backendSpec(f *fixture, c nydusd.Config) *mountspec.Spec {
	e.t.Helper()
	s := e.spec(f)
	text, err := c.FuseDev()
	must(e.t, err)
	origin, err := nydusd.OriginOf(text)
	must(e.t, err)
	s.Host, s.Repository = origin.Host, origin.Repository
	s.CacheDir = mountspec.CacheDir(e.root, s.Host, s.Repository)
	s.Instance = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
	c.CacheDir = s.CacheDir
	s.Config, err = c.FuseDev()
	must(e.t, err)
	return s
}

func bucketOf(b *kit.Bucket) nydusd.Config {
	return nydusd.Config{Backend: nydusd.Backend{
		Type: nydusd.BackendS3, Scheme: "http", Bucket: nydusd.Bucket{Endpoint: b.Host, Region: b.Region, Name: b.Name, Prefix: "team/"},
	}}
}

// A whole image from a bucket, with a key that shows nowhere but in nydusd's
// configuration; also after its daemon was killed.
func TestBucket(t *testing.T) {
	b := kit.NewBucket(t, keyID, keySecret)
	e := newEnv(t)
	img := odd(t)
	b.Put(t, "team/", img.Image)
	s := e.backendSpec(img, bucketOf(b))
	s.Credentials = &mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret}
	target := e.mustMount(s)
	e.holds(img, target)
	asked := len(b.Requests())
	if asked == 0 {
		t.Error("nothing came from the bucket")
	}
	e.hidesKey(1)
	e.kill(e.daemons(1)[0].PID)
	must(t, os.RemoveAll(s.CacheDir))
	again := e.mustMount(e.another(s))
	e.holds(img, again)
	if len(b.Requests()) == asked {
		t.Error("the second daemon asked for nothing")
	}
	for _, r := range b.Requests() {
		if r.Status != http.StatusOK {
			t.Errorf("the bucket refused %+v", r)
		}
	}
	e.hidesKey(1)
	e.unmount(again)
	e.unmount(target)
}

// hidesKey looks where daemons and programs could show the key: it is in the
// configuration files alone, of which there are so many.
func (e *env) hidesKey(configs int) {
	e.t.Helper()
	for _, p := range e.daemons(configs) {
		for _, name := range []string{"cmdline", "environ", "mountinfo"} {
			if text := proc(p.PID, name); strings.Contains(text, keySecret) || strings.Contains(text, keyID) {
				e.t.Errorf("the key is in /proc/%d/%s", p.PID, name)
			}
		}
	}
	found := 0
	for _, top := range []string{runDir, e.root} {
		must(e.t, filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if d != nil && d.Name() == "mnt" {
				return filepath.SkipDir
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil || !strings.Contains(string(text), keySecret) && !strings.Contains(string(text), keyID) {
				return err
			}
			info, err := d.Info()
			if err != nil || top != runDir || filepath.Base(path) != "config.json" || info.Mode().Perm() != 0o600 {
				e.t.Errorf("%s holds the key, mode %v, %v", path, info.Mode(), err)
			}
			found++
			return nil
		}))
	}
	if found != configs {
		e.t.Errorf("%d files hold the key, want %d", found, configs)
	}
}

// With the wrong key nydusd mounts, since it needs nothing of the bucket for that, and
// every read fails; its log says why and does not say the key.
func TestBucketRefusesAKey(t *testing.T) {
	b := kit.NewBucket(t, keyID, "another")
	e := newEnv(t)
	img := small(t, "one")
	b.Put(t, "team/", img.Image)
	s := e.backendSpec(img, bucketOf(b))
	s.Credentials = &mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret}
	target := e.mustMount(s)
	if _, err := os.ReadFile(filepath.Join(target, "name")); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("reading gives %v, want an input/output error", err)
	}
	logs, err := filepath.Glob(filepath.Join(e.root, "instances", "*", "nydusd.log"))
	must(t, err)
	if len(logs) != 1 {
		t.Fatalf("logs %q", logs)
	}
	text, err := os.ReadFile(logs[0])
	must(t, err)
	if !strings.Contains(string(text), "SignatureDoesNotMatch") && !strings.Contains(string(text), "403") {
		t.Errorf("the log does not say why")
	}
	e.hidesKey(1)
	e.unmount(target)
}

// nydusd starts with everything that a template may set, for each type of backend. It
// asks none for anything before something is read.
func TestTunedBackends(t *testing.T) {
	tuned, err := tuning.Parse("template", []byte(`{
		"device": {"backend": {"config": {"connect_timeout": 3, "timeout": 7, "retry_limit": 255, "blob_url_scheme": "https", "blob_redirected_host": "blobs.example:8443"}},
			"cache": {"type": "blobcache"}},
		"mode": "direct", "digest_validate": false, "enable_xattr": true, "iostats_files": true, "access_pattern": true, "latest_read_files": true, "amplify_io": 268435456,
		"fs_prefetch": {"enable": false, "threads_count": 1024, "merging_size": 268435456, "bandwidth_rate": 4294967295, "prefetch_all": false}
	}`))
	must(t, err)
	bucket := nydusd.Bucket{Endpoint: "bucket.invalid", Name: "b", Prefix: "p/"}
	regional := bucket
	regional.Region = "r"
	for name, b := range map[string]nydusd.Backend{
		"localfs":  {Type: nydusd.BackendLocalFS},
		"registry": {Type: nydusd.BackendRegistry, Scheme: "https", Host: "registry.invalid", Repository: "r"},
		"oss":      {Type: nydusd.BackendOSS, Scheme: "https", SkipVerify: true, Bucket: bucket},
		"s3":       {Type: nydusd.BackendS3, Scheme: "https", SkipVerify: true, Bucket: regional},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			img := small(t, "one")
			if b.Type == nydusd.BackendLocalFS {
				b.Dir = img.blobs
			}
			s := e.backendSpec(img, nydusd.Config{Backend: b, Tuning: tuned})
			if b.Bucket.Name != "" {
				s.Credentials = &mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret}
			}
			var sent map[string]any
			must(t, json.Unmarshal([]byte(s.Config), &sent))
			if sent["amplify_io"] != float64(1<<28) {
				t.Fatalf("the configuration is not tuned: %s", s.Config)
			}
			target := e.mustMount(s)
			if b.Type == nydusd.BackendLocalFS {
				e.holds(img, target)
			}
			e.unmount(target)
		})
	}
}
