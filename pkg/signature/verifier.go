package signature

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// Label is where an image has its signature: an annotation of the bootstrap layer's
// descriptor, and so a label of that layer's snapshot. It is NydusSignature of upstream's
// pkg/label.
const Label = "containerd.io/snapshot/nydus-signature"

var (
	// ErrMissing says that an image has no signature.
	ErrMissing = errors.New("the image has no signature")
	// ErrWrong says that none of the keys has made the signature.
	ErrWrong = errors.New("the image's signature is wrong")
)

// maxSignature bounds a signature in bytes: that of a key with 16384 bits.
const maxSignature = 2048

// Verifier judges signatures by the keys in a file. It may be used concurrently.
type Verifier struct {
	path string

	mu   sync.Mutex
	keys Keys
	read identity // the file that keys were read from
}

// NewVerifier reads the keys, so that a file that cannot be used shows at once. The path is
// absolute.
func NewVerifier(path string) (*Verifier, error) {
	v := &Verifier{path: path}
	if _, err := v.current(); err != nil {
		return nil, err
	}
	return v, nil
}

// current returns the keys that are in the file now.
func (v *Verifier) current() (Keys, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	// Looked at first: if it changes before it is read, it is read again.
	id, err := identify(v.path)
	if err == nil && v.keys != nil && id == v.read {
		return v.keys, nil
	}
	keys := Keys(nil)
	if err == nil {
		keys, err = ReadKeys(v.path)
	}
	v.keys, v.read = keys, id
	if err != nil {
		return nil, fmt.Errorf("image.public_key_file: %w", err)
	}
	return keys, nil
}

// Verify tells whether the bootstrap with this digest, "sha256:" and 64 hex digits, was
// signed by one of the keys. The signature is in base64, and empty when the image has none.
// The error wraps ErrMissing or ErrWrong when it is the image's.
func (v *Verifier) Verify(bootstrap, signature string) error {
	keys, err := v.current()
	if err != nil {
		return fmt.Errorf("check the image's signature: read %w", err)
	}
	text, ok := strings.CutPrefix(bootstrap, "sha256:")
	sum, err := hex.DecodeString(text)
	if !ok || err != nil || len(sum) != 32 {
		return fmt.Errorf("check the image's signature: bootstrap digest %.80q is not sha256: and 64 hex digits", bootstrap)
	}
	if signature == "" {
		return fmt.Errorf("%w (annotation %s of its bootstrap layer), and image.validate_signature asks for one", ErrMissing, Label)
	}
	raw, err := base64.StdEncoding.DecodeString(signature)
	switch {
	case err != nil:
		return fmt.Errorf("%w: annotation %s of its bootstrap layer is no base64", ErrWrong, Label)
	case len(raw) > maxSignature:
		return fmt.Errorf("%w: annotation %s of its bootstrap layer has %d bytes, want at most %d", ErrWrong, Label, len(raw), maxSignature)
	case !keys.verify(sum, raw):
		return fmt.Errorf("%w: none of the %d keys in %s (image.public_key_file) has signed the bootstrap %s", ErrWrong, len(keys), v.path, bootstrap)
	}
	return nil
}
