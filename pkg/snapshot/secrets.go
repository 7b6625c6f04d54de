package snapshot

import (
	"context"
	"maps"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
)

// Labels in which clients of other snapshotters hand credentials over.
const (
	labelUser   = "containerd.io/snapshot/pullusername"
	labelSecret = "containerd.io/snapshot/pullsecret"
)

// withoutSecrets keeps credentials out of our database, too: containerd's has them
// already.
func withoutSecrets(opts []snapshots.Opt) []snapshots.Opt {
	return append(opts[:len(opts):len(opts)], func(info *snapshots.Info) error {
		info.Labels = cleaned(info.Labels)
		return nil
	})
}

// cleaned returns labels without credentials.
func cleaned(labels map[string]string) map[string]string {
	_, user := labels[labelUser]
	_, secret := labels[labelSecret]
	if !user && !secret {
		return labels
	}
	labels = maps.Clone(labels)
	delete(labels, labelUser)
	delete(labels, labelSecret)
	return labels
}

// Update implements snapshots.Snapshotter.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	info.Labels = cleaned(info.Labels)
	return s.Snapshotter.Update(ctx, info, fieldpaths...)
}

// ignored knows the images of which it was said that credentials in their labels are
// ignored.
type ignored struct {
	mu     sync.Mutex
	images map[string]bool
}

// maxIgnored bounds how many are known; then it is said again.
const maxIgnored = 1000

// warn says so, once for each image.
func (i *ignored) warn(ctx context.Context, labels map[string]string) {
	if labels[labelUser] == "" && labels[labelSecret] == "" {
		return
	}
	image := labels[labelImage]
	i.mu.Lock()
	known := i.images[image]
	if !known {
		if len(i.images) >= maxIgnored || i.images == nil {
			i.images = map[string]bool{}
		}
		i.images[image] = true
	}
	i.mu.Unlock()
	if !known {
		log.G(ctx).WithField("image", image).Warnf("the credentials in the labels %s and %s are ignored: containerd keeps labels in its database, where they can be read; "+
			"remove them from the client, and use credentials.cri, credentials.kubernetes, credentials.kubelet or docker login", labelUser, labelSecret)
	}
}
