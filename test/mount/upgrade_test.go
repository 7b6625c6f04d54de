package mount_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
	"github.com/nydusfs/nydus-snapshotter/pkg/recovery"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func (e *env) upgrade(path string) (*recovery.Upgraded, error) {
	u := recovery.Upgrade{RunDir: runDir, Nydusd: path, StartTimeout: startTimeout}
	return u.Run(e.t.Context(), e.record().Key, e.current().Number)
}

// Who reads notices no upgrade, and the snapshotter does not take it for a death.
func TestUpgrade(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		target := e.mustMount(e.spec(small(t, "one")))
		before := e.current()
		if _, err := e.upgrade(""); !errors.Is(err, custody.ErrUnable) {
			t.Errorf("the upgrade of a daemon that cannot hand over says %v", err)
		}
		if now := e.current(); now.PID != before.PID {
			t.Errorf("nydusd %d serves, want %d", now.PID, before.PID)
		}
		e.answers(target, "one")
		e.unmount(target)
		must(t, e.tidy(soon))
		return
	}
	r := e.recover(recovery.PolicyFailover, true)
	target := e.mustMount(e.spec(odd(t)))
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	readers := e.read(target, 4)
	for n := range 5 {
		before := e.current()
		done, err := e.upgrade("")
		must(t, err)
		if now := e.current(); done.Before != before.PID || done.After != now.PID || now.PID == before.PID || !now.Kept || now.Restarts != n+1 {
			t.Fatalf("upgrade %d: %+v, from %+v to %+v", n, done, before, now)
		}
	}
	if text := r.log.String(); strings.Contains(text, "nydusd has died") {
		t.Errorf("an upgrade was taken for a death:\n%s", text)
	}
	// And what is kept is still good for a death.
	before := e.current()
	must(t, unix.Kill(before.PID, unix.SIGKILL))
	within(t, "a successor", func() bool { return e.current().Restarts == before.Restarts+1 })
	readers.end(t)
	e.daemons(1)
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// A new executable that is of no use does no harm: the old one goes on.
func TestUpgradeThatFails(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestUpgrade
	}
	old := e.tools.NydusdOld
	img := small(t, "one")
	target := e.mustMount(e.spec(img))
	readers := e.read(target, 2)
	first := e.current()
	for name, c := range map[string]struct {
		path, says string
		serves     bool // the very daemon that did
	}{
		"is not there":      {filepath.Join(t.TempDir(), "none"), "no such file", true},
		"ends at once":      {e.wrapper("exit 3"), "exit status 3", true},
		"cannot take over":  {old, "went back to", false},
		"is killed at once": {e.wrapper("kill -9 $$"), "SIGKILL", true},
	} {
		before := e.current()
		_, err := e.upgrade(c.path)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("one that %s: %v; want %q", name, err, c.says)
		}
		if now := e.current(); c.serves != (now.PID == before.PID) || now.Nydusd != first.Nydusd {
			t.Errorf("one that %s: now nydusd %d of %s serves, before %d", name, now.PID, now.Nydusd, before.PID)
		}
		e.daemons(1)
	}
	readers.end(t)
	e.holds(img, target)
	e.unmount(target)
	must(t, e.tidy(soon))
}

// A successor has the environment of the daemon that was mounted, wherever it is
// started, and nobody else can read it.
func TestSuccessorHasTheEnvironment(t *testing.T) {
	e := newEnv(t)
	s, target := e.spec(small(t, "one")), e.target()
	const proxy = "HTTPS_PROXY=http://user:canary@proxy.test:3128"
	cmd := e.command(t.Context(), "nydus-overlayfs", s.SnapshotDir, target, "-o", e.option(s))
	cmd.Env = append(cmd.Env, proxy, "no_proxy=registry.test")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := e.current()
	if e.succeeds() {
		_, err := e.upgrade("")
		must(t, err)
	} else {
		e.kill(before.PID)
		must(t, instance.Restart(t.Context(), runDir, e.record().Key, before.Number, startTimeout))
	}
	now := e.current()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", now.PID))
	must(t, err)
	if env := strings.Split(string(text), "\x00"); now.PID == before.PID || !slices.Contains(env, proxy) || !slices.ContainsFunc(env, func(e string) bool {
		return strings.HasPrefix(e, "no_proxy=localhost,") && strings.HasSuffix(e, ",registry.test")
	}) || strings.Contains(string(text), "SECRET_OF_THE_POD") {
		t.Errorf("the successor, %d after %d, has the environment %q", now.PID, before.PID, env)
	}
	info, err := os.Stat(filepath.Join(filepath.Dir(now.Mountpoint), "env.json"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file of the environment: %v, %v", info, err)
	}
	e.unmount(target)
	must(t, e.tidy(soon))
}

// A successor that was left half way goes with its instance, also when no snapshotter
// runs.
func TestHalfSuccessorGoesWithItsInstance(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return
	}
	img := small(t, "one")
	target := e.mustMount(e.spec(img))
	e.half(e.current())
	e.daemons(2)
	e.holds(img, target)
	e.unmount(target)
	must(t, e.tidy(soon))
	e.daemons(0)
}

