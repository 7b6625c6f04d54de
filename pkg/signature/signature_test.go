package signature

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	key, err := rsa.GenerateKey(rand.Reader, bits)
	must(t, err)
	return key
}

func pkcs1(key *rsa.PrivateKey) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&key.PublicKey)})
}

func pkix(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func sign(t *testing.T, key *rsa.PrivateKey, content []byte) string {
	t.Helper()
	sum := sha256.Sum256(content)
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	must(t, err)
	return base64.StdEncoding.EncodeToString(sig)
}

func write(t *testing.T, path string, text []byte) {
	t.Helper()
	must(t, os.WriteFile(path+".new", text, 0o644))
	must(t, os.Rename(path+".new", path))
}

func TestVerify(t *testing.T) {
	ours, other := newKey(t, 2048), newKey(t, 2048)
	file := filepath.Join(t.TempDir(), "keys.pem")
	write(t, file, pkcs1(ours))
	v, err := NewVerifier(file)
	must(t, err)
	boot := []byte("a bootstrap")
	good := sign(t, ours, boot)
	pss := func() string {
		sum := sha256.Sum256(boot)
		sig, err := rsa.SignPSS(rand.Reader, ours, crypto.SHA256, sum[:], nil)
		must(t, err)
		return base64.StdEncoding.EncodeToString(sig)
	}()
	for name, c := range map[string]struct {
		digest, signature string
		want              error
		text              string
	}{
		"right":                {digestOf(boot), good, nil, ""},
		"with line breaks":     {digestOf(boot), good[:64] + "\n" + good[64:] + "\n", nil, ""}, // as upstream's decoder
		"missing":              {digestOf(boot), "", ErrMissing, Label},
		"another bootstrap":    {digestOf([]byte("A bootstrap")), good, ErrWrong, file},
		"another key":          {digestOf(boot), sign(t, other, boot), ErrWrong, file},
		"another padding":      {digestOf(boot), pss, ErrWrong, file},
		"of the digest's text": {digestOf(boot), sign(t, ours, []byte(digestOf(boot))), ErrWrong, file},
		"cut":                  {digestOf(boot), good[:len(good)-8], ErrWrong, file},
		"no base64":            {digestOf(boot), "%" + good, ErrWrong, "no base64"},
		"of URLs":              {digestOf(boot), "-_" + good[2:], ErrWrong, "no base64"},
		"huge":                 {digestOf(boot), strings.Repeat("A", 4096), ErrWrong, "3072 bytes"},
		"only the padding":     {digestOf(boot), "====", ErrWrong, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := v.Verify(c.digest, c.signature)
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
	for _, digest := range []string{"", "sha256:", digestOf(boot)[7:], "sha512:" + digestOf(boot)[7:], digestOf(boot) + "00"} {
		if err := v.Verify(digest, good); err == nil || errors.Is(err, ErrWrong) {
			t.Errorf("digest %q: got %v", digest, err)
		}
	}
}

// What openssl signs is right, as the documentation says.
func TestOpenSSL(t *testing.T) {
	dir := t.TempDir()
	script := `openssl genrsa -out key.pem 3072 2>/dev/null && openssl pkey -in key.pem -pubout -out keys.pem &&
		openssl rsa -in key.pem -RSAPublicKey_out -out upstream.pem 2>/dev/null &&
		printf bootstrap > image.boot && openssl dgst -sha256 -sign key.pem image.boot | base64 -w0`
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = dir
	signature, err := cmd.Output()
	must(t, err)
	for _, name := range []string{"keys.pem", "upstream.pem"} {
		v, err := NewVerifier(filepath.Join(dir, name))
		must(t, err)
		if err := v.Verify(digestOf([]byte("bootstrap")), string(signature)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseKeys(t *testing.T) {
	a, b := newKey(t, 2048), newKey(t, 2048)
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(a)})
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	cut := pkcs1(b)
	for name, c := range map[string]struct {
		text []byte
		keys int
		fail string
	}{
		"upstream's":      {pkcs1(a), 1, ""},
		"openssl's":       {pkix(t, &a.PublicKey), 1, ""},
		"several":         {join([]byte("# of 2025\n"), pkcs1(a), []byte("\n# of 2026\n"), pkix(t, &b.PublicKey)), 2, ""},
		"empty":           {nil, 0, "no key"},
		"no PEM":          {[]byte("ssh-rsa AAAA"), 0, "no key"},
		"a private key":   {private, 0, "private key"},
		"one is private":  {join(pkcs1(b), private), 0, "key 2 of 2: it is a private key"},
		"another curve":   {pkix(t, &curve.PublicKey), 0, "want an RSA key"},
		"short":           {pkcs1(newKey(t, 1024)), 0, "1024 bits"},
		"a certificate":   {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), 0, "CERTIFICATE"},
		"garbage":         {pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}), 0, "key 1 of 1"},
		"the last is cut": {join(pkcs1(a), cut[:len(cut)-40]), 0, "1 of 2 blocks are no PEM"},
		"the first is":    {join(cut[:len(cut)-40], []byte("\n"), pkcs1(a)), 0, "1 of 2 blocks are no PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := ParseKeys(c.text)
			if len(keys) != c.keys || (err == nil) != (c.fail == "") || err != nil && !strings.Contains(err.Error(), c.fail) {
				t.Errorf("got %d keys, %v, want %d, %q", len(keys), err, c.keys, c.fail)
			}
			if err != nil && strings.Contains(err.Error(), base64.StdEncoding.EncodeToString(x509.MarshalPKCS1PrivateKey(a))[:40]) {
				t.Errorf("the error tells the key: %v", err)
			}
		})
	}
}

