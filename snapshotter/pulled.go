package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prove"
	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/snapshot"
)

// pulledImage is an image of the snapshotter's, with where its blobs are cached.
type pulledImage struct {
	fetch.Image
	backend          string // that its label asks for
	host, repository string
	// instance is the key of the instance that containers of it use.
	instance string
	// download is what its label asks for.
	download string
	// open opens its bootstrap.
	open func() (*os.File, error)
	// homeless is why it has no cache directory: its backend is not configured any more.
	// All that depends on one is empty then.
	homeless error
}

// proveImage is what a prover takes it for.
func (p *pulledImage) proveImage() prove.Image {
	return prove.Image{Name: p.Name, CacheDir: p.CacheDir, Bootstrap: p.Bootstrap, Digest: p.Digest, Open: p.open}
}

// pulledImages lists the images that are pulled, each once. What could not be read is in
// the error.
func pulledImages(cfg config.Config) ([]pulledImage, error) {
	all, err := snapshot.Images(cfg.Root)
	list := make([]pulledImage, 0, len(all))
	seen := make(map[[3]string]bool, len(all))
	for _, im := range all {
		p := pulledImage{
			Image:   fetch.Image{Name: im.Ref, Bootstrap: im.Path(), Digest: im.Digest},
			backend: im.Backend, download: im.Download, open: im.Open,
		}
		p.host, p.repository, p.homeless = home(cfg.Backends, im.Ref, im.Backend)
		if p.homeless == nil {
			p.CacheDir = mountspec.CacheDir(cfg.Root, p.host, p.repository)
			p.instance = mountspec.InstanceKey(im.Digest, p.host, p.repository, p.CacheDir)
		}
		// One of its layers may be there twice.
		if name := [3]string{p.Name, p.Digest, p.CacheDir}; !seen[name] {
			seen[name] = true
			list = append(list, p)
		}
	}
	return list, err
}

// home is where an image's blobs come from, which names their cache directory.
func home(rules []config.Backend, ref, wanted string) (host, repository string, err error) {
	rule, err := selectRule(rules, ref, wanted)
	if err == nil {
		host, repository, err = origin(rule, ref)
	}
	if err != nil {
		return "", "", fmt.Errorf("find the cache directory of image %q: %w", ref, err)
	}
	return host, repository, nil
}

// namedBy lists those of all that a reference means: several when a tag has moved and the
// older one is still there. None is an error.
func namedBy(all []pulledImage, ref string) ([]pulledImage, error) {
	want := normal(ref)
	list := slices.DeleteFunc(slices.Clone(all), func(p pulledImage) bool { return normal(p.Name) != want })
	if len(list) == 0 {
		return nil, fmt.Errorf("%s is not pulled as a nydus image; pull it first", ref)
	}
	return list, nil
}

// normal is a reference as it is written in full.
func normal(ref string) string {
	if name, err := reference.ParseDockerRef(ref); err == nil {
		return name.String()
	}
	return ref
}

// relist is how often the pulled images are listed that nobody said anything about.
const relist = 5 * time.Minute

// pulled are the images that containerd has pulled, mounted or not, for whoever works on
// them in the background. They are listed anew when a layer was committed or removed, and now
// and then. Those that have no place in the cache are none of them.
type pulled struct {
	read func() ([]pulledImage, error)
	now  func() time.Time

	changed atomic.Bool

	mu     sync.Mutex
	list   []pulledImage
	listed time.Time
}

// Changed says that there may be other images now.
func (p *pulled) Changed() { p.changed.Store(true) }

// images lists them. Nobody changes anything in the list.
func (p *pulled) images() ([]pulledImage, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if !p.changed.Swap(false) && now.Sub(p.listed) < relist {
		return p.list, nil
	}
	list, err := p.read()
	if err != nil {
		p.changed.Store(true) // not all of it was seen
	}
	p.list = slices.Clip(slices.DeleteFunc(list, func(im pulledImage) bool { return im.homeless != nil }))
	p.listed = now
	return p.list, err
}

// find finds one again that was listed before.
func (p *pulled) find(im fetch.Image) (pulledImage, error) {
	all, err := p.images()
	if n := slices.IndexFunc(all, func(p pulledImage) bool { return p.Image == im }); n >= 0 {
		return all[n], nil
	}
	return pulledImage{}, errors.Join(errors.New("the image is not there any more"), err)
}
