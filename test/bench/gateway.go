package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	gatewayName = "registry gateway"

	coldName, readName, linkName = "cold start through the gateway", "sequential cold read through the gateway", "cold start over a link of 100 Mbit/s and 20 ms"

	// linkLatency and linkBytes are the slow link's.
	linkLatency = 20 * time.Millisecond
	linkBytes   = 100e6 / 8
	// streams are how many parts the gateway gives out when its memory is measured.
	streams       = 64
	gatewayMemory = 48 << 20
	// dialTimeout is what hosts.toml says when the first mirror hangs; roundTrip is
	// what is granted beside it.
	dialTimeout   = time.Second
	roundTrip     = 50 * time.Millisecond
	failoverTries = 5
)

// gateway compares nodes whose images are read through the gateway and directly.
func (l *lab) gateway(t kit.TB) error {
	l.t = t
	l.progress.Start("%s: making the example image (once; takes a minute or two)", gatewayName)
	plain, nydus, err := show.MainImage(t)
	if err != nil {
		return err
	}
	l.registry = kit.NewRegistry(t, kit.RegistryOptions{})
	g, err := l.newGated(t, nydus, plain)
	if err != nil {
		return err
	}
	cold, far := g.firstRun(nil), g.firstRun(farLink)
	ctx := t.Context()
	const comparisons = 3
	l.rounds = progressOf{all: comparisons * (l.options.rounds + 1)}
	return errors.Join(
		l.compare(ctx, &result{Name: coldName, Target: 1.05,
			Ours: "pull the nydus image and run python as in the first line; nydusd reads through the gateway", Peer: "the same where nydusd reads from the registry itself"},
			&contest{ours: g.with("always", cold.ours), peer: g.with("never", cold.ours)}),
		l.compare(ctx, &result{Name: readName, Target: 1 / 0.95,
			Ours: "read every file of the image once, one after the other, through a container whose image has just been pulled, caches empty; nydusd reads through the gateway. The target of 0.95 × its throughput is that of 1.05 × its time",
			Peer: "the same where nydusd reads from the registry itself"},
			&contest{ours: g.with("always", g.readAll()), peer: g.with("never", g.readAll())}),
		l.compare(ctx, &result{Name: linkName, Target: 0.15,
			Ours: "pull and first run as above through the gateway; each answer of the registry begins 20 ms later, and all together have 12.5 MB/s", Peer: "the same with the plain image and overlayfs"},
			&contest{ours: g.with("always", far.ours), peer: far.peer}),
		g.memory(ctx, &l.report), g.failover(ctx, &l.report),
	)
}

// with sets whether the gateway is used before something is done.
func (g *gated) with(gateway string, do once) once {
	return func(ctx context.Context) (time.Duration, error) {
		if g.mode != gateway {
			g.node.Configure("remote.gateway", gateway)
			if err := g.node.RestartSnapshotter(ctx); err != nil {
				return 0, err
			}
			g.mode = gateway
		}
		return do(ctx)
	}
}

// compare measures one comparison and notes it.
func (l *lab) compare(ctx context.Context, r *result, c *contest) error {
	if err := l.repeat(ctx, c, r); err != nil {
		return fmt.Errorf("%s: %w", r.Name, err)
	}
	l.report.Results = append(l.report.Results, r)
	return nil
}

// gated is a node with a gateway.
type gated struct {
	*lab
	address string
	cmd     *exec.Cmd
	certs   string
	mode    string
}

func (l *lab) newGated(t kit.TB, nydus, plain *kit.Image) (*gated, error) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := free.Addr().String()
	free.Close()
	g := &gated{lab: &lab{options: l.options, progress: l.progress, t: t, registry: l.registry}, address: address, certs: t.TempDir(), mode: "always"}
	g.nydus = side{snapshotter: "nydus", image: nydus, ref: l.registry.MustPush(t, nydus, "bench/image:nydus")}
	g.plain = side{snapshotter: "overlayfs", image: plain, ref: l.registry.MustPush(t, plain, "bench/image:plain")}
	g.node = kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Config: map[string]any{
		"log.level": "info", "mount.idle_linger": "1s", "remote.gateway": "always", "remote.gateway_address": address, "remote.config_path": g.certs,
	}})
	g.cmd = g.node.Command(t.Context(), "nydus-snapshotter", "gateway", "--config", g.node.SnapshotterConfig())
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		_ = g.cmd.Process.Signal(os.Interrupt)
		_ = g.cmd.Wait()
	})
	return g, nil
}