// A successor that was left half way beside a daemon that serves is ended by a running
// snapshotter, which neither hears of it.
func TestHalfSuccessorIsEnded(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return
	}
	r := e.recover(recovery.PolicyFailover, true)
	img := small(t, "one")
	target := e.mustMount(e.spec(img))
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	before := e.current()
	half := e.half(before)
	if !half.Wait(time.Now().Add(soon)) {
		t.Error("the successor that was left half way still runs")
	}
	if now := e.daemons(1)[0].PID; now != before.PID {
		t.Errorf("nydusd %d serves, want %d", now, before.PID)
	}
	e.holds(img, target)
	e.unmount(target)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// With a run directory that is full nothing can be written down: what is mounted
// goes on all the same, what is not fails with a clear word and leaves nothing.
func TestFullRunDirectory(t *testing.T) {
	e := newEnv(t)
	able := e.succeeds()
	r := e.recover(recovery.PolicyFailover, true)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)
	var readers *readers
	if able {
		within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
		readers = e.read(target, 2)
	}
	filler := filepath.Join(runDir, "filler")
	full, err := os.Create(filler)
	must(t, err)
	t.Cleanup(func() { os.Remove(filler) })
	if _, err := io.Copy(full, zeros{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the run directory: %v", err)
	}
	must(t, full.Close())
	if able {
		e.kill(e.current().PID)
		within(t, "a successor", func() bool { return strings.Contains(r.log.String(), "nydusd was succeeded") })
		readers.end(t)
	}
	other := e.spec(small(t, "two"))
	if got := e.mount(other, e.target()); got.code == 0 || !strings.Contains(got.out, "no space left") {
		t.Errorf("a mount with a full run directory: exit status %d: %s", got.code, got.out)
	}
	must(t, os.Remove(filler))
	e.holds(img, target)
	// And what could not be written down is found again.
	second := e.mustMount(other)
	again := e.mustMount(e.another(s))
	e.holds(img, again)
	if able {
		e.holds(img, target)
	}
	for _, m := range []string{target, second, again} {
		e.unmount(m)
	}
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// What mount(8) has mounted was released at once, and has no mountpoint in the run
// directory any more.
func TestFailoverOfWhatIsReleased(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestFailover
	}
	r := e.recover(recovery.PolicyFailover, true)
	reconciler := e.reconcile(soon)
	img := small(t, "one")
	target := e.mustMount(e.spec(img))
	key := e.record().Key
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	must(t, instance.Retire(t.Context(), runDir, key, e.current().Number))
	retired := func() instance.Generation { return e.record().Retired[0] }
	readers := e.read(target, 2)
	for n := range 3 {
		e.kill(retired().PID)
		within(t, "a successor of what is released", func() bool { return retired().Restarts == n+1 })
	}
	if _, err := e.upgradeOf(key, retired().Number); err != nil {
		t.Errorf("the upgrade of what is released: %v", err)
	}
	readers.end(t)
	e.holds(img, target)
	e.unmount(target)
	must(t, reconciler.idle(soon))
	must(t, reconciler.stop())
	r.stop()
	e.holderEnds()
}

func (e *env) upgradeOf(key string, generation int) (*recovery.Upgraded, error) {
	return recovery.Upgrade{RunDir: runDir, StartTimeout: startTimeout}.Run(e.t.Context(), key, generation)
}

// A crash loop is given up: users get errors and do not wait for nobody, and the
// next mount works.
func TestCrashLoopIsGivenUp(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return
	}
	r := e.recover(recovery.PolicyFailover, true)
	img := small(t, "one")
	s := e.spec(img)
	target := e.mustMount(s)
	within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
	for {
		before := e.current()
		must(t, unix.Kill(before.PID, unix.SIGABRT)) // as a panic ends it
		gone := false
		within(t, "a successor, or the end", func() bool {
			now := e.current()
			gone = now.Number == 0
			return gone || now.PID != before.PID
		})
		if gone {
			break
		}
	}
	if text := r.log.String(); strings.Count(text, "nydusd was succeeded") != 5 || !strings.Contains(text, "is given up") {
		t.Errorf("the log tells of other than five successors and giving up:\n%s", text)
	}
	if _, err := os.ReadFile(filepath.Join(target, "name")); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("what was mounted on it says %v, want ENOTCONN", err)
	}
	again := e.mustMount(e.another(s))
	e.holds(img, again)
	e.daemons(1)
	e.unmount(target)
	e.unmount(again)
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}

