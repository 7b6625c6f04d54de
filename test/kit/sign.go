package kit

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationSignature is where upstream looks for a signature.
const annotationSignature = "containerd.io/snapshot/nydus-signature"

// NewSigningKey makes a key for Sign.
func NewSigningKey(t TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatalf("new signing key: %v", err)
	}
	return key
}

// WriteKeys makes a file with the public parts of keys, as upstream reads it, or replaces
// it at once.
func WriteKeys(t TB, path string, keys ...*rsa.PrivateKey) {
	t.Helper()
	var text []byte
	for _, key := range keys {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&key.PublicKey)})...)
	}
	if err := errors.Join(os.WriteFile(path+".new", text, 0o644), os.Rename(path+".new", path)); err != nil {
		t.Fatalf("write keys: %v", err)
	}
}

// Signature is what a key makes of a bootstrap, as upstream has it: base64 of RSA PKCS #1
// v1.5 over SHA-256.
func Signature(key *rsa.PrivateKey, bootstrap []byte) (string, error) {
	sum := sha256.Sum256(bootstrap)
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	return base64.StdEncoding.EncodeToString(signature), err
}

// Signed is the same nydus image with a signature by the key. Layers and configuration stay
// as they are; only the manifest is another.
func (i *Image) Signed(key *rsa.PrivateKey) (*Image, error) {
	boot, err := i.BootstrapBytes()
	if err != nil {
		return nil, fmt.Errorf("sign image: %w", err)
	}
	signature, err := Signature(key, boot)
	if err != nil {
		return nil, fmt.Errorf("sign image: %w", err)
	}
	return i.WithSignature(signature)
}

// WithSignature is the same nydus image that says to have this signature.
func (i *Image) WithSignature(signature string) (*Image, error) {
	n := i.Bootstrap()
	if n < 0 {
		return nil, errors.New("sign image: not a nydus image")
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(i.Manifest, &manifest); err != nil {
		return nil, fmt.Errorf("sign image: %w", err)
	}
	out := *i
	out.Layers = append([]Blob(nil), i.Layers...)
	out.Layers[n].Desc.Annotations = maps.Clone(i.Layers[n].Desc.Annotations)
	out.Layers[n].Desc.Annotations[annotationSignature] = signature
	manifest.Layers[n] = out.Layers[n].Desc
	var err error
	out.Manifest, err = json.Marshal(manifest)
	return &out, err
}

// MustSign is Signed for a test.
func (i *Image) MustSign(t TB, key *rsa.PrivateKey) *Image {
	t.Helper()
	img, err := i.Signed(key)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return img
}
