// Package kubernetes finds credentials in the image pull secrets of a cluster. It
// watches them, so that a lookup asks nobody.
//
// What the package promises:
//
//   - Secrets are in memory only, and of those only what logs in to registries. They
//     are in no log, whatever its level.
//   - An API server that cannot be reached, or refuses, holds nobody up: lookups wait
//     for the first list for a bounded time after the start. Then they find nothing,
//     and the log says why. What was seen stays in use while the connection is lost.
//   - Entries match images as kubelet has it: a host with globs, the beginning of a
//     repository, the longest first.
//
// It does not look at which pod wants an image: a secret of any watched namespace
// opens what it matches. Watch only namespaces whose authors may use each other's.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/nydusfs/nydus-snapshotter/pkg/credentials"
	"github.com/nydusfs/nydus-snapshotter/pkg/registry"
)

// InCluster stands for the service account of the pod that this process runs in, in
// place of a kubeconfig.
const InCluster = "in-cluster"

// Config is what Secrets need.
type Config struct {
	// Kubeconfig is a file, or InCluster. It is read when Run begins.
	Kubeconfig string
	// Namespaces are those whose secrets count; none means all.
	Namespaces []string
	// FirstList is how long after New lookups wait for the first list; 10 seconds if
	// 0.
	FirstList time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log gets what is wrong with a secret, without its content, and with the watch.
	Log *slog.Logger
}

// Secrets are the image pull secrets of a cluster: a credentials.Provider.
type Secrets struct {
	cfg     Config
	patient time.Time // until when lookups wait

	mu sync.Mutex
	// entries are by list, and then by secret.
	entries map[source]map[string][]credentials.Entry
	faults  map[source]error // why a list is not there, or is old
	changed chan struct{}    // closed when one of both changes
	// told is the last cause of a warning, and toldAt when that was.
	told   string
	toldAt time.Time
}

// tellAgain is how long the log is spared another warning that lists are missing.
const tellAgain = time.Minute

// source is one list that is watched.
type source struct {
	namespace string // empty for all
	kind      corev1.SecretType
}

// maxSecrets bounds how many secrets of a list count.
const maxSecrets = 10000

