package gateway

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Key seals capabilities. It is a secret of the node and of the boot.
type Key [32]byte

// String hides the key from fmt and from loggers.
func (Key) String() string { return "[key]" }

// GoString does so for %#v.
func (Key) GoString() string { return "[key]" }

// Grant is what a capability opens.
type Grant struct {
	// Instance is the key of the image's instance, Image its name for people.
	Instance string `json:"i"`
	Image    string `json:"m"`
	// Registry is as in references, Repository the path in it.
	Registry   string `json:"h"`
	Repository string `json:"r"`
}

// prefix is the version of the format.
const prefix = "ngw1."

// maxCapability is more than the longest that Seal makes of real names.
const maxCapability = 4096

// ErrCapability says that something is no capability of this key.
var ErrCapability = errors.New("not a capability of this node's present boot")

// Seal makes the capability for a grant. It is a secret.
func (k Key) Seal(g Grant) (string, error) {
	text, err := json.Marshal(g)
	if err != nil {
		return "", fmt.Errorf("seal capability: %w", err)
	}
	aead, err := k.aead()
	if err != nil {
		return "", fmt.Errorf("seal capability: %w", err)
	}
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(text)+aead.Overhead())
	_, _ = rand.Read(nonce) // never fails
	sealed := prefix + base64.RawURLEncoding.EncodeToString(aead.Seal(nonce, nonce, text, []byte(prefix)))
	if len(sealed) > maxCapability {
		return "", fmt.Errorf("seal capability: the names of image %s are too long", g.Image)
	}
	return sealed, nil
}

// Open reverses Seal. Its error is ErrCapability and tells nothing of the text.
func (k Key) Open(capability string) (Grant, error) {
	var g Grant
	text, ok := strings.CutPrefix(capability, prefix)
	// Strict, so that no other text opens the same.
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(capability) > maxCapability {
		return g, ErrCapability
	}
	aead, err := k.aead()
	if err != nil || len(sealed) < aead.NonceSize() {
		return g, ErrCapability
	}
	plain, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], []byte(prefix))
	if err != nil || json.Unmarshal(plain, &g) != nil {
		return Grant{}, ErrCapability
	}
	return g, nil
}

// Prove returns what the gateway answers to a nonce, so that whoever is about to send
// capabilities to its address knows that it is there.
func (k Key) Prove(nonce string) string {
	mac := hmac.New(sha256.New, k[:])
	mac.Write([]byte("probe " + nonce))
	return hex.EncodeToString(mac.Sum(nil))
}

func (k Key) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(k[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
