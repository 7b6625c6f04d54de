package mount_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/health"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/tuning"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
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
	s.Daemon.LogLevel = "trace"
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

// The key takes the ways of all credentials: to a successor of a killed daemon, which
// has yet to fetch everything, and to a daemon that serves many images.
func TestBucketOfSuccessorsAndPools(t *testing.T) {
	b := kit.NewBucket(t, keyID, keySecret)
	img := small(t, "one")
	b.Put(t, "team/", img.Image)
	mount := func(e *env) string {
		s := e.backendSpec(img, bucketOf(b))
		s.Credentials = &mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret}
		return e.mustMount(s)
	}
	t.Run("pool", func(t *testing.T) {
		e := newEnv(t)
		e.mode = mountspec.ModeShared
		target := mount(e)
		e.holds(img, target)
		e.hidesKey(1)
		e.unmount(target)
	})
	t.Run("successor", func(t *testing.T) {
		e := newEnv(t)
		if !e.succeeds() {
			return // see TestFailover
		}
		r := e.recover(recovery.PolicyFailover, true)
		target := mount(e)
		within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
		<-time.After(150 * time.Millisecond) // what dies sooner crashes
		before := e.current()
		e.kill(before.PID)
		within(t, "a successor", func() bool { return e.current().Restarts == before.Restarts+1 })
		e.holds(img, target)
		e.hidesKey(1)
		if strings.Contains(r.log.String(), keySecret) {
			t.Errorf("the log shows the key:\n%s", r.log)
		}
		e.unmount(target)
		must(t, e.tidy(soon))
		r.stop()
		e.holderEnds()
	})
}

// What decides whether a broken daemon is replaced asks a bucket as the daemon does.
func TestBucketHealth(t *testing.T) {
	b := kit.NewBucket(t, keyID, keySecret)
	img := small(t, "one")
	b.Put(t, "team/", img.Image)
	blob := img.Layers[0].Desc.Digest.Encoded()
	for _, config := range []nydusd.Config{bucketOf(b), ossOf(b)} {
		for secret, refusal := range map[string]string{keySecret: "", "another": "credentials of the mount are not, or no longer, valid"} {
			text, err := config.FuseDev()
			must(t, err)
			text, err = nydusd.AddCredentials(text, mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: secret})
			must(t, err)
			file := filepath.Join(t.TempDir(), "config.json")
			must(t, os.WriteFile(file, []byte(text), 0o600))
			err = health.Answers(t.Context(), file, nil, []string{blob})
			if refusal == "" && err != nil || refusal != "" && (err == nil || !strings.Contains(err.Error(), refusal) || strings.Contains(err.Error(), secret)) {
				t.Errorf("%s with %q: %v", config.Backend.Type, secret, err)
			}
		}
	}
}

// ossOf is the bucket as OSS, which nydusd reaches through a proxy.
func ossOf(b *kit.Bucket) nydusd.Config {
	return nydusd.Config{
		Backend: nydusd.Backend{Type: nydusd.BackendOSS, Scheme: "http", Bucket: nydusd.Bucket{Endpoint: kit.OSSEndpoint, Name: b.Name, Prefix: "team/"}},
		Tuning:  nydusd.Tuning{Transfer: nydusd.Transfer{Proxy: &nydusd.Proxy{URL: "http://" + b.Host}}},
	}
}

