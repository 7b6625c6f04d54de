// Package tuning reads an operator's template: a file in the shape of nydusd's own
// configuration, first version, that says how nydusd works and leaves out what is decided
// for each image.
//
// nydusd ignores what it does not know, and takes some values that ruin an image. So what
// the package promises is that nothing in the file is passed over: a key that is unknown
// to one of the versions of nydusd in use, that is not the operator's to set, is there
// twice, or has a value that nydusd would refuse or misread, is an error, with its line
// and path. All of them are reported at once. No value that could be a secret is repeated.
//
// Do not use it for configurations that go to nydusd as they are, as mount(8) has them.
package tuning

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// MaxSize bounds a file in bytes.
const MaxSize = 1 << 20

// Error is everything that is wrong with a file, in the order in which it is there.
type Error struct {
	Name   string
	Faults []Fault
}

// Fault is one thing that is wrong.
type Fault struct {
	// Line counts from 1.
	Line int
	// Key is the dotted path, empty for the file as a whole.
	Key     string
	Problem string
}

// String is the fault in one line, without the file's name.
func (f Fault) String() string {
	if f.Key == "" {
		return fmt.Sprintf("line %d: %s", f.Line, f.Problem)
	}
	return fmt.Sprintf("line %d: %s: %s", f.Line, f.Key, f.Problem)
}

// Error lists the faults in one line: it ends up in a log.
func (e *Error) Error() string {
	var all []string
	for _, f := range e.Faults {
		all = append(all, f.String())
	}
	return fmt.Sprintf("nydusd template %s: %s", e.Name, strings.Join(all, "; "))
}

// Read reads a file.
func Read(path string) (nydusd.Tuning, error) {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return nydusd.Tuning{}, fmt.Errorf("read nydusd template: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nydusd.Tuning{}, fmt.Errorf("read nydusd template: %w", err)
	}
	return Parse(path, text)
}

// Parse reads a file's text. The error is an *Error.
func Parse(name string, text []byte) (nydusd.Tuning, error) {
	if len(text) > MaxSize {
		return nydusd.Tuning{}, &Error{name, []Fault{{Line: 1, Problem: fmt.Sprintf("it has more than %d bytes", MaxSize)}}}
	}
	w := walker{dec: json.NewDecoder(bytes.NewReader(text)), text: text, rules: rules()}
	w.dec.UseNumber()
	w.file()
	if len(w.faults) > 0 {
		return nydusd.Tuning{}, &Error{name, w.faults}
	}
	var t template
	if err := json.Unmarshal(text, &t); err != nil {
		// The rules allow what the struct takes.
		return nydusd.Tuning{}, &Error{name, []Fault{{Line: 1, Problem: "it cannot be read"}}}
	}
	return t.tuning(), nil
}

// walker goes through a JSON text and holds it against the rules. A duplicate, the case of
// a name and a line are what encoding/json does not tell.
type walker struct {
	dec    *json.Decoder
	text   []byte
	rules  map[string]rule
	faults []Fault
}

func (w *walker) line() int { return 1 + bytes.Count(w.text[:w.dec.InputOffset()], []byte("\n")) }

func (w *walker) fail(key, problem string) {
	w.faults = append(w.faults, Fault{w.line(), key, problem})
}

// errSyntax ends the walk; the fault is noted.
var errSyntax = errors.New("no JSON")

func (w *walker) file() {
	token, err := w.dec.Token()
	if err == nil && token != json.Delim('{') {
		w.fail("", "want a JSON object")
		return
	}
	if err == nil {
		err = w.object("")
	}
	if err == nil {
		if _, err = w.dec.Token(); errors.Is(err, io.EOF) {
			return
		}
		w.fail("", "something follows the JSON object")
		return
	}
	// What stands there could be a secret.
	w.fail("", "the JSON breaks off or is malformed here")
}

