package blob

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
	"github.com/nydusfs/nydus-snapshotter/pkg/thread"
)

const (
	// scrubSaved is how often a pass writes down how far it is: as much is done twice
	// after a kill, and the blob that was under way.
	scrubSaved = 10 * time.Second
	// scrubFresh is how long what was learned about the whole cache is good for.
	scrubFresh = time.Minute
	// scrubAgain is how often it is looked whether somebody still uses what is wrong.
	scrubAgain = time.Minute
	// scrubRepaired is how often it is looked whether nydusd has repaired what it uses.
	scrubRepaired = time.Hour
	// scrubWait bounds how long it waits at once, so that a clock that is set counts.
	scrubWait = time.Hour
	// scrubSettle is how long a daemon that just writes a chunk gets to end that.
	scrubSettle = 2 * time.Second
)

// Scrubbing is how Scrub works.
type Scrubbing struct {
	// Interval is the time from one pass's begin to the next one's.
	Interval time.Duration
	// Rate bounds how many bytes of data a second are read; nil for no bound. Its burst is
	// at least rafs.MaxChunkSize.
	Rate *rate.Limiter
	// Jitter returns some duration below most, so that nodes which began together do not
	// go on so; nil for none.
	Jitter func(most time.Duration) time.Duration
	// Again and Settle are for tests; zero for the usual.
	Again, Settle time.Duration
}

// Scrub compares the data in the cache with the digests in the images' bootstraps, as
// Verify does, over and over until ctx ends: slowly, at the least priority, from the disk
// and not from the page cache, which stays as it is, and without keeping other methods
// waiting. A blob that is there in part is compared as far.
//
// What is wrong and not in use is removed, and fetched again on demand. When it is in use,
// the proofs that name it are removed, so that the next start is by nydusd; it is told who
// is affected, and the blob goes when nobody uses it any more.
//
// Where it is, is written down (ReadScrubState): another process goes on there.
func (c *Cache) Scrub(ctx context.Context, how Scrubbing) error {
	s, err := c.newScrubber(how)
	if err != nil {
		return err
	}
	defer s.close()
	for {
		s.again(ctx)
		if s.due() {
			s.pass(ctx)
		}
		if err := wait(ctx, s.rest()); err != nil {
			return err
		}
	}
}

type scrubber struct {
	*Cache
	how    Scrubbing
	state  ScrubState
	saved  time.Time
	looked time.Time // when it was last looked at what is damaged
	// compared is when a damaged blob was last compared, and how that ended.
	compared map[place]comparison

	// known is what was learned at the time learned, list what is to be scrubbed by then.
	known   *state
	learned time.Time
	list    []*cached
	fault   string // what was told last that could not be looked at

	buffer []byte
	work   chan func()
}

// comparison is one that found something wrong.
type comparison struct {
	at time.Time
	// stuck says that nobody is known to use the blob, and it could not be removed all the
	// same.
	stuck bool
}

func (c *Cache) newScrubber(how Scrubbing) (*scrubber, error) {
	s := &scrubber{Cache: c, how: how, work: make(chan func()), compared: map[place]comparison{}}
	if s.how.Again == 0 {
		s.how.Again = scrubAgain
	}
	if s.how.Settle == 0 {
		s.how.Settle = scrubSettle
	}
	if err := tidyScrub(c.o.Root); err != nil {
		c.o.Log.Warn("remove what an interrupted scrub left", "error", err)
	}
	var err error
	if s.state, err = ReadScrubState(c.o.Root); err != nil {
		// It costs a pass, and no data.
		c.o.Log.Warn("the scrub of the cache begins anew", "error", err)
	}
	if s.buffer, err = newColdBuffer(); err != nil {
		return nil, err
	}
	s.plan()
	go thread.Throwaway(s.idle)
	return s, nil
}

func (s *scrubber) close() {
	close(s.work)
	if err := unix.Munmap(s.buffer); err != nil {
		s.o.Log.Error("give back the memory of the scrub", "error", err)
	}
}

// idle does the work that takes long, on a thread of its own.
func (s *scrubber) idle() {
	if err := beIdle(); err != nil {
		s.o.Log.Warn("the cache is scrubbed at the usual priority", "error", err)
	}
	for f := range s.work {
		f()
	}
}

func (s *scrubber) now() time.Time { return s.o.Now().UTC() }

func (s *scrubber) jitter(most time.Duration) time.Duration {
	if s.how.Jitter == nil || most <= 0 {
		return 0
	}
	return s.how.Jitter(most)
}

// plan sees to it that there is a time for the next pass. The first one comes at any time
// within the interval.
func (s *scrubber) plan() {
	now := s.now()
	if s.state.Next.IsZero() || s.state.Next.After(now.Add(s.how.Interval+s.how.Interval/10)) {
		s.state.Next = now.Add(s.jitter(s.how.Interval))
		s.save(true)
	}
}

