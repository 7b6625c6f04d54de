package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"golang.org/x/sys/unix"
)

// Credentials open a registry. At most one of the three is set.
type Credentials struct {
	// Auth is base64 of user:password.
	Auth string
	// RegistryToken is a bearer token for the registry itself.
	RegistryToken string
	// IdentityToken is one that is exchanged for those, which nydusd cannot do.
	IdentityToken string
	// Source says where they come from, for people.
	Source string
	// Expires is until when they may be kept; zero when the source knows of no end.
	Expires time.Time
	// OneOfSeveral says that the source has others for the same repository: which of them
	// the registry takes shows when they are used.
	OneOfSeveral bool
}

// hidden stands for credentials wherever they are written.
const hidden = "[credentials]"

// Format hides the secret from fmt, whatever the verb.
func (Credentials) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, hidden) }

// String hides it from whoever asks for a text.
func (Credentials) String() string { return hidden }

// GoString does so for Go's syntax.
func (Credentials) GoString() string { return hidden }

// LogValue hides it from slog.
func (Credentials) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalText hides it from encoders of all kinds: who stores credentials does so
// on purpose, member by member.
func (Credentials) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// Opens tells whether c and other open the same, wherever they come from.
func (c *Credentials) Opens(other *Credentials) bool {
	if c == nil || other == nil {
		return c == other
	}
	return c.Auth == other.Auth && c.RegistryToken == other.RegistryToken && c.IdentityToken == other.IdentityToken
}

// Basic returns the credentials for a user and a password. Where the user's name
// tells that the password is a token, they expire: a while after since, when the
// token was handed out.
func Basic(user, password, source string, since time.Time) *Credentials {
	c := &Credentials{Auth: base64.StdEncoding.EncodeToString([]byte(user + ":" + password)), Source: source}
	if life := tokenLife(user); life > 0 {
		c.Expires = since.Add(life)
	}
	return c
}

// tokenLife is how long a token lives at most that goes with a user's name, and 0
// when the name says nothing of the kind.
//
// The names are those of ECR's authorization tokens, of access tokens for Artifact
// Registry and Container Registry, and of refresh tokens for ACR, in their
// documentation.
func tokenLife(user string) time.Duration {
	switch {
	case user == "AWS":
		return 12 * time.Hour
	case user == "oauth2accesstoken", strings.HasPrefix(user, "_dcg") && strings.HasSuffix(user, "_token"):
		return time.Hour
	case user == "00000000-0000-0000-0000-000000000000":
		return 3 * time.Hour
	}
	return 0
}

// Keychain finds credentials.
type Keychain interface {
	// Credentials returns what opens a repository of a registry host, as Backend
	// names it, and nil when it is to be used without.
	Credentials(ctx context.Context, host, repository string) (*Credentials, error)
}

// Refuser is a Keychain that wants to know which of its answers are refused.
type Refuser interface {
	// Refused tells that c, which came from the keychain, does not open the
	// repository of a host, although nothing else was wrong.
	Refused(host, repository string, c *Credentials)
}

// Docker is the Keychain of the docker command line: config.json with its
// stored logins, its credential store and its credential helpers. The file is
// read anew each time, so that a login takes effect at once.
type Docker struct {
	// Dir holds config.json. A directory or file that is missing means no
	// credentials.
	Dir string
	// Timeout bounds one run of a credential helper; 0 means 10 seconds.
	Timeout time.Duration
	// Env is added to the environment of credential helpers, as "NAME=VALUE".
	Env []string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

const (
	// tokenKept is how long a token may be kept. Neither a helper nor the file says
	// when a token ends, which either may have had for a while; helpers hand out none
	// that ends within a few minutes.
	tokenKept = 5 * time.Minute

	helperTimeout = 10 * time.Second
	helperPrefix  = "docker-credential-"
	// dockerKey is the name under which docker keeps the login of docker.io.
	dockerKey = "https://index.docker.io/v1/"
	// tokenUser marks a secret that is an identity token.
	tokenUser = "<token>"
)

// Credentials implements Keychain.
func (d Docker) Credentials(ctx context.Context, host, _ string) (*Credentials, error) {
	path := d.path()
	file, err := load(path)
	if err != nil || file == nil {
		return nil, err
	}
	key := dockerName(host)
	helper := helperOf(file, key)
	if helper == "" {
		return d.convert(stored(file, key), path), nil
	}
	auth, err := d.ask(ctx, helper, key)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s from %s: %w", host, path, err)
	}
	c := d.convert(auth, path)
	if c != nil && c.IdentityToken != "" {
		c.Expires = d.now().Add(tokenKept)
	}
	return c, nil
}

// HelperKey returns what an answer of a credential helper for a host may be kept
// under, which changes with config.json; "" when no helper is asked, or when
// Credentials has to say what is wrong.
func (d Docker) HelperKey(host string) string {
	var before, after unix.Stat_t
	path := d.path()
	if unix.Stat(path, &before) != nil {
		return ""
	}
	file, err := load(path)
	if err != nil || file == nil || unix.Stat(path, &after) != nil || before.Ino != after.Ino || before.Mtim != after.Mtim || before.Ctim != after.Ctim {
		return ""
	}
	key := dockerName(host)
	helper := helperOf(file, key)
	if helper == "" {
		return ""
	}
	return fmt.Sprintf("%s %s %q %d %d %d %d", helper, key, path, after.Ino, after.Size, after.Mtim, after.Ctim)
}

