package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// manyFiles is an image that takes several hundred requests to read.
func manyFiles(t *testing.T) *kit.Image {
	t.Helper()
	files := []kit.File{{Name: "./"}}
	source := rand.NewChaCha8([32]byte{1})
	for i := range 40 {
		data := make([]byte, 100_000+i*5_000)
		_, _ = source.Read(data)
		files = append(files, kit.File{Name: fmt.Sprintf("file-%02d", i), Data: string(data)})
	}
	return kit.MustBuildImage(t, kit.Pause, kit.FileLayer(files...))
}

// cluster is two mirrors and the registry itself, which all want tokens of one second.
type cluster struct {
	*lab
	hosts  []*front
	issuer *tokenServer
}

const clusterName = "cluster.test"

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{lab: newLab(t, manyFiles(t))}
	as := newLogin("carol")
	c.issuer = newTokenServer(t, as, time.Second)
	real := c.registry(kit.RegistryOptions{Of: c.store, Token: c.issuer.config()})
	logins := map[string]login{}
	for range 3 {
		f := newFront(t, c.issuer.refuseEnded(before(real, nil)))
		c.hosts = append(c.hosts, f)
		logins[f.Host] = as
	}
	c.login(logins)
	c.lab.hosts(clusterName, fmt.Sprintf("server = %q\n[host.%q]\n[host.%q]\n", "http://"+c.hosts[2].Host, "http://"+c.hosts[0].Host, "http://"+c.hosts[1].Host))
	return c
}

// illnesses are all that can be wrong with a host.
func (l *lab) illnesses() []*fault {
	nowhere := "http://" + deadHost(l.t)
	empty := newFront(l.t, http.NotFoundHandler())
	all := []*fault{
		down(), hang(), halved(), shortened(), oversized(), wrong(), page(),
		status(http.StatusTooManyRequests, "Retry-After", "1"), status(http.StatusInternalServerError), status(http.StatusBadGateway),
		status(http.StatusServiceUnavailable, "Retry-After", "3600"), status(http.StatusNotFound), status(http.StatusForbidden),
		status(http.StatusOK), status(http.StatusNoContent), status(http.StatusPartialContent, "Content-Range", "bytes 0-1/2"),
		status(http.StatusUnauthorized, "WWW-Authenticate", `Bearer realm="`+nowhere+`",service="x"`),
		redirect(http.StatusMovedPermanently, nowhere), redirect(http.StatusFound, "http://"+empty.Host), redirect(http.StatusTemporaryRedirect, nowhere), redirect(http.StatusPermanentRedirect, ""),
		toxic("latency", map[string]any{"latency": 200, "jitter": 150}), toxic("bandwidth", map[string]any{"rate": 300}),
		toxic("reset_peer", map[string]any{"timeout": 30}), toxic("timeout", map[string]any{"timeout": 0}), toxic("limit_data", map[string]any{"bytes": 20_000}),
		toxic("slicer", map[string]any{"average_size": 500, "size_variation": 300, "delay": 200}),
	}
	return all
}

// hours makes hosts fall ill and recover at random until stop is closed. One is always
// well, but not always the same.
func (c *cluster) hours(random *rand.Rand, stop <-chan struct{}) {
	list := c.illnesses()
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	well := 0
	for step := 0; ; step++ {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		if step%10 == 0 {
			well = random.IntN(len(c.hosts))
			c.hosts[well].spoil(nil) // before the others fall ill
			continue
		}
		// One that hangs should do so for longer than a moment.
		if host := random.IntN(len(c.hosts)); host != well && random.IntN(3) > 0 {
			c.hosts[host].spoil(list[random.IntN(len(list))])
		} else if host != well {
			c.hosts[host].spoil(nil)
		}
	}
}

// round reads all of the image several times at once, from nothing.
func (c *cluster) round() {
	c.t.Helper()
	v := c.mustMount(clusterName)
	defer v.unmount()
	const readers = 4
	errs := make([]error, readers)
	var all sync.WaitGroup
	for i := range readers {
		all.Go(func() {
			tree, err := kit.Walk(v.dir)
			if err == nil {
				if diff := kit.Diff(c.tree, tree); len(diff) > 0 {
					err = fmt.Errorf("wrong: %s", strings.Join(diff, "; "))
				}
			}
			errs[i] = err
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		c.t.Errorf("read while one host is well: %v", err)
	}
}

// TestRandomFaults reads an image again and again while its hosts fall ill and recover,
// and tokens end: as long as one of them is well each read gives the right bytes.
func TestRandomFaults(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("FAULTS_TIME"))
	if err != nil {
		length = 30 * time.Second
	}
	seed, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("SEED=%d FAULTS_TIME=%s", seed, length)
	c := newCluster(t)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		c.hours(rand.New(rand.NewPCG(seed, 0)), stop)
	}()
	rounds := 0
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); rounds++ {
		c.round()
	}
	close(stop)
	<-stopped
	met := map[string]int{}
	for _, f := range c.hosts {
		for _, s := range f.requests() {
			met[s.spoilt]++
		}
	}
	t.Logf("%d rounds, %d tokens; requests by what was wrong with the host: %v", rounds, len(c.issuer.tokens()), met)
	if names := slices.Collect(maps.Keys(met)); len(names) < 5 || rounds < 2 {
		t.Errorf("%d rounds, faults %q: too few to prove anything", rounds, names)
	}
}

