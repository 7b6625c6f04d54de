package kubelet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	configv1 "k8s.io/kubelet/config/v1"
	pluginv1 "k8s.io/kubelet/pkg/apis/credentialprovider/v1"

	"github.com/nydusfs/nydus-snapshotter/pkg/credentials"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// Config is what Plugins need.
type Config struct {
	// File is kubelet's --image-credential-provider-config, BinDir its
	// --image-credential-provider-bin-dir.
	File, BinDir string
	// Environ is the environment of plugins, as "NAME=VALUE", to which the file adds.
	Environ []string
	// Memo says how answers are kept. Its Timeout bounds a run.
	Memo credentials.MemoConfig
}

// Plugins are kubelet's credential provider plugins: a credentials.Provider.
type Plugins struct {
	list    []*plugin
	skipped []string
}

// plugin is one of them.
type plugin struct {
	name     string
	path     string
	args     []string
	env      []string
	patterns []credentials.Pattern
	keep     time.Duration
	now      func() time.Time
	memo     *credentials.Memo[[]credentials.Entry]
}

// New reads the configuration. The programs may come later.
func New(cfg Config) (*Plugins, error) {
	file, err := readConfig(cfg.File)
	if err != nil {
		return nil, err
	}
	if cfg.Memo.Now == nil {
		cfg.Memo.Now = time.Now
	}
	out := &Plugins{}
	for _, p := range file.Providers {
		if why := cannot(p); why != "" {
			out.skipped = append(out.skipped, fmt.Sprintf("provider %s of %s: %s", p.Name, cfg.File, why))
			continue
		}
		made, err := newPlugin(cfg, p)
		if err != nil {
			return nil, err
		}
		out.list = append(out.list, made)
	}
	return out, nil
}

// Skipped says which providers of the file cannot be used here, and why.
func (p *Plugins) Skipped() []string { return p.skipped }

func newPlugin(cfg Config, p configv1.CredentialProvider) (*plugin, error) {
	out := &plugin{
		name: p.Name, path: filepath.Join(cfg.BinDir, p.Name), args: p.Args, env: cfg.Environ[:len(cfg.Environ):len(cfg.Environ)],
		keep: p.DefaultCacheDuration.Duration, now: cfg.Memo.Now, memo: credentials.NewMemo[[]credentials.Entry](cfg.Memo),
	}
	for _, e := range p.Env {
		out.env = append(out.env, e.Name+"="+e.Value)
	}
	for _, m := range p.MatchImages {
		pattern, err := credentials.ParsePattern(m)
		if err != nil {
			return nil, err
		}
		out.patterns = append(out.patterns, pattern)
	}
	return out, nil
}

// Name implements credentials.Provider.
func (*Plugins) Name() string { return "kubelet's credential providers" }

// Lookup implements credentials.Provider. All plugins that are for the image are
// asked.
func (p *Plugins) Lookup(ctx context.Context, host, repository string) (list []*registry.Credentials, err error) {
	var all []credentials.Entry
	for _, one := range p.list {
		if !one.isFor(host, repository) {
			continue
		}
		entries, fault := one.entries(ctx, host, repository)
		if fault != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", one.path, fault))
		}
		all = append(all, entries...)
	}
	return credentials.Select(all, host, repository), err
}

// Forget forgets c, so that its plugin is run again.
func (p *Plugins) Forget(c *registry.Credentials) {
	for _, one := range p.list {
		one.memo.Forget(func(entries []credentials.Entry) bool {
			for _, e := range entries {
				if e.Credentials.Opens(c) {
					return true
				}
			}
			return false
		})
	}
}

func (p *plugin) isFor(host, repository string) bool {
	for _, pattern := range p.patterns {
		if pattern.Matches(host, repository) {
			return true
		}
	}
	return false
}

// Prefixes of the keys under which an answer is kept.
const (
	forImage    = "image "
	forRegistry = "registry "
	forAll      = "all"
)

// entries are what the plugin says, now or before.
func (p *plugin) entries(ctx context.Context, host, repository string) ([]credentials.Entry, error) {
	image := credentials.ImageName(host, repository)
	registry, _, _ := strings.Cut(image, "/")
	keys := []string{forImage + image, forRegistry + registry, forAll}
	return p.memo.Get(ctx, keys, func(ctx context.Context) (credentials.Answer[[]credentials.Entry], error) {
		answer, err := p.ask(ctx, image)
		if err != nil {
			return credentials.Answer[[]credentials.Entry]{}, err
		}
		return p.read(answer, keys)
	})
}

