package hostile_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const backendLabel = "containerd.io/snapshot/nydus-backend"

// bucketNode is a node whose images of team/ come from a bucket, and those that ask for
// it. The operator's file with the key lies in c.docker.
func bucketNode(t *testing.T, style string) (*canary, *kit.Bucket) {
	t.Helper()
	c := &canary{right: newSecret("AKIDEXAMPLE"), wrong: newSecret("AKIDEXAMPLE"), token: newSecret("unused"), docker: t.TempDir()}
	b := kit.NewBucket(t, c.right.user, c.right.password)
	c.registry = kit.NewRegistry(t, kit.RegistryOptions{})
	c.keys(t, c.right)
	settings := func(name, prefix string) map[string]any {
		return map[string]any{
			"name": name, "type": "s3", "endpoint": b.Host, "scheme": "http", "region": b.Region, "bucket_name": b.Name,
			"object_prefix": prefix, "credentials_file": filepath.Join(c.docker, "keys"), "profile": "node",
		}
	}
	team, asked, kept := settings("team", "team/"), settings("asked", "asked/"), settings("kept", "kept/")
	team["match"] = map[string]any{"host": c.registry.Host, "repository": "team/**"}
	kept["match"] = map[string]any{"repository": "kept/**"}
	asked["allow_label"] = true
	c.Node = newNode(t, kit.NodeConfig{Style: style, Hook: true, Path: t.TempDir(), Config: map[string]any{"backend": []map[string]any{team, asked, kept}}})
	c.witness = newWitness(t, c.right, c.wrong)
	return c, b
}

// keys writes the operator's file.
func (c *canary) keys(t *testing.T, s *secret) {
	t.Helper()
	writeFile(t, filepath.Join(c.docker, "keys"), fmt.Sprintf("[node]\naws_access_key_id = %s\naws_secret_access_key = %s\n", s.user, s.password), 0o600)
}

// TestBucketCanary is TestCanary for the key of a bucket: images from it by a rule and by
// their own wish, and what can go wrong while the key is at hand.
func TestBucketCanary(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			c, b := bucketNode(t, style)
			ruled := nydusImage(t, "ruled")
			b.Put(t, "team/", ruled)
			pulled := mustPull(t, c.Node, c.registry.MustPush(t, ruled, "team/a/app:1"), kit.PullOptions{})
			c.run(t, pulled, ruled)
			if len(b.Requests()) == 0 {
				t.Error("nothing came from the bucket")
			}
			asking := c.asking(t, "asking", "asked")
			b.Put(t, "asked/", asking)
			c.run(t, mustPull(t, c.Node, c.registry.MustPush(t, asking, "other:1"), kit.PullOptions{}), asking)

			for wish, want := range map[string]string{
				"team": "which does not allow it (allow_label = false)", "kept": "which does not allow it", "nobody": "no [[backend]] has that name",
			} {
				name := "refused-" + wish + ":1"
				_, err := c.Pull(t.Context(), c.registry.MustPush(t, c.asking(t, name, wish), name), kit.PullOptions{})
				c.failed(t, "pull of an image that asks for "+wish, err, name, backendLabel, want)
			}
			broken := fmt.Sprintf("[node]\naws_access_key_id = %s\naws_secret_access_key = %[1]s\n%[1]s\n", c.right.password)
			for text, want := range map[string]string{broken: "it is no ini file", broken[:7]: `profile "node": `} {
				writeFile(t, filepath.Join(c.docker, "keys"), text, 0o600)
				_, err := c.Run(t.Context(), pulled, "broken", kit.RunOptions{})
				c.failed(t, "container without a key", err, "team/a/app:1", `[[backend]] "team"`, filepath.Join(c.docker, "keys"), want)
			}
			c.check(t, "failures")
			c.keys(t, c.right)
			c.restarts(t, pulled, ruled)
			if configs := c.check(t, "ended"); len(configs) > 0 {
				t.Errorf("configurations after the last mount: %q", configs)
			}
			c.sawAll(t)
		})
	}
}

// asking is an image whose bootstrap layer asks for a backend.
func (c *canary) asking(t *testing.T, name, wish string) *kit.Image {
	t.Helper()
	img := nydusImage(t, name)
	boot := bootstrapPart(t, kit.BootstrapLayer(mustBootstrap(t, img))).annotated(backendLabel, wish)
	forged := forge(t, append(dataParts(img), boot)...)
	forged.Tars = img.Tars
	return forged
}
