package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/config"
	"github.com/nydusfs/nydus-snapshotter/pkg/fetch"
	"github.com/nydusfs/nydus-snapshotter/pkg/health"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// daemons starts daemons that fetch all of an image.
type daemons struct {
	cfg      config.Config
	nydusd   nydusdOf
	backends backends
	// purpose keeps apart those that may fetch the same image at the same time.
	purpose string
	// from has the blobs, instead of the image's backend; nil for that.
	from *directory
}

// prefetch makes nydusd fetch all of an image, whatever the operator's template says.
func (b backends) prefetch(threads int, rate int64) backends {
	tuning := b.tuning
	b.tuning = func() (nydusd.Tuning, error) {
		t, err := tuning()
		all, batch := true, prefetchBatch
		t.Prefetch = &nydusd.Prefetch{Enable: true, Threads: &threads, BatchSize: &batch, All: &all}
		if rate > 0 {
			bandwidth := int(min(rate, maxBandwidth))
			t.Prefetch.Bandwidth = &bandwidth
		}
		return t, err
	}
	return b
}

const (
	// prefetchBatch is how many bytes nydusd asks for at once.
	prefetchBatch = 1 << 20
	// maxBandwidth is the most that nydusd can be told.
	maxBandwidth = 1<<32 - 1
)

// start implements what fetch.Fetcher starts daemons with.
func (d *daemons) start(ctx context.Context, im pulledImage) (fetch.Daemon, error) {
	daemon := d.nydusd.spec()
	if err := d.check(ctx, daemon.Path); err != nil {
		return nil, err
	}
	key := instance.HoldKey(d.purpose, im.instance)
	spec := instance.Spec{
		Key: key, BootstrapDigest: im.Digest, Host: im.host, Repository: im.repository, CacheDir: im.CacheDir,
		Image: im.Name, Bootstrap: im.Bootstrap, Root: d.cfg.Root, RunDir: d.cfg.RunDir, Daemon: daemon,
	}
	var files map[string]string
	var err error
	if d.from != nil {
		files, err = d.from.files(ctx, im.Image)
		if err == nil {
			spec.Config, err = d.backends.rendered(nydusd.Backend{Type: nydusd.BackendLocalFS, Dir: instance.StageDir(d.cfg.Root, key)})(im.CacheDir)
		}
	} else {
		err = d.backend(ctx, im, &spec)
	}
	if err != nil {
		return nil, err
	}
	hold, err := instance.NewHold(ctx, spec, files)
	if err != nil {
		return nil, err
	}
	return daemonOf{hold, health.Follow(hold.Log(), hold.Generation().Number, 0)}, nil
}

// daemonOf is a daemon as fetch.Fetcher wants it.
type daemonOf struct {
	*instance.Hold
	health *health.Log
}

// Over implements fetch.Daemon. One that could not fetch a blob's metadata never gets
// anything of that blob.
func (d daemonOf) Over() bool {
	fault, err := d.health.Broken()
	return d.Ended() || err == nil && fault != nil
}

// Ask implements fetch.Daemon.
func (d daemonOf) Ask(ctx context.Context, blobs []string) error {
	g := d.Generation()
	env, err := instance.Environment(g)
	if err != nil {
		return err
	}
	return health.Answers(ctx, instance.ConfigPath(g), env, blobs)
}

// check refuses a nydusd whose cache nobody else can use. It may be another one each time.
func (d *daemons) check(ctx context.Context, path string) error {
	v, err := nydusd.VersionOf(ctx, path)
	if err != nil || v.SharesCache() {
		return err
	}
	what := "does not tell its version"
	if v.Known() {
		what = fmt.Sprintf("has version %d.%d", v.Major, v.Minor)
	}
	return fmt.Errorf("nydusd %s %s: one older than 2.3 keeps what it fetches to itself, so that nothing can be completed with it; install 2.3 or newer", path, what)
}

// backend takes from where, and with what, the image is read into a spec, as for a mount.
func (d *daemons) backend(ctx context.Context, im pulledImage, spec *instance.Spec) error {
	b, err := d.backends.Backend(ctx, im.Name, im.backend)
	if err == nil && b.ForMount != nil {
		b, err = b.ForMount(ctx)
	}
	if err != nil {
		return err
	}
	spec.Daemon.CAFile = b.CAFile
	if spec.Config, err = b.Config(im.CacheDir); err != nil || b.Credentials == nil {
		return err
	}
	c, err := b.Credentials(ctx, spec.Key)
	if err != nil || c == nil {
		return err
	}
	spec.Config, err = nydusd.AddCredentials(spec.Config, *c)
	return err
}

// directory has blobs as files: named by their ids or digests, or an OCI layout.
type directory struct {
	path string

	mu sync.Mutex
	// known are those whose content was compared with their names.
	known map[string]string
}

// names are the names that a blob may have there.
func (d *directory) names(id string) []string {
	return []string{id, "sha256:" + id, filepath.Join("blobs", "sha256", id)}
}

// files finds the blobs of an image, by the names that nydusd looks for. All have to be
// there: nydusd opens each. Whatever their names say, their content is compared with them:
// they go into a cache that others trust.
func (d *directory) files(ctx context.Context, im fetch.Image) (map[string]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ids, err := blobIDs(im.Bootstrap)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	var missing []string
	for _, id := range ids {
		path, err := d.find(ctx, id)
		if errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, id)
			continue
		}
		if err != nil {
			return nil, err
		}
		out[id] = path
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("%s lacks %d of the image's %d blobs, such as %s: want files named ID, sha256:ID or blobs/sha256/ID, as of an OCI layout", d.path, len(missing), len(ids), missing[0])
	}
	return out, nil
}

func (d *directory) find(ctx context.Context, id string) (string, error) {
	if path, ok := d.known[id]; ok {
		return path, nil
	}
	for _, name := range d.names(id) {
		path := filepath.Join(d.path, name)
		f, err := openBlob(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("read blob: %w", err)
		}
		got, err := digestOf(ctx, f)
		f.Close()
		if err != nil {
			return "", fmt.Errorf("read blob %s: %w", path, err)
		}
		if got != id {
			return "", fmt.Errorf("%s is not what its name says: its sha256 is %s; copy it again", path, got)
		}
		if d.known == nil {
			d.known = map[string]string{}
		}
		d.known[id] = path
		return path, nil
	}
	return "", fs.ErrNotExist
}

// openBlob opens a file, which may be reached by links: a store of layouts has them.
// Whatever else lies there is refused, and not waited for, as for the writer of a pipe.
func openBlob(path string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// blobIDs lists what the image's blobs are called, those of their metadata included.
func blobIDs(bootstrap string) ([]string, error) {
	b, err := rafs.ReadFile(bootstrap)
	if err != nil {
		return nil, err
	}
	var ids []string
	for i := range b.Blobs {
		for _, id := range []string{b.Blobs[i].ID, b.Blobs[i].MetaID} {
			if id != "" && !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

// digestOf is the sha256 of a file's content, in hex.
func digestOf(ctx context.Context, f *os.File) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, reader{ctx, f}); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// reader reads until its context ends.
type reader struct {
	ctx context.Context
	r   io.Reader
}

// Read implements io.Reader.
func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}
