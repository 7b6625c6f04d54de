package main

import (
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/blob"
)

func TestPrintScrub(t *testing.T) {
	now := time.Date(2030, 1, 2, 0, 0, 0, 0, time.UTC)
	pass := blob.ScrubPass{Started: now.Add(-5 * time.Hour), Blobs: 7, Checked: 70, Removed: 2, Damaged: 1, Failed: 3}
	ended := pass
	ended.Ended = now.Add(-time.Hour)
	const found = "7 blobs, 70 chunks compared, 2 blobs wrong and removed, 1 wrong and in use, 3 not read"
	for want, state := range map[string]blob.ScrubState{
		"":                                   {},
		"not scrubbed yet; begins in 3h0m\n": {Next: now.Add(3 * time.Hour)},
		"being scrubbed for 5h0m: " + found + "\n":       {Next: now, Pass: &pass, Last: &ended},
		"scrubbed 60m ago: " + found + "; again in 4d\n": {Next: now.Add(96 * time.Hour), Last: &ended},
	} {
		var out strings.Builder
		if printScrub(&out, state, now); out.String() != want {
			t.Errorf("got %q, want %q", out.String(), want)
		}
	}
}
