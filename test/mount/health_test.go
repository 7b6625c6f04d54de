package mount_test

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/health"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// givesUp is how long a daemon tries to fetch the metadata of a blob.
const givesUp = 80 * time.Second

// A container was started while the registry was away: its daemon says that it
// runs, and fails every read for good. The log tells, and the registry when another
// daemon will do better.
func TestMetadataThatCannotBeFetched(t *testing.T) {
	reg := kit.NewRegistry(t, kit.RegistryOptions{User: "user", Password: "canary"})
	e := newEnv(t)
	img := small(t, "one")
	reg.MustPush(t, img.Image, "health/image:1")
	s := e.registrySpec(img, reg, "health/image")
	// Each of its tries is one request, or it would take a minute.
	s.Config = strings.Replace(s.Config, `"retry_limit":2`, `"retry_limit":0`, 1)
	s.Credentials = &mountspec.Credentials{Auth: basic(reg.User, reg.Password)}
	reg.SetHook(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	r := e.recover(recovery.PolicyFailover, true)
	target := e.mustMount(s)
	g, rec := e.current(), e.record()
	log := health.Follow(instance.LogPath(rec), g.Number, 0)
	fault := awaitFault(t, log)
	t.Logf("found: %v", fault)
	if len(fault.Blobs) == 0 {
		t.Error("it does not say which blobs")
	}
	if err := health.Answers(t.Context(), instance.ConfigPath(g), nil, fault.Blobs); err == nil {
		t.Error("a registry that is away answers")
	}
	if _, err := os.ReadFile(filepath.Join(target, "name")); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EIO) {
		t.Errorf("it reads %v; want an error, or nothing has to be done", err)
	}
	within(t, "it is reported", func() bool { return strings.Contains(r.log.String(), "event=broken") })
	if e.succeeds() {
		// Asked once in vain, and nothing more is written: it has to be asked again.
		within(t, "the registry is asked", func() bool { return strings.Contains(r.log.String(), "stays broken for now") })
	}
	if e.succeeds() && e.current().Restarts > 0 {
		t.Error("it was replaced before the registry answered")
	}
	next := health.Follow(instance.LogPath(rec), g.Number, health.End(instance.LogPath(rec)))
	reg.SetHook(nil)
	if e.succeeds() {
		within(t, "a successor", func() bool { return e.current().Restarts == 1 })
	} else {
		// What lies on it cannot be helped; what comes gets another.
		within(t, "it is left", func() bool { return strings.Contains(r.log.String(), "event=left") })
		e.unmount(target)
		target = e.mustMount(e.another(s))
	}
	e.answers(target, "one")
	e.holds(img, target)
	if fault, err := next.Broken(); fault != nil || err != nil {
		t.Errorf("the next daemon: %v, %v", fault, err)
	}
	if err := health.Answers(t.Context(), instance.ConfigPath(e.current()), nil, fault.Blobs); err != nil {
		t.Errorf("the registry is back: %v", err)
	}
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// awaitFault reads the log until there is a fault; a log makes no event.
func awaitFault(t *testing.T, log *health.Log) *health.Fault {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(givesUp); time.Now().Before(deadline); <-tick.C {
		fault, err := log.Broken()
		must(t, err)
		if fault != nil {
			return fault
		}
	}
	t.Fatalf("no fault within %v", givesUp)
	return nil
}
