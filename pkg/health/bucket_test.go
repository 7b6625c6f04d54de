package health

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func bucketConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A bucket that checks the signature answers in test/mount; these are the ways in which
// one does not.
func TestBucketAnswers(t *testing.T) {
	host := serve(t, func(w http.ResponseWriter, r *http.Request) {
		auth := r.Header.Get("Authorization")
		switch {
		case !strings.HasPrefix(auth, "AWS4-HMAC-SHA256 Credential=AKID/") || !strings.Contains(auth, "/eu-1/s3/aws4_request"):
			t.Errorf("authorization %q", auth)
		case r.URL.Path == "/b/p/present" && r.Header.Get("Range") == "bytes=0-0":
			w.WriteHeader(http.StatusPartialContent)
		case r.URL.Path == "/b/":
			w.WriteHeader(http.StatusForbidden) // objects alone may be read
		case r.URL.Path == "/b/p/forbidden":
			w.WriteHeader(http.StatusForbidden)
		case r.URL.Path == "/b/p/broken":
			w.WriteHeader(http.StatusBadGateway)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	config := bucketConfig(t, fmt.Sprintf(`{"device":{"backend":{"type":"s3","config":{"scheme":"http","endpoint":%q,"region":"eu-1","bucket_name":"b","object_prefix":"p/","access_key_id":"AKID","access_key_secret":%q}}}}`, host, canary))
	for blobs, want := range map[string]string{
		"": "", "present": "", "present missing": `ask bucket b at ` + host + ` for object "p/missing": 404`,
		"forbidden": "credentials of the mount are not, or no longer, valid", "broken": "502",
	} {
		check(t, Answers(t.Context(), config, nil, strings.Fields(blobs)), want)
	}
}

func TestBucketThatIsAway(t *testing.T) {
	for _, broken := range []string{
		`{"device":{"backend":{"type":"s3","config":{"scheme":"http","endpoint":"127.0.0.1:1","region":"r","bucket_name":"b","access_key_id":"AKID","access_key_secret":"` + canary + `"}}}}`,
		`{"version":2,"backend":{"type":"oss","oss":{"scheme":"http","endpoint":"bucket.invalid","bucket_name":"b","access_key_id":"ID","access_key_secret":"` + canary + `"}}}`,
	} {
		for _, blobs := range [][]string{nil, {"x"}} {
			check(t, Answers(t.Context(), bucketConfig(t, broken), nil, blobs), "ask bucket b at ")
		}
	}
}
