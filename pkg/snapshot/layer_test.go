package snapshot

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

var (
	chainA = "sha256:" + strings.Repeat("a", 64)
	chainB = "sha256:" + strings.Repeat("b", 64)
)

func TestUnpackTarget(t *testing.T) {
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, "5-AbC_-=", chainA)
	for _, c := range []struct {
		key, ref, want string
	}{
		{"k8s.io/12/" + key, chainA, chainA},
		{"default/3/" + key, chainA, chainA},
		{key, chainA, chainA},
		{"k8s.io/12/" + key, chainB, ""},
		{"k8s.io/12/" + key, "", ""},
		{"k8s.io/12/0123abcd", chainA, ""},
		{"k8s.io/12/" + chainA, chainA, ""},
		{"k8s.io/12/my-" + key, chainA, ""},
		{"k8s.io/12/" + key + "/x", chainA, ""},
		{"k8s.io/12/" + key + " x", chainA, ""},
		{"k8s.io/12/" + key + "\n", chainA, ""},
		{"k8s.io/12/extract- " + chainA, chainA, ""},
		{"k8s.io/12/extract-x y " + chainA, chainA, ""},
		{"k8s.io/12/extractx " + chainA, chainA, ""},
		{"extract-x/12/" + chainA, chainA, ""},
		{"", "", ""},
	} {
		got := unpackTarget(c.key, map[string]string{snapshots.LabelSnapshotRef: c.ref})
		if got != c.want {
			t.Errorf("key %q, ref %q: got %q, want %q", c.key, c.ref, got, c.want)
		}
	}
}

func TestClassify(t *testing.T) {
	unpack := "k8s.io/1/" + fmt.Sprintf(snapshots.UnpackKeyFormat, "5-x", chainA)
	for name, c := range map[string]struct {
		key, parent string
		labels      map[string]string
		want        layerKind
		fault       string
	}{
		"container":            {key: "k8s.io/2/abc", want: layerNone},
		"plain":                {key: unpack, want: layerPlain},
		"data":                 {key: unpack, labels: map[string]string{labelData: "true", labelImage: "i"}, want: layerData},
		"bootstrap":            {key: unpack, parent: "p", labels: map[string]string{labelBootstrap: "true", labelImage: "i", labelParent: chainB}, want: layerBootstrap},
		"label is not true":    {key: unpack, labels: map[string]string{labelData: "false", labelBootstrap: "1"}, want: layerPlain},
		"container, labelled":  {key: "k8s.io/2/abc", labels: map[string]string{labelData: "true", labelBootstrap: "true"}, want: layerNone},
		"data, no image":       {key: unpack, labels: map[string]string{labelData: "true"}, fault: "disable_snapshot_annotations = false"},
		"bootstrap, no image":  {key: unpack, labels: map[string]string{labelBootstrap: "true"}, fault: "enable_remote_snapshot_annotations"},
		"both":                 {key: unpack, labels: map[string]string{labelData: "true", labelBootstrap: "true", labelImage: "i"}, fault: "both"},
		"parallel":             {key: unpack, labels: map[string]string{labelParent: chainB}, fault: `remove "rebase"`},
		"parallel, with image": {key: unpack, labels: map[string]string{labelParent: chainB, labelData: "true", labelImage: "i"}, fault: `remove "rebase"`},
	} {
		t.Run(name, func(t *testing.T) {
			labels := map[string]string{snapshots.LabelSnapshotRef: chainA}
			for k, v := range c.labels {
				labels[k] = v
			}
			got, err := classify(c.key, c.parent, labels)
			if c.fault == "" {
				if err != nil || got != c.want {
					t.Fatalf("got %v, %v, want %v", got, err, c.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Fatalf("got %v, %v, want an error with %q", got, err, c.fault)
			}
			if errdefs.IsAlreadyExists(err) || errdefs.IsNotFound(err) {
				t.Fatalf("containerd would take this for something else: %v", err)
			}
		})
	}
}

func TestDataNameSeparatesParents(t *testing.T) {
	names := map[string]bool{}
	for _, parent := range []string{"", "default/1/" + chainA, "k8s.io/1/" + chainA} {
		for _, target := range []string{chainA, chainB} {
			names[dataName(parent, target)] = true
		}
	}
	if len(names) != 6 {
		t.Fatalf("names collide: %v", names)
	}
}

func TestHostID(t *testing.T) {
	for mapping, want := range map[string]int64{
		"0:100000:65536": 100000, "1:5:1,0:7:1": 7, "": -1, "1:5:1": -1, "0:x:1": -1, "0:5": -1, "0:-1:1": -1, "0:4294967296:1": -1,
	} {
		if got := hostID(mapping); got != want {
			t.Errorf("%q: got %d, want %d", mapping, got, want)
		}
	}
}
