package main

import (
	"fmt"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
)

// Nothing is shared beyond a host and repository, a directory, or a place in a bucket: a
// server may give out other bytes under the id of somebody else's blob.
func TestCacheDirectoriesAreApart(t *testing.T) {
	s3 := func(change func(*config.Backend)) []config.Backend {
		b := config.Backend{Name: "b", Type: config.BackendS3, Match: config.Match{Repository: "**"}, Endpoint: "s3.example", Region: "r", BucketName: "b", ObjectPrefix: "p/"}
		change(&b)
		return []config.Backend{b}
	}
	local := func(dir string) []config.Backend {
		return []config.Backend{{Name: "l", Type: config.BackendLocalFS, Match: config.Match{Repository: "**"}, Dir: dir}}
	}
	apart := map[string][]config.Backend{"local": local("/blobs"), "elsewhere": local("/blobs2")}
	for name, change := range map[string]func(*config.Backend){
		"bucket":         func(*config.Backend) {},
		"endpoint":       func(b *config.Backend) { b.Endpoint = "s3.example:9000" },
		"region":         func(b *config.Backend) { b.Region = "r2" },
		"another bucket": func(b *config.Backend) { b.BucketName = "b2" },
		"prefix":         func(b *config.Backend) { b.ObjectPrefix = "p2/" },
		"other cloud":    func(b *config.Backend) { b.Type, b.Region = config.BackendOSS, "" },
	} {
		apart[name] = s3(change)
	}
	seen := map[string]string{}
	take := func(who string, rules []config.Backend, ref string) string {
		t.Helper()
		cfg := config.Default()
		cfg.Backends = rules
		dir, err := placed(cfg)(t.Context(), ref, "")
		if err != nil {
			t.Fatalf("%s: %v", who, err)
		}
		if other, ok := seen[dir]; ok {
			t.Errorf("%s and %s share %s", who, other, dir)
		}
		seen[dir] = who
		return dir
	}
	for _, ref := range []string{"a.example/team/app:1", "b.example/team/app:1", "a.example:5000/team/app:1", "a.example/team/app2:1", "a.example/team/app/x:1"} {
		take(ref, nil, ref)
	}
	for name, rules := range apart {
		take(name, rules, "a.example/team/app:1")
	}
	// Another tag, or another image of the same bucket, is no other place.
	for who, c := range map[string][2]string{"tags": {"a.example/team/app:1", "a.example/team/app:2"}, "digests": {"a.example/team/app:1", "a.example/team/app@sha256:" + fmt.Sprintf("%064x", 1)}} {
		cfg := config.Default()
		one, err1 := placed(cfg)(t.Context(), c[0], "")
		two, err2 := placed(cfg)(t.Context(), c[1], "")
		if err1 != nil || err2 != nil || one != two {
			t.Errorf("%s: %s (%v) and %s (%v)", who, one, err1, two, err2)
		}
	}
}
