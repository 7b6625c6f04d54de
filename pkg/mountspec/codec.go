package mountspec

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	// Version is the version of the option that this package writes, and the
	// newest that it reads.
	Version = 1
	// OptionName is the name of the mount option, fixed by Kata.
	OptionName = "extraoption"
	// MaxSize bounds the option's value in bytes. mount.fuse hands all options
	// to a shell as one argument, which Linux limits to 128 KiB.
	MaxSize = 96 << 10
)

// The ways in which an option can be wrong, for errors.Is.
var (
	// ErrMissing says that there is no extraoption among the options.
	ErrMissing = errors.New("no " + OptionName + " among the mount options; this mount type is made by nydus-snapshotter")
	// ErrTooLarge says that the option exceeds MaxSize.
	ErrTooLarge = fmt.Errorf("option is larger than %d bytes", MaxSize)
	// ErrMalformed says that the option is truncated or not one of ours.
	ErrMalformed = errors.New("option is truncated or malformed")
	// ErrVersion says that the option was made by a newer snapshotter.
	ErrVersion = errors.New("option has an unknown version")
	// ErrUnknownKey says that the node does not hold the option's key.
	ErrUnknownKey = errors.New("option was sealed with a key that this node does not hold")
	// ErrUntrusted says that the node's keys lie where others could reach them,
	// or are damaged.
	ErrUntrusted = errors.New("sealing keys cannot be trusted")
	// ErrAltered says that the option is not the one that was sealed.
	ErrAltered = errors.New("option was altered after it was sealed")
	// ErrInvalid says that the option is authentic but makes no sense.
	ErrInvalid = errors.New("option is invalid")
)

// wire is the JSON object as it travels. Kata's four members come first; their
// names, types and case are Kata's.
type wire struct {
	Source      string `json:"source"`
	Config      string `json:"config"`
	SnapshotDir string `json:"snapshotdir"`
	FSVersion   string `json:"fs_version"`
	Nydus       ours   `json:"nydus"`
}

// ours is what Kata ignores.
type ours struct {
	Version         int      `json:"version"`
	Key             string   `json:"key"`
	Kind            Kind     `json:"kind"`
	ReadOnly        bool     `json:"read_only,omitempty"`
	Lower           []string `json:"lower,omitempty"`
	OverlayOptions  []string `json:"overlay_options,omitempty"`
	Instance        string   `json:"instance"`
	Image           string   `json:"image,omitempty"`
	Host            string   `json:"host,omitempty"`
	Repository      string   `json:"repository,omitempty"`
	BootstrapDigest string   `json:"bootstrap_digest"`
	Root            string   `json:"root"`
	RunDir          string   `json:"run_dir"`
	CacheDir        string   `json:"cache_dir"`
	Driver          Driver   `json:"driver"`
	Daemon          Daemon   `json:"daemon"`
	// Sealed is nonce and ciphertext of the credentials; its additional data
	// is the whole object with Sealed empty. It is there even without
	// credentials, because it is also what authenticates the rest.
	Sealed []byte `json:"sealed"`
}

// Encode returns s as one mount option, name included, sealed with key. An error
// wraps ErrInvalid or ErrTooLarge.
func Encode(s *Spec, key Key) (string, error) {
	return encode(s, key, rand.Reader)
}

// encode takes its nonce from random, which a test can foretell.
func encode(s *Spec, key Key, random io.Reader) (string, error) {
	if err := s.Validate(); err != nil {
		return "", fmt.Errorf("encode mount option for snapshot %s: %w: %w", s.SnapshotDir, ErrInvalid, err)
	}
	w := toWire(s)
	w.Nydus.Key = key.ID()
	if err := w.seal(s.Credentials, key, random); err != nil {
		return "", fmt.Errorf("seal mount option for snapshot %s: %w", s.SnapshotDir, err)
	}
	value, err := w.text()
	if err != nil {
		return "", fmt.Errorf("encode mount option for snapshot %s: %w", s.SnapshotDir, err)
	}
	if len(value) > MaxSize {
		return "", fmt.Errorf("encode mount option for snapshot %s: %d bytes, %d layers above the image: %w", s.SnapshotDir, len(value), len(s.Lower), ErrTooLarge)
	}
	return OptionName + "=" + value, nil
}

// text is the option's value.
func (w *wire) text() (string, error) {
	object, err := json.Marshal(w)
	return base64.StdEncoding.EncodeToString(object), err
}

// Keys finds sealing keys. KeyDir is the one in use; tests have others.
type Keys interface {
	// Key returns the key with that id, or an error that wraps ErrUnknownKey
	// when the node does not hold it, and ErrUntrusted when it is no secret.
	Key(id string) (Key, error)
}

// Find returns the value of the extraoption in a list of mount options, each of
// which may itself be a comma-separated list. The last one counts, as in Kata.
func Find(options []string) (string, error) {
	value := ""
	for _, o := range options {
		for _, part := range strings.Split(o, ",") {
			if v, ok := strings.CutPrefix(part, OptionName+"="); ok {
				value = v
			}
		}
	}
	if value == "" {
		return "", ErrMissing
	}
	return value, nil
}

// Decode reverses Encode, given the option's value. An error wraps one of this
// package's error values, or comes from keys or the disk below it, and never
// repeats the option's text.
func Decode(value string, keys Keys) (*Spec, error) {
	s, err := decode(value, keys)
	if err != nil {
		return nil, fmt.Errorf("decode mount option %s: %w", OptionName, err)
	}
	return s, nil
}