// New returns Secrets, which know nothing before Run.
func New(cfg Config) *Secrets {
	if cfg.FirstList == 0 {
		cfg.FirstList = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Secrets{
		cfg: cfg, patient: time.Now().Add(cfg.FirstList),
		entries: map[source]map[string][]credentials.Entry{}, faults: map[source]error{}, changed: make(chan struct{}),
	}
	for _, of := range s.sources() {
		s.faults[of] = errors.New("it has not been asked yet")
	}
	return s
}

func (s *Secrets) sources() (list []source) {
	namespaces := s.cfg.Namespaces
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	for _, namespace := range namespaces {
		for _, kind := range []corev1.SecretType{corev1.SecretTypeDockerConfigJson, corev1.SecretTypeDockercfg} {
			list = append(list, source{namespace, kind})
		}
	}
	return list
}

// Run watches until ctx ends. The error says that it cannot begin.
func (s *Secrets) Run(ctx context.Context) error {
	client, err := s.client()
	if err != nil {
		err = fmt.Errorf("watch image pull secrets: %w", err)
		for _, of := range s.sources() {
			s.fault(of, err)
		}
		return err
	}
	// What client-go has to say goes to our log, not to its own.
	done := ctx
	logger := logr.FromSlogHandler(prefixed{s.cfg.Log.Handler(), func() bool { return done.Err() != nil }})
	ctx = klog.NewContext(ctx, logger)
	var all sync.WaitGroup
	for _, of := range s.sources() {
		lw := s.watched(client, of)
		reflector := cache.NewReflectorWithOptions(lw, &corev1.Secret{}, &store{s, of}, cache.ReflectorOptions{
			Name: "image pull secrets", TypeDescription: "*v1.Secret", Logger: &logger,
		})
		all.Go(func() { reflector.RunWithContext(ctx) })
	}
	all.Wait()
	return nil
}

// client speaks as much of the API as secrets need.
func (s *Secrets) client() (*rest.RESTClient, error) {
	var cfg *rest.Config
	var err error
	if s.cfg.Kubeconfig == InCluster {
		cfg, err = rest.InClusterConfig()
	} else if _, err = os.Stat(s.cfg.Kubeconfig); err == nil {
		cfg, err = clientcmd.BuildConfigFromFlags("", s.cfg.Kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w; see credentials.kubernetes.kubeconfig", err)
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	cfg = rest.CopyConfig(cfg)
	cfg.GroupVersion, cfg.APIPath = &corev1.SchemeGroupVersion, "/api"
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType, cfg.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	cfg.UserAgent = rest.DefaultKubernetesUserAgent()
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("use kubeconfig %s: %w", s.cfg.Kubeconfig, err)
	}
	return client, nil
}

// watched lists and watches, and notes how that goes.
func (s *Secrets) watched(client *rest.RESTClient, of source) *cache.ListWatch {
	lw := cache.NewListWatchFromClient(client, "secrets", of.namespace, fields.OneTermEqualSelector("type", string(of.kind)))
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := lw.ListWithContext(ctx, o)
			s.fault(of, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := lw.WatchWithContext(ctx, o)
			if err != nil {
				s.fault(of, err)
			}
			return w, err
		},
	}
}

// fault notes why a list could not be read; nil when it could.
func (s *Secrets) fault(of source, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[of] = err
	s.tell()
}

// tell wakes those who wait. The caller holds the lock.
func (s *Secrets) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Name implements credentials.Provider.
func (s *Secrets) Name() string { return "image pull secrets" }

// Lookup implements credentials.Provider. Lists that were never seen are no error, or
// nobody could read a public image before the API server is there: the log has them.
func (s *Secrets) Lookup(ctx context.Context, host, repository string) ([]*registry.Credentials, error) {
	until, cancel := context.WithDeadline(ctx, s.patient)
	defer cancel()
	for {
		list, changed, missing := s.known(host, repository)
		if missing == nil {
			return list, nil
		}
		select {
		case <-changed:
		case <-until.Done():
			if ctx.Err() != nil {
				return list, fmt.Errorf("wait for the first list: %w", errors.Join(context.Cause(ctx), missing))
			}
			s.warn(missing)
			return list, nil
		}
	}
}

// warn says that lists are missing: once for a cause, and not with each lookup when
// causes change.
func (s *Secrets) warn(missing error) {
	now, cause := s.cfg.Now(), missing.Error()
	s.mu.Lock()
	known := cause == s.told || !s.toldAt.IsZero() && now.Sub(s.toldAt) < tellAgain
	if !known {
		s.told, s.toldAt = cause, now
	}
	s.mu.Unlock()
	if !known {
		s.cfg.Log.Warn("image pull secrets are not known yet, and images are read without them; see credentials.kubernetes", "error", missing)
	}
}

// known is what is known at the moment, and which lists were never seen.
func (s *Secrets) known(host, repository string) (list []*registry.Credentials, changed <-chan struct{}, missing error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []credentials.Entry
	for _, of := range s.sources() {
		secrets, listed := s.entries[of]
		if !listed {
			missing = errors.Join(missing, fmt.Errorf("secrets of type %s in %s: %w", of.kind, of.where(), s.why(of)))
		}
		for _, name := range slices.Sorted(maps.Keys(secrets)) {
			all = append(all, secrets[name]...)
		}
	}
	return credentials.Select(all, host, repository), s.changed, missing
}

func (s *Secrets) why(of source) error {
	if err := s.faults[of]; err != nil {
		return err
	}
	return errors.New("they have not been listed yet")
}

func (of source) where() string {
	if of.namespace == metav1.NamespaceAll {
		return "all namespaces"
	}
	return "namespace " + of.namespace
}

// store takes what a reflector sees.
type store struct {
	s  *Secrets
	of source
}

// Add implements cache.ReflectorStore.
func (st *store) Add(object any) error {
	secret, ok := object.(*corev1.Secret)
	if !ok {
		return fmt.Errorf("a %T is no secret", object)
	}
	entries := st.parse(secret)
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	known := st.s.entries[st.of]
	if known == nil {
		known = map[string][]credentials.Entry{}
		st.s.entries[st.of] = known
	}
	if _, have := known[nameOf(secret)]; !have && len(known) >= maxSecrets {
		st.s.cfg.Log.Warn("a pull secret is ignored: there are too many; name the namespaces that count", "secret", nameOf(secret), "limit", maxSecrets)
		return nil
	}
	known[nameOf(secret)] = entries
	st.s.tell()
	return nil
}

// Update implements cache.ReflectorStore.
func (st *store) Update(object any) error { return st.Add(object) }

// Delete implements cache.ReflectorStore.
func (st *store) Delete(object any) error {
	secret, ok := object.(*corev1.Secret)
	if !ok {
		return fmt.Errorf("a %T is no secret", object)
	}
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	delete(st.s.entries[st.of], nameOf(secret))
	st.s.tell()
	return nil
}

// Replace implements cache.ReflectorStore.
func (st *store) Replace(objects []any, _ string) error {
	known := map[string][]credentials.Entry{}
	for _, object := range objects {
		secret, ok := object.(*corev1.Secret)
		if !ok {
			return fmt.Errorf("a %T is no secret", object)
		}
		if len(known) >= maxSecrets {
			st.s.cfg.Log.Warn("pull secrets are ignored: there are too many; name the namespaces that count", "secrets", len(objects), "limit", maxSecrets)
			break
		}
		known[nameOf(secret)] = st.parse(secret)
	}
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	st.s.entries[st.of] = known
	st.s.faults[st.of] = nil
	st.s.tell()
	return nil
}

// Resync implements cache.ReflectorStore.
func (*store) Resync() error { return nil }

func nameOf(s *corev1.Secret) string { return s.Namespace + "/" + s.Name }

// parse reads a secret. What is wrong with it is told once for each of its states.
func (st *store) parse(secret *corev1.Secret) (entries []credentials.Entry) {
	from := "pull secret " + nameOf(secret)
	since := st.s.cfg.Now() // a token in it was renewed just before, at best
	var err error
	switch secret.Type {
	case corev1.SecretTypeDockerConfigJson:
		entries, err = credentials.ParseConfigJSON(secret.Data[corev1.DockerConfigJsonKey], from, since)
	case corev1.SecretTypeDockercfg:
		entries, err = credentials.ParseConfig(secret.Data[corev1.DockerConfigKey], from, since)
	default:
		return nil // a server that does not know the selector
	}
	if err != nil {
		st.s.cfg.Log.Warn("a pull secret is broken; the good part of it counts", "secret", nameOf(secret), "error", err)
	}
	return entries
}

// prefixed says of what client-go speaks in its messages, until that has ended.
type prefixed struct {
	slog.Handler
	ended func() bool
}

// mostDetailed is what client-go may say at most, its V(4), whatever our own level:
// from V(8) on it logs the bodies of answers, and those are secrets.
const mostDetailed = slog.LevelDebug

// Enabled implements slog.Handler.
func (p prefixed) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= mostDetailed && p.Handler.Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (p prefixed) Handle(ctx context.Context, r slog.Record) error {
	if p.ended() || r.Level < mostDetailed {
		return nil
	}
	r.Message = "image pull secrets: " + r.Message
	return p.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (p prefixed) WithAttrs(attrs []slog.Attr) slog.Handler {
	return prefixed{p.Handler.WithAttrs(attrs), p.ended}
}

// WithGroup implements slog.Handler.
func (p prefixed) WithGroup(name string) slog.Handler {
	return prefixed{p.Handler.WithGroup(name), p.ended}
}