// object reads the members of an object that has begun.
func (w *walker) object(prefix string) error {
	seen := map[string]bool{}
	for w.dec.More() {
		token, err := w.dec.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return errSyntax
		}
		key := strings.TrimPrefix(prefix+"."+name, ".")
		if seen[name] {
			w.fail(key, "is there twice")
		}
		seen[name] = true
		if err := w.value(key); err != nil {
			return err
		}
	}
	if _, err := w.dec.Token(); err != nil {
		return errSyntax
	}
	return nil
}

func (w *walker) value(key string) error {
	r, known := w.rules[key]
	if !known || r.object == nil && r.check == nil {
		problem := r.foreign
		if !known {
			problem = "unknown key: nydusd would ignore it, or one of its versions would"
		}
		w.fail(key, problem)
		var any json.RawMessage
		if w.dec.Decode(&any) != nil {
			return errSyntax
		}
		return nil
	}
	token, err := w.dec.Token()
	if err != nil {
		return errSyntax
	}
	delim, nested := token.(json.Delim)
	switch {
	case r.object != nil && delim == '{':
		return w.object(key)
	case nested:
		w.fail(key, "want "+r.wants())
		return w.leave()
	case r.object != nil:
		w.fail(key, "want an object")
	default:
		if problem := r.check(token); problem != "" {
			w.fail(key, problem)
		}
	}
	return nil
}

// leave goes to the end of an object or list that has begun.
func (w *walker) leave() error {
	for depth := 1; depth > 0; {
		token, err := w.dec.Token()
		if err != nil {
			return errSyntax
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
	return nil
}

// template is what of a file counts.
type template struct {
	Device struct {
		Backend struct {
			Type   string `json:"type"`
			Config struct {
				ConnectTimeout     *int          `json:"connect_timeout"`
				Timeout            *int          `json:"timeout"`
				RetryLimit         *int          `json:"retry_limit"`
				Proxy              *nydusd.Proxy `json:"proxy"`
				BlobURLScheme      string        `json:"blob_url_scheme"`
				BlobRedirectedHost string        `json:"blob_redirected_host"`
			} `json:"config"`
		} `json:"backend"`
	} `json:"device"`
	EnableXattr     *bool `json:"enable_xattr"`
	IOStatsFiles    bool  `json:"iostats_files"`
	AccessPattern   bool  `json:"access_pattern"`
	LatestReadFiles bool  `json:"latest_read_files"`
	AmplifyIO       *int  `json:"amplify_io"`
	Prefetch        *struct {
		Enable    bool  `json:"enable"`
		Threads   *int  `json:"threads_count"`
		BatchSize *int  `json:"merging_size"`
		Bandwidth *int  `json:"bandwidth_rate"`
		All       *bool `json:"prefetch_all"`
	} `json:"fs_prefetch"`
}

func (t template) tuning() nydusd.Tuning {
	c := t.Device.Backend.Config
	out := nydusd.Tuning{
		Transfer: nydusd.Transfer{
			Only: t.Device.Backend.Type, ConnectTimeout: c.ConnectTimeout, Timeout: c.Timeout, Retries: c.RetryLimit, Proxy: c.Proxy,
			BlobURLScheme: c.BlobURLScheme, BlobRedirectedHost: c.BlobRedirectedHost,
		},
		EnableXattr: t.EnableXattr, IOStatsFiles: t.IOStatsFiles, AccessPattern: t.AccessPattern, LatestReadFiles: t.LatestReadFiles, AmplifyIO: t.AmplifyIO,
	}
	if c.Proxy != nil && c.Proxy.URL == "" {
		out.Transfer.Proxy = nil // nydusd's way to say that there is none
	}
	if p := t.Prefetch; p != nil {
		out.Prefetch = &nydusd.Prefetch{Enable: p.Enable, Threads: p.Threads, BatchSize: p.BatchSize, Bandwidth: p.Bandwidth, All: p.All}
	}
	return out
}
