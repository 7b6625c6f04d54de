package checkpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob/chunkmap"
	"github.com/nydusfs/nydus-snapshotter/pkg/blob/proof"
)

const (
	id     = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	chunks = 20
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bed is a cache directory with one blob.
type bed struct {
	t    *testing.T
	dir  string
	name string // of the map
}

func newBed(t *testing.T, name string) *bed {
	b := &bed{t, t.TempDir(), name}
	b.put(id+".blob.data", bytes.Repeat([]byte("data"), 5000))
	b.put(id+".blob.meta", []byte("metadata"))
	return b
}

func (b *bed) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bed) put(name string, text []byte) {
	b.t.Helper()
	must(b.t, os.WriteFile(b.path(name), text, 0o600))
}

// set makes the map one of these chunks, as nydusd does: in place.
func (b *bed) set(list ...uint32) {
	b.t.Helper()
	text := append(chunkmap.Header(), make([]byte, (chunks+7)/8)...)
	for _, n := range list {
		text[chunkmap.HeaderSize+n/8] |= 0x80 >> (n % 8)
	}
	b.put(b.name, text)
}

// all lists the chunks below n.
func all(n uint32) (list []uint32) {
	for i := range n {
		list = append(list, i)
	}
	return list
}

func (b *bed) take() Report {
	b.t.Helper()
	r, err := Take(b.t.Context(), b.dir, time.Now(), func() (func(), error) { return func() {}, nil })
	must(b.t, err)
	return r
}

func (b *bed) restore() Report {
	b.t.Helper()
	r, err := Restore(b.dir)
	must(b.t, err)
	return r
}

// has checks which chunks the map has; none means that there is no map.
func (b *bed) has(want ...uint32) {
	b.t.Helper()
	m, err := chunkmap.Read(b.path(b.name), chunks)
	if len(want) == 0 {
		if !errors.Is(err, os.ErrNotExist) {
			b.t.Errorf("there is a map: %v, %v", m, err)
		}
		return
	}
	must(b.t, err)
	for _, n := range want {
		if !m.Has(n) {
			b.t.Errorf("chunk %d is gone", n)
		}
	}
	if m.Ready() != len(want) {
		b.t.Errorf("%d chunks are there, want %d", m.Ready(), len(want))
	}
}

func (b *bed) exists(name string, want bool) {
	b.t.Helper()
	if _, err := os.Lstat(b.path(name)); (err == nil) != want {
		b.t.Errorf("%s: %v, want that it is there: %v", name, err, want)
	}
}

func each(t *testing.T, test func(b *bed)) {
	for _, name := range chunkmap.Names(id) {
		t.Run(strings.TrimPrefix(name, id), func(t *testing.T) { test(newBed(t, name)) })
	}
}

// TestRestore: what was synced stays, what came later goes.
func TestRestore(t *testing.T) {
	each(t, func(b *bed) {
		b.set(1, 2, 9)
		if r := b.take(); r != (Report{1, 3}) {
			b.t.Errorf("took %+v", r)
		}
		if r := b.take(); r != (Report{}) {
			b.t.Errorf("took the same again: %+v", r)
		}
		if r := b.restore(); r != (Report{}) {
			b.t.Errorf("restored what is right: %+v", r)
		}
		b.set(1, 2, 3, 9, 19)
		if r := b.restore(); r != (Report{1, 2}) {
			b.t.Errorf("restored %+v", r)
		}
		b.has(1, 2, 9)
		b.exists(id+".blob.meta", true)
		b.exists(id+".blob.data", true)
		// A map that has forgotten something is not made to remember.
		b.set(2, 4)
		b.restore()
		b.has(2)
	})
}

// TestRestoreLeavesOpenFilesAlone: a daemon that has the map open keeps what it has.
func TestRestoreLeavesOpenFilesAlone(t *testing.T) {
	each(t, func(b *bed) {
		b.set(1)
		b.take()
		b.set(1, 2)
		was, err := os.ReadFile(b.path(b.name))
		must(b.t, err)
		f, err := os.Open(b.path(b.name))
		must(b.t, err)
		defer f.Close()
		b.restore()
		b.has(1)
		now := make([]byte, len(was))
		if _, err := f.ReadAt(now, 0); err != nil || !bytes.Equal(was, now) {
			b.t.Errorf("the open map was changed: %v", err)
		}
	})
}

