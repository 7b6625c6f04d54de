package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/nydusfs/nydus-snapshotter/pkg/signature"
)

// signatures accepts "signature of DIGEST", as long as it is said to be trusted.
type signatures struct {
	distrusted atomic.Bool
	asked      atomic.Int32
}

func (s *signatures) Verify(bootstrap, text string) error {
	s.asked.Add(1)
	switch {
	case text == "":
		return signature.ErrMissing
	case s.distrusted.Load() || text != "signature of "+bootstrap:
		return signature.ErrWrong
	}
	return nil
}

// signedLayer is a bootstrap layer with the right signature.
func signedLayer(n *node, name string) layer {
	l := n.bootstrap(name)
	l.labels[signature.Label] = "signature of " + digestOf(bootstrap(n.t, name))
	return l
}

// everyMount asks in each way in which a mount of an image is handed out.
func everyMount(n *node, image, prepared string) map[string]error {
	all := map[string]error{}
	_, all["prepare"] = n.top.Prepare(n.ctx, "p", image)
	_, all["view"] = n.top.View(n.ctx, "v", image)
	_, all["mounts"] = n.top.Mounts(n.ctx, prepared)
	for _, key := range []string{"p", "v"} {
		if err := n.top.Remove(n.ctx, key); err != nil && !errdefs.IsNotFound(err) {
			n.t.Error(err)
		}
	}
	return all
}

func wantAll(t *testing.T, step string, got map[string]error, want error, texts ...string) {
	t.Helper()
	for how, err := range got {
		if (err == nil) != (want == nil) {
			t.Errorf("%s: %s: got %v, want %v", step, how, err, want)
			continue
		}
		if want == nil {
			continue
		}
		for _, text := range append(texts, want.Error(), testImage) {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %s: %q does not tell %q", step, how, err, text)
			}
		}
		if !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %s: %v is not PermissionDenied", step, how, err)
		}
	}
}

func eachStyle(t *testing.T, test func(t *testing.T, change func(*Options))) {
	for _, managed := range []bool{false, true} {
		t.Run(fmt.Sprintf("managed=%t", managed), func(t *testing.T) { test(t, func(o *Options) { o.Managed = managed }) })
	}
}

// What is not signed is not pulled, and nothing of it stays.
func TestUnsignedIsNotPulled(t *testing.T) {
	for name, c := range map[string]struct {
		signature string
		want      error
	}{
		"missing": {"", signature.ErrMissing},
		"wrong":   {"signature of something else", signature.ErrWrong},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(o *Options) { o.Signatures = &signatures{} })
			l := n.bootstrap("v6-lz4_block")
			if c.signature != "" {
				l.labels[signature.Label] = c.signature
			}
			below := n.pull(n.data())
			_, err := n.tryPull(n.ctx, n.data(), l)
			wantAll(t, "pull", map[string]error{"commit": err}, c.want)
			must(t, n.sn.Walk(n.ctx, func(_ context.Context, i snapshots.Info) error {
				if i.Kind == snapshots.KindCommitted && !strings.HasSuffix(i.Name, "/"+below) {
					t.Errorf("it is a layer, %s", i.Name)
				}
				return nil
			}))
			if list := n.records(kindBootstrap); len(list) > 0 {
				t.Errorf("it is an image: %+v", list)
			}
			n.collect(0)
			n.wantNoActive()
			if left, err := os.ReadDir(filepath.Join(n.root, "snapshots")); err != nil || len(left) > 0 {
				t.Errorf("what stays is %v (%v)", left, err)
			}
		})
	}
}

// An image that is there already is judged anew for each mount.
func TestSignatureBeforeEveryMount(t *testing.T) {
	eachStyle(t, func(t *testing.T, style func(*Options)) {
		s := &signatures{}
		n := newNode(t, style, func(o *Options) { o.Signatures = s })
		image := n.pull(n.data(), signedLayer(n, "v6-lz4_block"))
		mounts, key := n.container(image)
		if spec := n.decode(mounts[0]); "signature of "+spec.BootstrapDigest != signedLayer(n, "v6-lz4_block").labels[signature.Label] {
			t.Errorf("what was judged is not the digest in the option, %s", spec.BootstrapDigest)
		}
		wantAll(t, "signed", everyMount(n, image, key), nil)
		s.distrusted.Store(true)
		wantAll(t, "key gone", everyMount(n, image, key), signature.ErrWrong)
		s.distrusted.Store(false)
		wantAll(t, "key back", everyMount(n, image, key), nil)
	})
}

