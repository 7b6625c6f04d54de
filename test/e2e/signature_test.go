package e2e_test

import (
	"crypto/rsa"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	upstream "github.com/containerd/nydus-snapshotter/pkg/signature"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// signing is a node that asks for signatures, and what it takes to make them.
type signing struct {
	t             *testing.T
	n             *kit.Node
	r             *kit.Registry
	keys          string // the node's file
	trusted, evil *rsa.PrivateKey
}

func newSigning(t *testing.T, s style, config map[string]any) *signing {
	t.Helper()
	x := &signing{t: t, keys: filepath.Join(t.TempDir(), "keys.pem"), trusted: kit.NewSigningKey(t), evil: kit.NewSigningKey(t)}
	kit.WriteKeys(t, x.keys, x.trusted)
	all := map[string]any{"image.validate_signature": true, "image.public_key_file": x.keys}
	maps.Copy(all, config)
	x.r = kit.NewRegistry(t, kit.RegistryOptions{})
	x.n = s.node(t, kit.NodeConfig{Config: all})
	return x
}

// refused checks that an error says which image it is about and why.
func (x *signing) refused(what string, err error, texts ...string) {
	x.t.Helper()
	if err == nil {
		x.t.Errorf("%s: no error", what)
		return
	}
	for _, text := range append(texts, x.r.Host) {
		if !strings.Contains(err.Error(), text) {
			x.t.Errorf("%s: the error lacks %q: %v", what, text, err)
		}
	}
}

// tryPull pulls an image under a name of its own.
func (x *signing) tryPull(img *kit.Image, name string) (containerd.Image, error) {
	x.t.Helper()
	return x.n.Pull(x.t.Context(), x.r.MustPush(x.t, img, name+":1"), kit.PullOptions{})
}

// start tries to run a container, and removes it.
func (x *signing) start(img containerd.Image, id string) error {
	x.t.Helper()
	c, err := tryRun(x.t, x.n, img, id, kit.RunOptions{})
	if err == nil {
		remove(x.t, c)
	}
	return err
}

// TestSignatures: with validation on, exactly the images run that a key of the node's file
// has signed, whenever they were pulled.
func TestSignatures(t *testing.T) {
	base := kit.BusyboxLayer(kit.MustTools(t))
	plain := kit.MustBuildImage(t, kit.Pause, base, kit.FileLayer(kit.File{Name: "./"}, kit.File{Name: "a", Data: strings.Repeat("a", 100_000)}))
	nydus := plain.MustNydus(t, kit.NydusOptions{})
	boot, err := nydus.BootstrapBytes()
	if err != nil {
		t.Fatal(err)
	}
	want := tree(t, plain)
	eachStyle(t, func(t *testing.T, s style) {
		x := newSigning(t, s, nil)
		signed := nydus.MustSign(t, x.trusted)

		// What is not signed is not even pulled.
		_, err := x.tryPull(nydus, "missing")
		x.refused("no signature", err, "the image has no signature", "image.validate_signature", "missing:1")
		_, err = x.tryPull(nydus.MustSign(t, x.evil), "evil")
		x.refused("another key", err, "the image's signature is wrong", "image.public_key_file", "evil:1")
		flipped := append([]byte(nil), boot...)
		flipped[len(flipped)-1] ^= 1
		other, err := nydus.Hostile(t.TempDir(), kit.BootstrapLayer(flipped))
		if err != nil {
			t.Fatal(err)
		}
		if other, err = other.WithSignature(signed.Layers[signed.Bootstrap()].Desc.Annotations["containerd.io/snapshot/nydus-signature"]); err != nil {
			t.Fatal(err)
		}
		_, err = x.tryPull(other, "flipped")
		x.refused("a flipped byte", err, "the image's signature is wrong", "flipped:1")

		// Plain images are not concerned.
		if img, err := x.tryPull(plain, "plain"); err != nil {
			t.Error(err)
		} else if err := x.start(img, "plain"); err != nil {
			t.Error(err)
		} else if err := x.n.RemoveImage(t.Context(), img.Name()); err != nil {
			t.Error(err)
		}

		img, err := x.tryPull(signed, "signed")
		if err != nil {
			t.Fatal(err)
		}
		c := run(t, x.n, img, "signed", kit.RunOptions{})
		kit.EqualTrees(t, "a signed image", want, kit.MustWalk(t, c.Root()))
		x.rotate(img, c)
		remove(t, c)
		x.changedOnDisk(img)
		if err := x.n.RemoveImage(t.Context(), img.Name()); err != nil {
			t.Fatal(err)
		}
		x.switched(nydus)
	})
}

// rotate changes keys while the snapshotter runs.
func (x *signing) rotate(img containerd.Image, running *kit.Container) {
	x.t.Helper()
	kit.WriteKeys(x.t, x.keys, x.evil)
	x.refused("its key is gone", x.start(img, "gone"), "the image's signature is wrong", "signed:1")
	exec(x.t, running, "/bin/busybox", "ls", "/") // what runs is left alone
	kit.WriteKeys(x.t, x.keys, x.evil, x.trusted)
	if err := x.start(img, "both"); err != nil {
		x.t.Errorf("both keys: %v", err)
	}
	if err := os.WriteFile(x.keys, []byte("nothing"), 0o644); err != nil {
		x.t.Fatal(err)
	}
	x.refused("no keys", x.start(img, "none"), "image.public_key_file", x.keys, "no key")
	kit.WriteKeys(x.t, x.keys, x.trusted)
}

// changedOnDisk changes the bootstrap beneath a signature that was right.
func (x *signing) changedOnDisk(img containerd.Image) {
	x.t.Helper()
	wantDaemons(x.t, x.n, 0, soon)
	boots, _ := filepath.Glob(filepath.Join(x.n.SnapshotterRoot(), "snapshots", "*", "fs", "image", "image.boot"))
	if len(boots) != 1 {
		x.t.Fatalf("there are bootstraps %q", boots)
	}
	text, err := os.ReadFile(boots[0])
	if err != nil {
		x.t.Fatal(err)
	}
	last := len(text) - 1
	text[last] ^= 1
	if err := os.WriteFile(boots[0], text, 0o644); err != nil {
		x.t.Fatal(err)
	}
	err = x.start(img, "changed")
	if err == nil || !strings.Contains(err.Error(), "it was changed after the image was pulled") {
		x.t.Errorf("a bootstrap that was changed on the disk: %v", err)
	}
	text[last] ^= 1
	if err := os.WriteFile(boots[0], text, 0o644); err != nil {
		x.t.Fatal(err)
	}
}

// switched pulls without validation what does not run with it.
func (x *signing) switched(unsigned *kit.Image) {
	x.t.Helper()
	validate := func(on bool) {
		x.t.Helper()
		x.n.Configure("image.validate_signature", on)
		if err := x.n.RestartSnapshotter(x.t.Context()); err != nil {
			x.t.Fatal(err)
		}
		// containerd 1.6 waits a moment before it connects anew.
		eventually(x.t, "containerd reaches the snapshotter", func() bool {
			service := x.n.Client().SnapshotService(x.n.SnapshotterName())
			_, err := service.Prepare(x.t.Context(), "reach", "", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
			return err == nil && service.Remove(x.t.Context(), "reach") == nil
		})
	}
	validate(false)
	img, err := x.tryPull(unsigned, "off")
	if err != nil {
		x.t.Fatal(err)
	}
	c := run(x.t, x.n, img, "off", kit.RunOptions{})
	validate(true)
	exec(x.t, c, "/bin/busybox", "ls", "/")
	x.refused("pulled without validation", x.start(img, "on"), "the image has no signature", "image.validate_signature", "off:1")
	remove(x.t, c)
}

// TestSignatureWithoutDaemon: the kernel gets no image either that is not signed.
func TestSignatureWithoutDaemon(t *testing.T) {
	x := newSigning(t, helper24, map[string]any{
		"mount.driver": "auto", "daemon.nydusd_path": shares(t), "daemon.config_template": prefetchAll(t),
	})
	plain := kit.SmallImage(t, "signed")
	img, err := x.tryPull(plain.MustNydus(t, kit.NydusOptions{}).MustSign(t, x.trusted), "signed")
	if err != nil {
		t.Fatal(err)
	}
	c := run(t, x.n, img, "cold", kit.RunOptions{})
	awaitProof(t, x.n, 1)
	remove(t, c)
	wantDaemons(t, x.n, 0, soon)
	c = run(t, x.n, img, "warm", kit.RunOptions{})
	daemonsNow(t, x.n, 0)
	kit.EqualTrees(t, "through EROFS", tree(t, plain), kit.MustWalk(t, c.Root()))
	kit.WriteKeys(t, x.keys, x.evil)
	x.refused("its key is gone, while it is mounted", x.start(img, "gone"), "the image's signature is wrong")
	remove(t, c)
	if err := x.n.WaitRunEntries(soon); err != nil {
		t.Error(err)
	}
	x.refused("its key is gone", x.start(img, "gone-again"), "the image's signature is wrong")
	kit.WriteKeys(t, x.keys, x.trusted)
	x.changedOnDisk(img)
}

// TestSignatureIsUpstreams: what we accept upstream's own code accepts, and the other way
// round.
func TestSignatureIsUpstreams(t *testing.T) {
	key, dir := kit.NewSigningKey(t), t.TempDir()
	keys, boot := filepath.Join(dir, "keys.pem"), filepath.Join(dir, "image.boot")
	kit.WriteKeys(t, keys, key)
	if err := os.WriteFile(boot, []byte("bootstrap"), 0o644); err != nil {
		t.Fatal(err)
	}
	v, err := upstream.NewVerifier(keys, true)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := kit.Signature(key, []byte("bootstrap"))
	if err != nil {
		t.Fatal(err)
	}
	label := "containerd.io/snapshot/nydus-signature"
	if err := v.Verify(map[string]string{label: signature}, boot); err != nil {
		t.Errorf("upstream does not take what the tests sign: %v", err)
	}
	if err := os.WriteFile(boot, []byte("Bootstrap"), 0o644); err != nil {
		t.Fatal(err)
	}
	if v.Verify(map[string]string{label: signature}, boot) == nil {
		t.Error("upstream takes anything")
	}
}
