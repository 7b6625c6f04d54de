package main

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// sample is paths of an image, without a leading slash.
type sample []string

// samples chooses two disjoint sets of files of an image, spread over
// everything in it, and gives the second one a large file of its own.
func samples(tree kit.Tree) (first, second sample) {
	var usual, odd, large sample
	for path, e := range tree {
		switch {
		case e.Type != "file" || e.Size == 0 || e.Links != nil:
		case e.Size > 40e6: // would take longer than it tells
		case e.Size > 4e6:
			large = append(large, path)
		case strings.HasPrefix(path, "odd/"):
			odd = append(odd, path)
		default:
			usual = append(usual, path)
		}
	}
	sort.Strings(usual)
	sort.Strings(odd)
	sort.Slice(large, func(i, j int) bool { return tree[large[i]].Size > tree[large[j]].Size })
	first = append(usual.spread(150, 0), odd.spread(50, 0)...)
	second = append(usual.spread(150, 1), large[:min(1, len(large))]...)
	return first, second
}

// countFiles leaves out directories, links and the like.
func countFiles(tree kit.Tree) int {
	n := 0
	for _, e := range tree {
		if e.Type == "file" {
			n++
		}
	}
	return n
}

// spread picks n evenly spaced ones, moved by offset.
func (s sample) spread(n, offset int) sample {
	var picked sample
	for i := range n {
		if k := i*len(s)/n + offset; k < len(s) {
			picked = append(picked, s[k])
		}
	}
	return picked
}

// read reads the files with the container's own sha256sum and compares each sum
// with that of the layers' tar files.
func (s sample) read(ctx context.Context, c *kit.Container, tree kit.Tree) (reading, error) {
	args := []string{"/usr/bin/sha256sum", "--zero", "--"}
	for _, path := range s {
		args = append(args, "/"+path)
	}
	start := time.Now()
	out, code, err := c.Exec(ctx, args...)
	r := reading{Files: len(s), Seconds: seconds(time.Since(start))}
	if err != nil {
		return r, err
	}
	if code != 0 {
		return r, fmt.Errorf("sha256sum in %s ended with %d: %s", c.ID(), code, out)
	}
	lines := strings.Split(strings.TrimSuffix(out, "\x00"), "\x00")
	if len(lines) != len(s) {
		return r, fmt.Errorf("sha256sum in %s told of %d files, asked for %d", c.ID(), len(lines), len(s))
	}
	for i, line := range lines {
		sum, path, _ := strings.Cut(line, "  ")
		want := tree[s[i]]
		if path != "/"+s[i] || sum != want.SHA256 {
			return r, fmt.Errorf("the container reads %q with SHA-256 %s, its source has %q with %s", path, sum, "/"+s[i], want.SHA256)
		}
		r.Bytes += want.Size
	}
	return r, nil
}
