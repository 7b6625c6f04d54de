package gateway

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"time"
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
)

// Probe asks whether the gateway with a key answers at an address, and not somebody
// else who would be given its capabilities.
func Probe(ctx context.Context, address string, k Key) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("no answer within %s", probeTimeout))
	defer cancel()
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
