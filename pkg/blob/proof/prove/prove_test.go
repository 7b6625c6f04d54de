package prove

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof/prooftest"
)

const testdata = "../../../blobcheck/testdata"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func prove(t *testing.T, im *prooftest.Image) error {
	t.Helper()
	p := Prover{Now: prooftest.Later}
	_, err := p.Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest)
	return err
}

// proven is what the mount helper would find.
func proven(t *testing.T, im *prooftest.Image) error {
	t.Helper()
	p, err := proof.Open(im.CacheDir, im.Digest, im.Head)
	if err != nil {
		return err
	}
	return p.Close()
}

func TestProve(t *testing.T) {
	for _, name := range []string{"v6-none-4k", "v6-lz4_block-4k", "v6-lz4_block-0x10000", "v6-zstd-0x1000000", "v6-merged", "v6-chunk-dict", "v6-inline"} {
		t.Run(name, func(t *testing.T) {
			im := prooftest.New(t, testdata, name, t.TempDir())
			if err := proven(t, im); !errors.Is(err, proof.ErrNotProven) {
				t.Fatalf("before: %v", err)
			}
			must(t, prove(t, im))
			p, err := proof.Open(im.CacheDir, im.Digest, im.Head)
			must(t, err)
			for i, f := range p.Files {
				if f.Name() != im.Data(i) {
					t.Errorf("device %d is %s", i, f.Name())
				}
			}
			must(t, p.Check())
			must(t, p.Close())
			was, err := os.Stat(im.Proof())
			must(t, err)
			must(t, prove(t, im))
			now, err := os.Stat(im.Proof())
			must(t, err)
			if !os.SameFile(was, now) {
				t.Error("what was proven is proven again")
			}
		})
	}
}

// TestProveIsNoUse: what is looked at and compared is not used by that, so that what was
// used last is known.
func TestProveIsNoUse(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	files, err := filepath.Glob(filepath.Join(im.CacheDir, "*"))
	must(t, err)
	if len(files) < 2 {
		t.Fatalf("there is %v", files)
	}
	long := time.Unix(1000000000, 0)
	for _, path := range files {
		must(t, os.Chtimes(path, long, time.Time{}))
	}
	must(t, prove(t, im))
	for _, path := range files {
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		if at := time.Unix(st.Atim.Unix()); !at.Equal(long) {
			t.Errorf("%s was used at %s", path, at)
		}
	}
}

// TestTurn: of two provers one waits, and then finds that there is nothing to do.
func TestTurn(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	turn := NewTurn()
	worked := 0
	other := Prover{Now: prooftest.Later, Turn: turn, Step: func(string) { worked++ }}
	one := Prover{Now: prooftest.Later, Turn: turn, Step: func(name string) {
		if name != "compare" {
			return
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := other.Prove(ended, im.CacheDir, im.Bootstrap, im.Digest); !errors.Is(err, context.Canceled) {
			t.Errorf("it did not wait: %v", err)
		}
	}}
	if done, err := one.Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest); !done || err != nil {
		t.Fatalf("%t, %v", done, err)
	}
	if done, err := other.Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest); done || err != nil {
		t.Errorf("what was proven meanwhile: %t, %v", done, err)
	}
	if worked > 0 {
		t.Errorf("it took %d steps of its own", worked)
	}
}

// damage is something that makes a blob unusable.
type damage struct {
	name string
	do   func(t *testing.T, im *prooftest.Image)
	want error
}

func at(t *testing.T, path string, offset int64, b ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(b, offset)
	must(t, err)
	must(t, f.Close())
}

func punch(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 4096))
	must(t, f.Close())
}

func swap(t *testing.T, a, b string) {
	t.Helper()
	must(t, unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE))
}

var damages = []damage{
	{"hole", func(t *testing.T, im *prooftest.Image) { punch(t, im.Data(1)) }, ErrWrong},
	{"flipped byte", func(t *testing.T, im *prooftest.Image) { at(t, im.Data(0), 4096, 'x', 'y', 'z') }, ErrWrong},
	{"longer", func(t *testing.T, im *prooftest.Image) { must(t, os.Truncate(im.Data(0), 1<<20)) }, ErrWrong},
	{"shorter", func(t *testing.T, im *prooftest.Image) { must(t, os.Truncate(im.Data(1), 8192)) }, ErrWrong},
	{"swapped", func(t *testing.T, im *prooftest.Image) { swap(t, im.Data(0), im.Data(1)) }, ErrWrong},
	{"missing data", func(t *testing.T, im *prooftest.Image) { must(t, os.Remove(im.Data(1))) }, ErrIncomplete},
	{"link", func(t *testing.T, im *prooftest.Image) {
		must(t, os.Rename(im.Data(1), im.Data(1)+".real"))
		must(t, os.Symlink(im.Data(1)+".real", im.Data(1)))
	}, ErrIncomplete},
}

