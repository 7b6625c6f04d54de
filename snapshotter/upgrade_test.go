package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nydusfs/nydus-snapshotter/pkg/instance"
)

func TestChooseDaemons(t *testing.T) {
	a, b := strings.Repeat("a", 32), "ab"+strings.Repeat("0", 30)
	list := []instance.Status{
		{Instance: a, Generation: 2, PID: 1, State: instance.StateServing},
		{Instance: a, Generation: 1, PID: 2, State: instance.StateRetired},
		{Instance: b, Generation: 1, PID: 3, State: instance.StateIdle},
		{Instance: "dead", Generation: 1, PID: 4, State: instance.StateDead},
		{Instance: "new", Generation: 1, State: instance.StateStarting},
	}
	for _, c := range []struct {
		names []string
		pids  string
		fault string
	}{
		{nil, "1 2 3", ""},
		{[]string{"aa"}, "1 2", ""},
		{[]string{b, a}, "3 1 2", ""},
		{[]string{"a"}, "", "several"},
		{[]string{"dead"}, "", "no serving nydusd"},
		{[]string{""}, "", "no serving nydusd"},
	} {
		chosen, err := choose(list, c.names)
		var pids []string
		for _, s := range chosen {
			text, _ := json.Marshal(s.PID)
			pids = append(pids, string(text))
		}
		if c.fault == "" && (err != nil || strings.Join(pids, " ") != c.pids) || c.fault != "" && (err == nil || !strings.Contains(err.Error(), c.fault)) {
			t.Errorf("%q: %v, %v; want %s %s", c.names, pids, err, c.pids, c.fault)
		}
	}
}

func TestUpgradeCalledWrongly(t *testing.T) {
	old := filepath.Join(t.TempDir(), "nydusd")
	if err := os.WriteFile(old, []byte("#!/bin/sh\necho Version: v2.2.0\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"either --all or instances": {},
		"want either --all":         {"--all", "abc"},
		"--format is":               {"--all", "--format", "yaml"},
		"no serving nydusd":         {"abc"},
		"/none":                     {"--all", "--nydusd", "/none"},
		"cannot take":               {"--all", "--nydusd", old},
	} {
		app := newApp()
		app.Writer, app.ErrWriter = &bytes.Buffer{}, &bytes.Buffer{}
		err := app.RunContext(context.Background(), append([]string{"nydus-snapshotter", "daemon", "upgrade", "--run-dir", t.TempDir()}, args...))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("upgrade %q: %v; want %q", args, err, want)
		}
	}
}
