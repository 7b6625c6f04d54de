package prove

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

const (
	// lookEvery is how often it is looked whether an image has become complete, which
	// makes no event: nydusd marks what is there in memory that it has mapped. It takes a
	// stat of the files of each image, and a read of the chunk maps that have changed.
	lookEvery = 5 * time.Second
	// quiet is how long nobody may have written to an image's files until they are not
	// read again before they change. A chunk is marked soon after its data was written, and
	// the mark alone may not show in the map's times.
	quiet = 2 * time.Minute
	// again is when an image that has not changed is looked at once more, for whatever does
	// not show.
	again = time.Hour
	// firstRetry is when an image that could not be proven is looked at again, if it has
	// changed; that doubles up to lastRetry.
	firstRetry = time.Minute
	lastRetry  = 24 * time.Hour
)

// Background proves images one after the other, as they become complete.
type Background struct {
	// Root is the snapshotter's root directory, where what killed ones left is removed.
	Root string
	// Images lists those that are of interest, the most urgent first. What it returns
	// beside an error counts.
	Images func(ctx context.Context) ([]Image, error)
	// Every is how often they are looked at; zero for the default.
	Every  time.Duration
	Prover Prover
	Log    *slog.Logger

	seen map[string]*sight
	told string // what was told last that could not be listed
}

// sight is what was seen of an image when it was last looked at.
type sight struct {
	// blobs are its blobs' ids; nil until its bootstrap was read.
	blobs []string
	// stamp stands for the state of its files then, and settled says that a later state
	// would have another one.
	stamp   stamp
	settled bool
	at      time.Time
	// failed says that it could not be proven, although it seemed to be complete, and is
	// not tried again for delay.
	failed bool
	delay  time.Duration
	why    string
}

// stamp is a hash of what stat says of an image's files.
type stamp [sha256.Size]byte

// Run works until ctx ends. It must be the only one on the cache directories that does;
// others may prove images meanwhile.
func (b *Background) Run(ctx context.Context) error {
	b.seen = map[string]*sight{}
	dirs, _ := filepath.Glob(filepath.Join(b.Root, "cache", "*"))
	for _, dir := range dirs {
		if err := tidy(dir); err != nil {
			b.Log.Warn("remove what an interrupted proof left", "error", err)
		}
	}
	every := b.Every
	if every == 0 {
		every = lookEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		b.pass(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// pass looks at each image once.
func (b *Background) pass(ctx context.Context) {
	images, err := b.Images(ctx)
	if ctx.Err() != nil {
		return
	}
	fault := ""
	if err != nil {
		fault = err.Error()
	}
	if fault != "" && fault != b.told {
		b.Log.Error("look for images that are complete", "error", err)
	}
	b.told = fault
	known := make(map[string]*sight, len(images))
	for i := range images {
		key := proof.Path(images[i].CacheDir, images[i].Digest)
		if key == "" || known[key] != nil {
			continue // it is mounted, and pulled, perhaps by several names
		}
		s := b.seen[key]
		if s == nil {
			s = &sight{}
		}
		b.look(ctx, &images[i], s)
		known[key] = s
		if ctx.Err() != nil {
			return
		}
	}
	b.seen = known
}

// look proves an image if there is something new about it.
func (b *Background) look(ctx context.Context, im *Image, s *sight) {
	now := b.Prover.now()
	state, written := s.state(im)
	changed := state != s.stamp || !s.settled
	switch {
	case s.at.IsZero():
	case s.failed && (now.Before(s.at.Add(s.delay)) || !changed && !now.After(s.at.Add(lastRetry))):
		return
	case !s.failed && !changed && now.Before(s.at.Add(again)):
		return
	}
	before := s.blobs != nil
	err := b.one(ctx, im, s)
	if !before || err == nil {
		// Only now it is known which files they are, or there is a proof.
		state, written = s.state(im)
	}
	s.stamp, s.at = state, now
	s.settled = err == nil || s.failed || now.Sub(written) > quiet
}

// state looks at the image's files. It also tells when the last of them was written.
func (s *sight) state(im *Image) (sum stamp, written time.Time) {
	paths := []string{proof.Path(im.CacheDir, im.Digest)}
	for _, id := range s.blobs {
		for _, name := range append(chunkmap.Names(id), proof.DataName(id)) {
			paths = append(paths, filepath.Join(im.CacheDir, name))
		}
	}
	h := sha256.New()
	newest := int64(0)
	for i, path := range paths {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			st = unix.Stat_t{}
		}
		for _, n := range []uint64{st.Dev, st.Ino, uint64(st.Size), uint64(st.Mtim.Nano()), uint64(st.Ctim.Nano())} {
			h.Write(binary.LittleEndian.AppendUint64(nil, n))
		}
		if i > 0 { // of the proof nobody is to wait
			newest = max(newest, st.Mtim.Nano(), st.Ctim.Nano())
		}
	}
	return stamp(h.Sum(nil)), time.Unix(0, newest)
}

// one proves an image and takes down how that went.
func (b *Background) one(ctx context.Context, im *Image, s *sight) error {
	log := b.Log.With("image", im.Name, "bootstrap", im.Digest)
	started := b.Prover.now()
	proven, err := b.Prover.prove(ctx, *im, func(boot *rafs.Bootstrap) {
		s.blobs = make([]string, 0, len(boot.Blobs))
		for i := range boot.Blobs {
			s.blobs = append(s.blobs, boot.Blobs[i].ID)
		}
	})
	last, delay := s.why, s.delay
	s.failed, s.why, s.delay = false, "", 0
	switch {
	case err == nil:
		if proven {
			log.Info("all of the image is in the cache: its next start needs no nydusd", "event", "proven", "took", b.Prover.now().Sub(started).Round(time.Millisecond))
		}
		return nil
	case ctx.Err() != nil, errors.Is(err, ErrIncomplete), errors.Is(err, fs.ErrNotExist):
		return err
	}
	s.failed, s.why, s.delay = true, err.Error(), min(max(2*delay, firstRetry), lastRetry)
	switch {
	case s.why == last:
	case errors.Is(err, ErrWrong):
		log.Error("what the cache has of the image is damaged: it goes on to be served by nydusd", "event", "damaged", "error", err)
	default:
		log.Info("the image goes on to be served by nydusd", "reason", err)
	}
	return err
}