// read takes an answer apart. Keys are for image, registry and all.
func (p *plugin) read(answer *pluginv1.CredentialProviderResponse, keys []string) (out credentials.Answer[[]credentials.Entry], err error) {
	if want := pluginv1.SchemeGroupVersion.String(); answer.APIVersion != want || answer.Kind != "CredentialProviderResponse" {
		return out, fmt.Errorf("it answers with something that is no CredentialProviderResponse of %s", want)
	}
	switch answer.CacheKeyType {
	case pluginv1.ImagePluginCacheKeyType:
		out.Key = keys[0]
	case pluginv1.RegistryPluginCacheKeyType:
		out.Key = keys[1]
	case pluginv1.GlobalPluginCacheKeyType:
		out.Key = keys[2]
	default:
		return out, errors.New("it answers with a cacheKeyType that is not Image, Registry or Global")
	}
	keep := p.keep
	if answer.CacheDuration != nil {
		keep = answer.CacheDuration.Duration
	}
	if keep < 0 {
		return out, errors.New("it answers with a cacheDuration that is negative")
	}
	out.Expires = p.now().Add(keep)
	for name, auth := range answer.Auth {
		pattern, err := credentials.ParseEntry(name)
		if err != nil {
			return out, errors.New("it answers with an auth entry that is for no registry")
		}
		if auth.Username == "" && auth.Password == "" {
			continue
		}
		c := registry.Basic(auth.Username, auth.Password, "kubelet's credential provider "+p.name, p.now())
		c.Expires = out.Expires
		out.Value = append(out.Value, credentials.Entry{Pattern: pattern, Credentials: c})
	}
	out.Nothing = len(out.Value) == 0
	return out, nil
}

// maxOutput bounds what a plugin may print, in bytes.
const maxOutput = 1 << 20

// ask runs the plugin.
func (p *plugin) ask(ctx context.Context, image string) (*pluginv1.CredentialProviderResponse, error) {
	request, err := json.Marshal(pluginv1.CredentialProviderRequest{
		TypeMeta: metav1.TypeMeta{Kind: "CredentialProviderRequest", APIVersion: pluginv1.SchemeGroupVersion.String()}, Image: image,
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	out := &bounded{full: func() { cancel(fmt.Errorf("it answers with more than %d bytes", maxOutput)) }}
	cmd := exec.CommandContext(ctx, p.path, p.args...)
	cmd.Env = p.env
	cmd.Stdin, cmd.Stdout = bytes.NewReader(request), out
	err = runGroup(cmd)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		return nil, fmt.Errorf("it fails for %s: %w; see what it says by giving it a CredentialProviderRequest", image, err)
	}
	answer := &pluginv1.CredentialProviderResponse{}
	if json.Unmarshal(out.Bytes(), answer) != nil {
		return nil, errors.New("it answers with something that is not JSON")
	}
	return answer, nil
}

// runGroup runs a command made with a context in a process group of its own. What is
// left of the group dies with the command, and the command with its context.
func runGroup(cmd *exec.Cmd) error {
	var mu sync.Mutex
	gone := false // once the command was waited for, its pid may be another's
	kill := func() error {
		mu.Lock()
		defer mu.Unlock()
		if gone {
			return os.ErrProcessDone
		}
		return unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = kill
	// A child that has left the group must not hold us by its pipe.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	// It stays a zombie, and with it its pid stays the group's.
	waited := error(unix.EINTR)
	for errors.Is(waited, unix.EINTR) {
		waited = unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	if waited == nil {
		_ = kill() // a zombie cannot refuse
	}
	mu.Lock()
	gone = true
	mu.Unlock()
	return cmd.Wait()
}

// bounded is a buffer that takes maxOutput bytes.
type bounded struct {
	buf  bytes.Buffer
	full func()
}

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > maxOutput {
		b.full()
		return 0, errors.New("too much")
	}
	return b.buf.Write(p)
}

// Bytes are what was written.
func (b *bounded) Bytes() []byte { return b.buf.Bytes() }