// Pulled while nobody asked for signatures.
func TestSignatureAskedForLater(t *testing.T) {
	eachStyle(t, func(t *testing.T, style func(*Options)) {
		n := newNode(t, style)
		plain := n.pull(n.plain("file"))
		unsigned := n.pull(n.data(), n.bootstrap("v6-lz4_block"))
		signed := n.pull(n.data(), n.data(), signedLayer(n, "v6-merged"))
		_, ofUnsigned := n.container(unsigned)
		_, ofSigned := n.container(signed)
		_, ofPlain := n.container(plain)
		// A container's own labels, which a pod can choose, say nothing.
		fake := map[string]string{signature.Label: "signature of " + digestOf(bootstrap(t, "v6-lz4_block"))}
		if _, err := n.top.Prepare(n.ctx, "fake", unsigned, snapshots.WithLabels(fake)); err != nil {
			t.Fatal(err)
		}
		n.sn.o.Signatures = &signatures{}
		wantAll(t, "unsigned", everyMount(n, unsigned, ofUnsigned), signature.ErrMissing)
		wantAll(t, "labelled by a pod", everyMount(n, unsigned, "fake"), signature.ErrMissing)
		wantAll(t, "signed", everyMount(n, signed, ofSigned), nil)
		wantAll(t, "plain", everyMount(n, plain, ofPlain), nil)

		// A signature that comes later counts.
		info, err := n.top.Stat(n.ctx, unsigned)
		if err != nil {
			t.Fatal(err)
		}
		info.Labels[signature.Label] = fake[signature.Label]
		if _, err := n.top.Update(n.ctx, info, "labels"); err != nil {
			t.Fatal(err)
		}
		wantAll(t, "signed later", everyMount(n, unsigned, ofUnsigned), nil)
	})
}

// The bootstrap was changed after the pull: the option still says what was signed, so that
// whoever mounts refuses it.
func TestOptionSaysWhatWasSigned(t *testing.T) {
	n := newNode(t, func(o *Options) { o.Signatures = &signatures{} })
	image := n.pull(n.data(), signedLayer(n, "v6-lz4_block"))
	mounts, key := n.container(image)
	before := n.decode(mounts[0])
	place(t, before.Bootstrap, bootstrap(t, "v6-merged"))
	mounts, err := n.top.Mounts(n.ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if after := n.decode(mounts[0]); after.BootstrapDigest != before.BootstrapDigest {
		t.Errorf("the option says %s of a bootstrap that was changed, %s was signed", after.BootstrapDigest, before.BootstrapDigest)
	}
}

// A layer above the bootstrap could put anything in place of what was signed.
func TestLayerAboveSignedBootstrap(t *testing.T) {
	eachStyle(t, func(t *testing.T, style func(*Options)) {
		n := newNode(t, style)
		above := n.plain("file")
		image := n.pull(n.data(), signedLayer(n, "v6-lz4_block"), above)
		_, key := n.container(image)
		n.sn.o.Signatures = &signatures{}
		for how, err := range everyMount(n, image, key) {
			if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "is not signed") || !strings.Contains(err.Error(), image) {
				t.Errorf("%s: got %v", how, err)
			}
		}
		_, err := n.tryPull(n.ctx, n.data(), signedLayer(n, "v6-merged"), n.plain("other"))
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "is not signed") {
			t.Errorf("pull: got %v", err)
		}
		// Plain images have as many layers as they like.
		n.pull(n.plain("a"), n.plain("b"))

		// What this node itself has committed is root's.
		bottom := n.pull(n.data(), signedLayer(n, "v6-lz4_block"))
		if _, err := n.top.Prepare(n.ctx, "remap", bottom); err != nil {
			t.Fatal(err)
		}
		if err := n.top.Commit(n.ctx, "remapped", "remap"); err != nil {
			t.Fatal(err)
		}
		if mounts, err := n.top.Prepare(n.ctx, "c", "remapped"); err != nil || len(mounts) == 0 {
			t.Errorf("on what root has committed: %v, %v", mounts, err)
		}
	})
}

// Whatever fails while a signature is judged lets nothing through.
func TestSignatureThatCannotBeJudged(t *testing.T) {
	n := newNode(t)
	image := n.pull(n.data(), signedLayer(n, "v6-lz4_block"))
	_, key := n.container(image)
	cause := errors.New("no keys")
	n.sn.o.Signatures = failing{cause}
	wantAll(t, "no keys", everyMount(n, image, key), cause)
}

type failing struct{ error }

func (f failing) Verify(string, string) error { return f.error }

// A record that cannot be read may be a bootstrap's: the layer above is not let through.
func TestLayerAboveWhatCannotBeRead(t *testing.T) {
	n := newNode(t)
	image := n.pull(n.data(), signedLayer(n, "v6-lz4_block"))
	n.sn.o.Signatures = &signatures{}
	mounts, _ := n.container(image)
	record := filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(n.decode(mounts[0]).Bootstrap))), recordName)
	above := n.plain("file")
	above.apply = func([]mount.Mount) { place(t, record, []byte("{")) }
	if _, err := n.tryPull(n.ctx, n.data(), signedLayer(n, "v6-lz4_block"), above); err == nil || !strings.Contains(err.Error(), record) {
		t.Errorf("pull: %v, want an error that names %s", err, record)
	}
	// Data alone is no image yet, and not in the way.
	n.pull(n.data(), n.plain("a"))
}
