package registry

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/distribution/reference"
)

// Backend is where an image's blobs are.
type Backend struct {
	// Scheme is "http" or "https", Host the registry's host, with its port if
	// it has one, Repository the path without tag or digest.
	Scheme, Host, Repository string
	// SkipVerify accepts any certificate, CAFile has the certificate authorities that
	// it may be from beside those of the machine; empty for none.
	SkipVerify bool
	CAFile     string
}

// dockerHost serves the images that references place at docker.io.
const (
	dockerDomain = "docker.io"
	dockerHost   = "registry-1.docker.io"
)

// Hosts resolves images whose blobs are in the registry that they
// were pulled from. Its entries are host or host:port, as in a reference.
type Hosts struct {
	// PlainHTTP lists registries that speak http. Those on this machine
	// (localhost, 127.0.0.0/8, ::1) always do.
	PlainHTTP []string
	// SkipVerify lists registries whose certificate is not verified.
	SkipVerify []string
}

// Resolve fails only for a text that is no image reference.
func (h Hosts) Resolve(ref string) (Backend, error) {
	name, err := parse(ref)
	if err != nil {
		return Backend{}, err
	}
	domain := reference.Domain(name)
	b := Backend{Scheme: "https", Host: domain, Repository: reference.Path(name)}
	if domain == dockerDomain {
		b.Host = dockerHost
	}
	if isLocal(domain) || slices.Contains(h.PlainHTTP, domain) || slices.Contains(h.PlainHTTP, b.Host) {
		b.Scheme = "http"
		return b, nil
	}
	b.SkipVerify = slices.Contains(h.SkipVerify, domain) || slices.Contains(h.SkipVerify, b.Host)
	return b, nil
}

// parse reads a reference as docker does: a name without a host is docker.io's.
func parse(ref string) (reference.Named, error) {
	name, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("read image reference %q: %w", ref, err)
	}
	return name, nil
}

// isLocal follows containerd, which speaks http to registries on the same
// machine.
func isLocal(domain string) bool {
	host := domain
	if h, _, err := net.SplitHostPort(domain); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return ip != nil && ip.IsLoopback()
}
