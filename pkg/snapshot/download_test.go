package snapshot

import (
	"os"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// What the image's own layer asks for counts, if it is one of the values, and what a
// container's labels say does not.
func TestImageAsksForDownload(t *testing.T) {
	n := newNode(t)
	var want []string
	for _, c := range []struct{ value, want string }{{"always", "always"}, {"never", "never"}, {"idle", "idle"}, {"often", ""}, {"", ""}} {
		l := n.bootstrap("v6-merged")
		if c.value != "" {
			l.labels[LabelDownload] = c.value
		}
		chain := n.pull(n.data(), l)
		want = append(want, c.want)
		if _, err := n.top.Prepare(n.ctx, "pod-"+c.value, chain, snapshots.WithLabels(map[string]string{LabelDownload: "always"})); err != nil {
			t.Fatal(err)
		}
	}
	images, err := Images(n.opts.Root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, im := range images {
		got = append(got, im.Download)
		f, err := im.Open()
		if err != nil {
			t.Fatal(err)
		}
		opened, err1 := f.Stat()
		named, err2 := os.Stat(im.Path())
		f.Close()
		if err1 != nil || err2 != nil || !os.SameFile(opened, named) {
			t.Errorf("%s is not the bootstrap: %v, %v", im.Path(), err1, err2)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("images ask for %q, want %q", got, want)
	}
}
