package registry_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/pkg/gateway"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// dial connects with the gateway.
func (l *lab) dial() net.Conn {
	l.t.Helper()
	c, err := net.Dial("tcp", l.gw.Address)
	must(l.t, err)
	l.t.Cleanup(func() { c.Close() })
	must(l.t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

// path is that of the image's first blob at the gateway.
func (l *lab) path() string {
	return "/v2/" + repository + "/blobs/" + l.image.Layers[0].Desc.Digest.String()
}

// TestManyRanges asks for 500 ranges at once, while other clients take nothing of what
// they have asked for.
func TestManyRanges(t *testing.T) {
	l := smallLab(t)
	f := newFront(t, before(l.store, nil))
	l.hosts("many.test", "server = \"http://"+f.Host+"\"\n")
	v := l.mustMount("many.test")
	defer v.unmount()
	capability, blob := l.capability(v.instance, "many.test"), l.blob()
	for range 50 { // each asks for more than fits into what the kernel keeps for it
		c := l.dial()
		for range 20 {
			_, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", l.path(), capability)
			must(t, err)
		}
	}
	const ranges, length = 500, 30_000
	errs := make([]error, ranges)
	var all sync.WaitGroup
	for i := range ranges {
		all.Go(func() {
			offset := i * (len(blob) - length) / ranges
			got, err := l.get(capability, offset, length)
			if err == nil && (got.status != http.StatusPartialContent || !bytes.Equal(got.body, blob[offset:offset+length])) {
				err = fmt.Errorf("range %d: status %d, %d bytes, not those of the blob", i, got.status, len(got.body))
			}
			errs[i] = err
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	v.same()
}

// TestFewDescriptors lets the gateway run out of descriptors: what it cannot serve then it
// refuses, or lets wait, and it works as before once there are some again. That holds for
// a registry, too, that is asked for the first time meanwhile.
func TestFewDescriptors(t *testing.T) {
	l := smallLab(t)
	for _, name := range []string{"known.test", "new.test"} {
		l.hosts(name, "server = \"http://"+l.store.Host+"\"\n")
	}
	v := l.mustMount("known.test")
	defer v.unmount()
	must(t, l.gw.End(unix.SIGTERM))
	const files = 48
	l.start(files)
	v.gets("known.test")
	// More than there are wait in the middle of a request; the last ones are not accepted.
	var idle []net.Conn
	for range files + 16 {
		c := l.dial()
		_, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nRange: bytes=0-99\r\n", l.path())
		must(t, err)
		idle = append(idle, c)
	}
	kit.Eventually(t, "the gateway has no descriptor left", soon, func() bool { return l.descriptors() >= files })
	_, err := fmt.Fprintf(idle[0], "Authorization: Bearer %s\r\n\r\n", l.capability(v.instance, "new.test"))
	must(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(idle[0]), nil)
	must(t, err)
	if resp.StatusCode < 500 { // anything else says that the client is at fault
		t.Errorf("without descriptors: %s, want an error of the server", resp.Status)
	}
	for _, c := range idle {
		c.Close()
	}
	for _, name := range []string{"known.test", "new.test"} {
		kit.Eventually(t, "the gateway serves "+name+" again", patience, func() bool { return v.tryGet(name) == nil })
	}
	if !l.gw.Running() {
		t.Error("the gateway has ended")
	}
}

// descriptors counts those of the gateway.
func (l *lab) descriptors() int {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", l.gw.PID()))
	must(l.t, err)
	return len(list)
}

// TestAttacks sends what no client should to the gateway that runs: nothing of a blob
// comes out, and nobody is asked for one. The tests of package gateway have more of it.
func TestAttacks(t *testing.T) {
	l := smallLab(t)
	f := newFront(t, before(l.store, nil))
	l.hosts("attacked.test", "server = \"http://"+f.Host+"\"\n")
	v := l.mustMount("attacked.test")
	v.same()
	f.requests()
	good := l.capability(v.instance, "attacked.test")
	foreign, err := gateway.Key{1}.Seal(gateway.Grant{Instance: v.instance, Registry: "attacked.test", Repository: repository})
	must(t, err)
	smuggled := "GET " + l.path() + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + good + "\r\nRange: bytes=0-9\r\n\r\n"
	head := func(target, capability string, more ...string) string {
		return "GET " + target + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + capability + "\r\n" + strings.Join(more, "") + "\r\n"
	}
	// What each may give out: no body with 2xx at all.
	for name, text := range map[string]string{
		"no capability":        "GET " + l.path() + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"foreign capability":   head(l.path(), foreign),
		"altered capability":   head(l.path(), good[:len(good)-2]+"AA"),
		"two capabilities":     head(l.path(), good, "Authorization: Bearer "+good+"\r\n"),
		"other repository":     head(strings.Replace(l.path(), repository, "team/other", 1), good),
		"other blob":           head("/v2/"+repository+"/blobs/"+l.image.Config.Desc.Digest.String(), good),
		"manifest":             head("/v2/"+repository+"/manifests/1", good),
		"traversal":            head("/v2/x/../"+repository+l.path()[len("/v2/"+repository):], good),
		"encoded traversal":    head("/v2/x/%2e%2e/"+repository+l.path()[len("/v2/"+repository):], good),
		"encoded slash":        head(strings.Replace(l.path(), "team/image", "team%2fimage", 1), good),
		"double slash":         head("/"+l.path(), good),
		"double slash inside":  head(strings.Replace(l.path(), "/blobs/", "//blobs/", 1), good),
		"query for another":    head("http://169.254.169.254"+strings.Replace(l.path(), "image", "other", 1), good),
		"absolute form, https": head("https://127.0.0.1:1/etc/passwd", good),
		"authority form":       "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + good + "\r\n\r\n",
		"asterisk":             "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"length in a list":     head(l.path(), good, "Content-Length: 0, 5\r\n") + smuggled,
		"signed length":        head(l.path(), good, "Content-Length: +5\r\n") + smuggled,
		"chunks twice":         head(l.path(), good, "Transfer-Encoding: chunked\r\n", "Transfer-Encoding: identity\r\n") + smuggled,
		"folded":               head(l.path(), good, "X: a\r\n Content-Length: 5\r\n", "Transfer-Encoding:\r\n chunked\r\n") + "0\r\n\r\n" + smuggled,
		"bare CR":              head(l.path(), good, "X: a\rContent-Length: 5\r\n") + smuggled,
		"HTTP/2":               "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"HTTP/0.9":             "GET " + l.path() + "\r\n\r\n",
		"not HTTP":             "\x16\x03\x01\x02\x00\x01\x00\x01",
	} {
		t.Run(name, func(t *testing.T) {
			l := l.in(t)
			answers := l.exchange(text)
			for _, a := range answers {
				if a.status < 300 && len(a.body) > 0 {
					t.Errorf("answered %d with %d bytes", a.status, len(a.body))
				}
			}
			if n := blobs(f.requests()); n > 0 {
				t.Errorf("the registry was asked %d times", n)
			}
		})
	}
	t.Run("released", func(t *testing.T) {
		v.gets("attacked.test")
		v.unmount()
		if err := v.tryGet("attacked.test"); err == nil || !strings.Contains(err.Error(), "status 403") {
			t.Errorf("the capability of an instance that has ended: %v", err)
		}
	})
	if text := l.log(); strings.Contains(text, good) || strings.Contains(text, good[10:50]) {
		t.Error("the gateway's log has a capability")
	}
	if strings.Contains(l.log(), "panic") {
		t.Error("the gateway's log tells of a panic")
	}
}

// exchange writes a text to the gateway and reads all answers.
func (l *lab) exchange(text string) (answers []part) {
	l.t.Helper()
	c := l.dial().(*net.TCPConn)
	go func() {
		_, _ = io.WriteString(c, text)
		_ = c.CloseWrite()
	}()
	r := bufio.NewReader(c)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return answers
		}
		body, _ := io.ReadAll(resp.Body)
		answers = append(answers, part{resp.StatusCode, body})
	}
}
