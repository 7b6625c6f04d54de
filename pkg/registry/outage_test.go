package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A token server that has refused a login is asked again, when the login or it has changed.
func TestRefusedLoginIsTriedAgain(t *testing.T) {
	i := newIssuer(t)
	good := i.token
	var asked atomic.Int64
	i.token = func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(http.StatusUnauthorized)
	}
	f := quick(i.endpoints(t))
	for range 5 {
		if _, err := read(t, f, 0, 10); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
	}
	if n := asked.Load(); n > 4 {
		t.Errorf("it was asked %d times at once", n)
	}
	i.token = good
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(refusedFor / 4)
	defer tick.Stop()
	for {
		_, err := read(t, f, 0, 10)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it is still refused: %v", err)
		}
		<-tick.C
	}
}

// logins is a keychain whose answers change.
type logins struct{ now atomic.Pointer[Credentials] }

func (l *logins) Credentials(context.Context, string, string) (*Credentials, error) {
	return l.now.Load(), nil
}

// A token that is final, and a registry that was open to nobody, are tried with what the
// keychain has since.
func TestLoginThatChanges(t *testing.T) {
	for name, c := range map[string]struct{ old, next *Credentials }{
		"token":   {&Credentials{RegistryToken: "old"}, &Credentials{RegistryToken: "new"}},
		"nothing": {nil, &Credentials{Auth: base64.StdEncoding.EncodeToString([]byte("user:new"))}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSource(t)
			s.fail(func(w http.ResponseWriter, r *http.Request) {
				_, password, _ := r.BasicAuth()
				if password != "new" && r.Header.Get("Authorization") != "Bearer new" {
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				serve(w, r)
			})
			e, _ := setup(t, "", s)
			k := &logins{}
			k.now.Store(c.old)
			e.cfg.Keychain = k
			f := quick(e)
			if _, err := read(t, f, 0, 10); !errors.Is(err, ErrRefused) {
				t.Fatal(err)
			}
			k.now.Store(c.next)
			mustRead(t, f, 0, 10)
		})
	}
}

// A host whose content was wrong is asked after one that has failed just now.
func TestLiarIsTheLast(t *testing.T) {
	liar, weak := newSource(t), newSource(t)
	e, _ := setup(t, "", liar, weak)
	f := quick(e)
	p, err := f.Open(t.Context(), blob(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	p.Distrust(0, 10)
	p.Close()
	var times atomic.Int64
	weak.fail(func(w http.ResponseWriter, r *http.Request) {
		if times.Add(1) == 1 {
			hostFaults["reset in the middle"](w, r)
			return
		}
		serve(w, r)
	})
	_, _ = read(t, f, 0, -1) // the rest comes from whom there is
	before := liar.asked.Load()
	mustRead(t, f, 0, 10)
	if liar.asked.Load() != before {
		t.Error("the liar was asked before one that had stumbled")
	}
}

// Of two hosts that have given out the same bytes the first one is blamed.
func TestWhoIsBlamed(t *testing.T) {
	first, second := newSource(t), newSource(t)
	e, _ := setup(t, "", first, second)
	first.fail(hostFaults["reset in the middle"])
	f := quick(e)
	p, err := f.Open(t.Context(), blob(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := io.Copy(io.Discard, p); err != nil {
		t.Fatal(err)
	}
	if p.Host() != second.host() || len(p.stretches) != 2 {
		t.Fatalf("it ends at %s, %d stretches", p.Host(), len(p.stretches))
	}
	p.Distrust(10, int64(len(content))-20)
	p.Distrust(int64(len(content))-1, 1)
	now := time.Now()
	for i, want := range []*source{first, second} {
		if f.avoided[blobAt(p.stretches[i].host, blob())].rankAt(now) != wrong || p.stretches[i].host.Host != want.host() {
			t.Errorf("host %d is not distrusted", i)
		}
	}
}

// An error whose text never comes does not hold anybody up.
func TestErrorThatStalls(t *testing.T) {
	for _, code := range []int{401, 404, 503, 206} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			ill, good := newSource(t), newSource(t)
			e, _ := setup(t, "", ill, good)
			ill.fail(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.Header().Set("Content-Length", "100")
				w.WriteHeader(code)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			})
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			p, err := quick(e).Open(ctx, blob(), 0, 10)
			if err != nil {
				t.Fatal(err)
			}
			p.Close()
		})
	}
}

// slow is a keychain that does not know an end for one host.
type slow struct {
	host string
	stop chan struct{}
}

func (s slow) Credentials(_ context.Context, host, _ string) (*Credentials, error) {
	if host == s.host {
		<-s.stop
	}
	return nil, nil
}

// A source of credentials that hangs holds up those alone who need it.
func TestSlowKeychain(t *testing.T) {
	locked, good := newSource(t), newSource(t)
	locked.fail(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	e, dir := setup(t, "", locked)
	put(t, strings.Replace(dir, "registry.test", "other.test", 1)+"/hosts.toml", fmt.Sprintf("server = %q\n", good.URL))
	k := slow{locked.host(), make(chan struct{})}
	e.cfg.Keychain = k
	f := NewFetcher(FetcherConfig{Finder: e, AnswerTimeout: time.Minute, GiveUp: time.Minute})
	ended := make(chan error, 2)
	ctx, cancel := context.WithCancel(t.Context())
	for range 2 {
		go func() {
			_, err := f.Open(ctx, blob(), 0, 10)
			ended <- err
		}()
	}
	for range 3 {
		b := blob()
		b.Registry = "other.test"
		p, err := f.Open(t.Context(), b, 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
	}
	cancel() // who waits for it can go
	for range 2 {
		if err := <-ended; err == nil {
			t.Error("it was opened")
		}
	}
	close(k.stop)
}

// A reader that pauses for longer than hosts are waited for takes none of their time.
func TestPause(t *testing.T) {
	one, two := newSource(t), newSource(t)
	e, _ := setup(t, "", one, two)
	gone := make(chan struct{})
	one.fail(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		_, _ = w.Write(content[:1000])
		w.(http.Flusher).Flush()
		<-gone
		panic(http.ErrAbortHandler)
	})
	const short = 500 * time.Millisecond
	f := NewFetcher(FetcherConfig{Finder: e, GiveUp: short})
	p, err := f.Open(t.Context(), blob(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := io.CopyN(io.Discard, p, 1000); err != nil {
		t.Fatal(err)
	}
	p.moved = time.Now().Add(-time.Hour) // as after a pause
	close(gone)
	if n, err := io.Copy(io.Discard, p); err != nil || n != int64(len(content))-1000 {
		t.Errorf("%d bytes more, %v", n, err)
	}
}

// What many parts meet at once is one failure, and no time is longer than the longest.
func TestAvoidDoubles(t *testing.T) {
	f := NewFetcher(FetcherConfig{})
	for range 8 {
		f.avoid("a", stumbled, 10*time.Second)
	}
	if left := time.Until(f.avoided["a"].until); left > 10*time.Second {
		t.Errorf("after one failure it is avoided for %v", left)
	}
	for range 20 {
		a := f.avoided["a"]
		a.until = time.Now()
		f.avoided["a"] = a
		f.avoid("a", stumbled, 10*time.Second)
	}
	if left := time.Until(f.avoided["a"].until); left > mostAvoid || left < time.Minute {
		t.Errorf("after many it is avoided for %v", left)
	}
	f.avoid("b", wrong, avoidWrong)
	if left := time.Until(f.avoided["b"].until); left < avoidWrong-time.Minute || left > avoidWrong {
		t.Errorf("what is wrong is avoided for %v", left)
	}
}
