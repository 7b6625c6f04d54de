package mountspec

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// DefaultKeyDir is where the keys of a node lie. It is fixed, so that a helper
// never takes the place of its key from an option that is not yet trusted; it
// is on the run directory's tmpfs, so that keys end with the boot.
const DefaultKeyDir = "/run/nydus-snapshotter/keys"

// Key seals options. It is made anew for each boot.
type Key [32]byte

// NewKey makes a random key.
func NewKey() (Key, error) {
	var k Key
	if _, err := rand.Read(k[:]); err != nil {
		return Key{}, fmt.Errorf("make a sealing key: %w", err)
	}
	return k, nil
}

// ID names the key without telling it: 16 hex digits.
func (k Key) ID() string {
	sum := sha256.Sum256(append([]byte("nydus mount option key\x00"), k[:]...))
	return hex.EncodeToString(sum[:8])
}

// Derive returns another key, for another purpose, that tells nothing of this one.
func (k Key) Derive(purpose string) (out [32]byte, err error) {
	derived, err := hkdf.Key(sha256.New, k[:], nil, "nydus-snapshotter "+purpose, len(out))
	if err != nil {
		return out, fmt.Errorf("derive key for %s: %w", purpose, err)
	}
	copy(out[:], derived)
	return out, nil
}

// String hides the key from loggers.
func (k Key) String() string { return "[key " + k.ID() + "]" }

// GoString does so for %#v.
func (k Key) GoString() string { return k.String() }

// Format does so for every verb, also those that pass by String.
func (k Key) Format(f fmt.State, _ rune) { fmt.Fprint(f, k.String()) }

// MarshalJSON does so for loggers that write JSON.
func (k Key) MarshalJSON() ([]byte, error) { return []byte(`"` + k.String() + `"`), nil }

// KeyDir is a directory of sealing keys, one file each, named by the key's ID.
// It must belong to the calling user, with mode 0700 and no symbolic link.
// Several snapshotters on one node keep their keys side by side.
type KeyDir string

// Key reads the key with that id.
func (d KeyDir) Key(id string) (Key, error) {
	if !isHex(id, 16) {
		return Key{}, fmt.Errorf("%w: the key's id is not 16 hex digits", ErrMalformed)
	}
	path := filepath.Join(string(d), id)
	k, err := readKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Key{}, fmt.Errorf("%w: no %s; was the option made on another node or before the last boot, or is nydus-snapshotter not running?", ErrUnknownKey, path)
	}
	if err != nil {
		return Key{}, fmt.Errorf("read sealing key: %w", err)
	}
	if err := d.check(); err != nil {
		return Key{}, err
	}
	if k.ID() != id {
		return Key{}, fmt.Errorf("read sealing key: %w: the content of %s does not match its name; remove the file and restart nydus-snapshotter", ErrUntrusted, path)
	}
	return k, nil
}

// Ensure returns the key that name has in this directory, or makes one. The name
// separates snapshotters that share the directory. It may be called by several at
// a time, and be killed at any: all of one name get the same key.
func (d KeyDir) Ensure(name string) (Key, error) {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return Key{}, fmt.Errorf("create key directory: %w", err)
	}
	if err := d.check(); err != nil {
		return Key{}, err
	}
	current := d.current(name)
	k, err := readKey(current)
	if errors.Is(err, fs.ErrNotExist) {
		if err := d.create(current); err != nil {
			return Key{}, fmt.Errorf("make sealing key: %w", err)
		}
		k, err = readKey(current)
	}
	if err != nil {
		return Key{}, fmt.Errorf("read sealing key: %w; containers that run do not need it: remove it and restart nydus-snapshotter", err)
	}
	if err := publish(current, filepath.Join(string(d), k.ID()), k); err != nil {
		return Key{}, fmt.Errorf("publish sealing key: %w", err)
	}
	return k, nil
}

// current is where the key of a name is.
func (d KeyDir) current(name string) string {
	// A hash, so that any text can be a name.
	sum := sha256.Sum256([]byte(name))
	return filepath.Join(string(d), "current-"+hex.EncodeToString(sum[:8]))
}

// Named returns the key that Ensure has made for a name. The error wraps
// fs.ErrNotExist when it has not.
func (d KeyDir) Named(name string) (Key, error) {
	k, err := readKey(d.current(name))
	if err == nil {
		err = d.check()
	}
	if err != nil {
		return Key{}, fmt.Errorf("read sealing key: %w", err)
	}
	return k, nil
}

// publish gives the key the name by which options find it.
func publish(current, path string, k Key) error {
	err := os.Link(current, path)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	there, err := readKey(path)
	if err == nil && there != k {
		err = fmt.Errorf("%w: %s is another key; remove the file", ErrUntrusted, path)
	}
	return err
}

// create makes a key at path, unless another has done so meanwhile: theirs is
// kept, since it may be in use.
func (d KeyDir) create(path string) error {
	k, err := NewKey()
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(string(d), "new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(k[:])
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	// A link, unlike a rename, replaces nothing.
	if err := os.Link(tmp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (d KeyDir) check() error {
	var st syscall.Stat_t
	if err := syscall.Lstat(string(d), &st); err != nil {
		return fmt.Errorf("check key directory: %w", &fs.PathError{Op: "lstat", Path: string(d), Err: err})
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFDIR || !private(&st) {
		return fmt.Errorf("%w: key directory %s must be a directory of this user with mode 0700, and no symbolic link", ErrUntrusted, d)
	}
	return nil
}

func readKey(path string) (k Key, err error) {
	fault := func(op string, err error) error { return &fs.PathError{Op: op, Path: path, Err: err} }
	// No os.File: Go's poller would be set up for it, which takes longer than
	// the reading.
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if errors.Is(err, syscall.ELOOP) {
		return Key{}, fmt.Errorf("%w: %s is a symbolic link", ErrUntrusted, path)
	}
	if err != nil {
		return Key{}, fault("open", err)
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return Key{}, fault("stat", err)
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || !private(&st) || st.Size != int64(len(k)) {
		return Key{}, fmt.Errorf("%w: %s must be a file of this user with mode 0600 and %d bytes", ErrUntrusted, path, len(k))
	}
	n, err := syscall.Pread(fd, k[:], 0)
	if err != nil {
		return Key{}, fault("read", err)
	}
	if n != len(k) {
		return Key{}, fault("read", io.ErrUnexpectedEOF)
	}
	return k, nil
}

func private(st *syscall.Stat_t) bool {
	return int(st.Uid) == os.Geteuid() && st.Mode&0o077 == 0
}
