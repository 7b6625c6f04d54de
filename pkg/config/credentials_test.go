package config

import (
	"strings"
	"testing"
)

func TestCredentialSources(t *testing.T) {
	for text, want := range map[string]string{
		"[credentials.kubernetes]\nkubeconfig = \"/etc/kubernetes/nydus.conf\"\nnamespaces = [\"default\", \"team-a\"]": "",
		"[credentials.kubernetes]\nkubeconfig = \"in-cluster\"":                                                         "",
		"[credentials.kubernetes]\nkubeconfig = \"relative\"":                                                           `kubeconfig: "relative": want an absolute path`,
		"[credentials.kubernetes]\nnamespaces = [\"a\"]":                                                                "kubeconfig is not",
		"[credentials.kubernetes]\nkubeconfig = \"in-cluster\"\nnamespaces = [\"A\"]":                                   `"A" is no namespace`,
		"[credentials.kubernetes]\nkubeconfig = \"in-cluster\"\nnamespaces = [\"a\", \"a\"]":                            "listed twice",
		"[credentials.kubelet]\nconfig = \"/etc/c.yaml\"\nbin_dir = \"/bin\"":                                           "",
		"[credentials.kubelet]\nconfig = \"/etc/c.yaml\"":                                                               "or neither",
		"[credentials.kubelet]\nbin_dir = \"/bin\"":                                                                     "or neither",
		"[credentials.kubelet]\nconfig = \"c.yaml\"\nbin_dir = \"/bin/\"":                                               `bin_dir: "/bin/"`,
		"[credentials.cri]\naddress = \"/run/nydus-snapshotter/cri.sock\"":                                              "",
		"[credentials.cri]\naddress = \"cri.sock\"":                                                                     `address: "cri.sock"`,
		"[credentials.cri]\naddress = \"/" + strings.Repeat("x", MaxAddress) + "\"":                                     "a socket allows",
		"[credentials.cri]\naddress = \"/run/nydus-snapshotter/nydus-snapshotter.sock\"":                                "is taken by",
		"[credentials.cri]\naddress = \"/run/nydus-snapshotter/credentials/a.sock\"":                                    "is taken by",
		"[credentials.cri]\naddress = \"/run/nydus-snapshotter/i\"":                                                     "is taken by",
		"[credentials.cri]\naddress = \"/run/a.sock\"\ncontainerd = \"/run/a.sock\"":                                    "want containerd's socket",
		"[credentials.cri]\naddress = \"/run/a.sock\"\ncontainerd = \"\"":                                               "credentials.cri.containerd",
	} {
		_, err := Parse("f", []byte("version = 1\n"+text), nil)
		if (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n got %v, want %q", text, err, want)
		}
	}
}
