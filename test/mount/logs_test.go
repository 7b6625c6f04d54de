package mount_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/logs"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// follower is the snapshotter's, within the test.
type follower struct {
	t    *testing.T
	log  *logBook
	stop func()
}

func (e *env) follow(limit int64) *follower {
	e.t.Helper()
	f := &follower{t: e.t, log: &logBook{said: make(chan struct{}, 1)}}
	ctx, cancel := context.WithCancel(e.t.Context())
	done := make(chan error, 1)
	run := logs.New(logs.Config{
		Dir: instance.DiskDir(e.root), Name: instance.LogName, Limit: limit,
		Origin: func(key string) (logs.Origin, bool) { return instance.LogOrigin(runDir, key) },
		Log:    slog.New(slog.NewJSONHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	go func() { done <- run.Run(ctx) }()
	f.stop = func() {
		e.t.Helper()
		cancel()
		select {
		case err := <-done:
			must(e.t, err)
		case <-time.After(soon):
			e.t.Fatal("the follower does not end")
		}
	}
	e.t.Cleanup(func() {
		cancel()
		if e.t.Failed() {
			e.t.Logf("--- passed on\n%s", f.log)
		}
	})
	return f
}

// passed is a line that was passed on.
type passed struct {
	Level, Msg, Instance, Image string
	Generation                  int
}

// await waits for a line that was passed on.
func (f *follower) await(what string, ok func(passed) bool) passed {
	f.t.Helper()
	timer := time.NewTimer(2 * soon)
	defer timer.Stop()
	for {
		for _, line := range strings.Split(strings.TrimSpace(f.log.String()), "\n") {
			var p passed
			if json.Unmarshal([]byte(line), &p) == nil && ok(p) {
				return p
			}
		}
		select {
		case <-f.log.said:
		case <-timer.C:
			f.t.Fatalf("not passed on: %s", what)
		}
	}
}

// What goes wrong in nydusd reaches the snapshotter's log, with the instance's fields
// and without the password, which nydusd 2.2.0 writes into its log when a token
// server cannot be reached.
func TestErrorsOfNydusdArePassedOn(t *testing.T) {
	const password = "canary+pass/word"
	reg := kit.NewRegistry(t, kit.RegistryOptions{})
	e := newEnv(t)
	f := e.follow(mountspec.DefaultLogMaxSize)
	img := small(t, "one")
	reg.MustPush(t, img.Image, "private/image:1")
	s := e.registrySpec(img, reg, "private/image")
	s.Credentials = &mountspec.Credentials{Auth: basic("somebody", password)}
	reg.SetHook(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		// Nobody listens there.
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://127.0.0.1:1/token",service="registry",scope="repository:private/image:pull"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	// Standard output and error come along. It is the shell that says this, as only
	// 2.2.0 can be made to panic at will, see below.
	s.Daemon.Path = e.wrapper(`echo to stdout; echo "thread 'x' panicked at y.rs:1:" >&2; exec "$REAL" "$@"`)
	target := e.mustMount(s)
	f.await("standard output", func(p passed) bool { return p.Level == "WARN" && p.Msg == "nydusd: to stdout" })
	f.await("standard error", func(p passed) bool { return p.Level == "ERROR" && strings.Contains(p.Msg, "panicked at y.rs:1:") })
	// In a process of its own: the read fails after many tries.
	reader := exec.CommandContext(t.Context(), "cat", filepath.Join(target, "name"))
	must(t, reader.Start())
	defer func() { _ = reader.Wait() }()
	got := f.await("an error", func(p passed) bool { return p.Level == "ERROR" && strings.HasPrefix(p.Msg, "nydusd: ") })
	if got.Instance != s.Instance || got.Image != s.Image || got.Generation != 1 {
		t.Errorf("passed on is %+v, want instance %s, image %s, generation 1", got, s.Instance, s.Image)
	}
	f.await("the token server", func(p passed) bool { return strings.Contains(p.Msg, "/token") })
	if !e.succeeds() {
		// Its own end, too.
		e.panics(e.current().Socket)
		got = f.await("a panic", func(p passed) bool { return p.Level == "ERROR" && strings.Contains(p.Msg, "panicked at '") })
		if got.Instance != s.Instance || got.Image != s.Image {
			t.Errorf("passed on is %+v, want instance %s, image %s", got, s.Instance, s.Image)
		}
		e.daemons(0)
	} else {
		e.kill(e.current().PID) // ends the read
	}
	f.stop()
	text := f.log.String()
	for _, secret := range []string{password, "canary", basic("somebody", password)} {
		if strings.Contains(text, secret) {
			t.Errorf("%q was passed on", secret)
		}
	}
	file, err := os.ReadFile(filepath.Join(instance.DiskDir(e.root), s.Instance, instance.LogName))
	must(t, err)
	t.Logf("the password is in nydusd's log: %v", strings.Contains(string(file), "canary"))
	_ = unix.Unmount(target, unix.MNT_DETACH)
}

// panics makes the daemon at socket panic, nydusd 2.2.0 that is.
func (e *env) panics(socket string) {
	client := http.Client{Timeout: soon, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	resp, err := client.Get("http://nydusd/api/v2/blobs?domain_id=a&blob_id=b")
	if err == nil {
		resp.Body.Close()
		e.t.Errorf("nydusd answers %s where it is known to panic", resp.Status)
	}
}

// logSize is what an instance's log takes on disk.
func (e *env) logSize(key string) (total int64) {
	for _, file := range logs.Files(filepath.Join(instance.DiskDir(e.root), key, instance.LogName)) {
		if info, err := os.Stat(file); err == nil {
			total += info.Size()
		}
	}
	return total
}

// nydusd writes without end while its image is read: its log stays bounded, it goes on
// logging, and readers notice nothing. The snapshotter comes and goes meanwhile.
func TestFloodIsBounded(t *testing.T) {
	const limit = 64 << 10
	e := newEnv(t)
	s := e.spec(odd(t))
	s.Daemon.LogLevel, s.Daemon.LogMaxSize = "trace", limit
	f := e.follow(limit)
	target := e.mustMount(s)
	readers := e.read(target, 2)
	log := filepath.Join(instance.DiskDir(e.root), s.Instance, instance.LogName)
	last, most := uint64(0), int64(0)
	for cuts := 0; cuts < 4; {
		within(t, fmt.Sprintf("cut %d", cuts+1), func() bool {
			most = max(most, e.logSize(s.Instance))
			var st unix.Stat_t
			if unix.Stat(logs.Old(log), &st) != nil || uint64(st.Ctim.Nano()) == last {
				return false
			}
			last = uint64(st.Ctim.Nano())
			if st.Size > limit {
				t.Errorf("the older log has %d bytes, more than %d", st.Size, limit)
			}
			return true
		})
		if cuts++; cuts == 2 {
			f.stop()
			// Nobody bounds it.
			within(t, "the log grows", func() bool { return e.logSize(s.Instance) > 3*limit })
			f = e.follow(limit)
		}
	}
	readers.end(t)
	// How far it gets ahead of its bound is up to the disk.
	t.Logf("the log took %d at most", most)
	within(t, "the log is bounded in the end", func() bool { return e.logSize(s.Instance) <= 2*limit })
	f.await("a count of what was not passed on", func(p passed) bool {
		return strings.Contains(p.Msg, "more than is passed on") && p.Instance == s.Instance && p.Image == s.Image
	})
	text, err := os.ReadFile(log)
	must(t, err)
	if strings.Contains(string(text), "\x00") {
		t.Error("the log has a hole")
	}
	must(t, os.Truncate(log, 0))
	slow := e.readSlowly(target)
	within(t, "nydusd logs on", func() bool { info, err := os.Stat(log); return err == nil && info.Size() > 0 })
	slow.end(t)
	f.stop()
	e.unmount(target)
	must(t, e.tidy(soon))
	if left, _ := os.ReadDir(instance.DiskDir(e.root)); len(left) > 0 {
		t.Errorf("left on disk: %v", left)
	}
}

// readSlowly is read with one reader that does not keep the daemon busy.
func (e *env) readSlowly(target string) *readers {
	e.t.Helper()
	path := filepath.Join(target, "odd", "sizes", "same-as-4097")
	want, err := os.ReadFile(path)
	must(e.t, err)
	r := &readers{stop: make(chan struct{})}
	tick := time.NewTicker(2 * time.Millisecond)
	r.all.Go(func() {
		defer tick.Stop()
		for r.fault == nil {
			select {
			case <-r.stop:
				return
			case <-tick.C:
			}
			r.fault = kit.ReadPast(path, want)
			r.reads.Add(1)
		}
	})
	return r
}

// The disk is full: nydusd 2.2.0 ends when it cannot write its log, so there is always
// room for it.
func TestLogOnAFullDisk(t *testing.T) {
	const disk = 4 << 20
	e := newEnv(t)
	dir := instance.DiskDir(e.root)
	must(t, os.MkdirAll(dir, 0o700))
	must(t, unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", disk)))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := e.spec(odd(t))
	s.Daemon.LogLevel, s.Daemon.LogMaxSize = "trace", 8*disk
	f := e.follow(8 * disk)
	target := e.mustMount(s)
	filler, err := os.Create(filepath.Join(dir, ".filler"))
	must(t, err)
	defer filler.Close()
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	readers := e.readSlowly(target)
	f.await("the want of space", func(p passed) bool { return strings.Contains(p.Msg, "the disk is full") && p.Level == "ERROR" })
	log := filepath.Join(dir, s.Instance, instance.LogName)
	reads := readers.reads.Load()
	within(t, "nydusd serves on", func() bool { return readers.reads.Load() > reads+500 })
	must(t, os.Truncate(log, 0))
	within(t, "nydusd logs on", func() bool { info, err := os.Stat(log); return err == nil && info.Size() > 0 })
	readers.end(t)
	e.daemons(1)
	f.stop()
	e.unmount(target)
	must(t, e.tidy(soon))
	must(t, filler.Close())
	must(t, os.Remove(filler.Name()))
	must(t, unix.Unmount(dir, 0))
	must(t, os.Remove(dir))
}