var chunkDamages = []damage{
	{"missing chunk", func(t *testing.T, im *prooftest.Image) { at(t, im.Map(1), 4096, 0xfe) }, ErrIncomplete},
	{"missing map", func(t *testing.T, im *prooftest.Image) { must(t, os.Remove(im.Map(0))) }, ErrIncomplete},
	{"changed bootstrap", func(t *testing.T, im *prooftest.Image) { at(t, im.Bootstrap, 1040, 'x') }, ErrWrong},
}

func TestRefuses(t *testing.T) {
	for _, d := range append(append([]damage{}, damages...), chunkDamages...) {
		t.Run(d.name, func(t *testing.T) {
			im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
			d.do(t, im)
			if err := prove(t, im); !errors.Is(err, d.want) {
				t.Errorf("proving: %v, want %v", err, d.want)
			}
			if err := proven(t, im); !errors.Is(err, proof.ErrNotProven) {
				t.Errorf("it counts as proven: %v", err)
			}
		})
	}
}

// TestStale damages what was proven.
func TestStale(t *testing.T) {
	more := []damage{
		{"damaged proof", func(t *testing.T, im *prooftest.Image) { at(t, im.Proof(), 3, '#') }, nil},
		{"proof of another image", func(t *testing.T, im *prooftest.Image) {
			text, err := os.ReadFile(im.Proof())
			must(t, err)
			text = []byte(strings.Replace(string(text), im.Digest, "sha256:"+strings.Repeat("0", 64), 1))
			must(t, os.WriteFile(im.Proof(), text, 0o600))
		}, nil},
		{"newer proof", func(t *testing.T, im *prooftest.Image) {
			text, err := os.ReadFile(im.Proof())
			must(t, err)
			must(t, os.WriteFile(im.Proof(), []byte(strings.Replace(string(text), `"version":1`, `"version":2`, 1)), 0o600))
		}, nil},
		{"rewritten with old times", func(t *testing.T, im *prooftest.Image) {
			info, err := os.Stat(im.Data(0))
			must(t, err)
			at(t, im.Data(0), 0, 'x')
			must(t, os.Chtimes(im.Data(0), info.ModTime(), info.ModTime()))
		}, nil},
		{"copied", func(t *testing.T, im *prooftest.Image) {
			data, err := os.ReadFile(im.Data(0))
			must(t, err)
			must(t, os.Remove(im.Data(0)))
			must(t, os.WriteFile(im.Data(0), data, 0o600))
		}, nil},
		{"removed by name", func(t *testing.T, im *prooftest.Image) { must(t, proof.Remove(im.CacheDir, im.Head.Blobs[1].ID)) }, nil},
	}
	for _, d := range append(append([]damage{}, damages...), more...) {
		t.Run(d.name, func(t *testing.T) {
			im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
			must(t, prove(t, im))
			before, err := proof.Open(im.CacheDir, im.Digest, im.Head)
			must(t, err)
			defer before.Close()
			d.do(t, im)
			if err := proven(t, im); !errors.Is(err, proof.ErrNotProven) {
				t.Errorf("it still counts as proven: %v", err)
			}
		})
	}
}

// TestCheck damages what is open already, as between the check and the mount.
func TestCheck(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	must(t, prove(t, im))
	p, err := proof.Open(im.CacheDir, im.Digest, im.Head)
	must(t, err)
	defer p.Close()
	punch(t, im.Data(1))
	if err := p.Check(); !errors.Is(err, proof.ErrNotProven) {
		t.Errorf("a hole since it was opened: %v", err)
	}
}

func TestRemoveLeavesOthers(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	must(t, prove(t, im))
	must(t, proof.Remove(im.CacheDir, strings.Repeat("0", 64)))
	must(t, proven(t, im))
}

