package config

import (
	"path/filepath"
	"regexp"
	"slices"
)

// CredentialSources are where credentials for registries come from, beside docker's
// configuration, which is always asked, and last.
type CredentialSources struct {
	Kubernetes KubernetesSource `toml:"kubernetes"`
	Kubelet    KubeletSource    `toml:"kubelet"`
	CRI        CRISource        `toml:"cri"`
}

// KubernetesSource is a cluster's image pull secrets.
type KubernetesSource struct {
	// Kubeconfig is a file, KubeconfigInCluster, or empty: then there is no such
	// source.
	Kubeconfig string `toml:"kubeconfig"`
	// Namespaces are those whose secrets count; none means all.
	Namespaces []string `toml:"namespaces"`
}

// KubeconfigInCluster stands for the service account of the snapshotter's own pod.
const KubeconfigInCluster = "in-cluster"

// KubeletSource is kubelet's credential provider plugins.
type KubeletSource struct {
	// Config is kubelet's CredentialProviderConfig, or empty: then there is no such
	// source. BinDir has the programs.
	Config string `toml:"config"`
	BinDir string `toml:"bin_dir"`
}

// CRISource is what kubelet pulls images with.
type CRISource struct {
	// Address is the socket for kubelet's image calls, or empty: then there is no such
	// source. Containerd is where they go on to.
	Address    string `toml:"address"`
	Containerd string `toml:"containerd"`
}

func defaultCredentials() CredentialSources {
	return CredentialSources{
		Kubernetes: KubernetesSource{Namespaces: []string{}},
		CRI:        CRISource{Containerd: "/run/containerd/containerd.sock"},
	}
}

// namespaceName is a namespace as Kubernetes has it: a label of a host's name.
var namespaceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (v *validator) credentials(c Config) {
	s := c.Credentials
	if k := s.Kubernetes; k.Kubeconfig != "" && k.Kubeconfig != KubeconfigInCluster {
		v.file("credentials.kubernetes.kubeconfig", k.Kubeconfig, ` "in-cluster" in a pod,`)
	} else if k.Kubeconfig == "" && len(k.Namespaces) > 0 {
		v.fail("credentials.kubernetes.namespaces", "is set, but kubeconfig is not: no secret is looked at; set it, or remove the namespaces")
	}
	for i, name := range s.Kubernetes.Namespaces {
		if !namespaceName.MatchString(name) {
			v.fail("credentials.kubernetes.namespaces", "%q is no namespace", name)
		} else if slices.Contains(s.Kubernetes.Namespaces[:i], name) {
			v.fail("credentials.kubernetes.namespaces", "%q is listed twice", name)
		}
	}
	if k := s.Kubelet; k.Config != "" || k.BinDir != "" {
		if k.Config == "" || k.BinDir == "" {
			v.fail("credentials.kubelet.config", "%q and bin_dir %q: want both, kubelet's --image-credential-provider-config and --image-credential-provider-bin-dir, or neither", k.Config, k.BinDir)
		} else {
			v.file("credentials.kubelet.config", k.Config, "")
			v.file("credentials.kubelet.bin_dir", k.BinDir, "")
		}
	}
	if s.CRI.Address != "" {
		v.cri(c)
	}
}

// file reports whether p is the path of something that we do not make.
func (v *validator) file(key, p, or string) bool {
	if !filepath.IsAbs(p) || filepath.Clean(p) != p {
		v.fail(key, "%q: want an absolute path without . or ..,%s or nothing", p, or)
		return false
	}
	return true
}

func (v *validator) cri(c Config) {
	const key = "credentials.cri.address"
	s := c.Credentials.CRI
	if !v.file(key, s.Address, "") {
		return
	}
	if len(s.Address) > MaxAddress {
		v.fail(key, "%q has %d bytes; a socket allows %d", s.Address, len(s.Address), MaxAddress)
	}
	if within(s.Address, c.RunDir+"/i") || within(s.Address, c.RunDir+"/credentials") || s.Address == c.RunDir || s.Address == c.Address || within(c.Root, s.Address) {
		v.fail(key, "%q is taken by address, root, or what run_dir holds", s.Address)
	}
	if !v.file("credentials.cri.containerd", s.Containerd, "") {
		return
	}
	if s.Containerd == s.Address {
		v.fail("credentials.cri.containerd", "%q is address, where the snapshotter itself listens; want containerd's socket", s.Containerd)
	}
}
