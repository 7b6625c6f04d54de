package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
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
}

// String hides the secret from fmt and from loggers.
func (*Credentials) String() string { return "[credentials]" }

// GoString does so for %#v.
func (*Credentials) GoString() string { return "[credentials]" }

// Keychain finds credentials.
type Keychain interface {
	// Credentials returns what opens a repository of a registry host, as Backend
	// names it, and nil when it is to be used without.
	Credentials(ctx context.Context, host, repository string) (*Credentials, error)
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
}

const (
	helperTimeout = 10 * time.Second
	helperPrefix  = "docker-credential-"
	// dockerKey is the name under which docker keeps the login of docker.io.
	dockerKey = "https://index.docker.io/v1/"
	// tokenUser marks a secret that is an identity token.
	tokenUser = "<token>"
)

// Credentials implements Keychain.
func (d Docker) Credentials(ctx context.Context, host, _ string) (*Credentials, error) {
	path := filepath.Join(d.Dir, config.ConfigFileName)
	file, err := load(path)
	if err != nil || file == nil {
		return nil, err
	}
	key := host
	if host == dockerHost || host == dockerDomain {
		key = dockerKey
	}
	auth, err := d.lookup(ctx, file, key)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s from %s: %w", host, path, err)
	}
	return convert(auth, path), nil
}

// load returns nil when there is no file. Parse errors may quote the file, so
// only their kind is told.
func load(path string) (*configfile.ConfigFile, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read docker's credentials: %w", err)
	}
	defer f.Close()
	file, err := config.LoadFromReader(f)
	if err != nil {
		return nil, fmt.Errorf("read docker's credentials: %s is not JSON as docker login writes it, or one of its \"auth\" values is not base64 of user:password", path)
	}
	return file, nil
}

// lookup prefers a helper over what is stored in the file, as docker does.
func (d Docker) lookup(ctx context.Context, file *configfile.ConfigFile, key string) (types.AuthConfig, error) {
	helper := file.CredentialsStore
	if h, ok := file.CredentialHelpers[key]; ok {
		helper = h
	}
	if helper != "" {
		return d.ask(ctx, helper, key)
	}
	for _, name := range spellings(key) {
		if auth, ok := file.AuthConfigs[name]; ok {
			return auth, nil
		}
	}
	return types.AuthConfig{}, nil
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

func convert(auth types.AuthConfig, source string) *Credentials {
	switch {
	case auth.RegistryToken != "":
		return &Credentials{RegistryToken: auth.RegistryToken, Source: source}
	case auth.IdentityToken != "":
		return &Credentials{IdentityToken: auth.IdentityToken, Source: source}
	case auth.Username != "":
		pair := auth.Username + ":" + auth.Password
		return &Credentials{Auth: base64.StdEncoding.EncodeToString([]byte(pair)), Source: source}
	default:
		return nil
	}
}
