package mount_test

import (
	"encoding/base64"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func basic(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

// registrySpec is spec for an image whose blobs lie in a registry.
func (e *env) registrySpec(f *fixture, reg *kit.Registry, repository string) *mountspec.Spec {
	e.t.Helper()
	s := e.spec(f)
	s.Host, s.Repository = reg.Host, repository
	s.CacheDir = mountspec.CacheDir(e.root, s.Host, s.Repository)
	s.Instance = mountspec.InstanceKey(s.BootstrapDigest, s.Host, s.Repository, s.CacheDir)
	config, err := nydusd.Config{
		Backend:  nydusd.Backend{Type: nydusd.BackendRegistry, Scheme: "http", Host: reg.Host, Repository: repository},
		CacheDir: s.CacheDir,
	}.FuseDev()
	must(e.t, err)
	s.Config = config
	return s
}
