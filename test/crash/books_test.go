package crash_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// books are what a node keeps of what it was asked to do: containerd's rows, the
// snapshotter's directories. The kit watches mounts, processes, sockets, cgroups.
type books map[string]bool

func (l *lab) readBooks(ctx context.Context) (books, error) {
	b := books{}
	if err := l.rows(ctx, b); err != nil {
		return nil, err
	}
	for _, pattern := range []string{"snapshots/*", "instances/*"} {
		paths, err := filepath.Glob(filepath.Join(l.node.SnapshotterRoot(), pattern))
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			b["directory "+strings.TrimPrefix(p, l.node.SnapshotterRoot()+"/")] = true
		}
	}
	return b, nil
}

func (l *lab) rows(ctx context.Context, b books) error {
	client := l.node.Client()
	names, err := client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, ns := range names {
		ctx := namespaces.WithNamespace(ctx, ns)
		for _, s := range []string{"nydus", "overlayfs"} {
			err := client.SnapshotService(s).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
				b[s+" snapshot "+i.Name] = true
				return nil
			})
			if err != nil {
				return fmt.Errorf("list snapshots of %s: %w", s, err)
			}
		}
		err := client.ContentStore().Walk(ctx, func(i content.Info) error {
			b["content "+i.Digest.String()] = true
			return nil
		})
		if err != nil {
			return fmt.Errorf("list content: %w", err)
		}
		leases, err := client.LeasesService().List(ctx)
		if err != nil {
			return fmt.Errorf("list leases: %w", err)
		}
		for _, lease := range leases {
			b["lease "+lease.ID] = true
		}
		containers, err := client.ContainerService().List(ctx)
		if err != nil {
			return fmt.Errorf("list containers: %w", err)
		}
		for _, c := range containers {
			b["container "+c.ID] = true
		}
	}
	return nil
}

// balance checks that nothing is left when nothing is wanted any more, and that
// the snapshotter holds no more open files than at its start.
func (l *lab) balance() {
	l.t.Helper()
	l.until("the run directory is empty", func(context.Context) error {
		if left := l.node.RunEntries(); len(left) > 0 {
			return fmt.Errorf("it holds %q", left)
		}
		return nil
	})
	l.until("the books are balanced", func(ctx context.Context) error {
		now, err := l.readBooks(ctx)
		if err != nil {
			return err
		}
		var left []string
		for entry := range now {
			if !l.books[entry] {
				left = append(left, entry)
			}
		}
		if len(left) > 0 {
			slices.Sort(left)
			return fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
		}
		return nil
	})
	l.until("the snapshotter has closed its files", func(context.Context) error { return l.openFiles() })
}

const (
	// holderFiles is the descriptor by which the snapshotter knows the holder that it started.
	holderFiles = 1
	// talks are its connections when it is idle: its own socket, containerd's, the
	// holder's, and those of the runtime.
	talks = 10
)

// openFiles reports what a snapshotter that serves nothing should not have open.
func (l *lab) openFiles() error {
	dir := fmt.Sprintf("/proc/%d/fd", l.node.Snapshotter.PID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	kinds := map[string]int{}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		switch {
		case err != nil: // closed meanwhile
		case strings.HasPrefix(to, "socket:"):
			kinds["socket"]++
		case strings.HasSuffix(to, " (deleted)"):
			kinds["deleted"]++
		case strings.HasPrefix(to, l.node.RunDir()):
			kinds["run directory"]++
		default:
			kinds[to]++
		}
	}
	allowed := map[string]int{"anon_inode:[pidfd]": holderFiles, "socket": talks}
	for _, kind := range []string{"anon_inode:[pidfd]", "socket", "deleted", "run directory", "/dev/fuse"} {
		if kinds[kind] > allowed[kind] {
			return fmt.Errorf("it has %d open files of the kind %q, %d are its own: %v", kinds[kind], kind, allowed[kind], kinds)
		}
	}
	return nil
}

// openLike lists the open files of a process with a name.
func (l *lab) openLike(pid int, name string) []string {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.DeleteFunc(links, func(link string) bool {
		to, err := os.Readlink(link)
		return err != nil || to != name
	})
}
