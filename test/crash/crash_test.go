package crash_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) {
	if os.Getenv(readerVar) != "" {
		os.Exit(serveOrders(os.Stdin, os.Stdout))
	}
	kit.Main(m)
}

const (
	// patience bounds what takes a second, for machines of any speed.
	patience = 3 * time.Minute
	// hangs is how long a read may take before it counts as hung.
	hangs = time.Minute
	// glance is how often something is looked at that makes no event.
	glance = 20 * time.Millisecond
)

// plan is what the environment asks for.
type plan struct {
	seed  uint64
	kills int
	all   bool
	soak  time.Duration
}

func newPlan(t *testing.T) plan {
	t.Helper()
	p := plan{seed: uint64(time.Now().UnixNano()), kills: 2, soak: time.Minute}
	var err error
	if text := os.Getenv("CRASH_SEED"); text != "" {
		p.seed, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	if text := os.Getenv("CRASH_KILLS"); text != "" {
		p.kills, err = strconv.Atoi(text)
		must(t, err)
	}
	if text := os.Getenv("SOAK_TIME"); text != "" {
		p.soak, err = time.ParseDuration(text)
		must(t, err)
	}
	switch text := os.Getenv("CRASH_CELLS"); text {
	case "", "sample":
	case "all":
		p.all = true
	default:
		t.Fatalf("CRASH_CELLS is %q, want sample or all", text)
	}
	// To the terminal at once: a run that is ended from outside prints nothing else.
	fmt.Fprintf(os.Stderr, "%s: CRASH_SEED=%d CRASH_KILLS=%d\n", t.Name(), p.seed, p.kills)
	return p
}

// chances is a source of its own for each purpose, so that cells do not depend on
// those that ran before.
func (p plan) chances(purpose uint64) *rand.Rand { return rand.New(rand.NewPCG(p.seed, purpose)) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
