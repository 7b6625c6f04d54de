package blobcheck

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/rafs"
)

// synthetic makes a blob of n chunks of size bytes, which compress to about a half, and
// its table.
func synthetic(t testing.TB, n, size int, compressor rafs.Compressor, digester rafs.Digester) (*rafs.ChunkTable, []byte) {
	t.Helper()
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	var (
		list   []rafs.Chunk
		blob   []byte
		random = rand.NewChaCha8([32]byte{1})
		raw    = make([]byte, size)
	)
	for i := range n {
		_, _ = random.Read(raw)
		for k := range raw {
			raw[k] = "etaoinshrdlu \n{}"[raw[k]&15]
		}
		c := rafs.Chunk{Offset: uint64(len(blob)), RawOffset: uint64(i * size), RawSize: uint32(size), Index: uint32(i), Compressed: true}
		switch compressor {
		case rafs.CompressorNone:
			blob, c.Compressed = append(blob, raw...), false
		case rafs.CompressorLZ4:
			for k := 0; k+64 < size; k += 128 { // lz4 finds repetitions only
				copy(raw[k:k+64], "a line of text that repeats itself again and again in this file\n")
			}
			out := make([]byte, lz4.CompressBlockBound(size))
			k, err := lz4.CompressBlock(raw, out, nil)
			if err != nil {
				t.Fatal(err)
			}
			blob = append(blob, out[:k]...)
		case rafs.CompressorZstd:
			blob = encoder.EncodeAll(raw, blob)
		default:
			t.Fatal(compressor)
		}
		c.Size = uint32(uint64(len(blob)) - c.Offset)
		if c.Digest = blake3.Sum256(raw); digester == rafs.DigesterSHA256 {
			c.Digest = sha256.Sum256(raw)
		}
		list = append(list, c)
	}
	table, err := rafs.NewChunkTable(rafs.Blob{Compressor: compressor, Digester: digester}, rafs.Meta{}, list)
	if err != nil {
		t.Fatal(err)
	}
	return table, blob
}

// network gives out what a network read would, and drops what is written elsewhere.
type network struct{ io.Reader }

func (n network) Read(p []byte) (int, error) { return n.Reader.Read(p[:min(len(p), 16<<10)]) }

// cpu is what the process has spent so far.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkReader tells, beside the speed, the processor's time for each MiB of
// uncompressed data and for each of what is fetched.
func BenchmarkReader(b *testing.B) {
	buf := make([]byte, 32<<10)
	for _, digester := range []rafs.Digester{rafs.DigesterBlake3, rafs.DigesterSHA256} {
		for _, compressor := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd} {
			table, blob := synthetic(b, 16, 1<<20, compressor, digester)
			c := checker(b, table)
			b.Run(compressor.String()+"-"+digester.String(), func(b *testing.B) {
				b.SetBytes(int64(len(blob)))
				before := cpu(b)
				for b.Loop() {
					r, err := c.Reader(b.Context(), network{bytes.NewReader(blob)}, 0, int64(len(blob)), 0)
					if err != nil {
						b.Fatal(err)
					}
					if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, buf); err != nil || n != int64(len(blob)) {
						b.Fatal(n, err)
					}
					r.Close()
				}
				spent := float64(cpu(b)-before) / float64(time.Millisecond) / float64(b.N) // the setup included
				b.ReportMetric(spent/16, "cpu-ms/MiB")
				b.ReportMetric(spent/float64(len(blob))*(1<<20), "cpu-ms/MiB-fetched")
			})
		}
	}
	// What nydusd asks for at once: its chunks are checked beside each other.
	for _, size := range []int{1 << 20, 64 << 10, 8 << 10} {
		table, blob := synthetic(b, 2<<20/size, size, rafs.CompressorZstd, rafs.DigesterBlake3)
		c := checker(b, table)
		b.Run(fmt.Sprintf("request-%dk", size>>10), func(b *testing.B) {
			b.SetBytes(2 << 20)
			for b.Loop() {
				r, err := c.Reader(b.Context(), network{bytes.NewReader(blob)}, 0, int64(len(blob)), 0)
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, buf); err != nil || n != int64(len(blob)) {
					b.Fatal(n, err)
				}
				r.Close()
			}
		})
	}
	data := make([]byte, 16<<20)
	b.Run("copy", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, network{bytes.NewReader(data)}, buf)
		}
	})
}

// meeting lets parts stand still in the middle of a chunk until all are there.
type meeting struct {
	io.Reader
	left int64
	all  *sync.WaitGroup
	open <-chan struct{}
}

func (m *meeting) Read(p []byte) (int, error) {
	if m.left > 0 {
		n, err := m.Reader.Read(p[:min(int64(len(p)), m.left)])
		if m.left -= int64(n); m.left == 0 {
			m.all.Done()
			<-m.open
		}
		return n, err
	}
	return m.Reader.Read(p)
}

