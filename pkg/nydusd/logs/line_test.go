package logs

import (
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestParse(t *testing.T) {
	const stamp = "2024-05-06 07:08:09.123456 +00:00"
	for raw, want := range map[string]Line{
		// nydusd 2.2.0 without -L, and 2.4.
		"[" + stamp + "] \x1b[1m\x1b[31mERROR\x1b[0m [\x1b[35mstorage/src/meta/mod.rs:42\x1b[0m] failed to get blob.meta": {slog.LevelError, stamp, "[storage/src/meta/mod.rs:42] failed to get blob.meta"},
		"[" + stamp + "] ERROR [nydus_storage::meta:42] failed":                                                           {slog.LevelError, stamp, "[nydus_storage::meta:42] failed"},
		"[" + stamp + "] WARN [a:1] slow":                                                                                 {slog.LevelWarn, stamp, "[a:1] slow"},
		"[" + stamp + "] INFO Program Version: v2.2.0":                                                                    {slog.LevelDebug, stamp, "Program Version: v2.2.0"},
		"[" + stamp + "] TRACE [a:1] x":                                                                                   {slog.LevelDebug, stamp, "[a:1] x"},
		"[" + stamp + "] INFO thread 'x' panicked at src/a.rs:1:":                                                         {slog.LevelError, stamp, "thread 'x' panicked at src/a.rs:1:"},
		// Whatever else writes there.
		"thread 'main' panicked at 'oh', src/main.rs:1:2":       {slog.LevelError, "", "thread 'main' panicked at 'oh', src/main.rs:1:2"},
		"malloc(): corrupted top size":                          {slog.LevelWarn, "", "malloc(): corrupted top size"},
		"[2024-05-06T07:08:09Z] mount helper: clean up":         {slog.LevelWarn, "", "[2024-05-06T07:08:09Z] mount helper: clean up"},
		"[" + stamp + " level=error msg=forged] ERROR x":        {slog.LevelWarn, "", "[" + stamp + " level=error msg=forged] ERROR x"},
		"a\rb\x00c\x1b]0;title\x07\td\xff\u202egnp\u00e4\u009b": {slog.LevelWarn, "", `a\x0db\x00c\x1b]0;title\x07 d\xff\u{202e}gnpä\u{9b}`},
		"":                        {slog.LevelWarn, "", ""},
		"[":                       {slog.LevelWarn, "", "["},
		strings.Repeat("ä", 1500): {slog.LevelWarn, "", strings.Repeat("ä", 1024) + "… (952 bytes more)"},
	} {
		if got := Parse(raw, slog.LevelDebug, NewHider()); got != want {
			t.Errorf("%q is\n%+v, want\n%+v", raw, got, want)
		}
	}
	for _, level := range []slog.Level{slog.LevelError, slog.LevelDebug} {
		if got := Level("   at src/main.rs:3", level); got != level {
			t.Errorf("a line of a message with level %v has level %v", level, got)
		}
	}
}

func TestHide(t *testing.T) {
	h := NewHider("s3cret+Password", "cccccc", "short")
	for text, want := range map[string]string{
		"login with s3cret+Password failed": "login with [hidden] failed",
		// What 2.2.0 says about a token server that cannot be reached.
		"error sending request for url (https://auth.example/token?service=r&grant_type=password&username=u&password=p%2Fw): connect": "error sending request for url (https://auth.example/token?[hidden] connect",
		"GET https://user:pw@registry.example:5000/v2/a/blobs/x, retry":                                                               "GET https://[hidden]@registry.example:5000/v2/a/blobs/x, retry",
		"redirected to http://s3.example/b/x?X-Amz-Signature=0a&Expires=1 status 403":                                                 "redirected to http://s3.example/b/x?[hidden] status 403",
		"Authorization: Basic dXNlcjpwYXNz":                                                                                           "Authorization: [hidden] [hidden]",
		`header "Basic dXNlcjpwYXNz"`:                                                                                                 `header "Basic [hidden]"`,
		"authorization bearer eyJhbGciOiJSUzI1NiJ9.eyJ":                                                                               "authorization bearer [hidden]",
		`RegistryConfig { auth: Some("dXNlcjpw"), registry_token: None, x }`:                                                          `RegistryConfig { auth: Some([hidden]), registry_token: None, x }`,
		`{"auth":"dXNlcjpw","repo":"a"}`:                                                                                              `{"auth":[hidden],"repo":"a"}`,
		`{\"auth\":\"dXNlcjpw\"}`:                                                                                                     `{\"auth\":[hidden]}`,
		"access_key_secret=abc, bucket":                                                                                               "access_key_secret=[hidden], bucket",
		"X-Registry-Token: abc":                                                                                                       "X-Registry-Token: [hidden]",
		// Buckets.
		"AWS4-HMAC-SHA256 Credential=AKID/20260101/eu-1/s3/aws4_request, SignedHeaders=host;x-amz-date, Signature=0a1b": "AWS4-HMAC-SHA256 Credential=[hidden], SignedHeaders=host;x-amz-date, Signature=[hidden]",
		"Authorization: OSS LTAI5t:26NBxoKdsyly4EDv6inkoDft/yA=":                                                        "Authorization: [hidden] [hidden]",
		`"authorization": "OSS LTAI5t:26NBxoKdsyly4EDv6inkoDft/yA="`:                                                    `"authorization": [hidden]`,
		"date OSS LTAI5t:26NBxoKdsyly4EDv6inkoDft/yA= sent":                                                             "date OSS [hidden] sent",
		`S3Config { access_key_id: "AKID", access_key_secret: "a/b+c=", region: "r" }`:                                  `S3Config { access_key_id: [hidden], access_key_secret: [hidden], region: "r" }`,
		"<Code>InvalidAccessKeyId</Code><AWSAccessKeyId>cccccc</AWSAccessKeyId>":                                        "<Code>InvalidAccessKeyId</Code><AWSAccessKeyId>[hidden]</AWSAccessKeyId>",
		// Not secrets.
		"OSS backend: bucket":                               "OSS backend: bucket",
		"basic authentication failed, bearer token missing": "basic authentication failed, bearer token missing",
		"author: somebody, short word":                      "author: somebody, short word",
		"read from http://registry.example/v2/a/blobs/x":    "read from http://registry.example/v2/a/blobs/x",
	} {
		if got := h.Hide(text); got != want {
			t.Errorf("%s\n becomes %s\n    want %s", text, got, want)
		}
	}
	h.Know("other-secret")
	if got := h.Hide("cccccc other-secret"); got != "cccccc [hidden]" {
		t.Errorf("after a change of secrets %s", got)
	}
}

// However a log is read in pieces, its lines are the same.
func TestSplitter(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var want []string
		var all strings.Builder
		for range random.IntN(20) {
			line := strings.Repeat("x", []int{0, 1, 10, maxLine - 1, maxLine}[random.IntN(5)])
			want = append(want, line)
			all.WriteString(line + "\n")
		}
		all.WriteString("rest")
		var got []string
		var s splitter
		read := 0
		for text := all.String(); text != ""; {
			n := min(len(text), 1+random.IntN(2*maxLine))
			s.feed(text[:n], func(l string) { got = append(got, l) })
			text, read = text[n:], read+n
			if at := read - s.pending(); at > 0 && all.String()[at-1] != '\n' {
				t.Fatalf("position %d is not at the beginning of a line", at)
			}
		}
		if !slices.Equal(got, want) || s.take() != "rest" {
			t.Fatalf("%d lines, want %d, or others", len(got), len(want))
		}
	}
	var s splitter
	for range 3 {
		s.feed(strings.Repeat("y", maxLine), func(l string) { t.Errorf("a line that has not ended: %d bytes", len(l)) })
	}
	if len(s.rest) > maxLine || s.pending() != 3*maxLine {
		t.Errorf("holds %d bytes of %d", len(s.rest), s.pending())
	}
	s.feed("\nz\n", func(l string) {
		if l != "z" && l != strings.Repeat("y", maxLine)+"… (32768 bytes more)" {
			t.Errorf("a long line becomes one of %d bytes: …%s", len(l), l[max(0, len(l)-30):])
		}
	})
}

