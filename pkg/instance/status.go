package instance

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/mountspec"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// State is what a generation does, as seen from outside.
type State string

// The states.
const (
	// StateStarting is one whose filesystem has not answered yet.
	StateStarting State = "starting"
	// StateServing has users, StateIdle has none and is kept for a while.
	StateServing State = "serving"
	StateIdle    State = "idle"
	// StateFailed did not answer: nothing new is mounted on it.
	StateFailed State = "failed"
	// StateRetired ends with its users: a newer one, or none, has its place.
	StateRetired State = "retired"
	// StateDead has no process, or without a daemon no mount: its users get errors.
	StateDead State = "dead"
)

// Status is one generation of an instance at some moment.
type Status struct {
	// Instance is the key, 32 hex digits.
	Instance string `json:"instance"`
	// Generation tells apart the daemons that an instance has had, from 1 on.
	Generation int              `json:"generation"`
	Image      string           `json:"image"`
	Driver     mountspec.Driver `json:"driver"`
	State      State            `json:"state"`
	// PID is 0 while it is not known, and for one without a daemon.
	PID int `json:"pid"`
	// RSS is the daemon's memory in bytes, 0 when there is none.
	RSS int64 `json:"rss"`
	// Mounts is how many overlays and binds use it in this mount namespace; of a
	// pool, how many images.
	Mounts int `json:"mounts"`
	// Nydusd is the executable, Socket its API.
	Nydusd string `json:"nydusd"`
	Socket string `json:"socket"`
	// Started is when the generation's first daemon was started, or the image was
	// given to the daemon that it shares.
	Started time.Time `json:"started"`
	// Restarts is how many daemons have succeeded it.
	Restarts int `json:"restarts"`
	// Kept says that a successor can go on where its daemon stops when that dies.
	Kept bool `json:"kept"`
	// Pool is the instance of the daemon that the image shares with others, and of
	// that daemon itself; empty for a daemon of the image's own.
	Pool string `json:"pool,omitempty"`
}

// Replaceable tells whether a daemon serves it that another can succeed. A shared
// one is replaced under its own instance.
func (s *Status) Replaceable() bool {
	return s.PID > 0 && s.State != StateStarting && s.State != StateDead && (s.Pool == "" || s.Pool == s.Instance)
}

// List tells what is in a run directory, by image. It takes no lock and touches no
// mount, so that it answers whatever hangs. An instance that changes meanwhile is
// seen before or after; one whose record cannot be read is in the error, and the
// others are returned all the same.
func List(runDir string) ([]Status, error) {
	x, err := readMounts()
	if err != nil {
		return nil, err
	}
	records, err := Records(runDir)
	var list []Status
	errs := []error{err}
	for _, rec := range records {
		more, err := statusOf(dirOf(runDir, rec.Key), rec, x)
		list, errs = append(list, more...), append(errs, err)
	}
	slices.SortFunc(list, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Image, b.Image), cmp.Compare(a.Instance, b.Instance), cmp.Compare(b.Generation, a.Generation))
	})
	return list, errors.Join(errs...)
}

// statusOf lists the generations of one instance, the newest first.
func statusOf(d dir, rec *Record, x *mountIndex) ([]Status, error) {
	var list []Status
	add := func(g *Generation) error {
		s, err := rec.status(d, g, x)
		list = append(list, s)
		return err
	}
	var errs []error
	if rec.Current != nil {
		errs = append(errs, add(rec.Current))
	}
	for n := range slices.Backward(rec.Retired) {
		errs = append(errs, add(&rec.Retired[n]))
	}
	return list, errors.Join(errs...)
}

func (r *Record) status(d dir, g *Generation, x *mountIndex) (Status, error) {
	s := Status{
		Instance: r.Key, Generation: g.Number, Image: r.Image, Driver: g.driver(),
		Started: g.Started,
	}
	switch {
	case g.Shared:
		s.Pool = r.Key
	case g.Berth != nil:
		s.Pool = g.Berth.Pool
	}
	targets, _, err := users(d, g, x)
	if err != nil {
		return s, err
	}
	if s.Mounts = len(targets); g.Shared {
		keys, err := aboard(d, g)
		if err != nil {
			return s, err
		}
		s.Mounts = len(keys)
	}
	of, err := d.carrier(g)
	if err != nil {
		return s, err
	}
	if of == nil {
		of = &Generation{Nydusd: g.Nydusd} // its pool is gone
	}
	s.PID, s.Socket, s.Restarts, s.Nydusd, s.Kept = of.PID, of.Socket, of.Restarts, of.Nydusd, of.Kept
	p, err := nydusd.Find(of.PID, of.StartTime)
	if err != nil {
		return s, err
	}
	if p != nil {
		s.RSS = p.RSS()
		err = p.Close()
	}
	lives := p != nil
	if g.Daemonless() {
		m, ok := x.At(g.Mountpoint)
		lives = ok && g.holds(m) || s.Mounts > 0
	}
	s.State = stateOf(g, g == r.Current, lives, s.Mounts)
	return s, err
}

func stateOf(g *Generation, current, lives bool, mounts int) State {
	switch {
	case !g.Ready:
		return StateStarting
	case !lives:
		return StateDead
	case g.Failed:
		return StateFailed
	case !current:
		return StateRetired
	case mounts > 0:
		return StateServing
	}
	return StateIdle
}
