package mountspec

import (
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec/katatest"
)

// kataReads fails unless both runtimes take option, and take from it what s says.
func kataReads(t *testing.T, what string, s *Spec, option string) {
	t.Helper()
	katatest.Takes(t, what, katatest.Volume{Source: s.Bootstrap, Config: s.Config, SnapshotDir: s.SnapshotDir, FSVersion: s.FSVersion},
		katatest.Mount{Type: MountType, Source: "/", Options: []string{"workdir=" + s.Work(), "upperdir=" + s.Upper(), "lowerdir=/x", option}})
}

// TestKataReadsOurOption: every Spec that a snapshotter makes.
func TestKataReadsOurOption(t *testing.T) {
	for name, s := range variants() {
		option, err := Encode(s, testKey)
		if err != nil {
			t.Fatal(err)
		}
		kataReads(t, name, s, option)
	}
}