// Keys come and go while it is used, and what is broken lets nothing through.
func TestRotation(t *testing.T) {
	before, after := newKey(t, 2048), newKey(t, 2048)
	file := filepath.Join(t.TempDir(), "keys.pem")
	write(t, file, pkcs1(before))
	v, err := NewVerifier(file)
	must(t, err)
	boot := []byte("bootstrap")
	check := func(step string, key *rsa.PrivateKey, want bool) {
		t.Helper()
		if err := v.Verify(digestOf(boot), sign(t, key, boot)); (err == nil) != want {
			t.Errorf("%s: got %v, want it to be accepted: %t", step, err, want)
		}
	}
	check("old key", before, true)
	check("new key, not there yet", after, false)
	write(t, file, append(pkcs1(before), pkcs1(after)...))
	check("old key, beside the new one", before, true)
	check("new key, beside the old one", after, true)
	write(t, file, pkcs1(after))
	check("old key, removed", before, false)
	check("new key alone", after, true)
	write(t, file, []byte("-----BEGIN PUBLIC KEY-----\n"))
	check("broken file", after, false)
	check("broken file, again", after, false)
	must(t, os.Remove(file))
	check("no file", after, false)
	write(t, file, pkcs1(after))
	check("file is back", after, true)
}

func TestFile(t *testing.T) {
	key := newKey(t, 2048)
	dir := t.TempDir()
	for name, c := range map[string]struct {
		make func(path string) error
		fail string
	}{
		"missing":     {func(string) error { return nil }, "no such file"},
		"a directory": {func(path string) error { return os.Mkdir(path, 0o755) }, "regular file"},
		"too large":   {func(path string) error { return os.WriteFile(path, make([]byte, maxFile+1), 0o644) }, "regular file"},
		"others' to write": {func(path string) error {
			return errors.Join(os.WriteFile(path, pkcs1(key), 0o644), os.Chmod(path, 0o664))
		}, "mode 0664"},
		"another user's": {func(path string) error {
			return errors.Join(os.WriteFile(path, pkcs1(key), 0o644), os.Chown(path, 1000, 1000))
		}, "user 1000"},
		"through a link": {func(path string) error {
			return errors.Join(os.WriteFile(path+".real", pkcs1(key), 0o444), os.Symlink(path+".real", path))
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			must(t, c.make(path))
			_, err := NewVerifier(path)
			if (err == nil) != (c.fail == "") || err != nil && (!strings.Contains(err.Error(), c.fail) || !strings.Contains(err.Error(), "image.public_key_file") || !strings.Contains(err.Error(), path)) {
				t.Errorf("got %v, want %q, the setting and the path", err, c.fail)
			}
		})
	}
}

func TestConcurrently(t *testing.T) {
	key := newKey(t, 2048)
	file := filepath.Join(t.TempDir(), "keys.pem")
	write(t, file, pkcs1(key))
	v, err := NewVerifier(file)
	must(t, err)
	boot, signature := digestOf([]byte("b")), sign(t, key, []byte("b"))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				if err := v.Verify(boot, signature); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 20 {
		write(t, file, pkcs1(key))
	}
	all.Wait()
}

func BenchmarkVerify(b *testing.B) {
	key, err := rsa.GenerateKey(rand.Reader, 4096)
	if err != nil {
		b.Fatal(err)
	}
	file := filepath.Join(b.TempDir(), "keys.pem")
	if err := os.WriteFile(file, pkcs1(key), 0o644); err != nil {
		b.Fatal(err)
	}
	v, err := NewVerifier(file)
	if err != nil {
		b.Fatal(err)
	}
	sum := sha256.Sum256([]byte("b"))
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		b.Fatal(err)
	}
	text := base64.StdEncoding.EncodeToString(sig)
	for b.Loop() {
		if err := v.Verify(digestOf([]byte("b")), text); err != nil {
			b.Fatal(err)
		}
	}
}