// TestRestoreWithout lists what makes a map worth nothing.
func TestRestoreWithout(t *testing.T) {
	for what, spoil := range map[string]func(b *bed){
		"checkpoint": func(b *bed) { must(b.t, os.Remove(b.path(b.name+Suffix))) },
		"sense in it": func(b *bed) {
			b.put(b.name+Suffix, []byte("{"))
		},
		"a known version": func(b *bed) {
			text, err := os.ReadFile(b.path(b.name + Suffix))
			must(b.t, err)
			b.put(b.name+Suffix, bytes.Replace(text, []byte(`"version":1`), []byte(`"version":2`), 1))
		},
		"its data": func(b *bed) { must(b.t, os.Remove(b.path(id+".blob.data"))) },
		"the data's size": func(b *bed) {
			must(b.t, os.Truncate(b.path(id+".blob.data"), 1<<20))
		},
		"the same file": func(b *bed) {
			text, err := os.ReadFile(b.path(id + ".blob.data"))
			must(b.t, err)
			b.put("other", text)
			must(b.t, os.Rename(b.path("other"), b.path(id+".blob.data")))
		},
		"a head": func(b *bed) { b.put(b.name, append(make([]byte, chunkmap.HeaderSize), 0xff, 0, 0)) },
		"its size": func(b *bed) {
			text, err := os.ReadFile(b.path(b.name))
			must(b.t, err)
			b.put(b.name, append(text, 0))
		},
		"a whole head": func(b *bed) { b.put(b.name, chunkmap.Header()[:100]) },
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(b *bed) {
				b.set(1, 2)
				b.take()
				spoil(b)
				if r := b.restore(); r.Blobs != 1 {
					b.t.Errorf("restored %+v", r)
				}
				b.has()
				b.exists(b.name+Suffix, false)
				b.restore() // and once more
			})
		})
	}
}

// TestRestoreMark: nydusd marks a full map, and looks at no bit of it any more.
func TestRestoreMark(t *testing.T) {
	mark := func(b *bed) {
		text, err := os.ReadFile(b.path(b.name))
		must(b.t, err)
		copy(text[12:], []byte{0x50, 0x41, 0x4D, 0x4D})
		b.put(b.name, text)
	}
	marked := func(b *bed) bool {
		m, err := readMap(b.path(b.name))
		must(b.t, err)
		return m.full
	}
	each(t, func(b *bed) {
		b.set(all(chunks)...)
		b.take()
		mark(b)
		b.restore()
		b.has(all(chunks)...)
		if marked(b) {
			b.t.Error("a mark is believed that was not synced")
		}
		mark(b)
		b.take()
		if r := b.restore(); r != (Report{}) || !marked(b) {
			b.t.Errorf("a mark that was synced is gone: %+v", r)
		}
		b.set(1)
		mark(b)
		b.restore()
		b.has(1)
	})
}

func TestRestoreMetadata(t *testing.T) {
	each(t, func(b *bed) {
		b.put(id+".blob.toc", []byte("toc"))
		b.set(1)
		b.take()
		b.put(id+".blob.digest", []byte("later"))
		b.restore()
		b.exists(id+".blob.digest", false)
		b.exists(id+".blob.toc", true)
		b.exists(id+".blob.meta", true)
		// In place, so that only the content tells.
		b.put(id+".blob.meta", []byte("\x00\x00\x00\x00data"))
		b.restore()
		b.exists(id+".blob.meta", false)
		b.has(1)
		// New metadata is taken although no chunk is new.
		b.put(id+".blob.meta", []byte("metadata"))
		b.take()
		b.restore()
		b.exists(id+".blob.meta", true)
	})
}

// TestRestoreRemovedMap: whoever removes a map wants the blob fetched anew.
func TestRestoreRemovedMap(t *testing.T) {
	each(t, func(b *bed) {
		b.set(1, 2)
		b.take()
		must(b.t, os.Remove(b.path(b.name)))
		b.restore()
		b.exists(b.name+Suffix, false)
		b.exists(b.name, false)
	})
}

// TestRestoreProven: what was compared needs no checkpoint, until somebody writes to it.
func TestRestoreProven(t *testing.T) {
	each(t, func(b *bed) {
		b.set(all(chunks)...)
		f, err := os.Open(b.path(id + ".blob.data"))
		must(t, err)
		defer f.Close()
		now, err := proof.Stat(f)
		must(t, err)
		of := "sha256:" + strings.Repeat("ab", 32)
		text, err := json.Marshal(proof.New(of, []proof.Blob{{ID: id, File: now}}))
		must(t, err)
		must(t, os.WriteFile(proof.Path(b.dir, of), text, 0o600))
		b.restore()
		b.has(all(chunks)...)
		must(t, os.Truncate(f.Name(), now.Size)) // which changes its times
		must(t, os.Chtimes(f.Name(), time.Now(), time.Unix(1, 0)))
		b.restore()
		b.has()
	})
}

