package crash_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	daemonNew, daemonOld = "2.4", "2.2.0"
	dedicated            = "dedicated"
	shared               = "shared"
)

// modes are the daemon modes, and what the configuration says for them.
var modes = map[string]map[string]any{
	dedicated: {},
	shared:    {"daemon.daemon_mode": shared},
}

// cell is a place in the matrix.
type cell struct {
	victim victim
	setup  setup
}

func (c cell) String() string {
	return strings.NewReplacer("+", "-and-").Replace(c.victim.name) + "/" + c.setup.String()
}

// cells are all of the matrix.
func cells() []cell {
	var list []cell
	for _, v := range victims() {
		for _, daemon := range []string{daemonNew, daemonOld} {
			for _, style := range []string{"helper", "managed"} {
				for mode := range modes {
					list = append(list, cell{v, setup{daemon, style, mode}})
				}
			}
		}
	}
	return list
}

// sample chooses cells so that each two values of different axes meet in one, and
// each death of a daemon meets a successor in each mode.
func sample(all []cell, random *rand.Rand) []cell {
	type pair [2]string
	pairs := func(c cell) []pair {
		values := []string{c.victim.name, c.setup.daemon, c.setup.style, c.setup.mode}
		var list []pair
		for i, a := range values {
			for _, b := range values[i+1:] {
				list = append(list, pair{a, b})
			}
		}
		if c.victim.daemon && c.setup.succeeds() {
			list = append(list, pair{c.victim.name + " succeeded", c.setup.mode})
		}
		return list
	}
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	open := map[pair]bool{}
	for _, c := range all {
		for _, p := range pairs(c) {
			open[p] = true
		}
	}
	var chosen []cell
	for len(open) > 0 {
		best, most := cell{}, 0
		for _, c := range all {
			n := 0
			for _, p := range pairs(c) {
				if open[p] {
					n++
				}
			}
			if n > most {
				best, most = c, n
			}
		}
		chosen = append(chosen, best)
		for _, p := range pairs(best) {
			delete(open, p)
		}
	}
	return chosen
}

// result is what came of a cell.
type result struct {
	cell       cell
	kills, met int
	score      score
	took       time.Duration
	ok         bool
}

// TestMatrix kills each victim on each kind of node.
func TestMatrix(t *testing.T) {
	p := newPlan(t)
	list := cells()
	if !p.all {
		list = sample(list, p.chances(1))
	}
	reg := newDepot(t)
	var results []result
	for n, c := range list {
		t.Run(c.String(), func(t *testing.T) {
			began := time.Now()
			res := result{cell: c}
			defer func() { // after a fatal failure as well
				res.took, res.ok = time.Since(began), !t.Failed()
				results = append(results, res)
			}()
			c.run(t, reg, p.chances(uint64(100+n)), p.kills, &res)
		})
	}
	t.Logf("CRASH_SEED=%d\n%s", p.seed, tabulate(results))
}

func tabulate(results []result) string {
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "VICTIM\tDAEMON\tSTYLE\tMODE\tKILLS\tIN FLIGHT\tREADS\tFAILED\tWRONG\tHUNG\tSLOWEST\tTOOK\t")
	for _, r := range results {
		verdict := ""
		if !r.ok {
			verdict = "FAIL"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%v\t%v\t%s\n", r.cell.victim.name, r.cell.setup.daemon, r.cell.setup.style,
			r.cell.setup.mode, r.kills, r.met, r.score.reads, r.score.failed, r.score.wrong, r.score.hung,
			r.score.slowest.Round(time.Millisecond), r.took.Round(100*time.Millisecond), verdict)
	}
	w.Flush()
	return text.String()
}

func (c cell) run(t *testing.T, reg *depot, random *rand.Rand, kills int, res *result) {
	traps := newTraps(t)
	l := newLab(t, c.setup, reg, random, traps.bin)
	r := &round{lab: l, traps: traps, spans: map[string]time.Duration{}}
	defer func() {
		l.watch.verdict()
		res.kills, res.met, res.score = r.kills, r.met, l.watch.score()
	}()
	for r.kills < kills && !t.Failed() && !l.watch.faulty() {
		r.play(c, min(c.victim.each, kills-r.kills))
	}
	if t.Failed() || l.watch.faulty() {
		return
	}
	if c.victim.daemon && c.setup.succeeds() && r.kills >= 20 && r.met == 0 {
		t.Errorf("none of %d kills met a request in flight: the cold files are not what is being read", r.kills)
	}
	r.deadSockets()
	l.balance()
}

// play reads a fresh image through a fresh container while something is killed.
func (r *round) play(c cell, kills int) {
	r.t.Helper()
	r.img, r.other = r.pull(), r.pull()
	if c.victim.daemon && !c.setup.succeeds() {
		for range kills {
			r.lost(c.victim)
		}
	} else {
		r.survives(c, kills)
	}
	if r.watch.faulty() {
		return // what is left shows what happened
	}
	r.forget(r.img)
	r.forget(r.other)
}

// survives kills something of which readers must notice nothing.
func (r *round) survives(c cell, kills int) {
	r.t.Helper()
	r.n++
	r.c = r.run(r.img, fmt.Sprintf("reader-%d", r.n))
	if c.setup.succeeds() {
		r.kept(r.img)
	}
	r.read(r.c, wayNames()...)
	for range kills {
		r.moment(700 * time.Millisecond)
		if r.watch.faulty() {
			return
		}
		c.victim.strike(r)
	}
	r.watch.served(r.c.ID())
	if r.watch.faulty() {
		return
	}
	r.found()
	r.n++
	r.comesAndGoes(fmt.Sprintf("after-%d", r.n), r.img)
	r.watch.stop(r.c.ID())
	r.same(r.c)
	r.remove(r.c)
}

// same compares all that a container shows with what the image holds.
func (r *round) same(c *kit.Container) {
	r.t.Helper()
	var got kit.Tree
	r.must("walk through "+c.ID(), func(context.Context) (err error) {
		got, err = kit.Walk(c.Root())
		return err
	})
	kit.EqualTrees(r.t, c.ID(), r.reg.picture.tree, got)
}

// lost kills a daemon that has no successor: what it served fails, what comes
// works at once, and nothing stacks up.
func (r *round) lost(v victim) {
	r.t.Helper()
	r.n++
	old := r.run(r.img, fmt.Sprintf("lost-%d", r.n))
	first := filepath.Join(old.Root(), coldDir, "00")
	r.must("read "+first, func(context.Context) error {
		_, err := os.ReadFile(first)
		return err
	})
	r.moment(300 * time.Millisecond)
	v.strike(r)
	last := filepath.Join(old.Root(), coldDir, fmt.Sprintf("%02d", coldFiles-1))
	r.must("read "+last+" of a daemon that is gone", func(context.Context) error {
		_, err := os.ReadFile(last)
		if errors.Is(err, unix.ENOTCONN) {
			return nil
		}
		// Where its program was taken out of memory it has ended with its daemon.
		if _, gone := os.Stat(old.Root()); errors.Is(err, unix.ENOENT) && errors.Is(gone, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("want ENOTCONN: %w", err)
	})
	r.found()
	r.n++
	r.comesAndGoes(fmt.Sprintf("after-%d", r.n), r.img)
	r.remove(old)
	places := map[string]int{}
	for _, m := range kit.Mounts(r.t, "") {
		if places[m.Mountpoint]++; places[m.Mountpoint] > 1 && strings.HasPrefix(m.Mountpoint, r.node.RunDir()+"/") {
			r.t.Errorf("%d mounts on %s", places[m.Mountpoint], m.Mountpoint)
		}
	}
}