func (d Docker) path() string { return filepath.Join(d.Dir, config.ConfigFileName) }

func (d Docker) now() time.Time {
	if d.Now == nil {
		return time.Now()
	}
	return d.Now()
}

// dockerName is how docker names a host.
func dockerName(host string) string {
	if host == dockerHost || host == dockerDomain {
		return dockerKey
	}
	return host
}

// ErrDockerConfig says that docker's configuration is there and cannot be read or
// understood.
var ErrDockerConfig = errors.New("read docker's credentials")

// load returns nil when there is no file, and otherwise fails with ErrDockerConfig. Parse
// errors may quote the file, so only their kind is told.
func load(path string) (*configfile.ConfigFile, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDockerConfig, err)
	}
	defer f.Close()
	file, err := config.LoadFromReader(f)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is not JSON as docker login writes it, or one of its \"auth\" values is not base64 of user:password", ErrDockerConfig, path)
	}
	return file, nil
}

// helperOf is the helper that is asked rather than what is stored in the file, as
// docker does; "" for none.
func helperOf(file *configfile.ConfigFile, key string) string {
	if h, ok := file.CredentialHelpers[key]; ok {
		return h
	}
	return file.CredentialsStore
}

// stored is the login in the file itself.
func stored(file *configfile.ConfigFile, key string) types.AuthConfig {
	for _, name := range spellings(key) {
		if auth, ok := file.AuthConfigs[name]; ok {
			return auth
		}
	}
	return types.AuthConfig{}
}

// spellings lists how a login for a registry may be filed, the best first: by
// its host, and as a URL by older programs. One with another path is for a part
// of the registry only and not ours to use.
func spellings(key string) []string {
	hosts := []string{key}
	if key == dockerKey {
		hosts = []string{"index.docker.io", dockerDomain, dockerHost}
	}
	names := []string{key}
	for _, host := range hosts {
		names = append(names, host)
		for _, scheme := range []string{"https://", "http://", ""} {
			for _, path := range []string{"", "/", "/v1/", "/v2/", "/v1", "/v2"} {
				names = append(names, scheme+host+path)
			}
		}
	}
	return names
}

// ask runs a credential helper. What it prints may hold the secret, so a failure
// repeats none of it.
func (d Docker) ask(ctx context.Context, helper, key string) (types.AuthConfig, error) {
	name := helperPrefix + helper
	if helper != filepath.Base(helper) {
		return types.AuthConfig{}, fmt.Errorf("credential helper %q: want the end of a program's name after %s, not a path", helper, helperPrefix)
	}
	timeout := d.Timeout
	if timeout <= 0 {
		timeout = helperTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	p := &program{}
	answer, err := client.Get(func(args ...string) client.Program {
		p.cmd = exec.CommandContext(ctx, name, args...)
		p.cmd.Env = append(os.Environ(), d.Env...)
		return p
	}, key)
	switch {
	case err == nil:
		return fromHelper(answer), nil
	case credentials.IsErrCredentialsNotFound(err):
		return types.AuthConfig{}, nil
	case ctx.Err() != nil:
		return types.AuthConfig{}, fmt.Errorf("%s did not answer within %s: %w", name, timeout, ctx.Err())
	case p.err != nil:
		return types.AuthConfig{}, fmt.Errorf("run %s: %w; see what it says: echo %s | %s get", name, p.err, key, name)
	default:
		return types.AuthConfig{}, fmt.Errorf("%s answers with something that is not a credential in JSON", name)
	}
}

func fromHelper(c *credentials.Credentials) types.AuthConfig {
	if c.Username == tokenUser {
		return types.AuthConfig{IdentityToken: c.Secret}
	}
	return types.AuthConfig{Username: c.Username, Password: c.Secret}
}

// program runs a helper that dies with its context, unlike docker's own.
type program struct {
	cmd *exec.Cmd
	err error
}

// Input implements client.Program.
func (p *program) Input(in io.Reader) { p.cmd.Stdin = in }

// Output implements client.Program.
func (p *program) Output() ([]byte, error) {
	// A child that the helper leaves behind must not hold us by its pipe.
	p.cmd.WaitDelay = time.Second
	var out bytes.Buffer
	p.cmd.Stdout = &out
	p.err = p.cmd.Run()
	if errors.Is(p.err, exec.ErrWaitDelay) {
		p.err = nil // it succeeded, and left a child behind
	}
	return out.Bytes(), p.err
}

func (d Docker) convert(auth types.AuthConfig, source string) *Credentials {
	switch {
	case auth.RegistryToken != "":
		return &Credentials{RegistryToken: auth.RegistryToken, Source: source}
	case auth.IdentityToken != "":
		return &Credentials{IdentityToken: auth.IdentityToken, Source: source}
	case auth.Username != "":
		c := Basic(auth.Username, auth.Password, source, d.now())
		if !c.Expires.IsZero() {
			c.Expires = d.now().Add(tokenKept)
		}
		return c
	default:
		return nil
	}
}
