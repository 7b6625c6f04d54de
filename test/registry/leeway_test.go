package registry_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestTokenEnds shows why the lab's proxy has to refuse tokens that have ended: the
// registry itself takes them for a minute more.
func TestTokenEnds(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	image := kit.SmallImage(t, "ends")
	r.MustPush(t, image, repository+":"+tag)
	for life, want := range map[time.Duration]int{time.Minute: http.StatusOK, -30 * time.Second: http.StatusOK, -90 * time.Second: http.StatusUnauthorized} {
		issuer := newTokenServer(t, newLogin("carol"), life)
		locked := kit.NewRegistry(t, kit.RegistryOptions{Of: r, Token: issuer.config()})
		token, err := issuer.issue([]string{"repository:" + repository + ":pull"})
		must(t, err)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, "http://"+locked.Host+"/v2/"+repository+"/blobs/"+image.Config.Desc.Digest.String(), nil)
		must(t, err)
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("a token that ends in %s: %s, want %d", life, resp.Status, want)
		}
		// The proxy is stricter.
		if ended := issuer.ended(token); ended != (life < 0) {
			t.Errorf("a token that ends in %s has ended: %v", life, ended)
		}
	}
}