// Another policy lets go of what failover has kept: nobody waits for a successor
// that will not come.
func TestNobodyWaitsForWhatIsNotBroughtBack(t *testing.T) {
	for _, policy := range []recovery.Policy{recovery.PolicyNone, recovery.PolicyRestart} {
		t.Run(string(policy), func(t *testing.T) {
			e := newEnv(t)
			if !e.succeeds() {
				return
			}
			r := e.recover(recovery.PolicyFailover, true)
			target := e.mustMount(e.spec(small(t, "one")))
			within(t, "the daemon's descriptor is kept", func() bool { return e.current().Kept })
			before := e.current()
			r.stop()
			e.kill(before.PID)
			r = e.recover(policy, true)
			e.holderEnds()
			if _, err := os.ReadFile(filepath.Join(target, "name")); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("what was mounted says %v, want ENOTCONN", err)
			}
			e.unmount(target)
			must(t, e.tidy(soon))
			r.stop()
		})
	}
}

// Several are replaced one after the other, up to the first failure; the others serve
// on. What is there then is succeeded by what it was replaced with.
func TestUpgradeOfSeveral(t *testing.T) {
	e := newEnv(t)
	if !e.succeeds() {
		return // see TestUpgrade
	}
	program := filepath.Join(kit.Binaries(t, "nydus-snapshotter"), "nydus-snapshotter")
	upgrade := func(args ...string) (string, error) {
		out, err := e.command(t.Context(), program, append([]string{"daemon", "upgrade", "--run-dir", runDir}, args...)...).CombinedOutput()
		return string(out), err
	}
	r := e.recover(recovery.PolicyFailover, true)
	var targets []string
	for _, name := range []string{"a", "b", "c"} {
		s := e.spec(tiny(t, name))
		s.Image = "registry.test/" + name // they are replaced in this order
		targets = append(targets, e.mustMount(s))
	}
	generations := func() map[string]instance.Generation {
		all := map[string]instance.Generation{}
		images, _ := e.records()
		for _, rec := range images {
			all[rec.Image] = *rec.Current
		}
		return all
	}
	within(t, "all three are kept", func() bool {
		for _, g := range generations() {
			if !g.Kept {
				return false
			}
		}
		return true
	})
	readers := e.read(targets[1], 2)
	before := generations()
	count := filepath.Join(t.TempDir(), "count")
	out, err := upgrade("--all", "--nydusd", e.wrapper(fmt.Sprintf(`[ ! -e '%[1]s' ] || exit 3; : > '%[1]s'; exec '%[2]s' "$@"`, count, e.tools.Nydusd)))
	now := generations()
	if err == nil || !strings.Contains(out, "stopped after 1 of 3: image registry.test/b") || !strings.Contains(out, "exit status 3") {
		t.Errorf("an upgrade whose second fails: %v, %s", err, out)
	}
	for image, g := range before {
		if replaced := now[image].PID != g.PID; replaced != strings.HasSuffix(image, "/a") {
			t.Errorf("%s: nydusd %d, then %d", image, g.PID, now[image].PID)
		}
	}
	other := filepath.Join(t.TempDir(), "nydusd-new")
	text, err := os.ReadFile(e.tools.Nydusd)
	must(t, err)
	must(t, os.WriteFile(other, text, 0o755))
	out, err = upgrade("--all", "--nydusd", other)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); err != nil || len(lines) != 3 || !strings.HasPrefix(lines[0], "1/3 ") || !strings.HasPrefix(lines[2], "3/3 ") {
		t.Errorf("an upgrade of three: %v, %s", err, out)
	}
	g := generations()["registry.test/b"]
	e.kill(g.PID)
	within(t, "a successor", func() bool { return generations()["registry.test/b"].Restarts == g.Restarts+1 })
	for image, g := range generations() {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", g.PID))
		if err != nil || exe != other || g.Nydusd != other {
			t.Errorf("%s is served by %s (%v), the record says %s", image, exe, err, g.Nydusd)
		}
	}
	readers.end(t)
	for _, target := range targets {
		e.unmount(target)
	}
	must(t, e.tidy(soon))
	r.stop()
	e.holderEnds()
}
