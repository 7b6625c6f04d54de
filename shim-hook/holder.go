package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/custody"
)

// holderCommand makes this program a custody.Holder. It is here because this is a
// small program: the holder runs on each node.
const holderCommand = "holder"

// hold serves on a socket that appears when it is ready.
func hold(ctx context.Context, path string) error {
	fresh := fmt.Sprintf("%s.%d", path, os.Getpid())
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: fresh, Net: "unixpacket"})
	if err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Rename(fresh, path); err != nil {
		return errors.Join(fmt.Errorf("holder: %w", err), l.Close(), os.Remove(fresh))
	}
	before, err := os.Lstat(path)
	if err != nil {
		return errors.Join(fmt.Errorf("holder: %w", err), l.Close())
	}
	err = new(custody.Holder).Serve(ctx, l)
	// A newer one may have its socket there.
	if now, lerr := os.Lstat(path); lerr == nil && os.SameFile(before, now) {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}