// There is no OSS to test with: what answers is a stand-in that checks signatures.
func TestOSS(t *testing.T) {
	b := kit.NewBucket(t, keyID, keySecret)
	e := newEnv(t)
	img := odd(t)
	b.Put(t, "team/", img.Image)
	s := e.backendSpec(img, ossOf(b))
	s.Credentials = &mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret}
	s.Daemon.LogLevel = "trace"
	target := e.mustMount(s)
	e.holds(img, target)
	if all := b.Requests(); len(all) == 0 || slices.ContainsFunc(all, func(r kit.Request) bool { return r.Status != http.StatusOK }) {
		t.Errorf("the bucket was asked %+v", all)
	}
	e.hidesKey(1)
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
		"device": {"backend": {"config": {"connect_timeout": 3, "timeout": 7, "retry_limit": 255, "blob_url_scheme": "https", "blob_redirected_host": "blobs.example:8443",
			"proxy": {"url": "http://127.0.0.1:9", "ping_url": "http://127.0.0.1:9/ping", "fallback": true, "check_interval": 5, "use_http": true}}},
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

// Prefetching, which a template turns on, brings data from a bucket before anybody reads
// it: a blob begins with it, and ends with its metadata.
func TestTunedPrefetch(t *testing.T) {
	tuned, err := tuning.Parse("template", []byte(`{"fs_prefetch": {"enable": true, "threads_count": 2, "merging_size": 131072, "bandwidth_rate": 0, "prefetch_all": true}}`))
	must(t, err)
	b := kit.NewBucket(t, keyID, keySecret)
	e := newEnv(t)
	img := small(t, "one")
	b.Put(t, "team/", img.Image)
	c := bucketOf(b)
	c.Tuning = tuned
	s := e.backendSpec(img, c)
	s.Credentials = &mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret}
	target := e.mustMount(s)
	within(t, "data is fetched", func() bool {
		return slices.ContainsFunc(b.Requests(), func(r kit.Request) bool { return strings.HasPrefix(r.Range, "bytes=0-") && r.Status == http.StatusOK })
	})
	e.holds(img, target)
	e.unmount(target)
}

// The oldest nydusd takes what is written for fscache: it parses and checks the
// configuration and opens the bootstrap, without the kernel's fscache. What serves with
// it is not tested here, where no kernel has it.
func TestFSCacheEntries(t *testing.T) {
	kit.Baseline(t)
	img := small(t, "one")
	dir := t.TempDir()
	boot := filepath.Join(dir, "image.boot")
	must(t, os.WriteFile(boot, img.boot, 0o600))
	n := func(i int) *int { return &i }
	yes := true
	tuned := nydusd.Tuning{
		Transfer: nydusd.Transfer{ConnectTimeout: n(3), Timeout: n(7), Retries: n(4)},
		Prefetch: &nydusd.Prefetch{Enable: true, Threads: n(4), BatchSize: n(1 << 20), Bandwidth: n(1 << 20), All: &yes},
	}
	put := singleton(t)
	for name, b := range map[string]nydusd.Backend{
		"localfs":  {Type: nydusd.BackendLocalFS, Dir: img.blobs},
		"registry": {Type: nydusd.BackendRegistry, Scheme: "https", Host: "registry.invalid", Repository: "r"},
		"oss":      {Type: nydusd.BackendOSS, Scheme: "https", Bucket: nydusd.Bucket{Endpoint: "bucket.invalid", Name: "b"}},
		"s3":       {Type: nydusd.BackendS3, Scheme: "https", Bucket: nydusd.Bucket{Region: "r", Name: "b"}},
	} {
		text, err := nydusd.Config{Backend: b, CacheDir: dir, Tuning: tuned}.FSCache(nydusd.FSCacheImage{ID: name, Domain: "domain", Bootstrap: boot})
		must(t, err)
		if b.Bucket.Name != "" {
			text, err = nydusd.AddCredentials(text, mountspec.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret})
			must(t, err)
		}
		if status, answer := put(text); status != http.StatusNoContent {
			t.Errorf("%s: %d %s for %s", name, status, answer, text)
		}
		// It does look at it.
		broken := strings.Replace(strings.Replace(text, `"id":"`+name, `"id":"broken-`+name, 1), `"`+b.Type+`":{`, `"x":{`, 1)
		if status, _ := put(broken); status < http.StatusBadRequest {
			t.Errorf("%s: %d for %s", name, status, broken)
		}
	}
}

// singleton starts a nydusd that would serve fscache, and returns how it is given images.
func singleton(t *testing.T) (put func(text string) (status int, answer string)) {
	t.Helper()
	dir, err := os.MkdirTemp("", "fsc") // short, as sockets need it
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(kit.MustTools(t).NydusdOld, "singleton", "--rlimit-nofile", "0", "--apisock", socket)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	request := func(method, path, text string) (int, string, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://nydusd"+path, strings.NewReader(text))
		must(t, err)
		resp, err := client.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(answer), err
	}
	within(t, "nydusd listens", func() bool {
		_, _, err := request(http.MethodGet, "/api/v1/daemon", "")
		return err == nil
	})
	return func(text string) (int, string) {
		status, answer, err := request(http.MethodPut, "/api/v2/blobs", text)
		must(t, err)
		return status, answer
	}
}
