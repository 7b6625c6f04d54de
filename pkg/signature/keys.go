package signature

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// maxFile bounds a file of keys in bytes; one of 4096 bits takes 800.
	maxFile = 1 << 20
	// minBits is the least length of a key: shorter ones have been broken, or soon will
	// be (NIST SP 800-131A).
	minBits = 2048
)

// Keys are RSA keys of which each is trusted.
type Keys []*rsa.PublicKey

// ParseKeys reads public keys in PEM: at least one block "RSA PUBLIC KEY" (PKCS #1, what
// upstream reads) or "PUBLIC KEY" (PKIX, what openssl writes), and no other blocks.
func ParseKeys(text []byte) (Keys, error) {
	var keys Keys
	begun := bytes.Count(text, []byte("-----BEGIN "))
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		key, err := parseKey(block)
		if err != nil {
			return nil, fmt.Errorf("key %d of %d: %w", len(keys)+1, begun, err)
		}
		keys = append(keys, key)
	}
	switch {
	case begun == 0:
		return nil, errors.New("it holds no key: want RSA public keys in PEM")
	case len(keys) != begun:
		// A damaged one would be passed over otherwise.
		return nil, fmt.Errorf("%d of %d blocks are no PEM", begun-len(keys), begun)
	}
	return keys, nil
}

func parseKey(block *pem.Block) (*rsa.PublicKey, error) {
	var parsed any
	var err error
	switch block.Type {
	case "RSA PUBLIC KEY":
		parsed, err = x509.ParsePKCS1PublicKey(block.Bytes)
	case "PUBLIC KEY":
		parsed, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "EC PRIVATE KEY":
		return nil, errors.New("it is a private key, which has no business on a node: put the public one there (openssl pkey -in KEY -pubout)")
	default:
		return nil, fmt.Errorf("it is a %q, want a PUBLIC KEY or RSA PUBLIC KEY", block.Type)
	}
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("it is a %T, want an RSA key", parsed)
	}
	if bits := key.N.BitLen(); bits < minBits {
		return nil, fmt.Errorf("it has %d bits, want %d or more", bits, minBits)
	}
	return key, nil
}

// verify tells whether one of the keys made the signature of what has this SHA-256.
func (k Keys) verify(sum, signature []byte) bool {
	for _, key := range k {
		if rsa.VerifyPKCS1v15(key, crypto.SHA256, sum, signature) == nil {
			return true
		}
	}
	return false
}

// identity is what a stat says of a file: as long as it is the same, the content is.
type identity struct {
	dev, inode    uint64
	size          int64
	mtime, change int64
}

// ReadKeys reads a file of keys, which has to belong to the user of this process, which is
// root on a node, and be writable for nobody else. It may be reached through links, as in a
// volume of Kubernetes.
func ReadKeys(path string) (Keys, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxFile:
		return nil, fmt.Errorf("%s: want a regular file of at most %d bytes", path, maxFile)
	case st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0:
		return nil, fmt.Errorf("%s has mode %04o and belongs to user %d: others could put their keys there; chown it to user %d, who runs this program, and chmod 0644", path, st.Mode&0o7777, st.Uid, os.Geteuid())
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, err
	}
	keys, err := ParseKeys(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return keys, nil
}

func identify(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return identity{st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}, nil
}
