// Package accesskey reads the access keys that open buckets from the files in which
// the clouds' own tools keep them: AWS's shared credentials file
// (https://docs.aws.amazon.com/sdkref/latest/guide/file-format.html) and that of Alibaba
// Cloud (~/.alibabacloud/credentials). Both are ini files with a section for each
// profile.
//
// What the package promises:
//
//   - A file that somebody else than root could read or write is refused.
//   - What a profile says is used or refused, never passed over: nydusd knows an id and
//     a secret, no session and no role.
//   - Errors name file, profile and key, and repeat nothing else of what the file says:
//     of a key that is none they name the line.
//
// Do not use it for logins at registries (pkg/registry), nor to find credentials that
// nobody named: it reads no environment and asks no metadata service.
package accesskey

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"gopkg.in/ini.v1"
)

// Format says whose file it is.
type Format string

// The formats.
const (
	AWS     Format = "aws"
	Alibaba Format = "alibaba"
)

// DefaultProfile is used when none is named.
const DefaultProfile = "default"

// maxSize bounds a file in bytes.
const maxSize = 1 << 20

// Key opens a bucket. It does not show in logs.
type Key struct{ ID, Secret string }

// Format hides it, whatever the verb.
func (Key) Format(f fmt.State, _ rune) { io.WriteString(f, "[access key]") }

// MarshalJSON hides it.
func (Key) MarshalJSON() ([]byte, error) { return []byte(`"[access key]"`), nil }

// names are those of a format's keys.
type names struct{ id, secret, session, kind string }

func namesOf(f Format) (names, error) {
	switch f {
	case AWS:
		return names{id: "aws_access_key_id", secret: "aws_secret_access_key", session: "aws_session_token"}, nil
	case Alibaba:
		return names{id: "access_key_id", secret: "access_key_secret", session: "security_token", kind: "type"}, nil
	}
	return names{}, fmt.Errorf("unknown format %q", f)
}

// Read reads the key of a profile, DefaultProfile if empty.
func Read(path string, format Format, profile string) (Key, error) {
	if profile == "" {
		profile = DefaultProfile
	}
	key, err := read(path, format, profile)
	if err != nil {
		return Key{}, fmt.Errorf("read access key from %s: %w", path, err)
	}
	return key, nil
}

func read(path string, format Format, profile string) (Key, error) {
	n, err := namesOf(format)
	if err != nil {
		return Key{}, err
	}
	text, err := readPrivate(path)
	if err != nil {
		return Key{}, err
	}
	// As the clouds' tools read it: a secret may have any character in it.
	file, err := ini.LoadSources(ini.LoadOptions{
		IgnoreInlineComment: true, IgnoreContinuation: true, PreserveSurroundedQuote: true, KeyValueDelimiters: "=", AllowNonUniqueSections: true, AllowShadows: true,
	}, text)
	if err != nil {
		return Key{}, errors.New("it is no ini file") // the error repeats a line
	}
	sections, err := file.SectionsByName(profile)
	if err != nil || len(sections) == 0 {
		return Key{}, fmt.Errorf("it has no profile %q", profile)
	}
	if len(sections) > 1 {
		return Key{}, fmt.Errorf("profile %q is there twice", profile)
	}
	named := func(key string) string { return shown(text, profile, key) }
	key, err := n.key(sections[0], named)
	if err != nil {
		return Key{}, fmt.Errorf("profile %q: %w", profile, err)
	}
	return key, nil
}

// plainName is that of a key that can be named. A line with a colon in the place of the
// equals sign has its value in the name, and base64 ends with equals signs.
const plainName = "^[a-z_]{1,32}$"

// shown is how a key of a profile stands in errors.
func shown(text []byte, profile, key string) string {
	if ok, err := regexp.MatchString(plainName, key); ok && err == nil {
		return key
	}
	inside := false
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			inside = strings.TrimSpace(strings.Trim(line, "[]")) == profile
			continue
		}
		if name, _, _ := strings.Cut(line, "="); inside && strings.Trim(name, " \t\"`") == key {
			return fmt.Sprintf("in line %d", i+1)
		}
	}
	return "whose name cannot be shown"
}

// key reads a profile. Named is how a key stands in errors.
func (n names) key(s *ini.Section, named func(string) string) (Key, error) {
	var key Key
	for _, k := range s.Keys() {
		if len(k.ValueWithShadows()) > 1 {
			return Key{}, fmt.Errorf("key %s is there twice", named(k.Name()))
		}
		switch value := k.Value(); {
		case k.Name() == n.id:
			key.ID = value
		case k.Name() == n.secret:
			key.Secret = value
		case k.Name() == n.session:
			return Key{}, fmt.Errorf("%s: nydusd cannot use keys of a session; give it a lasting key that may only read", n.session)
		case n.kind != "" && k.Name() == n.kind:
			if value != "access_key" {
				return Key{}, fmt.Errorf(`%s: nydusd can use "access_key" only`, n.kind)
			}
		default:
			return Key{}, fmt.Errorf("unknown key %s: want NAME = VALUE, with %s and %s", named(k.Name()), n.id, n.secret)
		}
	}
	for name, value := range map[string]string{n.id: key.ID, n.secret: key.Secret} {
		if value == "" {
			return Key{}, fmt.Errorf("%s is missing", name)
		}
		// It goes into a header, where nydusd panics at anything else.
		if strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return Key{}, fmt.Errorf("%s has a character that no access key has", name)
		}
	}
	return key, nil
}

// readPrivate reads a file that root alone can read and write, and this process's user.
func readPrivate(path string) ([]byte, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, errors.Unwrap(err) // the path is said already
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.New("it is no regular file")
	case !slices.Contains([]uint32{0, uint32(os.Geteuid())}, st.Uid):
		return nil, fmt.Errorf("it is user %d's; chown root it", st.Uid)
	case st.Mode&0o077 != 0:
		return nil, fmt.Errorf("its mode is %04o, so that others can get at it; chmod 0600 it", st.Mode&0o7777)
	case st.Size > maxSize:
		return nil, fmt.Errorf("it has more than %d bytes", maxSize)
	}
	return io.ReadAll(io.LimitReader(f, maxSize))
}