// TestProofsAreReadLate: to take a checkpoint nobody needs them.
func TestProofsAreReadLate(t *testing.T) {
	b := newBed(t, chunkmap.Names(id)[0])
	b.set(all(chunks)...)
	of := "sha256:" + strings.Repeat("ab", 32)
	b.put(filepath.Base(proof.Path(b.dir, of)), []byte("no proof yet"))
	list, err := blobs(b.dir)
	must(t, err)
	f, err := os.Open(b.path(id + ".blob.data"))
	must(t, err)
	defer f.Close()
	now, err := proof.Stat(f)
	must(t, err)
	text, err := json.Marshal(proof.New(of, []proof.Blob{{ID: id, File: now}}))
	must(t, err)
	must(t, os.WriteFile(proof.Path(b.dir, of), text, 0o600))
	if len(list) != 1 || !list[0].proven() {
		t.Errorf("of %d blobs the proofs were read before anybody asked", len(list))
	}
}

// TestTakeNothing: files that nydusd is making have nothing to keep.
func TestTakeNothing(t *testing.T) {
	each(t, func(b *bed) {
		if r := b.take(); r != (Report{}) {
			b.t.Errorf("no map: %+v", r)
		}
		b.put(b.name, nil)
		if r := b.take(); r != (Report{}) {
			b.t.Errorf("an empty map: %+v", r)
		}
		b.restore()
		b.exists(b.name, true)
		b.exists(b.name+Suffix, false)
		b.set(1)
		must(b.t, os.Remove(b.path(id+".blob.data")))
		if r := b.take(); r != (Report{}) {
			b.t.Errorf("no data: %+v", r)
		}
	})
}

func TestTakeTidies(t *testing.T) {
	b := newBed(t, chunkmap.Names(id)[0])
	b.put(temporary+"1", nil)
	b.put(temporary+"2", nil)
	old := time.Now().Add(-2 * abandoned)
	must(t, os.Chtimes(b.path(temporary+"1"), old, old))
	b.take()
	b.exists(temporary+"1", false)
	b.exists(temporary+"2", true)
}

// TestTakeFails: one blob that cannot be synced keeps no other from it.
func TestTakeFails(t *testing.T) {
	b := newBed(t, chunkmap.Names(id)[0])
	b.set(1)
	other := strings.Repeat("0", 64)
	b.put(other+".blob.data", []byte("data"))
	b.put(other+".blob.data.chunk_map", []byte("short"))
	_, err := Take(t.Context(), b.dir, time.Now(), func() (func(), error) { return func() {}, nil })
	if !errors.Is(err, chunkmap.ErrInvalid) || !strings.Contains(err.Error(), other) {
		t.Errorf("%v, want one about %s", err, other)
	}
	b.exists(b.name+Suffix, true)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b.set(1, 2)
	if _, err := Take(ctx, b.dir, time.Now(), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

// TestTakeFailsAlike: what fails each time in the same way says the same, or it would be told
// each time.
func TestTakeFailsAlike(t *testing.T) {
	b := newBed(t, chunkmap.Names(id)[0])
	b.set(1)
	must(t, os.Mkdir(b.path(b.name+Suffix), 0o700))
	said := ""
	for range 2 {
		_, err := Take(t.Context(), b.dir, time.Now(), func() (func(), error) { return func() {}, nil })
		if err == nil || !strings.Contains(err.Error(), b.path(b.name+Suffix)) || said != "" && err.Error() != said {
			t.Fatalf("%v, want it as before, with the file's name: %s", err, said)
		}
		said = err.Error()
	}
	left, err := filepath.Glob(b.path(temporary + "*"))
	if must(t, err); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

// TestDistrust: what was fetched since the last checkpoint is not believed.
func TestDistrust(t *testing.T) {
	each(t, func(b *bed) {
		b.set(1)
		b.take()
		b.set(1, 2)
		must(b.t, Distrust(b.dir, id))
		b.has(1)
		must(b.t, Distrust(b.dir, strings.Repeat("0", 64)))
	})
}
