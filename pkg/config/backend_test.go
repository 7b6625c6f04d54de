package config

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestBackends(t *testing.T) {
	got, err := Parse("f", []byte(`
version = 1

[[backend]]
name = "team"
type = "s3"
match = { host = "registry.example:5000", repository = "team/**" }
region = "eu-central-1"
endpoint = "s3.example:9000"
bucket_name = "blobs"
object_prefix = "team/"
credentials_file = "/etc/keys"

[[backend]]
name = "files"
type = "localfs"
allow_label = true
dir = "/srv/blobs"
[backend.match]
host = "*"
`), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Backend{
		{Name: "team", Type: BackendS3, Match: Match{"registry.example:5000", "team/**"}, Region: "eu-central-1", Endpoint: "s3.example:9000",
			BucketName: "blobs", ObjectPrefix: "team/", CredentialsFile: "/etc/keys"},
		{Name: "files", Type: BackendLocalFS, AllowLabel: true, Dir: "/srv/blobs", Match: Match{Host: "*"}},
	}
	if !reflect.DeepEqual(got.Backends, want) {
		t.Fatalf("got\n%+v\nwant\n%+v", got.Backends, want)
	}
}

// The example in the documented file is a right one, and has every key.
func TestDefaultTOMLExplainsBackends(t *testing.T) {
	_, example, ok := strings.Cut(DefaultTOML, "\n# [[backend]]\n")
	if !ok {
		t.Fatal("default.toml has no example of a [[backend]]")
	}
	text := "version = 1\n[[backend]]\n"
	for line := range strings.Lines(example) {
		line = strings.TrimPrefix(strings.TrimPrefix(line, "#"), " ")
		if !strings.HasPrefix(line, "dir =") {
			text += line
		} else if _, err := Parse("dir", []byte("version = 1\n[[backend]]\nname=\"x\"\ntype=\"localfs\"\nallow_label=true\n"+line), nil); err != nil {
			t.Error(err)
		}
	}
	if _, err := Parse("example", []byte(text), nil); err != nil {
		t.Error(err)
	}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Backend]()) {
		if key := f.Tag.Get("toml"); !strings.Contains(example, "# "+key+" =") {
			t.Errorf("the example does not have %s", key)
		}
	}
}

