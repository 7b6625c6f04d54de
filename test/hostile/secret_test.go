package hostile_test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// secret is a password that is like no other text, with the forms in which it
// could show: as it is, percent-encoded, in hex, and as base64 at every alignment
// within a longer text, such as user:password, once and twice (credentials are
// base64 in nydusd's configuration, which is base64 in the mount option).
type secret struct {
	user, password string
	forms          map[string][]byte
}

func newSecret(user string) *secret {
	s := &secret{user: user, password: "Canary/" + rand.Text(), forms: map[string][]byte{}}
	s.forms["plain"] = []byte(s.password)
	s.forms["percent-encoded"] = []byte(url.QueryEscape(s.password))
	s.forms["hex"] = []byte(hex.EncodeToString([]byte(s.password)))
	// What is encoded together with a user's name holds these as well.
	for _, once := range alignments([]byte(s.password)) {
		s.add("base64", once)
		for _, twice := range alignments(once) {
			s.add("base64 of base64", twice)
		}
	}
	return s
}

func (s *secret) add(name string, form []byte) {
	s.forms[fmt.Sprintf("%s (%d)", name, len(s.forms))] = form
}

// alignments is the part of a text's base64 that does not depend on what stands
// before and after it, for each of the three places where it can begin.
func alignments(text []byte) [][]byte {
	var list [][]byte
	for shift := range 3 {
		padded := append(make([]byte, shift), text...)
		whole := len(padded) / 3 * 4 // digits that only the text decides
		from := (shift*8 + 5) / 6
		std := base64.StdEncoding.EncodeToString(padded)[from:whole]
		list = append(list, []byte(std))
		if other := strings.NewReplacer("+", "-", "/", "_").Replace(std); other != std {
			list = append(list, []byte(other))
		}
	}
	return list
}

// either is one secret with the forms of several.
func either(secrets ...*secret) *secret {
	s := &secret{forms: map[string][]byte{}}
	for i, one := range secrets {
		for name, form := range one.forms {
			s.forms[fmt.Sprintf("%s, secret %d", name, i)] = form
		}
	}
	return s
}

// in tells in which form the secret is in a text, or "".
func (s *secret) in(text []byte) string {
	for name, form := range s.forms {
		if bytes.Contains(text, form) {
			return name
		}
	}
	return ""
}

// inFile searches a file of any size.
func (s *secret) inFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	const overlap = 256 // longer than any form
	r := bufio.NewReaderSize(f, 1<<20)
	var tail []byte
	buf := make([]byte, 1<<20)
	for {
		n, err := r.Read(buf)
		window := append(tail, buf[:n]...)
		if form := s.in(window); form != "" {
			return form, nil
		}
		tail = slices.Clone(window[max(0, len(window)-overlap):])
		if errors.Is(err, io.EOF) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
	}
}

// find is a place where a secret is.
type find struct {
	path, form string
	mode       fs.FileMode
	tmpfs      bool
}

func (f find) String() string {
	return fmt.Sprintf("%s, mode %v: %s", f.path, f.mode, f.form)
}

// files searches every file on the node: all that the servers, the tests and the
// project wrote, databases and logs included; changes to /etc and /sbin lie in the
// scratch directory. What images consist of is left out.
func (s *secret) files(t *testing.T) []find {
	t.Helper()
	var finds []find
	for _, root := range []string{kit.Scratch(), "/run"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // gone since it was listed
			}
			if err == nil && d.IsDir() && isImage(path) {
				return fs.SkipDir
			}
			if err != nil || !d.Type().IsRegular() || fixture.MatchString(path) {
				return err
			}
			form, err := s.inFile(path)
			if form == "" || errors.Is(err, fs.ErrNotExist) {
				return ignoreGone(err)
			}
			info, err := d.Info()
			if err != nil {
				return ignoreGone(err)
			}
			finds = append(finds, find{path, form, info.Mode(), onTmpfs(path)})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return finds
}

// fixture matches what the kit builds images in, and what it pushed.
var fixture = regexp.MustCompile(`/(layer-[0-9]+\.tar(\.gz)?|nydus-[0-9]+\.blob|bootstrap-[0-9a-f]+\.tar\.gz)$|/registry-[0-9]+/storage/`)

// isImage tells whether a directory is on an image's mount, or on a container's
// root filesystem.
func isImage(dir string) bool {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return true // it does not answer
	}
	return st.Type == unix.FUSE_SUPER_MAGIC || st.Type == unix.OVERLAYFS_SUPER_MAGIC
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func onTmpfs(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// processes searches arguments, environment and mount table of all processes as
// they are now.
func (s *secret) processes(t *testing.T) []string {
	t.Helper()
	var finds []string
	for _, name := range []string{"cmdline", "environ", "mountinfo"} {
		paths, err := filepath.Glob("/proc/[0-9]*/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				continue // it has ended
			}
			if form := s.in(text); form != "" {
				finds = append(finds, fmt.Sprintf("%s: %s", path, form))
			}
		}
	}
	return finds
}
