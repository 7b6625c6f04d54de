package mountspec

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// keyDir makes a directory that does not exist yet.
func keyDir(t *testing.T) KeyDir {
	t.Helper()
	return KeyDir(filepath.Join(t.TempDir(), "keys"))
}

func ensure(t *testing.T, d KeyDir, name string) Key {
	t.Helper()
	k, err := d.Ensure(name)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// file is the one that the key is found by.
func file(d KeyDir, k Key) string { return filepath.Join(string(d), k.ID()) }

// current is the one that Ensure finds a name's key by.
func current(t *testing.T, d KeyDir) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(string(d), "current-*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	return files[0]
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestEnsure(t *testing.T) {
	d := keyDir(t)
	a := ensure(t, d, "a")
	if again := ensure(t, d, "a"); again != a || a == (Key{}) {
		t.Error("a second Ensure makes another key")
	}
	b := ensure(t, d, "../../b\x00")
	if b == a {
		t.Error("two names share a key")
	}
	for _, k := range []Key{a, b} {
		if got, err := d.Key(k.ID()); err != nil || got != k {
			t.Errorf("%v, %v", got, err)
		}
		info, err := os.Lstat(file(d, k))
		must(t, err)
		if info.Mode() != 0o600 || info.Size() != 32 {
			t.Errorf("%s, %d bytes", info.Mode(), info.Size())
		}
	}
	entries, err := os.ReadDir(string(d))
	must(t, err)
	if len(entries) != 4 {
		t.Errorf("%d files: %v", len(entries), entries)
	}
	if other := ensure(t, keyDir(t), "a"); other == a {
		t.Error("two directories share a key")
	}
}

// TestEnsureAtOnce: several of one name, which nothing keeps apart.
func TestEnsureAtOnce(t *testing.T) {
	for range 20 {
		d := keyDir(t)
		keys := make([]Key, 16)
		errs := make([]error, len(keys))
		var start, done sync.WaitGroup
		start.Add(1)
		for i := range keys {
			done.Go(func() {
				start.Wait()
				keys[i], errs[i] = d.Ensure("one")
			})
		}
		start.Done()
		done.Wait()
		for i, k := range keys {
			must(t, errs[i])
			if k != keys[0] {
				t.Fatal("two keys of one name")
			}
		}
		if got, err := d.Key(keys[0].ID()); err != nil || got != keys[0] {
			t.Fatalf("%v, %v", got, err)
		}
	}
}

// TestEnsureAfterKill: what each step leaves when the next one does not come.
func TestEnsureAfterKill(t *testing.T) {
	d := keyDir(t)
	must(t, os.Mkdir(string(d), 0o700))
	ensure(t, d, "after an empty directory")

	d = keyDir(t)
	must(t, os.Mkdir(string(d), 0o700))
	for name, size := range map[string]int{"new-1": 0, "new-2": 7, "new-3": 32} {
		must(t, os.WriteFile(filepath.Join(string(d), name), make([]byte, size), 0o600))
	}
	k := ensure(t, d, "after temporary files")
	if got, err := d.Key(k.ID()); err != nil || got != k {
		t.Errorf("%v, %v", got, err)
	}

	must(t, os.Remove(file(d, k)))
	if _, err := d.Key(k.ID()); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("not published: %v", err)
	}
	if again := ensure(t, d, "after temporary files"); again != k {
		t.Error("a key that was not published is lost")
	}
	if got, err := d.Key(k.ID()); err != nil || got != k {
		t.Errorf("published: %v, %v", got, err)
	}

	must(t, os.Remove(current(t, d)))
	if next := ensure(t, d, "after temporary files"); next == k {
		t.Error("a key came back")
	}
	if got, err := d.Key(k.ID()); err != nil || got != k {
		t.Errorf("options of before can no longer be read: %v, %v", got, err)
	}
}

// spoilt makes a directory with a key, spoils it, and tells what reading an
// option and making a key say then.
func spoilt(t *testing.T, spoil func(d KeyDir, k Key)) (decode, again error) {
	t.Helper()
	t.Helper()
	d := keyDir(t)
	k, err := d.Ensure("x")
	must(t, err)
	value := valueOf(t, testSpec(), k)
	if _, err := Decode(value, d); err != nil {
		t.Fatal(err)
	}
	spoil(d, k)
	s, decode := Decode(value, d)
	if s != nil || decode == nil {
		t.Errorf("read %v in spite of all", s)
		return errors.New("none"), nil
	}
	noLeak(t, "the error", decode.Error(), value)
	_, again = d.Ensure("x")
	return decode, again
}

// TestKeyFaults: each with its own error.
func TestKeyFaults(t *testing.T) {
	write := func(name string, data []byte) { must(t, os.WriteFile(name, data, 0o600)) }
	replace := func(name string) { must(t, os.Rename(name, name+".real")) }
	for what, c := range map[string]struct {
		spoil  func(d KeyDir, k Key)
		decode error
		text   string
		ensure error // nil when it helps
	}{
		"missing key":       {func(d KeyDir, k Key) { must(t, os.Remove(file(d, k))) }, ErrUnknownKey, "before the last boot", nil},
		"missing directory": {func(d KeyDir, _ Key) { must(t, os.RemoveAll(string(d))) }, ErrUnknownKey, "not running", nil},
		"group may list":    {func(d KeyDir, _ Key) { must(t, os.Chmod(string(d), 0o750)) }, ErrUntrusted, "mode 0700", ErrUntrusted},
		"world may enter":   {func(d KeyDir, _ Key) { must(t, os.Chmod(string(d), 0o701)) }, ErrUntrusted, "mode 0700", ErrUntrusted},
		"directory linked": {func(d KeyDir, _ Key) {
			replace(string(d))
			must(t, os.Symlink(string(d)+".real", string(d)))
		}, ErrUntrusted, "symbolic link", ErrUntrusted},
		"key may be read":   {func(d KeyDir, k Key) { must(t, os.Chmod(file(d, k), 0o644)) }, ErrUntrusted, "mode 0600", ErrUntrusted},
		"key for the group": {func(d KeyDir, k Key) { must(t, os.Chmod(file(d, k), 0o620)) }, ErrUntrusted, "mode 0600", ErrUntrusted},
		"key linked": {func(d KeyDir, k Key) {
			replace(file(d, k))
			must(t, os.Symlink(file(d, k)+".real", file(d, k)))
		}, ErrUntrusted, "symbolic link", ErrUntrusted},
		"key a fifo": {func(d KeyDir, k Key) {
			must(t, os.Remove(file(d, k)))
			must(t, syscall.Mkfifo(file(d, k), 0o600))
		}, ErrUntrusted, "must be a file", ErrUntrusted},
		"key a directory": {func(d KeyDir, k Key) {
			must(t, os.Remove(file(d, k)))
			must(t, os.Mkdir(file(d, k), 0o700))
		}, ErrUntrusted, "must be a file", ErrUntrusted},
		"key truncated": {func(d KeyDir, k Key) { must(t, os.Truncate(file(d, k), 31)) }, ErrUntrusted, "32 bytes", ErrUntrusted},
		"key empty":     {func(d KeyDir, k Key) { must(t, os.Truncate(file(d, k), 0)) }, ErrUntrusted, "32 bytes", ErrUntrusted},
		"key too long":  {func(d KeyDir, k Key) { must(t, os.Truncate(file(d, k), 33)) }, ErrUntrusted, "32 bytes", ErrUntrusted},
		"another key": {func(d KeyDir, k Key) {
			must(t, os.Remove(file(d, k)))
			write(file(d, k), bytes.Repeat([]byte("K"), 32))
		}, ErrUntrusted, "does not match its name", ErrUntrusted},
	} {
		t.Run(what, func(t *testing.T) {
			decode, ensure := spoilt(t, c.spoil)
			if !errors.Is(decode, c.decode) || !strings.Contains(decode.Error(), c.text) {
				t.Errorf("Decode: %v; want %v, naming %q", decode, c.decode, c.text)
			}
			if !errors.Is(ensure, c.ensure) {
				t.Errorf("Ensure: %v; want %v", ensure, c.ensure)
			}
		})
	}
}

// TestForeignOwner: a key that another user put there.
func TestForeignOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root, to give a file away")
	}
	const nobody = 65534
	for what, owned := range map[string]func(d KeyDir, k Key) string{
		"directory": func(d KeyDir, _ Key) string { return string(d) },
		"key":       file,
	} {
		decode, ensure := spoilt(t, func(d KeyDir, k Key) { must(t, os.Chown(owned(d, k), nobody, nobody)) })
		if !errors.Is(decode, ErrUntrusted) || !errors.Is(ensure, ErrUntrusted) || !strings.Contains(decode.Error(), "this user") {
			t.Errorf("%s: %v, %v", what, decode, ensure)
		}
	}
}

// TestEnsureWithoutRoom: a directory that cannot be made.
func TestEnsureWithoutRoom(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	for _, d := range []KeyDir{KeyDir(file), KeyDir(file + "/keys"), "/proc/keys-of-nydus"} {
		if k, err := d.Ensure("x"); err == nil || k != (Key{}) || !strings.Contains(err.Error(), string(d)) && !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v, %v", d, k, err)
		}
	}
}

func TestKeyID(t *testing.T) {
	a, err := NewKey()
	must(t, err)
	b, err := NewKey()
	must(t, err)
	if a == b || a.ID() == b.ID() || !isHex(a.ID(), 16) {
		t.Errorf("%s, %s", a.ID(), b.ID())
	}
	// Fixed, since options that exist name keys by it.
	if got := testKey.ID(); got != "50b208653b643827" {
		t.Errorf("%s", got)
	}
}
