package accesskey

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const canary = "cAnArY/sEcReT+0123456789#; x"

func write(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRead(t *testing.T) {
	const aws = `
# of the team
[default]
aws_access_key_id = AKID
aws_secret_access_key = a/b+c="d#e;f%(aws_access_key_id)s\
[other]
aws_access_key_id=OTHER
aws_secret_access_key="quoted"
`
	const alibaba = "[default]\ntype = access_key\naccess_key_id = LTAI\naccess_key_secret = s\n"
	for _, c := range []struct {
		text    string
		format  Format
		profile string
		want    Key
	}{
		{aws, AWS, "", Key{"AKID", `a/b+c="d#e;f%(aws_access_key_id)s\`}},
		{aws, AWS, "default", Key{"AKID", `a/b+c="d#e;f%(aws_access_key_id)s\`}},
		{aws, AWS, "other", Key{"OTHER", `"quoted"`}},
		{alibaba, Alibaba, "", Key{"LTAI", "s"}},
		{strings.ReplaceAll(alibaba, "type = access_key\n", ""), Alibaba, "", Key{"LTAI", "s"}},
	} {
		if got, err := Read(write(t, c.text, 0o600), c.format, c.profile); err != nil || got.ID != c.want.ID || got.Secret != c.want.Secret {
			t.Errorf("%s %q: %q %q, %v; want %q %q", c.format, c.profile, got.ID, got.Secret, err, c.want.ID, c.want.Secret)
		}
	}
}

func TestRefuses(t *testing.T) {
	const pair = "aws_access_key_id = ID\naws_secret_access_key = canary\n"
	for _, c := range []struct {
		text    string
		format  Format
		profile string
		want    string
	}{
		{"", AWS, "", `it has no profile "default"`},
		{"[default]\n" + pair, AWS, "team", `it has no profile "team"`},
		{"[default]\n", AWS, "", `profile "default": aws_`},
		{"[default]\naws_access_key_id = canary", AWS, "", `profile "default": aws_secret_access_key is missing`},
		{"[default]\naws_secret_access_key = canary", AWS, "", "aws_access_key_id is missing"},
		{"[default]\n" + pair + "aws_session_token = canary", AWS, "", "aws_session_token: nydusd cannot use keys of a session"},
		{"[default]\n" + pair + "role_arn = canary", AWS, "", `unknown key role_arn`},
		{"[default]\n" + pair + "AWS_ACCESS_KEY_ID = canary", AWS, "", "unknown key in line 4: want NAME = VALUE, with aws_access_key_id"},
		{"[default]\n" + pair + "aws_access_key_id = canary", AWS, "", "aws_access_key_id is there twice"},
		{"[default]\n" + pair + "[default]\n" + pair, AWS, "", `profile "default" is there twice`},
		{"[default]\naws_access_key_id = ID\naws_secret_access_key = " + canary, AWS, "", "aws_secret_access_key has a character"},
		{"[default]\naws_access_key_id = canary\xff\naws_secret_access_key = canary", AWS, "", "aws_access_key_id has a character"},
		{"[default]\ncanary", AWS, "", "it is no ini file"},
		{"[default\ncanary", AWS, "", "it is no ini file"},
		{"[other]\naws_secret_access_key: Canary==\n[default]\naws_access_key_id = ID\naws_secret_access_key: Canary==\n", AWS, "", "unknown key in line 5"},
		{"[default]\r\n\r\nCanary/0==\r\n", AWS, "", "unknown key in line 3"},
		{"[default]\n" + pair + "CANARY=1\nCANARY=2", AWS, "", "key in line 4 is there twice"},
		{"[default]\n" + pair + "`canary 1`=1", AWS, "", "unknown key in line 4"},
		{"[default]\n" + strings.Repeat("canary", 6) + "=1", AWS, "", "unknown key in line 2"},
		{"canary = 1\n= canary", AWS, "", "it is no ini file"},
		{"[default]\n" + pair, Alibaba, "", `unknown key aws_access_key_id: want NAME = VALUE, with access_key_id and access_key_secret`},
		{"[default]\ntype = ram_role_arn\naccess_key_id = canary\naccess_key_secret = canary", Alibaba, "", `type: nydusd can use "access_key" only`},
		{"[default]\n" + pair, "azure", "", `unknown format "azure"`},
		{strings.Repeat("#", maxSize+1), AWS, "", "more than"},
	} {
		path := write(t, c.text, 0o600)
		key, err := Read(path, c.format, c.profile)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%.80q: want an error that says %s, got %v", c.text, c.want, err)
		} else if strings.Contains(strings.ToLower(err.Error()), "canary") || key != (Key{}) {
			t.Errorf("%.80q: the secret shows: %v", c.text, err)
		}
	}
}

func TestRefusesFilesOfOthers(t *testing.T) {
	const text = "[default]\naws_access_key_id = ID\naws_secret_access_key = S\n"
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o400: true, 0o640: false, 0o604: false, 0o620: false} {
		_, err := Read(write(t, text, mode), AWS, "")
		if ok != (err == nil) || err != nil && !strings.Contains(err.Error(), fmt.Sprintf("its mode is %04o", mode)) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	foreign := write(t, text, 0o600)
	if err := os.Chown(foreign, 4711, 0); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		foreign: "it is user 4711's", fifo: "no regular file", t.TempDir(): "no regular file", "/nonexistent/keys": "no such file",
	} {
		if _, err := Read(path, AWS, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
}

func TestKeyIsHidden(t *testing.T) {
	key := Key{"canary-id", "canary-secret"}
	text, err := json.Marshal(map[string]any{"k": key})
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{fmt.Sprint(key), fmt.Sprintf("%+v %#v %x %s", key, &key, key, []Key{key}), string(text)} {
		if strings.Contains(shown, "canary") || strings.Contains(shown, "63616e617279") {
			t.Errorf("the key shows: %s", shown)
		}
	}
}
