package rootfs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs"
	"github.com/nydusfs/nydus-snapshotter/pkg/rootfs/fusetest"
)

// A question that was taken and never answered: only an abort ends it. Another
// filesystem does not notice.
func TestAbortConnection(t *testing.T) {
	hung, other := fusetest.Mount(t), fusetest.Mount(t)
	c, err := rootfs.OpenConnections()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := c.Waiting(hung.Dev); n != 0 || err != nil {
		t.Errorf("%d wait, %v, though nobody has asked", n, err)
	}
	hung.Take()
	// In a process of its own: should this one be killed, the filesystem goes with it.
	var said bytes.Buffer
	asks := exec.Command("stat", "--file-system", hung.Dir)
	asks.Env, asks.Stderr = []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}, &said
	if err := asks.Start(); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() { answered <- asks.Wait() }()
	hung.AwaitTaken()
	if n, err := c.Waiting(hung.Dev); n != 1 || err != nil {
		t.Errorf("%d wait, %v; want 1", n, err)
	}
	// It is found by its number also when it is mounted nowhere any more.
	if err := rootfs.Detach(hung.Dir); err != nil {
		t.Fatal(err)
	}
	if err := rootfs.AbortConnection(hung.Dev); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-answered:
		if !strings.Contains(said.String(), "connection abort") {
			t.Errorf("the question ended with %v: %s; want that the connection was aborted", err, &said)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the question still waits")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(other.Dir, &st); err != nil {
		t.Errorf("another filesystem: %v", err)
	}
}

func TestConnectionThatIsGone(t *testing.T) {
	c, err := rootfs.OpenConnections()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Waiting("0:1048575"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("how many wait for it: %v", err)
	}
	if err := c.Abort("0:1048575"); err != nil {
		t.Errorf("abort: %v", err)
	}
	for _, dev := range []string{"", "x", "7", "../1:2"} {
		if err := c.Abort(dev); err == nil {
			t.Errorf("device %q was taken", dev)
		}
	}
}
