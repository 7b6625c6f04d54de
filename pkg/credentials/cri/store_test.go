package cri

import (
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const secret = "s3cr3t-canary"

// memory makes a directory on the tmpfs that every Linux has.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nydus-cri-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newStore(t *testing.T) *Store {
	t.Helper()
	s := OpenStore(filepath.Join(memory(t), "pulls"), nil)
	if err := s.Setup(); err != nil {
		t.Fatal(err)
	}
	return s
}

// users lists the users that a lookup finds.
func users(t *testing.T, s *Store, host, repository string) string {
	t.Helper()
	list, err := s.Lookup(t.Context(), host, repository)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, c := range list {
		if c.IdentityToken != "" {
			out = append(out, "token "+c.IdentityToken)
			continue
		}
		text, _ := base64.StdEncoding.DecodeString(c.Auth)
		user, _, _ := strings.Cut(string(text), ":")
		out = append(out, user)
	}
	return strings.Join(out, ",")
}

func add(t *testing.T, s *Store, repository string, l login) {
	t.Helper()
	if err := s.add("r.example", repository, l); err != nil {
		t.Fatal(err)
	}
}

func TestStoreOrder(t *testing.T) {
	s := newStore(t)
	want := func(text string) {
		t.Helper()
		if got := users(t, s, "r.example", "a"); got != text {
			t.Fatalf("got %q, want %q", got, text)
		}
	}
	want("")
	add(t, s, "a", login{User: "one", Password: "p"})
	want("one")
	add(t, s, "a", login{User: "two", Password: "p"})
	want("two,one")
	add(t, s, "a", login{User: "one", Password: "p", Proven: true})
	want("one,two")
	add(t, s, "a", login{User: "three", Password: "p"})
	want("one,three,two")
	add(t, s, "a", login{User: "one", Password: "p"}) // is still proven
	want("one,three,two")
	for _, l := range []login{{User: "two", Password: "p"}, {User: "three", Password: "wrong"}} {
		if err := s.refuse("r.example", "a", l); err != nil {
			t.Fatal(err)
		}
	}
	want("one,three")
	for i := range 10 {
		add(t, s, "a", login{User: fmt.Sprint(i), Password: "p", Proven: true})
	}
	want("9,8,7,6")
	add(t, s, "a", login{User: "last", Password: "p"})
	want("9,8,7,last")
	if got := users(t, OpenStore(s.dir, nil), "r.example", "a"); got != "9,8,7,last" {
		t.Errorf("another process finds %q", got)
	}
	for _, other := range [][2]string{{"r.example", "b"}, {"r.example", "a/b"}, {"other.example", "a"}} {
		if got := users(t, s, other[0], other[1]); got != "" {
			t.Errorf("%v: %q", other, got)
		}
	}
	refuse := func(users ...string) {
		t.Helper()
		for _, user := range users {
			if err := s.refuse("r.example", "a", login{User: user, Password: "p"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	refuse("8") // was proven, and comes after those that still are
	want("9,7,8,last")
	add(t, s, "a", login{User: "8", Password: "p", Proven: true})
	want("8,9,7,last")
	refuse("8", "last")
	want("9,7,8")
	refuse("8", "8")
	want("9,7")
	refuse("9", "7")
	want("7,9")
	refuse("9", "7")
	if left, _ := os.ReadDir(s.dir); len(left) != 0 {
		t.Errorf("a file is left: %v", left)
	}
}

// Tokens of which the end is known are not used after it.
func TestStoreTokensEnd(t *testing.T) {
	now := time.Now()
	s := OpenStore(filepath.Join(memory(t), "pulls"), func() time.Time { return now })
	if err := s.Setup(); err != nil {
		t.Fatal(err)
	}
	add(t, s, "a", login{User: "AWS", Password: "p"})
	list, err := s.Lookup(t.Context(), "r.example", "a")
	if err != nil || len(list) != 1 || list[0].Expires.IsZero() || list[0].Source != "kubelet's pull of r.example/a" {
		t.Fatalf("%v, %v", list, err)
	}
	now = now.Add(12 * time.Hour)
	if got := users(t, s, "r.example", "a"); got != "" {
		t.Errorf("%q", got)
	}
}

// What is kept is for root alone, in memory, and its names tell nothing.
func TestStoreFiles(t *testing.T) {
	s := newStore(t)
	add(t, s, "team/app", login{User: "u", Password: secret})
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	info, err := entries[0].Info()
	if err != nil || info.Mode() != 0o600 || strings.Contains(info.Name(), "app") || strings.Contains(info.Name(), "r.example") {
		t.Errorf("%s %s, %v", info.Mode(), info.Name(), err)
	}
	if text := fmt.Sprintf("%v %+v %#v", login{Password: secret}, []login{{Password: secret}}, saved{Logins: []login{{Password: secret}}}); strings.Contains(text, secret) {
		t.Errorf("%s", text)
	}
	path := filepath.Join(s.dir, entries[0].Name())
	refused := func(why string) {
		t.Helper()
		if list, err := s.Lookup(t.Context(), "r.example", "team/app"); list != nil || err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v, %v", why, list, err)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	refused("others can read it")
	for name, text := range map[string]string{"broken": `{"version": 1, ` + secret, "another version": `{"version": 2}`, "another's": `{"version": 1, "host": "r.example", "repository": "x"}`} {
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(name)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	add(t, s, "team/app", login{User: "u", Password: secret})
	if err := os.Rename(path, path+".other"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path+".other", path); err != nil {
		t.Fatal(err)
	}
	refused("a link")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("a fifo")
	add(t, s, "team/app", login{User: "u", Password: "p"}) // replaces what is of no use
	if got := users(t, s, "r.example", "team/app"); got != "u" {
		t.Errorf("%q", got)
	}
}

// A directory that is on a disk, others can read, or is a link, is refused, also
// later.
func TestStoreDirectory(t *testing.T) {
	s := OpenStore(filepath.Join(memory(t), "pulls"), nil)
	if list, err := s.Lookup(t.Context(), "r.example", "a"); list != nil || err != nil {
		t.Errorf("without a directory: %v, %v", list, err)
	}
	if err := s.Setup(); err != nil {
		t.Fatal(err)
	}
	unfinishedFile := filepath.Join(s.dir, unfinished+"1")
	if err := os.WriteFile(unfinishedFile, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Setup(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(unfinishedFile); !os.IsNotExist(err) {
		t.Errorf("what a killed process left stays: %v", err)
	}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.add("r.example", "a", login{User: "u"}); err == nil || !strings.Contains(err.Error(), "mode 0755") {
		t.Errorf("%v", err)
	}
	if err := os.Rename(s.dir, s.dir+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(s.dir+".moved", s.dir); err != nil {
		t.Fatal(err)
	}
	if err := s.Setup(); err == nil || !strings.Contains(err.Error(), s.dir) {
		t.Errorf("a link: %v", err)
	}
	disk := t.TempDir()
	var st unix.Statfs_t
	if err := unix.Statfs(disk, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type != unix.TMPFS_MAGIC { // where it is one, there is no disk to be had
		if err := OpenStore(filepath.Join(disk, "pulls"), nil).Setup(); err == nil || !strings.Contains(err.Error(), "tmpfs") {
			t.Errorf("a disk: %v", err)
		}
	}
}

func TestStoreIsBounded(t *testing.T) {
	s := newStore(t)
	old := time.Now().Add(-time.Hour)
	for i := range maxFiles + 20 {
		name := fmt.Sprint(i)
		add(t, s, name, login{User: "u", Password: "p"})
		if err := os.Chtimes(s.path("r.example", name), time.Time{}, old.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	left, err := os.ReadDir(s.dir)
	if err != nil || len(left) != maxFiles {
		t.Errorf("%d files, %v", len(left), err)
	}
	for name, want := range map[string]string{"0": "", "19": "", "20": "u", fmt.Sprint(maxFiles + 19): "u"} {
		if got := users(t, s, "r.example", name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// Whoever brings many or large logins fills no tmpfs, and drives out what was proven
// last.
func TestStoreIsBoundedInBytes(t *testing.T) {
	s := newStore(t)
	huge := login{User: secret, Password: strings.Repeat("x", maxLogin)}
	if err := s.add("r.example", "huge", huge); err == nil || !strings.Contains(err.Error(), "more than") || strings.Contains(err.Error(), secret) {
		t.Errorf("a huge login: %v", err)
	}
	escaped := login{User: "u", Password: strings.Repeat("\x00", maxLogin/4)} // JSON has 6 bytes for each
	if err := s.add("r.example", "huge", escaped); err == nil {
		t.Error("a login that is huge in its file is kept")
	}
	if got := users(t, s, "r.example", "huge"); got != "" {
		t.Errorf("%q", got)
	}
	old := time.Now().Add(-time.Hour)
	age := func(repository string) {
		t.Helper()
		if err := os.Chtimes(s.path("r.example", repository), time.Time{}, old); err != nil {
			t.Fatal(err)
		}
	}
	add(t, s, "proven", login{User: "good", Password: "p", Proven: true})
	age("proven")
	s = OpenStore(s.dir, nil) // a new process knows nothing of it
	large := strings.Repeat("x", maxLogin-200)
	var last string
	for i := range maxTotal/(maxLogins*len(large)) + 5 {
		last = fmt.Sprint("large", i)
		for user := range maxLogins {
			add(t, s, last, login{User: fmt.Sprint(user), Password: large})
		}
		if total := size(t, s); total > maxTotal {
			t.Fatalf("%d bytes", total)
		}
	}
	for i := range maxFiles {
		if err := os.WriteFile(filepath.Join(s.dir, fmt.Sprint(i)+suffix), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	last = "many"
	add(t, s, last, login{User: "u", Password: "p"})
	if left, err := os.ReadDir(s.dir); err != nil || len(left) > maxFiles {
		t.Errorf("%d files, %v", len(left), err)
	}
	for repository, want := range map[string]string{"proven": "good", last: "u", "large0": ""} {
		if got := users(t, s, "r.example", repository); got != want {
			t.Errorf("%s: %q, want %q", repository, got, want)
		}
	}
	// Refused, it is the oldest of many.
	if err := s.refuse("r.example", "proven", login{User: "good", Password: "p"}); err != nil {
		t.Fatal(err)
	}
	age("proven")
	add(t, s, "one more", login{User: "u", Password: "p"})
	if got := users(t, s, "r.example", "proven"); got != "" {
		t.Errorf("what is no longer proven drives out others: %q", got)
	}
}

func size(t *testing.T, s *Store) (total int64) {
	t.Helper()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	return total
}

// Readers see the old file or the new one.
func TestStoreReadersMeanwhile(t *testing.T) {
	s := newStore(t)
	add(t, s, "a", login{User: "u", Password: "p"})
	stop := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if list, err := s.Lookup(t.Context(), "r.example", "a"); err != nil || len(list) == 0 {
					t.Errorf("%v, %v", list, err)
					return
				}
			}
		}
	})
	for i := range 200 {
		add(t, s, "a", login{User: fmt.Sprint(i), Password: "p"})
	}
	close(stop)
	all.Wait()
	if _, err := fs.Stat(os.DirFS(s.dir), "."); err != nil {
		t.Error(err)
	}
}

// The decisions are those of containerd's ParseAuth.
func TestLoginOf(t *testing.T) {
	pair := base64.StdEncoding.EncodeToString([]byte("u:p:q"))
	for name, c := range map[string]struct {
		image string
		auth  *runtime.AuthConfig
		want  string // host repository user password token
	}{
		"nothing":            {"r.example/a:1", nil, ""},
		"empty":              {"r.example/a:1", &runtime.AuthConfig{}, ""},
		"user":               {"r.example/a/b:1", &runtime.AuthConfig{Username: "u", Password: "p"}, "r.example a/b u p "},
		"digest":             {"r.example:5000/a@sha256:" + strings.Repeat("0", 64), &runtime.AuthConfig{Username: "u"}, "r.example:5000 a u  "},
		"docker.io":          {"busybox", &runtime.AuthConfig{Username: "u", Password: "p"}, "registry-1.docker.io library/busybox u p "},
		"pair":               {"r.example/a", &runtime.AuthConfig{Auth: pair}, "r.example a u p:q "},
		"user before pair":   {"r.example/a", &runtime.AuthConfig{Username: "x", Password: "y", Auth: pair}, "r.example a x y "},
		"token before pair":  {"r.example/a", &runtime.AuthConfig{IdentityToken: "t", Auth: pair}, "r.example a   t"},
		"user before token":  {"r.example/a", &runtime.AuthConfig{Username: "x", IdentityToken: "t"}, "r.example a x  "},
		"registry token":     {"r.example/a", &runtime.AuthConfig{RegistryToken: "t"}, ""},
		"server":             {"r.example/a", &runtime.AuthConfig{Username: "u", ServerAddress: "https://r.example/v2/"}, "r.example a u  "},
		"another server":     {"r.example/a", &runtime.AuthConfig{Username: "u", ServerAddress: "https://mirror.example"}, "mirror.example a u  "},
		"server without URL": {"r.example/a", &runtime.AuthConfig{Username: "u", ServerAddress: "r.example"}, ""},
		"broken pair":        {"r.example/a", &runtime.AuthConfig{Auth: "!"}, ""},
		"broken reference":   {"r.example/A", &runtime.AuthConfig{Username: "u"}, ""},
	} {
		to, l, ok := loginOf(&runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: c.image}, Auth: c.auth})
		got := strings.Join([]string{to.host, to.repository, l.User, l.Password, l.IdentityToken}, " ")
		if ok != (c.want != "") || ok && got != c.want {
			t.Errorf("%s: %v %q, want %q", name, ok, got, c.want)
		}
	}
}