func decode(value string, keys Keys) (*Spec, error) {
	w, err := parse(value)
	if err != nil {
		return nil, err
	}
	key, err := keys.Key(w.Nydus.Key)
	if err != nil {
		return nil, err
	}
	credentials, err := w.open(key)
	if err != nil {
		return nil, err
	}
	s := fromWire(w)
	s.Credentials = credentials
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return s, nil
}

func parse(value string) (*wire, error) {
	if len(value) > MaxSize {
		return nil, fmt.Errorf("%w (%d bytes)", ErrTooLarge, len(value))
	}
	text, err := base64.StdEncoding.DecodeString(value)
	if err != nil {
		return nil, fmt.Errorf("%w: base64: %w", ErrMalformed, err)
	}
	// The version decides how the rest is to be read, so it is read first and
	// without a look at anything else.
	var probe struct {
		Nydus struct {
			Version int `json:"version"`
		} `json:"nydus"`
	}
	if err := json.Unmarshal(text, &probe); err != nil {
		return nil, malformedJSON(err)
	}
	switch v := probe.Nydus.Version; v {
	case Version:
	case 0:
		return nil, fmt.Errorf("%w: it has no version; was it made by another program?", ErrMalformed)
	default:
		return nil, fmt.Errorf("%w: it has %d, this program reads %d; install the same version of the helper and the snapshotter", ErrVersion, v, Version)
	}
	var w wire
	if err := json.Unmarshal(text, &w); err != nil {
		return nil, malformedJSON(err)
	}
	// What is sealed is the meaning, and the same meaning has many spellings: a
	// member given twice or in another case, a member that we do not know, white
	// space, line breaks. Kata may see in them what we do not, so only our own
	// spelling is taken.
	if canonical, err := w.text(); err != nil || canonical != value {
		return nil, ErrAltered
	}
	return &w, nil
}

// malformedJSON keeps only where the fault is: the text of some JSON errors
// repeats the input.
func malformedJSON(err error) error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("%w: JSON ends or breaks at byte %d", ErrMalformed, syntax.Offset)
	}
	var kind *json.UnmarshalTypeError
	if errors.As(err, &kind) {
		return fmt.Errorf("%w: JSON member %q has the wrong type", ErrMalformed, kind.Field)
	}
	return fmt.Errorf("%w: JSON ends early", ErrMalformed)
}

// secret is Credentials without the methods that hide it.
type secret Credentials

func (w *wire) seal(c *Credentials, key Key, random io.Reader) error {
	plain := []byte{}
	if c != nil {
		var err error
		if plain, err = json.Marshal((*secret)(c)); err != nil {
			return err
		}
	}
	aead, additional, err := w.aead(key)
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	if _, err := io.ReadFull(random, nonce); err != nil {
		return err
	}
	w.Nydus.Sealed = aead.Seal(nonce, nonce, plain, additional)
	return nil
}

func (w *wire) open(key Key) (*Credentials, error) {
	aead, additional, err := w.aead(key)
	if err != nil {
		return nil, err
	}
	sealed := w.Nydus.Sealed
	if len(sealed) < aead.NonceSize() {
		return nil, fmt.Errorf("%w: the seal is missing", ErrMalformed)
	}
	plain, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], additional)
	if err != nil {
		return nil, ErrAltered
	}
	if len(plain) == 0 {
		return nil, nil
	}
	var c secret
	if err := json.Unmarshal(plain, &c); err != nil {
		// The text of the error could hold a piece of the secret.
		return nil, fmt.Errorf("%w: sealed credentials cannot be read", ErrInvalid)
	}
	return (*Credentials)(&c), nil
}

// aead returns the cipher and, as additional data, everything that travels in
// the clear.
func (w *wire) aead(key Key) (cipher.AEAD, []byte, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, nil, err
	}
	open := *w
	open.Nydus.Sealed = nil
	additional, err := json.Marshal(open)
	return aead, additional, err
}

func toWire(s *Spec) *wire {
	return &wire{
		Source: s.Bootstrap, Config: s.Config, SnapshotDir: s.SnapshotDir, FSVersion: s.FSVersion,
		Nydus: ours{
			Version: Version, Kind: s.Kind, ReadOnly: s.ReadOnly, Lower: s.Lower, OverlayOptions: s.OverlayOptions,
			Instance: s.Instance, Image: s.Image, Host: s.Host, Repository: s.Repository, BootstrapDigest: s.BootstrapDigest,
			Root: s.Root, RunDir: s.RunDir, CacheDir: s.CacheDir, Driver: s.Driver, Daemon: s.Daemon,
		},
	}
}

func fromWire(w *wire) *Spec {
	n := &w.Nydus
	return &Spec{
		Bootstrap: w.Source, Config: w.Config, SnapshotDir: w.SnapshotDir, FSVersion: w.FSVersion,
		Kind: n.Kind, ReadOnly: n.ReadOnly, Lower: n.Lower, OverlayOptions: n.OverlayOptions,
		Instance: n.Instance, Image: n.Image, Host: n.Host, Repository: n.Repository, BootstrapDigest: n.BootstrapDigest,
		Root: n.Root, RunDir: n.RunDir, CacheDir: n.CacheDir, Driver: n.Driver, Daemon: n.Daemon,
	}
}
