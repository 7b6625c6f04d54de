package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// work is something that the project and a peer do in turn.
type work struct {
	name   string
	target float64 // greatest ratio of medians; 0 for none
	ours   string  // what is measured, for readers
	peer   string
	set    func(*lab, context.Context) (*contest, error)
}

// once does the work and tells how long its measured part took. It prepares and
// cleans up by itself, unmeasured.
type once func(context.Context) (time.Duration, error)

// contest is a work that is set up.
type contest struct {
	ours, peer once
	done       func(context.Context) error
}

var works = []work{
	{
		name: "pull and first run, caches empty", target: 0.25,
		ours: "pull the nydus image, then run python with json, ssl, sqlite3, decimal and http.client to its exit. Before each round: images, " +
			"snapshots, contents, blob cache and page cache removed. The registry is on the loopback device and has everything in memory",
		peer: "the same with the plain image and overlayfs",
		set:  func(l *lab, _ context.Context) (*contest, error) { return l.firstRun(nil), nil },
	},
	{
		name: "the same, registry at 50 MB/s",
		ours: "as above; all answers of the registry together are limited to 50 MB/s (400 Mbit/s), after 64 KiB at once",
		peer: "the same with the plain image and overlayfs",
		set:  func(l *lab, _ context.Context) (*contest, error) { return l.firstRun(slowLink), nil },
	},
	{
		name: "warm run, instance up", target: 1.10,
		ours: "create and start the task, run the same python program to its exit; another container of the image runs meanwhile, and the program has been run before",
		peer: "the same on overlayfs, another container of the plain image running meanwhile",
		set:  func(l *lab, ctx context.Context) (*contest, error) { return l.warmRun(ctx, kit.MainCommand) },
	},
	{
		name: "warm run of true, instance up",
		ours: "as above with a static `busybox true`: nearly nothing but the mount and the runtime",
		peer: "the same on overlayfs",
		set: func(l *lab, ctx context.Context) (*contest, error) {
			return l.warmRun(ctx, []string{"/usr/bin/busybox", "true"})
		},
	},
	{
		name: "mount that starts nydusd", target: 1.5,
		ours: "`mount.fuse3 … -t nydus-overlayfs` for a container's root filesystem, from exec to exit, as containerd calls it; no nydusd runs before, " +
			"the blob cache is warm. Starts nydusd, waits until its filesystem answers, checks the bootstrap's digest, mounts the overlay, writes its records",
		peer: "bare nydusd with the very same configuration, bootstrap, blob cache and command line, from exec until its mount is in the mount table and has answered statfs; no overlay",
		set:  (*lab).coldMount,
	},
	{
		name: "mount on a running instance", target: 1.5,
		ours: "`mount.fuse3 … -t nydus-overlayfs`, from exec to exit; nydusd runs",
		peer: "`mount.fuse3 … -t bench-overlay`, a static C program that only calls mount(2) for an overlay on the same lower directory (test/bench/peer/overlay.c)",
		set:  (*lab).warmMount,
	},
	{
		name: "the least helper in Go",
		ours: "as the peer of the line above, but a static Go program (test/bench/peer/overlay) that only calls mount(2): what Go's start and end take",
		peer: "the C program of the line above",
		set:  (*lab).leastMount,
	},
	{
		name: "64 containers at once", target: 1.2,
		ours: "create and start 64 containers of one image at the same time, until the processes of all run; no nydusd runs before, the blob cache is warm",
		peer: "the same on overlayfs",
		set:  (*lab).crowd,
	},
}

// measure does a work's rounds, the project and its peer in turn, after one of
// each that does not count.
func (l *lab) measure(ctx context.Context, w work) error {
	l.progress.Start("%s: preparing", w.name)
	c, err := w.set(l, ctx)
	if err != nil {
		return err
	}
	r := &result{Name: w.name, Target: w.target, Ours: w.ours, Peer: w.peer}
	err = l.repeat(ctx, c, r)
	if c.done != nil {
		// Also after an interruption.
		done, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, c.done(done))
	}
	if err == nil {
		l.report.Results = append(l.report.Results, r)
	}
	return err
}

func (l *lab) repeat(ctx context.Context, c *contest, r *result) error {
	for n := range l.options.rounds + 1 {
		l.progress.Set("%s %s, round %d of %d", l.rounds.bar(), r.Name, n, l.options.rounds)
		ours, err := c.ours(ctx)
		if err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
		peer, err := c.peer(ctx)
		if err != nil {
			return fmt.Errorf("round %d, the peer: %w", n, err)
		}
		if n > 0 {
			r.OursSamples = append(r.OursSamples, ours.Seconds())
			r.PeerSamples = append(r.PeerSamples, peer.Seconds())
		}
		l.rounds.done++
	}
	return nil
}

// progressOf counts the rounds of a whole run.
type progressOf struct{ done, all int }

func (p *progressOf) count(o options, list []work) {
	for _, w := range list {
		if o.wants(w.name) {
			p.all += o.rounds + 1
		}
	}
}

func (p *progressOf) bar() string {
	const width = 20
	full := p.done * width / max(1, p.all)
	return fmt.Sprintf("[%s%s]", strings.Repeat("#", full), strings.Repeat(".", width-full))
}