// TestEachFault asks the gateway, and so without nydusd's asking again, for a part of a
// blob that the first host spoils: it comes from the next one.
func TestEachFault(t *testing.T) {
	l := newLab(t, manyFiles(t))
	l.hosts("base.test", `server = "http://`+l.store.Host+`"`)
	v := l.mustMount("base.test")
	defer v.unmount()
	list := l.illnesses()
	fronts := make([]*front, len(list))
	for i, with := range list {
		fronts[i] = newFront(t, before(l.store, nil))
		fronts[i].spoil(with)
	}
	const most = 600_000
	blob := l.blob()[:most]
	t.Run("all", func(t *testing.T) {
		for i, with := range list {
			t.Run(with.name, func(t *testing.T) {
				t.Parallel()
				l := l.in(t)
				name := fmt.Sprintf("fault-%d.test", i)
				l.hosts(name, fmt.Sprintf("server = %q\n[host.%q]\n", "http://"+l.store.Host, "http://"+fronts[i].Host))
				got, err := l.get(l.capability(v.instance, name), 5, len(blob)-5)
				if with.lies && errors.Is(err, io.ErrUnexpectedEOF) && got.status == http.StatusPartialContent && len(got.body) < len(blob)-5 {
					// As nydusd does. What came before was not whole.
					got, err = l.get(l.capability(v.instance, name), 5, len(blob)-5)
				}
				if err != nil || got.status != http.StatusPartialContent || !bytes.Equal(got.body, blob[5:]) {
					t.Errorf("%v, status %d, %d bytes of %d, right: %v", err, got.status, len(got.body), len(blob)-5, bytes.HasPrefix(blob[5:], got.body))
				}
				if !with.down && blobs(fronts[i].requests()) == 0 {
					t.Error("the host that is ill was never asked")
				}
			})
		}
	})
}

// TestTrickle has a mirror that is so slow that nydusd gives up on what it gives out. It
// never stops for long, but the registry behind it is well.
func TestTrickle(t *testing.T) {
	c := newCluster(t)
	v := c.mustMount(clusterName)
	defer v.unmount()
	v.gets(clusterName)
	c.hosts[0].spoil(toxic("bandwidth", map[string]any{"rate": 1}))
	c.hosts[1].spoil(toxic("bandwidth", map[string]any{"rate": 1}))
	begun := time.Now()
	read := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(v.dir, "file-39"))
		read <- err
	}()
	select {
	case err := <-read:
		if err != nil {
			t.Errorf("read while one host is well: %v after %s", err, time.Since(begun))
		}
		t.Logf("read after %s", time.Since(begun))
	case <-time.After(time.Minute):
		t.Error("300 KB are not read within a minute, while one host is well")
		for _, f := range c.hosts {
			f.spoil(nil)
		}
		<-read
	}
}

// TestAllGone takes all hosts away while an image is mounted, and gives one back.
func TestAllGone(t *testing.T) {
	c := newCluster(t)
	v := c.mustMount(clusterName)
	defer v.unmount()
	v.gets(clusterName)
	for _, f := range c.hosts {
		f.spoil(down())
	}
	begun := time.Now()
	read := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(v.dir, "file-39"))
		read <- err
	}()
	got, err := c.get(c.capability(v.instance, clusterName), 0, 100)
	if took := time.Since(begun); err != nil || got.status != http.StatusBadGateway || took > time.Minute {
		t.Errorf("all hosts are gone: %v, %+v after %s", err, got, took)
	}
	c.refusal(clusterName, c.hosts[0].Host, c.hosts[1].Host, c.hosts[2].Host, "connection refused")
	// nydusd asks again for some 8 s, and the kernel has it ask for each piece that it
	// reads ahead, at worst one after the other.
	const bounded = 3 * time.Minute
	timer := time.NewTimer(bounded)
	defer timer.Stop()
	select {
	case err := <-read:
		t.Logf("a read fails after %s: %v", time.Since(begun), err)
		if !errors.Is(err, unix.EIO) {
			t.Errorf("a read while all hosts are gone: %v, want an input/output error", err)
		}
		c.hosts[1].spoil(nil)
	case <-timer.C:
		t.Errorf("a read has not failed %s after all hosts were gone", bounded)
		c.hosts[1].spoil(nil)
		<-read
	}
	v.same() // nothing was restarted
}
