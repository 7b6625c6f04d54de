package e2e_test

import (
	"net/http"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// labelDownload is the annotation by which an image asks to be completed.
const labelDownload = "containerd.io/snapshot/nydus-download"

// settled checks that an image that was completed in the background left nothing, and runs
// without nydusd and without its registry.
func (f fetching) settled(r *kit.Registry, ref string, want kit.Tree) {
	f.t.Helper()
	awaitProof(f.t, f.Node, 1)
	wantDaemons(f.t, f.Node, 0, soon)
	if err := f.WaitRunEntries(soon); err != nil {
		f.t.Error(err)
	}
	f.nothingLeft()
	r.ResetRequests()
	c := run(f.t, f.Node, pull(f.t, f.Node, ref), "warm", kit.RunOptions{})
	daemonsNow(f.t, f.Node, 0)
	kit.EqualTrees(f.t, "through EROFS", want, kit.MustWalk(f.t, c.Root()))
	if got := r.BlobTotal(); got > 0 {
		f.t.Errorf("%d bytes were fetched of an image that is complete", got)
	}
	remove(f.t, c)
	if err := f.WaitRunEntries(soon); err != nil {
		f.t.Error(err)
	}
}

// TestDownloadAlways completes what nobody has mounted.
func TestDownloadAlways(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	f := newFetching(t, helper24, map[string]any{"cache.download": "always"})
	pull(t, f.Node, ref)
	f.settled(r, ref, want)
}

// TestDownloadByLabel has one image that asks for it, and one that does not.
func TestDownloadByLabel(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	other, _ := smallNydus(t, r, "small")
	f := newFetching(t, helper24, nil)
	pull(t, f.Node, other)
	if _, err := f.Pull(t.Context(), ref, kit.PullOptions{Labels: map[string]string{labelDownload: "always"}}); err != nil {
		t.Fatal(err)
	}
	f.settled(r, ref, want)
}

// TestDownloadIdle completes an image beside the daemon that serves it, once it is quiet.
func TestDownloadIdle(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	other, _ := smallNydus(t, r, "small")
	f := newFetching(t, helper24, map[string]any{"cache.download": "idle"})
	pull(t, f.Node, other) // which stays as it is
	c := run(t, f.Node, pull(t, f.Node, ref), "cold", kit.RunOptions{})
	daemonsNow(t, f.Node, 1)
	awaitProof(t, f.Node, 1)
	kit.EqualTrees(t, "through FUSE", want, kit.MustWalk(t, c.Root()))
	wantDaemons(t, f.Node, 1, soon)
	remove(t, c)
	f.settled(r, ref, want)
}

// TestDownloadKilled kills the snapshotter in the middle.
func TestDownloadKilled(t *testing.T) {
	r := kit.NewRegistry(t, kit.RegistryOptions{})
	ref, _, want := oddNydus(t, r, "odd")
	f := newFetching(t, helper24, map[string]any{"cache.download": "always"})
	for _, stop := range []func() error{f.KillSnapshotter, f.StopSnapshotter} {
		held, release := make(chan struct{}, 1), make(chan struct{})
		r.SetHook(ranges(func(_ http.ResponseWriter, req *http.Request, _ http.Handler) {
			select {
			case held <- struct{}{}:
			default:
			}
			select {
			case <-release:
			case <-req.Context().Done():
			}
		}))
		pull(t, f.Node, ref)
		<-held
		daemonsNow(t, f.Node, 1)
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		r.SetHook(nil)
		close(release)
		if err := f.StartSnapshotter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	f.settled(r, ref, want)
}