func (s *scrubber) due() bool { return s.state.Pass != nil || !s.now().Before(s.state.Next) }

// rest is how long there is nothing to do.
func (s *scrubber) rest() time.Duration {
	d := min(scrubWait, s.state.Next.Sub(s.now()))
	if len(s.state.Damaged) > 0 {
		d = min(d, s.how.Again)
	}
	return max(d, 0)
}

// save writes the state, at times or now. Without it, only more is done again.
func (s *scrubber) save(now bool) {
	if !now && s.now().Sub(s.saved) < scrubSaved {
		return
	}
	s.saved = s.now()
	if err := s.state.write(s.o.Root); err != nil {
		s.o.Log.Warn("a restart will scrub again what was scrubbed", "error", err)
	}
}

// pass goes over the cache once, or as far as ctx lets it.
func (s *scrubber) pass(ctx context.Context) {
	if s.state.Pass == nil {
		now := s.now()
		s.state.Pass = &ScrubPass{Started: now}
		// A tenth earlier or later.
		s.state.Next = now.Add(s.how.Interval - s.how.Interval/10 + s.jitter(s.how.Interval/5))
		s.save(true)
	}
	p := s.state.Pass
	for {
		s.again(ctx)
		b := s.after(ctx, place{p.Directory, p.Blob})
		if ctx.Err() != nil {
			s.save(true)
			return
		}
		if b == nil {
			break
		}
		v := s.one(ctx, b)
		if ctx.Err() != nil {
			s.save(true)
			return
		}
		s.count(p, v)
		p.Directory, p.Blob = b.dir.path, b.id
		s.save(false)
	}
	p.Ended = s.now()
	s.state.Last, s.state.Pass, s.known = p, nil, nil
	s.save(true)
	s.o.Log.Info("cache scrubbed", "event", "scrubbed", "blobs", p.Blobs, "chunks", p.Checked, "unchecked", p.Unchecked, "removed", p.Removed,
		"damaged", p.Damaged, "failed", p.Failed, "took", p.Ended.Sub(p.Started).Round(time.Second), "next", s.state.Next)
}

func (s *scrubber) count(p *ScrubPass, v *Verdict) {
	p.Blobs++
	if v == nil {
		p.Failed++
		return
	}
	p.Checked += v.Checked
	p.Unchecked += v.Unchecked
	switch {
	case v.Evicted:
		p.Removed++
	case v.Problem != "":
		p.Damaged++
	}
}

// after returns the blob that comes after one, nil after the last.
func (s *scrubber) after(ctx context.Context, last place) *cached {
	if s.known == nil || s.now().Sub(s.learned) >= scrubFresh {
		s.learn(ctx)
	}
	n, found := slices.BinarySearchFunc(s.list, last, func(b *cached, p place) int {
		return cmp.Or(cmp.Compare(b.dir.path, p.dir), cmp.Compare(b.id, p.id))
	})
	if found {
		n++
	}
	if n == len(s.list) {
		return nil
	}
	return s.list[n]
}

// learn looks at the whole cache. What could not be looked at is told once.
func (s *scrubber) learn(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st, err := s.look(ctx)
	s.known, s.learned, s.list = st, s.now(), nil
	if st == nil {
		return // ctx has ended
	}
	fault := ""
	if err := errors.Join(err, st.refs.errors()); err != nil {
		fault = err.Error()
	}
	if fault != "" && fault != s.fault {
		s.o.Log.Warn("not all of the cache is scrubbed", "error", fault)
	}
	s.fault = fault
	for _, d := range st.dirs {
		for _, b := range d.blobs {
			if len(st.refs.of(d, b.id).sources) > 0 {
				s.list = append(s.list, b)
			}
		}
	}
	slices.SortFunc(s.list, func(a, b *cached) int {
		return cmp.Or(cmp.Compare(a.dir.path, b.dir.path), cmp.Compare(a.id, b.id))
	})
}

// one scrubs a blob and does what is to be done about it. It returns nil when the blob could
// not be looked at.
func (s *scrubber) one(ctx context.Context, b *cached) *Verdict {
	v := &verifying{
		state: s.known, found: map[place]*verdict{}, settle: s.how.Settle,
		open: func(b *cached) (reader, error) { return openCold(b, s.buffer) },
	}
	if s.how.Rate != nil {
		v.pace = s.how.Rate.WaitN
	}
	o, done := v.verdict(b), make(chan error)
	s.work <- func() { done <- s.compare(ctx, v, b) }
	if err := <-done; err != nil {
		if ctx.Err() == nil {
			s.o.Log.Warn("a blob is not scrubbed", "blob", b.id, "directory", b.dir.path, "error", err)
		}
		// What was compared before is known all the same.
		if ctx.Err() != nil || o.Bad == 0 && o.Problem == "" {
			return nil
		}
	}
	if o.Bad > 0 || o.Problem != "" {
		// It may have taken long: who uses it now?
		if s.learn(ctx); s.known == nil {
			return nil
		}
		v.state = s.known
	}
	s.mu.Lock()
	list := s.judge(ctx, v)
	s.mu.Unlock()
	s.tell(ctx, &list[0])
	return &list[0]
}

