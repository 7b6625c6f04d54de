package e2e_test

import (
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
	f.warm(pull(f.t, f.Node, ref), "warm", want)
	if got := r.BlobTotal(); got > 0 {
		f.t.Errorf("%d bytes were fetched of an image that is complete", got)
	}
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
	await, release := holding(t, r, 0)
	pull(t, f.Node, ref)
	last := 0
	for _, stop := range []func() error{f.KillSnapshotter, f.StopSnapshotter} {
		eventually(t, "one nydusd fetches, which is not the killed snapshotter's", func() bool {
			list := f.Daemons()
			if len(list) != 1 || list[0].PID == last {
				return false
			}
			last = list[0].PID
			return true
		})
		await()
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if err := f.StartSnapshotter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	release()
	f.settled(r, ref, want)
}