func TestBackendFaults(t *testing.T) {
	const keys = "\ncredentials_file = '/k'\n"
	s3 := "name = 'a'\ntype = 's3'\nmatch = {host = '*'}\nregion = 'r'\nbucket_name = 'b'" + keys
	oss := "name = 'a'\ntype = 'oss'\nmatch = {host = '*'}\nendpoint = 'oss.example'\nbucket_name = 'b'" + keys
	for text, want := range map[string][]string{
		"": {"backend[1].name", "backend[1].match: is missing", `backend[1].type: is "", want one of: registry, localfs, oss, s3`},
		"name = 'a'\ntype = 'registry'\nmatch = {host = '*'}\ncolour = 'blue'":                                                  {"line 6: backend[1].colour: unknown key"},
		"name = 'a'\ntype = 'registry'\nmatch = {host = '*',\n repo = 'x'}":                                                     {"line 6: backend[1].match.repo: unknown key"},
		"name = 'a'\ntype = 'registry'\nmatch = {host = '*'}\nallow-label = true":                                               {"line 6: backend[1].allow-label: unknown key; did you mean allow_label?"},
		"name = 'a'\ntype = 'registry'\nmatch = {host = '*'}\nallow_label = 'yes'":                                              {"line 6: backend[1].allow_label: want true or false, got text"},
		"name = 'a'\ntype = 'registry'":                                                                                         {"backend[1].match: is missing"},
		"name = 'a'\ntype = 'registry'\nmatch = 'x'":                                                                            {"line 5: backend[1].match: want a table", "line 5: backend[1].match: is missing"},
		"name = 'a'\ntype = 'registry'\nmatch = {host = 'a/b'}":                                                                 {"line 5: backend[1].match.host:"},
		"name = 'a'\ntype = 'registry'\nmatch = {repository = '[a'}":                                                            {"line 5: backend[1].match.repository: \"[a\" is no pattern"},
		"name = 'a'\ntype = 'registry'\nmatch = {host = '*'}\nendpoint = 'x'":                                                   {"line 6: backend[1].endpoint: means nothing for type \"registry\""},
		"name = 'a'\ntype = 'localfs'\nmatch = {host = '*'}":                                                                    {"backend[1].dir: is missing"},
		"name = 'a'\ntype = 'localfs'\nmatch = {host = '*'}\ndir = '/a:b'":                                                      {"line 6: backend[1].dir: \"/a:b\" has a character"},
		"name = 'A b'\ntype = 'registry'\nmatch = {host = '*'}":                                                                 {"line 3: backend[1].name:"},
		"name = 'a'\ntype = 'registry'\nmatch = {host = '*'}\n[[backend]]\nname = 'a'\ntype = 'registry'\nmatch = {host = '*'}": {"line 7: backend[2].name: \"a\" is there twice"},
		"name = 'a'\ntype = 's3'\nmatch = {host = '*'}":                                                                         {"backend[1].bucket_name: is missing", "backend[1].credentials_file: is missing", "backend[1].region: is missing"},
		s3 + "dir = '/x'":                                      {"line 9: backend[1].dir: means nothing for type \"s3\""},
		s3 + "endpoint = 'https://s3.example'":                 {"line 9: backend[1].endpoint:"},
		s3 + "object_prefix = '/x'":                            {"line 9: backend[1].object_prefix:"},
		s3 + "object_prefix = 'a?b'":                           {"line 9: backend[1].object_prefix:"},
		s3 + "scheme = 'ftp'":                                  {"line 9: backend[1].scheme: is \"ftp\""},
		s3 + "scheme = 'http'\nskip_verify=true":               {"line 10: backend[1].skip_verify:"},
		oss + "region = 'r'":                                   {"line 9: backend[1].region: means nothing for type \"oss\""},
		strings.ReplaceAll(oss, "oss.example", "127.0.0.1:80"): {"line 6: backend[1].endpoint: \"127.0.0.1:80\": want a name"},
		strings.ReplaceAll(s3, "'/k'", "'k'"):                  {"line 8: backend[1].credentials_file: \"k\""},
		strings.ReplaceAll(s3, "'b'", "'b/c'"):                 {"line 7: backend[1].bucket_name: \"b/c\""},
	} {
		_, err := Parse("f", []byte("version = 1\n[[backend]]\n"+text), nil)
		var all *Error
		if !errors.As(err, &all) {
			t.Errorf("%q: got %v", text, err)
			continue
		}
		if len(all.Faults) != len(want) {
			t.Errorf("%q: want %d faults, got %v", text, len(want), err)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q: want %s, got %v", text, w, err)
			}
		}
	}
	for text, want := range map[string]string{
		"[backend]\nname = 'a'": "line 2: backend: want a list of tables, each begun with [[backend]], got a table",
		"backend = ['a']":       "line 2: backend: want a list of tables, element 0 is text",
		"backend = [\n{name = 'a', type = 'registry', match = {host = '*'}},\n{name = 'a', type = 'registry', match = {host = '*'}}]": "line 4: backend[2].name",
	} {
		if _, err := Parse("f", []byte("version = 1\n"+text), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: want %s, got %v", text, want, err)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		match            Match
		host, repository string
		want             bool
	}{
		{Match{}, "r.example", "a", true},
		{Match{Host: "r.example"}, "r.example", "a/b", true},
		{Match{Host: "r.example"}, "r.example:5000", "a/b", false},
		{Match{Host: "r.example:*"}, "r.example:5000", "a/b", true},
		{Match{Host: "*.example"}, "a.b.example", "a", true},
		{Match{Host: "*"}, "[::1]:5000", "a", true},
		{Match{Host: "[::1]:5000"}, "[::1]:5000", "a", true},
		{Match{Host: "[::1]:5000"}, ":5000", "a", false},
		{Match{Repository: "team/*"}, "h", "team/a", true},
		{Match{Repository: "team/*"}, "h", "team/a/b", false},
		{Match{Repository: "team/*"}, "h", "other/team/a", false},
		{Match{Repository: "team/*"}, "h", "team", false},
		{Match{Repository: "team/**"}, "h", "team/a/b", true},
		{Match{Repository: "**/app"}, "h", "a/b/app", true},
		{Match{Repository: "{a,b}/c"}, "h", "b/c", true},
		{Match{Repository: "TEAM/*"}, "h", "team/a", false},
		{Match{"r.example", "team/*"}, "r.example", "team/a", true},
		{Match{"r.example", "team/*"}, "r.example", "a", false},
		{Match{"r.example", "team/*"}, "s.example", "team/a", false},
	} {
		if got := c.match.Fits(c.host, c.repository); got != c.want {
			t.Errorf("%+v fits %s/%s: %v, want %v", c.match, c.host, c.repository, got, c.want)
		}
	}
}
