// Command nydus-overlayfs mounts a nydus image, alone or as a container's root
// filesystem. containerd calls it through mount.fuse for mounts that the
// snapshotter made; under the name mount.nydus it is mount(8)'s helper for
// `mount -t nydus`. nydusd is started when nothing serves the image yet.
//
// It is a short, light process: it links neither HTTP nor TLS nor gRPC, asks
// nobody, and leaves nothing behind when it fails.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
)

// version is set by the linker.
var version = "devel"

// Exit statuses as in mount(8).
const (
	exitUsage   = 1
	exitFailure = 32
)

// errUsage marks errors in how the program was called.
var errUsage = errors.New("usage error")

func main() {
	name := filepath.Base(os.Args[0])
	err := run(name, os.Args[1:], os.Stdout)
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	if errors.Is(err, errUsage) {
		os.Exit(exitUsage)
	}
	os.Exit(exitFailure)
}

func run(name string, args []string, out io.Writer) error {
	c, err := parseArgs(args)
	if err != nil {
		return err
	}
	switch {
	case c.help:
		_, err := fmt.Fprintf(out, help, name)
		return err
	case c.version:
		_, err := fmt.Fprintf(out, "%s %s\n", name, version)
		return err
	}
	if os.Geteuid() != 0 || os.Getuid() != 0 {
		return fmt.Errorf("mount %s: only root may mount a nydus image", c.target)
	}
	m, err := c.request(mountspec.KeyDir(mountspec.DefaultKeyDir))
	if err != nil {
		return fmt.Errorf("mount %s: %w", c.target, err)
	}
	// Called by mount(8), nobody may be there to release the instance later.
	m.detach = name == "mount.nydus"
	m.image.Alone = m.detach
	if c.fake {
		return nil
	}
	// Interrupted, it undoes what it has begun like after any other failure.
	m.image.Starting = func(ctx context.Context) (context.Context, context.CancelFunc) {
		return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	}
	ctx := context.Background()
	if err := m.mount(ctx); err != nil {
		return fmt.Errorf("mount %s: %w", c.target, err)
	}
	if m.detach {
		// Nobody else may come to remove what ended mounts have left.
		instance.Sweep(ctx, m.image.RunDir)
	}
	if c.verbose {
		_, err = fmt.Fprintf(out, "%s mounted on %s\n", c.source, c.target)
	}
	return err
}

const help = `Usage: %[1]s SOURCE TARGET [-sfnv] [-t TYPE] [-o OPTIONS]

Mounts a nydus image on TARGET, alone or as a container's root filesystem, as
mount.fuse's and mount(8)'s helper. What serves the image already is used; if
nothing does, a nydusd is started, or the kernel's EROFS mounts the image
without any daemon. Only root may mount.

With extraoption=… among OPTIONS the option, made by nydus-snapshotter, says
everything: EROFS serves the image when the configured driver allows it and all
of the image is in the cache and was compared with its digests. Beside it stand,
for a container in a user namespace, whose the files are to be (EROFS only):

  uidmap=C:H:N      N user ids of the image from C on are those from H on;
                    several with commas between them, in double quotes
  gidmap=C:H:N      the same for group ids

and SELinux's labels (context=…) for a container.

Without it a nydusd serves the image, and ends with its last unmount:

  bootstrap=FILE    the image's metadata file (required)
  config=FILE       nydusd's configuration, JSON; mode 0600 if it has credentials (required)
  nydusd=FILE       the executable (default: nydusd in the usual directories)
  root=DIR          logs and default cache (default: ` + defaultRoot + `)
  run_dir=DIR       run directory (default: ` + defaultRunDir + `)
  log_level=LEVEL   trace, debug, info, warn or error
  threads=N         FUSE threads
  timeout=DURATION  for nydusd to serve, such as 10s

In both cases the flags of mount(8) count (ro, nosuid, nodev, noexec, noatime, …),
and options of fstab's own are passed over (nofail, _netdev, user, x-…).

  -s                ignore unknown options
  -f                check all, mount nothing
  -v                say what was mounted
  -n, -t TYPE       no effect
  --help, --version

Exit status: 0, 1 for a wrong call, 32 for a mount that failed.

Example:
  mount -t nydus -o bootstrap=/img/image.boot,config=/img/nydusd.json rafs /mnt
`
