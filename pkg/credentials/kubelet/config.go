// Package kubelet finds credentials by kubelet's credential provider plugins: the
// programs that a node already has for its cloud's registries.
//
// Configuration and protocol are Kubernetes': CredentialProviderConfig of
// kubelet.config.k8s.io/v1, and credentialprovider.kubelet.k8s.io/v1, in the Go types
// of k8s.io/kubelet.
//
// What the package promises:
//
//   - A plugin's run is bounded in time, and so is what it prints. It dies with its
//     time, and its process group with it.
//   - What a plugin prints is in no error and no log: it may be a secret.
//   - Answers are kept as long as, and for what, the plugin says.
//
// Plugins that want the token of a pod's service account cannot be used, and are left
// out: whoever reads a blob is no pod.
package kubelet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	configv1 "k8s.io/kubelet/config/v1"
	pluginv1 "k8s.io/kubelet/pkg/apis/credentialprovider/v1"
	"sigs.k8s.io/yaml"

	"github.com/nydusfs/nydus-snapshotter/pkg/credentials"
)

// kind of the configuration.
const kind = "CredentialProviderConfig"

// maxConfig bounds the configuration in bytes.
const maxConfig = 1 << 20

// readConfig reads kubelet's configuration and says everything that is wrong with it.
func readConfig(path string) (*configv1.CredentialProviderConfig, error) {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", path)
	}
	if err == nil && info.Size() > maxConfig {
		err = fmt.Errorf("%s has more than %d bytes", path, maxConfig)
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(filepath.Clean(path))
	}
	if err != nil {
		return nil, fmt.Errorf("read kubelet's credential providers: %w", err)
	}
	config := &configv1.CredentialProviderConfig{}
	if err := yaml.UnmarshalStrict(text, config); err != nil {
		return nil, fmt.Errorf("read kubelet's credential providers: %s: %w", path, withoutText(err))
	}
	if err := check(config); err != nil {
		return nil, fmt.Errorf("kubelet's credential providers: %s: %w", path, err)
	}
	return config, nil
}

// withoutText keeps of an error what names no value: env may hold secrets.
func withoutText(err error) error {
	for _, line := range strings.Split(err.Error(), "\n") {
		if _, field, ok := strings.Cut(line, "unknown field "); ok {
			return fmt.Errorf("unknown field %s", field)
		}
		if _, rest, ok := strings.Cut(line, "line "); ok {
			number, _, _ := strings.Cut(rest, ":")
			if n, err := strconv.Atoi(number); err == nil {
				return fmt.Errorf("line %d is not YAML, or has a key twice", n)
			}
		}
		if _, field, ok := strings.Cut(line, "Go struct field "); ok {
			field, _, _ = strings.Cut(field, " of type")
			return fmt.Errorf("%s has another type", field)
		}
	}
	return errors.New("it is not YAML as kubelet reads it")
}

// check says what kubelet would.
func check(config *configv1.CredentialProviderConfig) error {
	if want := configv1.SchemeGroupVersion.String(); config.APIVersion != want || config.Kind != kind {
		return fmt.Errorf("it is %q, kind %q; want %q, kind %q", config.APIVersion, config.Kind, want, kind)
	}
	if len(config.Providers) == 0 {
		return errors.New("it has no providers")
	}
	var faults []error
	seen := map[string]bool{}
	for i, p := range config.Providers {
		name := p.Name
		if name == "" {
			name = fmt.Sprintf("number %d", i+1)
		}
		if seen[name] {
			faults = append(faults, fmt.Errorf("provider %s is there twice", name))
		}
		seen[name] = true
		if err := checkProvider(p); err != nil {
			faults = append(faults, fmt.Errorf("provider %s: %w", name, err))
		}
	}
	return errors.Join(faults...)
}

// cannot says why a provider is of no use here, although kubelet can use it.
func cannot(p configv1.CredentialProvider) string {
	if p.TokenAttributes != nil {
		return "tokenAttributes: it wants the token of a pod's service account, and there is no pod where blobs are read; credentials.cri has what kubelet got from it"
	}
	return ""
}

func checkProvider(p configv1.CredentialProvider) error {
	var faults []error
	fail := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ \t\n\x00") {
		fail("name %q: want that of a program in bin_dir", p.Name)
	}
	if want := pluginv1.SchemeGroupVersion.String(); p.APIVersion != want {
		fail("apiVersion is %q, want %q", p.APIVersion, want)
	}
	if len(p.MatchImages) == 0 {
		fail("matchImages is empty")
	}
	for _, m := range p.MatchImages {
		if _, err := credentials.ParsePattern(m); err != nil {
			fail("matchImages: %w", err)
		}
	}
	if p.DefaultCacheDuration == nil {
		fail("defaultCacheDuration is missing")
	} else if p.DefaultCacheDuration.Duration < 0 {
		fail("defaultCacheDuration is %s, want 0 or more", p.DefaultCacheDuration.Duration)
	}
	for _, e := range p.Env {
		if e.Name == "" || strings.ContainsAny(e.Name, "=\x00") {
			fail("env: %q is no name of a variable", e.Name)
		}
	}
	return errors.Join(faults...)
}
