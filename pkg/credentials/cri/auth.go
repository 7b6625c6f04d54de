package cri

import (
	"net/url"

	"github.com/distribution/reference"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nydusfs/nydus-snapshotter/pkg/credentials"
)

// target is what a pull is for.
type target struct{ host, repository string }

// hubHost is where docker.io is.
const hubHost = "registry-1.docker.io"

// hostOf is the host that a registry's API has.
func hostOf(registry string) string {
	if registry == "docker.io" || registry == "index.docker.io" {
		return hubHost
	}
	return registry
}

// loginOf returns what a pull's credentials are for, and ok when they are for
// something. It decides as ParseAuth of containerd's CRI plugin: with a server's
// address they are for that host alone, without one for the image's; user and
// password come before an identity token and that before an encoded pair. A registry
// token containerd does not know.
func loginOf(request *runtime.PullImageRequest) (to target, l login, ok bool) {
	auth := request.GetAuth()
	name, err := reference.ParseDockerRef(request.GetImage().GetImage())
	if auth == nil || err != nil {
		return to, l, false
	}
	to = target{hostOf(reference.Domain(name)), reference.Path(name)}
	if address := auth.GetServerAddress(); address != "" {
		u, err := url.Parse(address)
		if err != nil || u.Host == "" {
			return to, l, false
		}
		to.host = u.Host
	}
	switch {
	case auth.GetUsername() != "":
		l.User, l.Password = auth.GetUsername(), auth.GetPassword()
	case auth.GetIdentityToken() != "":
		l.IdentityToken = auth.GetIdentityToken()
	case auth.GetAuth() != "":
		if l.User, l.Password, err = credentials.DecodeAuth(auth.GetAuth()); err != nil || l.User == "" {
			return to, l, false
		}
	default:
		return to, l, false
	}
	return to, l, true
}
