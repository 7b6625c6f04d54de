package health

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha1" // what OSS signs with
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	signer "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
)

// bucket is how a daemon reaches one. It holds secrets.
type bucket struct {
	kind                           string
	scheme, endpoint, region, name string
	prefix, id, secret             string
	client                         *http.Client
}

// awsEndpoint is where nydusd finds buckets of S3 that have no endpoint.
const awsEndpoint = "s3.amazonaws.com"

func bucketAnswers(ctx context.Context, kind string, settings map[string]any, env, blobs []string) error {
	b := bucket{
		kind: kind, scheme: cmp.Or(setting(settings, "scheme"), "https"), endpoint: cmp.Or(setting(settings, "endpoint"), awsEndpoint),
		region: setting(settings, "region"), name: setting(settings, "bucket_name"), prefix: setting(settings, "object_prefix"),
		id: setting(settings, "access_key_id"), secret: setting(settings, "access_key_secret"),
	}
	var err error
	if b.client, err = clientOf(settings, env); err != nil {
		return err
	}
	if len(blobs) == 0 {
		// What may be read is objects; any answer shows that it lives.
		return b.get(ctx, "", func(resp *http.Response, fail func(error) error) error {
			if resp.StatusCode >= http.StatusInternalServerError {
				return fail(errors.New(resp.Status))
			}
			return nil
		})
	}
	for _, blob := range blobs {
		if err := b.get(ctx, b.prefix+blob, verdict); err != nil {
			return err
		}
	}
	return nil
}

// get asks for the first byte, and leaves the answer to judge.
func (b *bucket) get(ctx context.Context, object string, judge func(*http.Response, func(error) error) error) error {
	fail := func(err error) error {
		return fmt.Errorf("ask bucket %s at %s for object %q: %w", b.name, b.endpoint, object, err)
	}
	at := url.URL{Scheme: b.scheme, Host: b.endpoint, Path: "/" + b.name + "/" + object}
	if b.kind == nydusd.BackendOSS {
		at.Host, at.Path = b.name+"."+b.endpoint, "/"+object
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err == nil {
		req.Header.Set("Range", "bytes=0-0")
		err = b.sign(ctx, req, object)
	}
	if err != nil {
		return fail(errors.New("it cannot be asked"))
	}
	resp, err := b.client.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) {
			err = at.Err
		}
		return fail(err)
	}
	_, _ = io.CopyN(io.Discard, resp.Body, 1)
	_ = resp.Body.Close()
	return judge(resp, fail)
}

// sign does it as each of the two wants it: S3 with version 4, OSS with version 1, as
// nydusd does (https://help.aliyun.com/document_detail/31951.html).
func (b *bucket) sign(ctx context.Context, req *http.Request, object string) error {
	now := time.Now().UTC()
	if b.kind == nydusd.BackendS3 {
		empty := sha256.Sum256(nil)
		hash := hex.EncodeToString(empty[:])
		req.Header.Set("X-Amz-Content-Sha256", hash)
		key := aws.Credentials{AccessKeyID: b.id, SecretAccessKey: b.secret}
		return signer.NewSigner(func(o *signer.SignerOptions) { o.DisableURIPathEscaping = true }).SignHTTP(ctx, key, req, hash, "s3", b.region, now)
	}
	date := now.Format(http.TimeFormat)
	mac := hmac.New(sha1.New, []byte(b.secret))
	fmt.Fprintf(mac, "%s\n\n\n%s\n/%s/%s", req.Method, date, b.name, object)
	req.Header.Set("Date", date)
	req.Header.Set("Authorization", "OSS "+b.id+":"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	return nil
}
