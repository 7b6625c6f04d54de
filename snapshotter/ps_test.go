package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sampleRows(now time.Time) []row {
	return []row{
		{Version: "2.4.0", Status: instance.Status{
			Instance: "0123456789abcdef0123456789abcdef", Generation: 2, Image: "r.example/app:1", Driver: "fuse", State: instance.StateServing,
			PID: 42, RSS: 25_700_000, Mounts: 3, Restarts: 2, Started: now.Add(-90 * time.Minute),
		}},
		{Status: instance.Status{
			Instance: "0123456789abcdef0123456789abcdef", Generation: 1, Image: "r.example/app:1", Driver: "fuse", State: instance.StateDead,
			Started: now.Add(-49 * time.Hour),
		}},
	}
}

func TestPsPrints(t *testing.T) {
	now := time.Now()
	var out bytes.Buffer
	must(t, printTable(&out, sampleRows(now), now))
	want := `INSTANCE      STATE    MOUNTS  PID  RSS      VERSION  DRIVER  AGE  RESTARTS  IMAGE
0123456789ab  serving  3       42   25.7 MB  2.4.0    fuse    90m  2         r.example/app:1
0123456789ab  dead     0       -    -        -        fuse    2d   0         r.example/app:1
`
	if out.String() != want {
		t.Errorf("the table is\n%s, want\n%s", out.String(), want)
	}
	out.Reset()
	must(t, printKeys(&out, sampleRows(now), now))
	if out.String() != "0123456789abcdef0123456789abcdef\n" {
		t.Errorf("the keys are %q", out.String())
	}
	out.Reset()
	must(t, printJSON(&out, sampleRows(now), now))
	var back []row
	if err := json.Unmarshal(out.Bytes(), &back); err != nil || len(back) != 2 || back[0].Version != "2.4.0" || back[0].RSS != 25_700_000 || back[1].State != instance.StateDead {
		t.Errorf("the JSON is %s (%v)", out.String(), err)
	}
	out.Reset()
	must(t, printJSON(&out, []row{}, now))
	if strings.TrimSpace(out.String()) != "[]" {
		t.Errorf("no instance is %q in JSON, want []", out.String())
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 3*time.Hour + time.Minute: "3h1m", 50 * time.Hour: "2d",
	} {
		if got := age(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func TestPsCalledWrongly(t *testing.T) {
	for _, args := range [][]string{{"--format", "yaml"}, {"-q", "--format", "json"}, {"extra"}} {
		app := newApp()
		app.Writer, app.ErrWriter = &bytes.Buffer{}, &bytes.Buffer{}
		if err := app.Run(append([]string{"nydus-snapshotter", "ps", "--run-dir", t.TempDir()}, args...)); err == nil {
			t.Errorf("ps %q succeeds", args)
		}
	}
}