// compare compares a blob with each bootstrap that names it.
func (s *scrubber) compare(ctx context.Context, v *verifying, b *cached) error {
	var errs []error
	for _, src := range v.sourcesOf(b) {
		tables, version, err := src.tables()
		if err != nil {
			errs = append(errs, fmt.Errorf("image %q: %w", src.image, err))
			continue
		}
		for i := range tables {
			if t := &tables[i]; t.Blob.ID == b.id || t.Blob.MetaID == b.id {
				errs = append(errs, v.blob(ctx, b, t, version))
			}
		}
	}
	return errors.Join(errs...)
}

// tell says what was found, once.
func (s *scrubber) tell(ctx context.Context, v *Verdict) {
	p := place{v.Directory, v.ID}
	left := v.Problem
	if v.Evicted {
		left = ""
	}
	news := s.state.note(p, left, s.now())
	if delete(s.compared, p); left != "" {
		s.compared[p] = comparison{s.now(), len(v.Instances) == 0}
	}
	log := s.o.Log.With("event", "damaged", "blob", v.ID, "repository", v.Host+"/"+v.Repository, "images", v.Images)
	switch {
	case v.Evicted:
		log.LogAttrs(ctx, slog.LevelWarn, "what the cache had of a blob was wrong: it was removed, and is fetched again on demand", slog.String("problem", v.Problem))
	case left != "" && news:
		log.LogAttrs(ctx, slog.LevelError, "what the cache has of a blob is wrong, and it is in use: containers may read wrong data until they are started anew; it is removed when nobody uses it",
			slog.String("problem", v.Problem), slog.Any("instances", s.readers(v.Instances)))
	case news:
		log.LogAttrs(ctx, slog.LevelInfo, "what the cache has of a blob is right again")
	}
	if news || v.Evicted {
		s.save(true)
	}
}

// readers says of instances how they read.
func (s *scrubber) readers(keys []string) []string {
	list := make([]string, len(keys))
	for i, key := range keys {
		list[i] = key
		if rec, err := instance.ReadRecord(s.o.RunDir, key); err == nil && rec.Driver != "" {
			list[i] = fmt.Sprintf("%s (%s, %s)", key, rec.Image, rec.Driver)
		}
	}
	return list
}

// again looks at blobs that were wrong and in use, from time to time: whether they can be
// removed now.
func (s *scrubber) again(ctx context.Context) {
	if len(s.state.Damaged) == 0 || s.now().Sub(s.looked) < s.how.Again || ctx.Err() != nil {
		return
	}
	s.looked = s.now()
	s.learn(ctx)
	for _, d := range slices.Clone(s.state.Damaged) {
		if s.known == nil || ctx.Err() != nil {
			return
		}
		n := slices.IndexFunc(s.list, func(b *cached) bool { return b.dir.path == d.Directory && b.id == d.Blob })
		switch {
		case n < 0:
			// Gone, or nobody's any more, and then swept.
			s.state.note(place{d.Directory, d.Blob}, "", s.now())
			delete(s.compared, place{d.Directory, d.Blob})
			s.save(true)
		default:
			s.retry(ctx, s.list[n], d.Problem)
		}
	}
}

// retry has a damaged blob compared again, once it is not in use any more or could have been
// repaired. One that could not be removed is not read each time for that.
func (s *scrubber) retry(ctx context.Context, b *cached, problem string) {
	last := s.compared[place{b.dir.path, b.id}]
	used, old := s.known.refs.of(b.dir, b.id).living(), s.now().Sub(last.at) >= scrubRepaired
	switch {
	case old, !used && !last.stuck:
		s.one(ctx, b)
	case !used:
		s.remove(ctx, b, problem)
	}
}

// remove removes a blob that is known to be wrong, if that can be done now.
func (s *scrubber) remove(ctx context.Context, b *cached, problem string) {
	s.mu.Lock()
	v := Verdict{Blob: s.describe(b, s.known.refs.of(b.dir, b.id)), Problem: problem, Evicted: true}
	w, j := &sweep{Cache: s.Cache, state: s.known, report: &Report{}}, &job{dir: b.dir, list: []*cached{b}, young: true}
	w.do(ctx, j)
	s.mu.Unlock()
	if len(j.gone) > 0 {
		s.tell(ctx, &v)
	}
}
