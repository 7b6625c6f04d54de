package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
)

// TestOptionsBehindImages: the library takes them for images.
func TestOptionsBehindImages(t *testing.T) {
	for _, c := range []struct {
		args, images []string
		verify       bool
		from, fault  string
	}{
		{[]string{"a", "b"}, []string{"a", "b"}, false, "", ""},
		{[]string{"a", "--verify"}, []string{"a"}, true, "", ""},
		{[]string{"--from", "d", "a", "--verify=false", "b"}, []string{"a", "b"}, false, "d", ""},
		{[]string{"a", "--from", "d", "b", "--verify"}, []string{"a", "b"}, true, "d", ""},
		{[]string{"a", "--from=d"}, []string{"a"}, false, "d", ""},
		{[]string{"a", "--", "--verify"}, []string{"a", "--verify"}, false, "", ""},
		{[]string{"a", "-verify", "-from=d"}, []string{"a"}, true, "d", ""},
		{[]string{"a", "-h"}, nil, false, "", "fetch --help"},
		{[]string{"a", "--from"}, nil, false, "", "needs an argument"},
		{[]string{"a", "--what"}, nil, false, "", "not defined"},
		{[]string{"a", "--verify=often"}, nil, false, "", "verify"},
	} {
		app := newApp()
		app.Writer, app.ErrWriter = &bytes.Buffer{}, &bytes.Buffer{}
		command := imageCommand().Subcommands[0]
		var images []string
		command.Action = func(ctx *cli.Context) (err error) {
			images, err = behind(ctx)
			if err == nil && (ctx.Bool("verify") != c.verify || ctx.String("from") != c.from) {
				t.Errorf("%q: verify %v, from %q", c.args, ctx.Bool("verify"), ctx.String("from"))
			}
			return err
		}
		app.Commands = []*cli.Command{command}
		err := app.Run(append([]string{"nydus-snapshotter", "fetch"}, c.args...))
		if c.fault != "" {
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("%q: %v, want %q", c.args, err, c.fault)
			}
			continue
		}
		if err != nil || !slices.Equal(images, c.images) {
			t.Errorf("%q: %q, %v", c.args, images, err)
		}
	}
}

func TestFetchUsage(t *testing.T) {
	for _, c := range []struct {
		want string
		args []string
	}{
		{"want an IMAGE", nil},
		{"want an IMAGE", []string{"a", ""}},
		{"--from is empty", []string{"a", "--from="}},
		{"--format", []string{"a", "--format", "xml"}},
		{"--rate", []string{"a", "--rate", "fast"}},
		{"--from", []string{"a", "--from", "/no/such/directory", "--root", t.TempDir()}},
	} {
		app := newApp()
		app.Writer, app.ErrWriter = &bytes.Buffer{}, &bytes.Buffer{}
		err := app.Run(append([]string{"nydus-snapshotter", "image", "fetch"}, c.args...))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.args, err, c.want)
		}
	}
}

func TestNamedBy(t *testing.T) {
	var all []pulledImage
	for _, name := range []string{"docker.io/library/busybox:latest", "r.example:5000/a/b:1", "r.example:5000/a/b:2", "r.example:5000/a/b:1", "not a reference"} {
		all = append(all, pulledImage{Image: fetch.Image{Name: name}})
	}
	for ref, want := range map[string]int{"busybox": 1, "docker.io/library/busybox": 1, "r.example:5000/a/b:1": 2, "r.example:5000/a/b": 0, "not a reference": 1, "b": 0} {
		if got, err := namedBy(all, ref); len(got) != want || (err == nil) != (want > 0) {
			t.Errorf("%q names %+v, %v; want %d", ref, got, err, want)
		}
	}
}

// TestDirectory finds blobs by all the names that they may have.
func TestDirectory(t *testing.T) {
	text := []byte("this is a blob")
	sum := sha256.Sum256(text)
	id := hex.EncodeToString(sum[:])
	for _, name := range (&directory{}).names(id) {
		dir := t.TempDir()
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, text, 0o600))
		d := &directory{path: dir}
		if got, err := d.find(t.Context(), id); got != path || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		must(t, os.WriteFile(path, []byte("this is another"), 0o600))
		if got, err := (&directory{path: dir}).find(t.Context(), id); err == nil || !strings.Contains(err.Error(), "is not what its name says") {
			t.Errorf("%s with other content: %q, %v", name, got, err)
		}
	}
	if got, err := (&directory{path: t.TempDir()}).find(t.Context(), id); !os.IsNotExist(err) {
		t.Errorf("a blob that is not there: %q, %v", got, err)
	}
}

