package kit

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// Bucket is an S3 server on 127.0.0.1 and a random port with one bucket. It asks for a
// signature (version 4) that the right key has made, and keeps a record of requests.
//
// As an HTTP proxy it stands in for OSS, whose buckets are names in DNS: what it is asked
// for at Name.OSSEndpoint has to be signed as OSS documents it. It is no OSS.
type Bucket struct {
	Host   string // 127.0.0.1:PORT, plain HTTP
	Name   string
	Region string

	backend *s3mem.Backend
	next    http.Handler

	mu         sync.Mutex
	id, secret string
	requests   []Request
}

// NewBucket starts a server that ends with the test.
func NewBucket(t TB, id, secret string) *Bucket {
	t.Helper()
	b := &Bucket{Name: "blobs", Region: "eu-test-1", id: id, secret: secret, backend: s3mem.New()}
	if err := b.backend.CreateBucket(b.Name); err != nil {
		t.Fatalf("new bucket: %v", err)
	}
	b.next = gofakes3.New(b.backend).Server()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("new bucket: %v", err)
	}
	b.Host = listener.Addr().String()
	server := &http.Server{Handler: b}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("bucket %s: %v", b.Host, err)
		}
	})
	return b
}

// Put stores the blobs of an image, each under prefix and its digest in hex.
func (b *Bucket) Put(t TB, prefix string, image *Image) {
	t.Helper()
	for n, l := range image.Layers {
		if n == image.Bootstrap() {
			continue
		}
		text, err := os.ReadFile(l.Path)
		if err == nil {
			_, err = b.backend.PutObject(b.Name, prefix+l.Desc.Digest.Encoded(), nil, bytes.NewReader(text), int64(len(text)), nil)
		}
		if err != nil {
			t.Fatalf("put into bucket: %v", err)
		}
	}
}

// Requests lists what was answered.
func (b *Bucket) Requests() []Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.requests)
}

// ServeHTTP implements http.Handler.
func (b *Bucket) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	note := Request{Method: r.Method, Path: r.URL.Path, Range: r.Header.Get("Range"), Authenticated: r.Header.Get("Authorization") != ""}
	verify, asOSS := b.verify, r.Host == b.Name+"."+OSSEndpoint
	if asOSS {
		verify = b.verifyOSS
	}
	if err := verify(r); err != nil {
		note.Status = http.StatusForbidden
		b.note(note)
		http.Error(w, "<Error><Code>SignatureDoesNotMatch</Code><Message>"+err.Error()+"</Message></Error>", http.StatusForbidden)
		return
	}
	note.Status = http.StatusOK
	b.note(note)
	r = r.Clone(context.WithoutCancel(r.Context()))
	if asOSS {
		r.URL.Host, r.Host, r.URL.Path = "", b.Host, "/"+b.Name+r.URL.Path
	}
	b.next.ServeHTTP(w, r)
}

// OSSEndpoint is what a Bucket stands in for.
const OSSEndpoint = "oss.test"

// verifyOSS checks a signature of version 1 as
// https://help.aliyun.com/document_detail/31951.html has it.
func (b *Bucket) verifyOSS(r *http.Request) error {
	m := hmac.New(sha1.New, []byte(b.secret))
	fmt.Fprintf(m, "%s\n\n\n%s\n/%s%s", r.Method, r.Header.Get("Date"), b.Name, r.URL.Path)
	if r.Header.Get("Authorization") != "OSS "+b.id+":"+base64.StdEncoding.EncodeToString(m.Sum(nil)) {
		return errors.New("no signature, or another one")
	}
	return nil
}

func (b *Bucket) note(r Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.requests = append(b.requests, r)
}

// verify checks the signature as
// https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html has it.
func (b *Bucket) verify(r *http.Request) error {
	fields := map[string]string{}
	text, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	for _, field := range strings.Split(text, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		fields[name] = value
	}
	id, scope, _ := strings.Cut(fields["Credential"], "/")
	date, _, _ := strings.Cut(scope, "/")
	if !ok || id != b.id || scope != date+"/"+b.Region+"/s3/aws4_request" {
		return errors.New("no signature, or one of another key or region")
	}
	var headers strings.Builder
	for _, name := range strings.Split(fields["SignedHeaders"], ";") {
		value := r.Header.Get(name)
		if name == "host" {
			value = r.Host
		}
		fmt.Fprintf(&headers, "%s:%s\n", name, strings.TrimSpace(value))
	}
	canonical := strings.Join([]string{
		r.Method, r.URL.EscapedPath(), r.URL.RawQuery, headers.String(), fields["SignedHeaders"], r.Header.Get("X-Amz-Content-Sha256"),
	}, "\n")
	sum := sha256.Sum256([]byte(canonical))
	key := []byte("AWS4" + b.secret)
	for _, part := range []string{date, b.Region, "s3", "aws4_request"} {
		key = mac(key, part)
	}
	want := mac(key, strings.Join([]string{"AWS4-HMAC-SHA256", r.Header.Get("X-Amz-Date"), scope, hex.EncodeToString(sum[:])}, "\n"))
	if hex.EncodeToString(want) != fields["Signature"] {
		return errors.New("the signature is another one")
	}
	return nil
}

func mac(key []byte, text string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return m.Sum(nil)
}
