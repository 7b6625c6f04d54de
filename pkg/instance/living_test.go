package instance

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReaders(t *testing.T) {
	run, root := t.TempDir(), t.TempDir()
	put := func(r Record) {
		t.Helper()
		r.Version, r.Root = recordVersion, root
		text, err := json.Marshal(r)
		must(t, err)
		must(t, os.MkdirAll(string(dirOf(run, r.Key)), 0o700))
		must(t, os.WriteFile(dirOf(run, r.Key).record(), text, 0o600))
	}
	put(Record{Key: "a", BootstrapDigest: "sha256:a", Image: "x", CacheDir: "/c", Current: &Generation{Number: 1}})
	put(Record{Key: "b", Image: "y", CacheDir: "/c", Retired: []Generation{{Number: 1, Failed: true}}})
	put(Record{Key: "c", Image: "gone", CacheDir: "/c"})
	put(Record{Key: "p", Image: poolName, Current: &Generation{Number: 3, Shared: true, Passengers: []Passenger{{Name: "n1", Key: "a"}, {Name: "n2", Key: "b"}}}})
	berth := filepath.Join(root, "instances", "p", "g3", "n2")
	must(t, os.MkdirAll(filepath.Dir(berth), 0o700))
	must(t, os.WriteFile(berth, nil, 0o600))
	list, err := Readers(run)
	must(t, err)
	want := []Reader{
		{"a", "x", "/c", filepath.Join(root, "instances", "a", "bootstrap"), "sha256:a"},
		{"b", "y", "/c", filepath.Join(root, "instances", "b", "bootstrap"), ""},
		{"p", "b", "", berth, ""},
	}
	if len(list) != len(want) {
		t.Fatalf("%+v", list)
	}
	for i := range want {
		if list[i] != want[i] {
			t.Errorf("%+v, want %+v", list[i], want[i])
		}
	}
	must(t, os.WriteFile(dirOf(run, "a").record(), []byte("{"), 0o600))
	if list, err = Readers(run); err == nil || len(list) != 2 {
		t.Errorf("with a broken record: %+v, %v", list, err)
	}
}

// TestPassCache: nobody begins to read while something is removed.
func TestPassCache(t *testing.T) {
	dir := t.TempDir()
	l := &launch{spec: Spec{CacheDir: dir}}
	must(t, l.passCache(t.Context()))
	lock, err := LockCache(t.Context(), dir)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.passCache(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("passed: %v", err)
	}
	passed := make(chan error, 1)
	go func() { passed <- l.passCache(context.Background()) }()
	select {
	case err := <-passed:
		t.Errorf("passed: %v", err)
	default:
	}
	must(t, lock.Close())
	must(t, <-passed)
	// Neither it nor the one that gave up holds the lock.
	lock, err = LockCache(t.Context(), dir)
	must(t, err)
	defer lock.Close()
	other, err := os.Open(dir)
	must(t, err)
	defer other.Close()
	if err := flock(other, unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the lock keeps nobody out: %v", err)
	}
}
