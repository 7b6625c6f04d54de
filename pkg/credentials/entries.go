package credentials

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// Names of docker.io: in references, of its API, and in old configurations.
const (
	hubDomain = "docker.io"
	hubHost   = "registry-1.docker.io"
	hubIndex  = "index.docker.io"
)

// ImageName is how a repository of a host stands in references: docker.io's API has
// another host name.
func ImageName(host, repository string) string {
	if host == hubHost || host == hubIndex {
		host = hubDomain
	}
	return host + "/" + repository
}

// Pattern says for which images an entry counts, as Kubernetes writes it in pull
// secrets and in matchImages: a host, of which each label may be a glob, with the
// very port if the image's has one, and the beginning of a repository.
type Pattern struct {
	text string
	// host has no port.
	host, port, path string
}

// ParseEntry reads the pattern of a login. It may also be a URL, as docker wrote them,
// in which /v1/ and /v2/ before anything else mean nothing, as for kubelet.
func ParseEntry(text string) (Pattern, error) {
	p, err := ParsePattern(text)
	for _, api := range []string{"v1/", "v2/"} {
		if rest, ok := strings.CutPrefix(p.path, api); ok {
			p.path = rest
			break
		}
	}
	return p, err
}

// ParsePattern reads a pattern as matchImages has it. Errors repeat it only when it
// looks like one: what stands in its place may be a URL with a password.
func ParsePattern(text string) (Pattern, error) {
	rest := strings.TrimPrefix(strings.TrimPrefix(text, "https://"), "http://")
	host, repository, _ := strings.Cut(rest, "/")
	p := Pattern{text: text, host: host, path: repository}
	if name, port, err := net.SplitHostPort(host); err == nil {
		p.host, p.port = name, port
	}
	if _, err := url.Parse("https://" + strings.ReplaceAll(host, "*", "x")); err != nil || p.host == "" || strings.Contains(host, "@") {
		return Pattern{}, fmt.Errorf("%s is no registry with, or without, the beginning of a repository", shown(text))
	}
	for _, label := range strings.Split(p.host, ".") {
		if _, err := path.Match(label, ""); err != nil {
			return Pattern{}, fmt.Errorf("%s has no pattern for a part of a host's name", shown(text))
		}
	}
	return p, nil
}

// shown is how a name stands in messages: as it is if nothing in it can be a secret.
func shown(name string) string {
	const host, port, repository = `[A-Za-z0-9.*_\[\]-]+`, `(:[0-9]{1,5})?`, `(/[A-Za-z0-9.*_/-]*)?`
	if ok, err := regexp.MatchString(`^(https?://)?`+host+port+repository+`$`, name); !ok || err != nil || len(name) > 255 {
		return "an entry"
	}
	return strconv.Quote(name)
}

// Matches tells whether the pattern is for a repository of a host.
func (p Pattern) Matches(host, repository string) bool {
	hosts := []string{host}
	if host == hubDomain || host == hubHost || host == hubIndex {
		hosts = []string{hubDomain, hubIndex, hubHost}
	}
	return strings.HasPrefix(repository, p.path) && slices.ContainsFunc(hosts, p.matchesHost)
}

func (p Pattern) matchesHost(host string) bool {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = host, ""
	}
	want, have := strings.Split(p.host, "."), strings.Split(name, ".")
	if p.port != port || len(want) != len(have) {
		return false
	}
	for i := range want {
		if ok, err := path.Match(want[i], have[i]); !ok || err != nil {
			return false
		}
	}
	return true
}

// Closer orders patterns that match the same image: the longer path first, the one
// that spells out the host before a glob.
func (p Pattern) Closer(than Pattern) int {
	return cmp.Or(
		-cmp.Compare(len(p.path), len(than.path)),
		cmp.Compare(globs(p.host), globs(than.host)),
		-cmp.Compare(len(p.text), len(than.text)),
		cmp.Compare(p.text, than.text),
	)
}

func globs(host string) int {
	return strings.Count(host, "*") + strings.Count(host, "?") + strings.Count(host, "[")
}

// Entry is a login for what a pattern says.
type Entry struct {
	Pattern     Pattern
	Credentials *registry.Credentials
}

// Select returns the credentials of the entries that match, the closest first, each
// once.
func Select(entries []Entry, host, repository string) []*registry.Credentials {
	var found []Entry
	for _, e := range entries {
		if e.Pattern.Matches(host, repository) {
			found = append(found, e)
		}
	}
	slices.SortStableFunc(found, func(a, b Entry) int { return a.Pattern.Closer(b.Pattern) })
	list := make([]*registry.Credentials, len(found))
	for i, e := range found {
		list[i] = e.Credentials
	}
	return unique(list, (*registry.Credentials).Opens)
}

// login is one of docker's, as config.json has it and pull secrets do.
type login struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// ParseConfigJSON reads the entries of a config.json, which Kubernetes keeps in
// secrets of type kubernetes.io/dockerconfigjson. Errors repeat nothing of it.
func ParseConfigJSON(text []byte, source string, since time.Time) ([]Entry, error) {
	var file struct {
		Auths map[string]login `json:"auths"`
	}
	if json.Unmarshal(text, &file) != nil {
		return nil, errors.New("it is not JSON as docker login writes it")
	}
	return entries(file.Auths, source, since)
}

// ParseConfig reads the entries of docker's older .dockercfg, which Kubernetes keeps
// in secrets of type kubernetes.io/dockercfg.
func ParseConfig(text []byte, source string, since time.Time) ([]Entry, error) {
	var auths map[string]login
	if json.Unmarshal(text, &auths) != nil {
		return nil, errors.New("it is not JSON as docker login wrote it")
	}
	return entries(auths, source, since)
}

// entries returns what is good, and what is wrong with the rest.
func entries(auths map[string]login, source string, since time.Time) (list []Entry, err error) {
	for name, l := range auths {
		pattern, fault := ParseEntry(name)
		if fault != nil {
			err = errors.Join(err, fault)
			continue
		}
		c, fault := l.credentials(source, since)
		if fault != nil {
			err = errors.Join(err, fmt.Errorf("the login for %s: %w", shown(name), fault))
		} else if c != nil {
			list = append(list, Entry{pattern, c})
		}
	}
	return list, err
}

func (l login) credentials(source string, since time.Time) (*registry.Credentials, error) {
	switch {
	case l.RegistryToken != "":
		return &registry.Credentials{RegistryToken: l.RegistryToken, Source: source}, nil
	case l.IdentityToken != "":
		return &registry.Credentials{IdentityToken: l.IdentityToken, Source: source}, nil
	case l.Auth != "":
		user, password, err := DecodeAuth(l.Auth)
		if err != nil {
			return nil, err
		}
		return registry.Basic(user, password, source, since), nil
	case l.Username != "":
		return registry.Basic(l.Username, l.Password, source, since), nil
	}
	return nil, nil
}

// DecodeAuth reads base64 of user:password, with padding or without. Docker filled
// passwords up with zero bytes once.
func DecodeAuth(auth string) (user, password string, err error) {
	text, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(strings.TrimSpace(auth), "="))
	user, password, ok := strings.Cut(string(text), ":")
	if err != nil || !ok {
		return "", "", errors.New(`"auth" is not base64 of user:password`)
	}
	return user, strings.Trim(password, "\x00"), nil
}