// TestMemory: 64 parts that stop almost at the end of a chunk of 1 MiB, all at once, hold
// what has arrived and not much more.
func TestMemory(t *testing.T) {
	for _, compressor := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd} {
		table, blob := synthetic(t, 4, 1<<20, compressor, rafs.DigesterBlake3)
		c := checker(t, table)
		heap := func() int64 {
			for range 3 { // what a pool has free lives for two
				runtime.GC()
			}
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc + m.StackInuse)
		}
		before := heap()
		const parts = 64
		var all, done sync.WaitGroup
		all.Add(parts)
		open := make(chan struct{})
		stop := int64(table.At(2).End()) - 1
		for range parts {
			done.Go(func() {
				r, err := c.Reader(t.Context(), &meeting{Reader: bytes.NewReader(blob), left: stop, all: &all, open: open}, 0, int64(len(blob)), 0)
				if err != nil {
					t.Error(err)
					return
				}
				defer r.Close()
				if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, make([]byte, 32<<10)); err != nil || n != int64(len(blob)) {
					t.Error(n, err)
				}
			})
		}
		all.Wait()
		used := heap() - before
		close(open)
		done.Wait()
		arrived := int64(0)
		if compressor != rafs.CompressorNone {
			arrived = parts * int64(table.At(2).Size)
		}
		// A piece and a hasher for each part, and for each worker what it needs.
		if most := arrived + parts*(2*int64(len(piece{}))) + 2*(10<<20); used > most {
			t.Errorf("%s: %d KiB are held, want at most %d", compressor, used>>10, most>>10)
		}
		t.Logf("%s: %d KiB are held for %d parts; a chunk has %d KiB compressed", compressor, used>>10, parts, table.At(2).Size>>10)
	}
}

// TestConcurrent: many parts at once, some wrong, with few workers.
func TestConcurrent(t *testing.T) {
	for _, compressor := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd} {
		table, blob := synthetic(t, 40, 20<<10, compressor, rafs.DigesterSHA256)
		c := checker(t, table)
		bad := bytes.Clone(blob)
		middle := table.At(20)
		bad[middle.Offset+uint64(middle.Size)/2] ^= 0x40
		var all sync.WaitGroup
		for i := range 64 {
			all.Go(func() {
				data, want := blob, error(nil)
				if i%3 == 0 {
					data, want = bad, ErrContent
				}
				r, err := c.Reader(t.Context(), bytes.NewReader(data), 0, int64(len(data)), 0)
				if err != nil {
					t.Error(err)
					return
				}
				defer r.Close()
				n, err := io.Copy(io.Discard, r)
				if !errors.Is(err, want) || (n == int64(len(data))) != (want == nil) {
					t.Errorf("%s, part %d: %d of %d bytes: %v, want %v", compressor, i, n, len(data), err, want)
				}
				var where *ContentError
				if want != nil && (!errors.As(err, &where) || where.Offset != int64(middle.Offset) || where.Size != int64(middle.Size)) {
					t.Errorf("%s, part %d: %v, want the chunk at %d", compressor, i, err, middle.Offset)
				}
			})
		}
		all.Wait()
		if n := len(c.pool.workers); n != 2 {
			t.Errorf("%d workers are left, want 2", n)
		}
	}
}

// FuzzReader looks for a panic of a decoder, which a source could cause, and for wrong
// data that comes.
func FuzzReader(f *testing.F) {
	type one struct {
		c    *Checker
		blob []byte
	}
	var all []one
	for _, im := range images(f) {
		for i := range im.tables {
			if im.tables[i].Opaque == 0 && im.tables[i].Blob.ChunkSize <= 64<<10 {
				all = append(all, one{checker(f, &im.tables[i]), im.blobs[i]})
			}
		}
	}
	f.Add(uint(0), uint(100), []byte("wrong"))
	f.Add(uint(7), uint(4826), []byte{0x28, 0xb5, 0x2f, 0xfd, 0xff})
	f.Fuzz(func(t *testing.T, which, at uint, change []byte) {
		o := all[which%uint(len(all))]
		wrong := bytes.Clone(o.blob)
		at %= uint(len(wrong))
		copy(wrong[at:], change)
		got, _, err := read(t, o.c, wrong, 0, len(wrong), len(wrong))
		var where *ContentError
		switch {
		case errors.As(err, &where):
			if len(got) >= len(wrong) || bytes.Contains([]byte(where.Error()), []byte("the check fails")) {
				t.Fatalf("%d bytes: %v", len(got), err)
			}
		case err != nil || !bytes.Equal(got, wrong):
			t.Fatalf("%d bytes: %v", len(got), err)
		default:
			must := covered(o.c, len(wrong))
			for i, b := range o.blob {
				if b != wrong[i] && must[i] && !harmless(o.c, o.blob, wrong, i) {
					t.Fatalf("byte %d is wrong and came", i)
				}
			}
		}
	})
}