func FuzzParse(f *testing.F) {
	const canary = "canary-secret"
	f.Add("[2024-05-06 07:08:09.123456 +00:00] \x1b[31mERROR\x1b[0m [a:1] https://u:p@h/?q", "x")
	f.Add("thread 'x' panicked at \x1b[", `"auth":"x`)
	f.Add("\xff\u202e\x1b[0;1Basic dTpw password=\\\"a\\\" token: Some('", "\n")
	f.Fuzz(func(t *testing.T, before, behind string) {
		hide := NewHider(canary)
		l := Parse(before+canary+behind, slog.LevelDebug, hide)
		if len(l.Text) > maxText+40 || len(l.Time) > 40 || !utf8.ValidString(l.Text) {
			t.Errorf("%d bytes, time %q", len(l.Text), l.Time)
		}
		for _, r := range l.Text + l.Time {
			if !unicode.IsPrint(r) {
				t.Errorf("%U in %q", r, l.Text)
			}
		}
		if l.Level != slog.LevelDebug && l.Level != slog.LevelWarn && l.Level != slog.LevelError {
			t.Errorf("level %v", l.Level)
		}
		if strings.Contains(l.Text, canary) {
			t.Errorf("the secret is in %q", l.Text)
		}
		var s splitter
		s.feed(before+"\n"+behind+"\n", func(string) {})
		if s.pending() != 0 {
			t.Errorf("%d bytes pending", s.pending())
		}
	})
}