func TestNever(t *testing.T) {
	for _, name := range []string{"v5-none-4k", "v6-zran"} {
		im := prooftest.New(t, testdata, name, t.TempDir())
		if err := prove(t, im); !errors.Is(err, proof.ErrNotProven) {
			t.Errorf("%s: %v", name, err)
		}
	}
	im := prooftest.New(t, testdata, "v6-none-4k", t.TempDir())
	p := Prover{Now: prooftest.Later}
	if _, err := p.Prove(t.Context(), im.CacheDir, im.Bootstrap, "sha256:../../x"); !errors.Is(err, proof.ErrNotProven) {
		t.Errorf("a digest that is a path: %v", err)
	}
	// What was just written may be written again within the same tick of the clock.
	if _, err := (&Prover{}).Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest); !errors.Is(err, ErrIncomplete) {
		t.Errorf("just written: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Prove(ctx, im.CacheDir, im.Bootstrap, im.Digest); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestEncrypted has bootstraps that say of a blob that its chunks are encrypted, or batched:
// their digests are not those of what the kernel would read.
func TestEncrypted(t *testing.T) {
	const table, features, batch, encrypted = 1160, 84, 1 << 7, 1 << 8
	for name, bit := range map[string]uint32{"batch": batch, "encrypted": encrypted} {
		im := prooftest.New(t, testdata, "v6-none-4k", t.TempDir())
		boot, err := os.ReadFile(im.Bootstrap)
		must(t, err)
		le := binary.LittleEndian
		entry := boot[le.Uint64(boot[table:])+features:]
		le.PutUint32(entry, le.Uint32(entry)|bit)
		must(t, os.WriteFile(im.Bootstrap, boot, 0o600))
		sum := sha256.Sum256(boot)
		im.Digest = "sha256:" + hex.EncodeToString(sum[:])
		if err := prove(t, im); !errors.Is(err, proof.ErrNotProven) || !strings.Contains(err.Error(), "no digests") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWritten has somebody write while the blob is compared.
func TestWritten(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-none-4k", t.TempDir())
	p := Prover{Now: prooftest.Later, Step: func(name string) {
		if name == "compare" {
			data, err := os.ReadFile(im.Data(0))
			must(t, err)
			at(t, im.Data(0), 0, data[:1]...)
		}
	}}
	if _, err := p.Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest); !errors.Is(err, ErrIncomplete) {
		t.Errorf("written to meanwhile: %v", err)
	}
	if err := proven(t, im); !errors.Is(err, proof.ErrNotProven) {
		t.Errorf("it counts as proven: %v", err)
	}
}

// TestKilled ends the proving before each of its steps, as a kill does: what is then
// found is a proof that holds or none, and the next one succeeds.
func TestKilled(t *testing.T) {
	var steps []string
	whole := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	p := Prover{Now: prooftest.Later, Step: func(name string) { steps = append(steps, name) }}
	if done, err := p.Prove(t.Context(), whole.CacheDir, whole.Bootstrap, whole.Digest); err != nil || !done {
		t.Fatal(done, err)
	}
	if len(steps) != 9 {
		t.Fatalf("steps %q", steps)
	}
	for n, last := range steps {
		im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
		done := make(chan struct{})
		p := Prover{Now: prooftest.Later, Step: stopAt(n, done)}
		go func() { _, _ = p.Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest) }()
		<-done
		err := proven(t, im)
		if renamed := last == "sync directory"; renamed != (err == nil) {
			t.Errorf("killed before %q (%d): %v", last, n, err)
		}
		must(t, prove(t, im))
		must(t, proven(t, im))
		must(t, tidy(im.CacheDir))
		if left, _ := filepath.Glob(filepath.Join(im.CacheDir, proof.Temporary+"*")); len(left) > 0 {
			t.Errorf("killed before %q: %q is left", last, left)
		}
		must(t, proven(t, im))
	}
}

// stopAt makes a prover go no further than n steps.
func stopAt(n int, reached chan<- struct{}) func(string) {
	return func(string) {
		if n > 0 {
			n--
			return
		}
		close(reached)
		select {}
	}
}

func imageOf(name string, im *prooftest.Image) Image {
	return Image{Name: name, CacheDir: im.CacheDir, Bootstrap: im.Bootstrap, Digest: im.Digest}
}

// TestBackground waits for an image to be proven that becomes complete.
func TestBackground(t *testing.T) {
	root := t.TempDir()
	im := prooftest.New(t, testdata, "v6-merged", root)
	broken := prooftest.New(t, testdata, "v6-lz4_block-4k", t.TempDir())
	punch(t, broken.Data(0))
	must(t, os.Rename(im.Map(0), im.Map(0)+".later"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	passes := 0
	said := new(strings.Builder)
	b := Background{
		Root: root, Every: time.Millisecond, Log: slog.New(slog.NewTextHandler(said, nil)), Prover: Prover{Now: prooftest.Later},
		Images: func(context.Context) ([]Image, error) {
			switch passes++; passes {
			case 3:
				must(t, os.Rename(im.Map(0)+".later", im.Map(0)))
			case 6:
				cancel()
			}
			return []Image{imageOf("broken", broken), imageOf("good", im), imageOf("the same", im)},
				errors.New("one more cannot be read")
		},
	}
	must(t, b.Run(ctx))
	must(t, proven(t, im))
	if err := proven(t, broken); err == nil {
		t.Error("a broken image is proven")
	}
	for what, want := range map[string]int{"event=proven": 1, "event=damaged": 1, "one more cannot be read": 1} {
		if n := strings.Count(said.String(), what); n != want {
			t.Errorf("%q is in the log %d times, want %d:\n%s", what, n, want, said)
		}
	}
}

// watched is an image in the background whose bootstrap is read so many times.
type watched struct {
	t     *testing.T
	b     Background
	im    *prooftest.Image
	reads int
	now   time.Time
}

func newWatched(t *testing.T) *watched {
	w := &watched{t: t, im: prooftest.New(t, testdata, "v6-merged", t.TempDir()), now: time.Now().Add(10 * time.Minute)}
	w.b = Background{
		Log: slog.New(slog.DiscardHandler), Prover: Prover{Now: func() time.Time { return w.now }},
		Images: func(context.Context) ([]Image, error) {
			im := imageOf("watched", w.im)
			im.Open = func() (*os.File, error) {
				w.reads++
				return os.Open(w.im.Bootstrap)
			}
			return []Image{im}, nil
		},
	}
	return w
}

// pass expects the bootstrap to be read in the next pass, or not.
func (w *watched) pass(what string, read bool) {
	w.t.Helper()
	before := w.reads
	w.b.pass(w.t.Context())
	if (w.reads > before) != read {
		w.t.Errorf("%s: the bootstrap was read %d times, want %t", what, w.reads-before, read)
	}
}

// TestBackgroundLooksOnce reads nothing again of what has not changed.
func TestBackgroundLooksOnce(t *testing.T) {
	w := newWatched(t)
	at(t, w.im.Map(1), 4096, 0xfe)
	w.pass("for the first time", true)
	w.pass("incomplete", false)
	w.now = w.now.Add(again)
	w.pass("incomplete for long", true)
	must(t, os.WriteFile(w.im.Map(1), prooftest.ChunkMap(w.im.Head.Blobs[1].ChunkCount), 0o600))
	w.pass("complete", true)
	must(t, proven(t, w.im))
	w.pass("proven", false)
	must(t, os.Remove(w.im.Proof()))
	w.pass("without its proof", true)
	must(t, proven(t, w.im))
	must(t, os.Rename(w.im.Data(0), w.im.Data(0)+".old"))
	w.pass("without data", true)
	w.pass("still without data", false)

	// What was just written may be marked as there without a trace.
	at(t, w.im.Map(1), 4096, 0xfe)
	w.now = time.Now().Add(quiet / 2)
	w.pass("just written", true)
	w.pass("a little later", true)
	w.now = time.Now().Add(2 * quiet)
	w.pass("when it is quiet", true)
	w.pass("in the quiet", false)
}

// TestBackgroundLeavesDamaged does not read blobs again and again that are wrong.
func TestBackgroundLeavesDamaged(t *testing.T) {
	w := newWatched(t)
	punch(t, w.im.Data(0))
	w.pass("damaged", true)
	w.pass("damaged still", false)
	w.now = w.now.Add(2 * firstRetry)
	w.pass("damaged as it was", false)
	punch(t, w.im.Data(0))
	w.pass("written", true)
	punch(t, w.im.Data(0))
	w.now = w.now.Add(firstRetry)
	w.pass("written too soon", false)
	w.now = w.now.Add(2 * firstRetry)
	w.pass("written", true)
	w.now = w.now.Add(lastRetry + time.Second)
	w.pass("a day later", true)
}

func TestMissing(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	at(t, im.Map(1), 4096, 0xfe)
	must(t, os.Remove(im.Map(0)))
	err := prove(t, im)
	var m *Missing
	if !errors.As(err, &m) || !errors.Is(err, ErrIncomplete) || len(m.Blobs) != 2 {
		t.Fatalf("got %v", err)
	}
	for i, b := range m.Blobs {
		chunks := int(im.Head.Blobs[i].ChunkCount)
		if want := (Lack{im.Head.Blobs[i].ID, i * (chunks - 1), chunks}); b != want || !strings.Contains(err.Error(), b.Blob) {
			t.Errorf("got %+v, want %+v: %v", b, want, err)
		}
	}
}

func TestProgress(t *testing.T) {
	im := prooftest.New(t, testdata, "v6-merged", t.TempDir())
	last, all := int64(0), int64(0)
	p := Prover{Now: prooftest.Later, Progress: func(done, total int64) {
		if done <= last || all != 0 && total != all {
			t.Errorf("%d of %d after %d of %d", done, total, last, all)
		}
		last, all = done, total
	}}
	for range 2 {
		if _, err := p.Prove(t.Context(), im.CacheDir, im.Bootstrap, im.Digest); err != nil || last == 0 || last != all {
			t.Errorf("%d of %d, %v", last, all, err)
		}
		must(t, os.Remove(im.Proof()))
		last = 0
	}
}

func BenchmarkOpen(b *testing.B) {
	im := prooftest.New(b, testdata, "v6-merged", b.TempDir())
	p := Prover{Now: prooftest.Later}
	if _, err := p.Prove(b.Context(), im.CacheDir, im.Bootstrap, im.Digest); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if !valid(im.CacheDir, im.Digest, im.Head) {
			b.Fatal("not proven")
		}
	}
}
