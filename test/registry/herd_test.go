package registry_test

import (
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestManyTokens lets many ranges find at once that their token has ended: they share a
// new one, and the token server is not asked by each.
func TestManyTokens(t *testing.T) {
	c := newCluster(t)
	v := c.mustMount(clusterName)
	defer v.unmount()
	const rounds, ranges, most = 3, 200, 20
	for range rounds {
		v.gets(clusterName)
		last := c.issuer.tokens()
		kit.Eventually(t, "the token has ended", soon, func() bool { return c.issuer.ended(last[len(last)-1]) })
		errs, begun := make([]error, ranges), time.Now()
		var all sync.WaitGroup
		for i := range ranges {
			all.Go(func() { errs[i] = v.tryGet(clusterName) })
		}
		all.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Error(err)
		}
		// While a busy machine reads, tokens end again.
		times := 1 + int(time.Since(begun)/c.issuer.life)
		if n := len(c.issuer.tokens()) - len(last); n > times*most {
			t.Errorf("%d ranges took %d tokens in %d of their lives, want %d at most", ranges, n, times, times*most)
		}
	}
}

// TestTokenServer lets the token server fail while its tokens end.
func TestTokenServer(t *testing.T) {
	c := newCluster(t)
	v := c.mustMount(clusterName)
	defer v.unmount()
	for name, hook := range map[string]func(http.ResponseWriter){
		"500": func(w http.ResponseWriter) { http.Error(w, "ill", http.StatusInternalServerError) },
		"429": func(w http.ResponseWriter) {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "busy", http.StatusTooManyRequests)
		},
		"no JSON":  func(w http.ResponseWriter) { _, _ = w.Write([]byte("<html>")) },
		"no token": func(w http.ResponseWriter) { _, _ = w.Write([]byte("{}")) },
		"reset":    func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			v := *v
			v.l = c.in(t)
			v.gets(clusterName)
			last := c.issuer.tokens()
			kit.Eventually(t, "the token has ended", soon, func() bool { return c.issuer.ended(last[len(last)-1]) })
			left := 5 // that is how often it fails
			var mu sync.Mutex
			c.issuer.setHook(func(w http.ResponseWriter, _ *http.Request) bool {
				mu.Lock()
				fails := left > 0
				left--
				mu.Unlock()
				if fails {
					hook(w)
				}
				return fails
			})
			v.gets(clusterName)
			c.issuer.setHook(nil)
			mu.Lock()
			defer mu.Unlock()
			if left > 0 {
				t.Errorf("the token server was not asked often enough: %d faults are left", left)
			}
		})
	}
}
