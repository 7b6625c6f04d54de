package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// oNonblock keeps the opening of a FIFO from waiting for a writer.
const oNonblock = syscall.O_NONBLOCK | syscall.O_NOFOLLOW

// request is one mount to make.
type request struct {
	target   string
	flags    []string
	kind     mountspec.Kind
	readOnly bool
	image    instance.Spec
	// overlay is what lies above the image, for mountspec.KindRootfs.
	overlay rootfs.Overlay
	// detach lets the instance go at once, if this mount brought it up: it
	// lives with the target alone.
	detach bool
}

// fromSpec takes what the snapshotter decided. ids, when set, shifts the owners of the image's
// files.
func fromSpec(target string, flags []string, ids *rootfs.IDMap, s *mountspec.Spec) (*request, error) {
	if ids != nil && s.Kind != mountspec.KindRootfs {
		return nil, fmt.Errorf("%w: an image alone is not id-mapped, only a whole root filesystem", errUsage)
	}
	config := s.Config
	if c := s.Credentials; c != nil {
		var err error
		if config, err = nydusd.AddCredentials(config, *c); err != nil {
			return nil, err
		}
	}
	return &request{
		target: target, flags: flags, kind: s.Kind, readOnly: s.ReadOnly,
		image: instance.Spec{
			Key: s.Instance, BootstrapDigest: s.BootstrapDigest, Host: s.Host, Repository: s.Repository, CacheDir: s.CacheDir,
			Image: s.Image, Bootstrap: s.Bootstrap, Config: config, Root: s.Root, RunDir: s.RunDir, Driver: s.Driver, Daemon: s.Daemon,
			IDMapped: ids != nil,
		},
		overlay: rootfs.Overlay{Lower: s.Lower, Upper: s.Upper(), Work: s.Work(), Options: s.OverlayOptions, IDMap: ids},
	}, nil
}

// mount makes the image's filesystem exist and mounts on the target what was
// asked for. The lock is held throughout: nobody can release the instance
// between the two.
func (r *request) mount(ctx context.Context) (err error) {
	i, err := instance.Ensure(ctx, r.image)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	if r.detach {
		err = r.vacant(i)
	}
	if err == nil {
		err = r.onto(ctx, i)
	}
	if err != nil {
		if i.Started() {
			// Nobody else uses what was started for this mount alone.
			err = errors.Join(err, i.Undo(ctx))
		}
		return err
	}
	if r.detach && (i.Started() || i.Alone()) {
		if err := i.Detach(); err != nil {
			return errors.Join(fmt.Errorf("let the instance go: %w", err), rootfs.Detach(r.target))
		}
	}
	return nil
}

// vacant refuses to mount the image where it is mounted already, as mount(8)
// does for a device.
func (r *request) vacant(i *instance.Instance) error {
	m, ok, err := rootfs.Lookup(r.target)
	if err != nil {
		return err
	}
	if ok && i.Holds(m) {
		return errors.New("the image is already mounted there")
	}
	return nil
}

func (r *request) onto(ctx context.Context, i *instance.Instance) error {
	if r.kind == mountspec.KindImage {
		return rootfs.Bind(i.Mountpoint(), r.target, rootfs.Flags(append([]string{"ro"}, r.withoutRW()...)))
	}
	o := r.above(i.Mountpoint())
	if o.Upper == "" && len(o.Lower) == 1 {
		// A view of the image alone is a bind, and counted like one.
		return o.Mount(r.target)
	}
	return i.Use(ctx, r.target, o.Upper, func() error { return o.Mount(r.target) })
}

// above is the overlay above the image that is mounted on mountpoint.
func (r *request) above(mountpoint string) rootfs.Overlay {
	o := r.overlay
	o.Lower = append(append([]string{}, o.Lower...), mountpoint)
	flags := r.flags
	if r.readOnly {
		flags = append([]string{"ro"}, r.withoutRW()...)
	}
	o.Options = append(append([]string{}, o.Options...), flags...)
	if o.Upper != "" && r.wantsRO() {
		// containerd looks into the snapshot of a container that may be running.
		// Of an overlay with an upper directory the kernel would empty the
		// work directory, which is in use, although it is read-only.
		o.Lower = append([]string{o.Upper}, o.Lower...)
		o.Upper, o.Work, o.Unmapped = "", "", 1
	}
	return o
}

// wantsRO tells whether the caller's flags ask for a read-only mount: the last
// one counts.
func (r *request) wantsRO() bool {
	ro := false
	for _, f := range r.flags {
		switch f {
		case "ro":
			ro = true
		case "rw":
			ro = false
		}
	}
	return ro
}

// withoutRW drops the flag that containerd and mount(8) always pass; an image
// and a view cannot be written.
func (r *request) withoutRW() []string {
	var flags []string
	for _, f := range r.flags {
		if f != "rw" {
			flags = append(flags, f)
		}
	}
	return flags
}