// farLink is a hook that delays and limits all answers.
func farLink() kit.Hook {
	limiter := rate.NewLimiter(linkBytes, 64<<10)
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		timer := time.NewTimer(linkLatency)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-req.Context().Done():
			return
		}
		next.ServeHTTP(&slowWriter{w, req.Context(), limiter}, req)
	}
}

// readAll reads an image that has just been pulled.
func (l *lab) readAll() once {
	return func(ctx context.Context) (time.Duration, error) {
		if err := l.empty(ctx); err != nil {
			return 0, err
		}
		var err error
		if l.nydus.pulled, err = l.node.Pull(ctx, l.nydus.ref, kit.PullOptions{Snapshotter: l.nydus.snapshotter}); err != nil {
			return 0, err
		}
		c, err := l.node.Run(ctx, l.nydus.pulled, "read", kit.RunOptions{Snapshotter: l.nydus.snapshotter})
		if err != nil {
			return 0, err
		}
		start := time.Now()
		read, err := readTree(c.Rootfs())
		took := time.Since(start)
		if err == nil && read < l.nydus.image.Size()/2 {
			err = fmt.Errorf("%d bytes were read, which is not the image", read)
		}
		return took, errors.Join(err, c.Remove(ctx))
	}
}

// readTree reads all files beneath a directory, and tells how many bytes they have.
func readTree(root string) (read int64, err error) {
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.Copy(io.Discard, f)
		read += n
		return err
	})
	return read, err
}

// memory measures the gateway while many parts are under way: first as nydusd reads
// them, then as nobody should.
func (g *gated) memory(ctx context.Context, out *report) error {
	g.progress.Start("%s: memory", gatewayName)
	return g.mounted(ctx, "memory", func(capability string, blob digest.Digest, size int64) error {
		most, err := g.peak(ctx, capability, blob, size, func(_ context.Context, body io.Reader) error {
			_, err := io.Copy(io.Discard, body)
			return err
		})
		if err != nil {
			return err
		}
		out.figure(figure{
			Name: "memory of the gateway with 64 streams", What: "64 requests for a whole layer at the same time, read as fast as they come; the most that the process had resident since its start (VmHWM), after all that is measured above",
			Text: fmt.Sprintf("%.1f MiB", float64(most)/(1<<20)), Target: "≤ 48 MiB", Met: most <= gatewayMemory,
		})
		// Nobody goes on before all stand still.
		var still atomic.Int64
		all := make(chan struct{})
		most, err = g.peak(ctx, capability, blob, size, func(ctx context.Context, body io.Reader) error {
			_, err := io.CopyN(io.Discard, body, 1<<20)
			if still.Add(1) == streams {
				close(all)
			}
			select {
			case <-all:
			case <-ctx.Done():
			}
			return err
		})
		if err != nil {
			return err
		}
		out.figure(figure{
			Name: "memory of the gateway with 64 streams that stand still", What: "the same with clients that all stop reading after 1 MiB, wherever in a chunk that is", Text: fmt.Sprintf("%.1f MiB", float64(most)/(1<<20)),
		})
		return nil
	})
}

// peak is the most that the gateway had resident while or before many streams were read.
func (g *gated) peak(ctx context.Context, capability string, blob digest.Digest, size int64, read func(context.Context, io.Reader) error) (int64, error) {
	group, ctx := errgroup.WithContext(ctx)
	for range streams {
		group.Go(func() error {
			return g.part(ctx, capability, blob, 0, size-1, func(body io.Reader) error { return read(ctx, body) })
		})
	}
	if err := group.Wait(); err != nil {
		return 0, err
	}
	return kilobytes(g.cmd.Process.Pid, "status", "VmHWM:")
}

// part asks the gateway for a part of a blob.
func (g *gated) part(ctx context.Context, capability string, blob digest.Digest, first, last int64, do func(io.Reader) error) error {
	_, repository, _ := strings.Cut(strings.TrimPrefix(g.nydus.ref, g.registry.Host), "/")
	repository, _, _ = strings.Cut(repository, ":")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.address+"/v2/"+repository+"/blobs/"+blob.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+capability)
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, last))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return fmt.Errorf("the gateway answers %s", resp.Status)
	}
	return do(resp.Body)
}

