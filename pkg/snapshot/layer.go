package snapshot

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// The labels that make a layer nydus's. They are annotations of the layer's
// descriptor in the image's manifest.
const (
	labelData      = "containerd.io/snapshot/nydus-blob"
	labelBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	// labelImage is the image reference. containerd sets it when asked to.
	labelImage = "containerd.io/snapshot/cri.image-ref"
	// labelParent names the parent's chain ID, on every layer but the lowest.
	labelParent = "containerd.io/snapshot/parent-chain-id"
)

// LabelBackend asks for one of the configured backends by its name: an annotation of
// the bootstrap layer's descriptor, and of the data layers' for a fault to show before
// they are pulled.
const LabelBackend = "containerd.io/snapshot/nydus-backend"

// LabelDownload says for an image, instead of [cache] download for all, whether it is
// completed in the background: never, idle or always, as an annotation of the bootstrap layer's
// descriptor. Any other value counts as none, since it is not worth an image that cannot be
// pulled.
const LabelDownload = "containerd.io/snapshot/nydus-download"

// downloadOf is what labels ask for, "" for nothing.
func downloadOf(labels map[string]string) string {
	switch wanted := labels[LabelDownload]; wanted {
	case "never", "idle", "always":
		return wanted
	default:
		return ""
	}
}

// unpackKey is the last element of a key under which containerd unpacks a
// layer: snapshots.UnpackKeyFormat, with the chain ID in parentheses here. The
// elements before are the namespace and a number, of containerd's metadata
// store.
var unpackKey = regexp.MustCompile(`^` + snapshots.UnpackKeyPrefix + `-[^/ ]+ (sha256:[0-9a-f]{64})$`)

// unpackTarget returns the chain ID of the layer that is being unpacked under
// key, or "" when this is no unpack. Key and label must agree: a pod can set the
// label, but not the key.
func unpackTarget(key string, labels map[string]string) string {
	m := unpackKey.FindStringSubmatch(key[strings.LastIndexByte(key, '/')+1:])
	if m == nil || labels[snapshots.LabelSnapshotRef] != m[1] {
		return ""
	}
	return m[1]
}

// layerKind is what a prepared snapshot is going to be.
type layerKind int

const (
	layerNone      layerKind = iota // a container's
	layerPlain                      // an unpacked layer, as with overlayfs
	layerData                       // data of a nydus image
	layerBootstrap                  // metadata of a nydus image
)

// classify decides by key and labels, and refuses what cannot work.
func classify(key, parent string, labels map[string]string) (layerKind, error) {
	if unpackTarget(key, labels) == "" {
		return layerNone, nil
	}
	if parent == "" && labels[labelParent] != "" {
		return 0, fmt.Errorf("the layer comes without its parent, as containerd unpacks in parallel; remove \"rebase\" from the capabilities of this snapshotter's proxy plugin: %w", errdefs.ErrFailedPrecondition)
	}
	kind := layerPlain
	switch data, bootstrap := labels[labelData] == "true", labels[labelBootstrap] == "true"; {
	case data && bootstrap:
		return 0, fmt.Errorf("the layer is labelled both as nydus data and as nydus bootstrap: %w", errdefs.ErrInvalidArgument)
	case data:
		kind = layerData
	case bootstrap:
		kind = layerBootstrap
	}
	if kind != layerPlain && labels[labelImage] == "" {
		return 0, fmt.Errorf("this is a nydus layer, but containerd does not say of which image (label %s), so its data cannot be found; "+
			"for CRI set disable_snapshot_annotations = false, for the transfer service (ctr of containerd 2) the proxy plugin's exports "+
			"enable_remote_snapshot_annotations = \"true\"; ctr of containerd 1.6 cannot do it, use crictl or nerdctl: %w",
			labelImage, errdefs.ErrFailedPrecondition)
	}
	return kind, nil
}

// dataName is the name under which a data layer is committed. containerd finds
// it by label and parent, not by name; the name makes the commit idempotent,
// since the same layer on the same parent always gets the same. The layer is
// then shared by containerd's namespaces, like its content. containerd takes the
// first one that fits, in the order of names: this one comes before those of any
// namespace, or whoever declares another namespace's layer as nydus data would be
// given that.
func dataName(parent, target string) string {
	sum := sha256.Sum256([]byte(parent))
	return "+nydus-data/" + hex.EncodeToString(sum[:8]) + "/" + target
}

func labelsOf(opts []snapshots.Opt) (map[string]string, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return nil, err
		}
	}
	return info.Labels, nil
}
