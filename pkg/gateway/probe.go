package gateway

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// probePath is asked with a nonce in the header nonceHeader, and answered with a
	// proof in proofHeader. Neither needs a capability.
	probePath   = "/v2/"
	nonceHeader = "Nydus-Nonce"
	proofHeader = "Nydus-Proof"
	maxNonce    = 64
	// probeTimeout bounds Probe.
	probeTimeout = 3 * time.Second
	probeEvery   = 20 * time.Millisecond
)

// Probe asks whether the gateway with a key answers at an address, and not somebody
// else who would be given its capabilities. One that is just being restarted is asked
// again.
func Probe(ctx context.Context, address string, k Key) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("no answer within %s", probeTimeout))
	defer cancel()
	// That it listens again makes no event.
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		err := probe(ctx, address, k)
		if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, io.EOF) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

func probe(ctx context.Context, address string, k Key) error {
	nonce := rand.Text()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+probePath, nil)
	if err != nil {
		return err
	}
	req.Header.Set(nonceHeader, nonce)
	// No proxy, and no connection that stays.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	resp.Body.Close()
	if !hmac.Equal([]byte(resp.Header.Get(proofHeader)), []byte(k.Prove(nonce))) {
		return errors.New("somebody answers who does not have this node's key: another program, or a gateway that was started for another root")
	}
	return nil
}