// TestDirectoryOfPipes: what is no file is refused at once, and a link to a file is not.
func TestDirectoryOfPipes(t *testing.T) {
	text := []byte("this is a blob")
	sum := sha256.Sum256(text)
	id := hex.EncodeToString(sum[:])
	for name, put := range map[string]func(path string) error{
		"pipe":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"link to a pipe": func(path string) error {
			return errors.Join(unix.Mkfifo(path+".pipe", 0o600), os.Symlink(path+".pipe", path))
		},
		"socket": func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
	} {
		path := filepath.Join(t.TempDir(), id)
		must(t, put(path))
		got, err := (&directory{path: filepath.Dir(path)}).find(t.Context(), id)
		// A socket cannot even be opened.
		if err == nil || !strings.Contains(err.Error(), path) || name != "socket" && !strings.Contains(err.Error(), "is no regular file") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	dir, other := t.TempDir(), filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(other, text, 0o600))
	must(t, os.Symlink(other, filepath.Join(dir, id)))
	if got, err := (&directory{path: dir}).find(t.Context(), id); got != filepath.Join(dir, id) || err != nil {
		t.Errorf("a link to a file: %q, %v", got, err)
	}
	pipe := filepath.Join(dir, "pipe")
	must(t, unix.Mkfifo(pipe, 0o600))
	if d, err := newDirectory(pipe); err == nil || !strings.Contains(err.Error(), "is no directory") {
		t.Errorf("a pipe for a directory: %+v, %v", d, err)
	}
}

func states() (some, more, all fetch.State) {
	of := func(ready int) fetch.State {
		return fetch.State{
			{ID: strings.Repeat("1", 64), Chunks: 10, Ready: 10, Size: 1e6, Raw: 2e6},
			{ID: strings.Repeat("2", 64), Chunks: 10, Ready: ready, Size: 4e6, Raw: 9e6},
		}
	}
	return of(0), of(5), of(10)
}

func TestLines(t *testing.T) {
	some, more, all := states()
	now := time.Now()
	var out bytes.Buffer
	l := &lines{w: &out, image: "im", now: func() time.Time { return now }, every: lineEvery}
	l.tell(fetch.Fetching, some)
	now = now.Add(5 * time.Second)
	l.tell(fetch.Fetching, more)
	now = now.Add(5 * time.Second)
	l.tell(fetch.Fetching, more)
	l.tell(fetch.Fetching, all)
	l.tell(fetch.Comparing, all)
	l.end()
	want := "im: 1.0 MB of 5.0 MB are in the cache, fetching the rest\nim: 3.0 MB of 5.0 MB, 0.2 MB/s, 10s left\n"
	if out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	// What is there is not worth a line.
	out.Reset()
	l = &lines{w: &out, image: "im", now: time.Now, every: lineEvery}
	l.tell(fetch.Fetching, all)
	l.tell(fetch.Comparing, all)
	if out.Len() > 0 {
		t.Errorf("%q", out.String())
	}
}

func TestBars(t *testing.T) {
	some, more, all := states()
	var out safeBuffer
	b := newBars(&out, "im", time.Now)
	b.tell(fetch.Fetching, some)
	b.tell(fetch.Fetching, more)
	await(t, "a bar", func() bool {
		text := out.String()
		return strings.Contains(text, "im ") && strings.Contains(text, "blob 222222222222") && strings.Contains(text, "3.0 MB of 5.0 MB") &&
			strings.Contains(text, "2.0 MB of 4.0 MB") && strings.Contains(text, "left")
	})
	if strings.Contains(out.String(), "blob 111111111111") {
		t.Error("a blob that is there has a bar")
	}
	b.tell(fetch.Fetching, all)
	b.tell(fetch.Comparing, all)
	await(t, "the next phase", func() bool { return strings.Contains(out.String(), "im: comparing") })
	b.end()
}

// safeBuffer is written to by one goroutine and read by another.
type safeBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// await waits for what makes no event.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !done() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("there is not %s", what)
		}
	}
}