// mounted has a container running, and makes a capability for its image.
func (g *gated) mounted(ctx context.Context, id string, do func(capability string, blob digest.Digest, size int64) error) error {
	if err := g.empty(ctx); err != nil {
		return err
	}
	var err error
	if g.nydus.pulled, err = g.node.Pull(ctx, g.nydus.ref, kit.PullOptions{Snapshotter: g.nydus.snapshotter}); err != nil {
		return err
	}
	c, err := g.node.Run(ctx, g.nydus.pulled, id, kit.RunOptions{Snapshotter: g.nydus.snapshotter})
	if err != nil {
		return err
	}
	capability, err := g.capability()
	if err == nil {
		layer := g.nydus.image.Layers[0].Desc
		err = do(capability, layer.Digest, layer.Size)
	}
	return errors.Join(err, c.Remove(ctx))
}

// capability makes one as the snapshotter does.
func (g *gated) capability() (string, error) {
	key, err := mountspec.KeyDir(mountspec.DefaultKeyDir).Named(g.node.SnapshotterRoot())
	if err != nil {
		return "", err
	}
	sealing, err := key.Derive("gateway capability")
	if err != nil {
		return "", err
	}
	all, err := instance.List(g.node.RunDir())
	if err != nil {
		return "", err
	}
	if len(all) != 1 {
		return "", fmt.Errorf("%d instances, want 1", len(all))
	}
	path := strings.TrimPrefix(g.nydus.ref, g.registry.Host+"/")
	repository, _, _ := strings.Cut(path, ":")
	return gateway.Key(sealing).Seal(gateway.Grant{Instance: all[0].Instance, Image: g.nydus.ref, Registry: g.registry.Host, Repository: repository})
}

// failover measures the first part of a blob when the first mirror does not answer.
func (g *gated) failover(ctx context.Context, out *report) error {
	g.progress.Start("%s: a mirror that hangs", gatewayName)
	dir := filepath.Join(g.certs, strings.ReplaceAll(g.registry.Host, ":", "_")+"_")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var took []float64
	err := g.mounted(ctx, "failover", func(capability string, blob digest.Digest, _ int64) error {
		for range failoverTries {
			// Another one each time: who has failed is asked later.
			mirror, done, err := hanging()
			if err != nil {
				return err
			}
			defer done()
			text := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\"]\ndial_timeout = %q\n", g.registry.Host, mirror, dialTimeout)
			if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600); err != nil {
				return err
			}
			start := time.Now()
			if err := g.part(ctx, capability, blob, 0, 1023, func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }); err != nil {
				return err
			}
			took = append(took, time.Since(start).Seconds())
		}
		return nil
	})
	if err != nil {
		return err
	}
	most := quantile(took, 1)
	out.figure(figure{
		Name: "failover to the next mirror when the first hangs", Samples: took,
		What:   fmt.Sprintf("from the request to the gateway until 1 KiB of a blob is there; the first mirror of hosts.toml accepts no connection, its dial_timeout is %s; %d requests", dialTimeout, failoverTries),
		Text:   fmt.Sprintf("most %.0f ms after the dial timeout", (most-dialTimeout.Seconds())*1e3),
		Target: fmt.Sprintf("≤ dial timeout + 1 round trip (%s)", roundTrip), Met: most <= (dialTimeout + roundTrip).Seconds(),
	})
	return nil
}

// hanging returns an address at which connections are never made: its queue is full.
func hanging() (address string, done func(), err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	var fill []net.Conn
	done = func() {
		for _, c := range fill {
			c.Close()
		}
		unix.Close(fd)
	}
	err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0))
	at, nameErr := unix.Getsockname(fd)
	if err = errors.Join(err, nameErr); err != nil {
		done()
		return "", nil, err
	}
	address = fmt.Sprintf("127.0.0.1:%d", at.(*unix.SockaddrInet4).Port)
	for {
		c, err := net.DialTimeout("tcp", address, dialTimeout/2)
		if err != nil {
			return address, done, nil
		}
		fill = append(fill, c)
	}
}
