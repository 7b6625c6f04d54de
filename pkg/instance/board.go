package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
)

// board gives the image a berth in its pool and makes it the current generation.
// Nothing of the image reaches the pool before it was checked.
func (i *Instance) board(ctx context.Context, s Spec, boot *bootstrap) (err error) {
	l := &launch{spec: s, inst: i, boot: boot}
	defer l.release()
	if err := l.image(); err != nil {
		return errors.Join(err, i.removeBootstrap())
	}
	if err := boot.check(ctx); err != nil {
		return errors.Join(err, i.removeBootstrap())
	}
	pool, err := openPool(ctx, s)
	if err != nil {
		return errors.Join(fmt.Errorf("shared nydusd: %w", err), i.removeBootstrap())
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	b := boarding{launch: l, pool: pool}
	if err := b.run(ctx); err != nil {
		return errors.Join(err, l.undo(), pool.vacate(ctx))
	}
	return nil
}

// boarding is one image's way into a pool whose lock is held.
type boarding struct {
	*launch
	pool *Instance
}

// run makes the image's generation.
func (b *boarding) run(ctx context.Context) error {
	on := b.pool.rec.Current
	for _, name := range on.known(b.spec.Key) {
		err := b.occupy(ctx, name)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// A successor may not know it, or it has gone bad.
		b.passenger(name).Ready = false
		b.pool.note("%s does not answer and is mounted again: %v", name, err)
		if err := b.pool.write(); err != nil {
			return err
		}
	}
	if len(on.Passengers) >= maxPassengers {
		return errors.Join(errors.New("the shared nydusd is full; try again"), b.pool.retire())
	}
	name, err := b.enter(ctx)
	if err != nil {
		return err
	}
	return b.occupy(ctx, name)
}

func (b *boarding) passenger(name string) *Passenger {
	list := b.pool.rec.Current.Passengers
	n := slices.IndexFunc(list, func(p Passenger) bool { return p.Name == name })
	return &list[n]
}

// enter makes the pool's daemon serve the image under a new name.
func (b *boarding) enter(ctx context.Context) (string, error) {
	on := b.pool.rec.Current
	m := nydusd.Submount{Name: on.berthName(b.spec.Key)}
	m.Bootstrap = filepath.Join(b.pool.berths(on), m.Name)
	config, err := b.configFor(m.Name)
	if err != nil {
		return "", err
	}
	m.Config = config
	// From here on the name is taken, whatever comes of it.
	on.Passengers = append(on.Passengers, Passenger{Name: m.Name, Key: b.spec.Key, Size: stateSize(m.Name, m.Bootstrap, m.Config)})
	if err := b.pool.write(); err != nil {
		return "", err
	}
	if err := b.linkBootstrap(m.Bootstrap); err != nil {
		return "", err
	}
	if err := b.begin(m.Name); err != nil {
		return "", err
	}
	if err := b.trustCache(ctx); err != nil {
		return "", err
	}
	if err := b.passCache(ctx); err != nil {
		return "", err
	}
	if err := b.reserve(b.cacheDir); err != nil {
		return "", err
	}
	logStart := sizeOf(diskDirOf(b.pool.rec.Root, b.pool.rec.Key).log())
	if err := nydusd.AddSubmount(ctx, on.Socket, m); err != nil {
		return "", b.refused(err, logStart)
	}
	// Before the bind, which is what tells others that there is something new.
	on.Revision++
	return m.Name, b.pool.write()
}

// linkBootstrap gives the image's bootstrap the name that the pool's daemon opens.
func (b *boarding) linkBootstrap(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("create directory for bootstraps: %w", err)
	}
	f, err := os.Open(b.disk.bootstrap())
	if err != nil {
		return fmt.Errorf("open bootstrap: %w", err)
	}
	defer f.Close()
	if err := linkFile(f, path); err != nil {
		return fmt.Errorf("link bootstrap: %w", err)
	}
	return nil
}

// configFor is the configuration of the image under a name in the pool.
func (b *boarding) configFor(name string) (string, error) {
	s, on := b.spec, b.pool.rec.Current
	cacheDir := s.CacheDir
	if err := claimCache(s); err != nil {
		return "", err
	}
	if on.Private != "" {
		// For this image alone: nydusd cannot share one with itself either.
		cacheDir = filepath.Join(s.CacheDir, "private", on.Private, s.Key)
		if n := on.count(s.Key); n > 0 {
			cacheDir += fmt.Sprintf(".%d", n)
		}
		if err := os.MkdirAll(cacheDir, 0o700); err != nil {
			return "", fmt.Errorf("create cache directory: %w", err)
		}
	}
	b.cacheDir = cacheDir
	config, err := nydusd.SetCacheDir(s.Config, cacheDir)
	if err != nil {
		return "", err
	}
	return nydusd.SetID(config, name)
}

// count is how often an instance was given to the pool's generation.
func (g *Generation) count(key string) int {
	n := 0
	for _, p := range g.Passengers {
		if p.Key == key {
			n++
		}
	}
	return n
}

// begin makes the berth the image's current generation, not ready yet.
func (b *boarding) begin(name string) error {
	if b.gen.Number == 0 {
		b.next()
	}
	on := b.pool.rec.Current
	b.gen.Socket, b.gen.Supervisor = "", ""
	b.gen.Dev = on.Dev
	b.gen.Berth = &Berth{Pool: b.pool.rec.Key, Generation: on.Number, Name: name}
	return b.launch.begin(b.spec.Config)
}

// occupy mounts the image from the pool and makes it answer.
func (b *boarding) occupy(ctx context.Context, name string) (err error) {
	if b.gen.Berth == nil || b.gen.Berth.Name != name {
		if err := b.begin(name); err != nil {
			return err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, rootfs.DetachAll(b.gen.Mountpoint))
		}
	}()
	on := b.pool.rec.Current
	source := filepath.Join(on.Mountpoint, name)
	logStart := sizeOf(diskDirOf(b.pool.rec.Root, b.pool.rec.Key).log())
	err = within(ctx, b.pool.hang, func() error {
		if err := rootfs.Bind(source, b.gen.Mountpoint, nil); err != nil {
			return err
		}
		return ask(b.gen.Mountpoint)
	})
	if err != nil {
		return b.poolFailed("mounted the image but does not serve it: "+err.Error(), logStart)
	}
	m, ok, err := rootfs.Lookup(b.gen.Mountpoint)
	if err != nil {
		return err
	}
	if !ok || !b.gen.holds(m) {
		return fmt.Errorf("%s is not what nydusd mounted as %s", b.gen.Mountpoint, name)
	}
	if p := b.passenger(name); !p.Ready {
		p.Ready = true
		if err := b.pool.write(); err != nil {
			return err
		}
	}
	b.gen.Ready = true
	return b.inst.write()
}

// refused explains why the pool's daemon did not take the image. One that did not
// say what it made of it gets no other.
func (b *boarding) refused(err error, logStart int64) error {
	var refused *nydusd.RefusedError
	if errors.As(err, &refused) {
		return b.poolFailed(err.Error(), logStart)
	}
	b.pool.note("takes no more images: %v", err)
	return errors.Join(b.poolFailed(err.Error(), logStart), b.pool.retire())
}

func (b *boarding) poolFailed(what string, logStart int64) error {
	log := diskDirOf(b.pool.rec.Root, b.pool.rec.Key).log()
	msg := fmt.Sprintf("shared nydusd %s: %s", b.spec.Daemon.Path, what)
	if tail := nydusd.Tail(log, logStart, 5); tail != "" {
		msg += fmt.Sprintf("; the end of %s: %s", log, tail)
	}
	return errors.New(msg)
}
