package conventions

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// licences maps what may be linked to a sentence of its text, with any white
// space matched by one blank. MPL-2.0 is fine as long as the files it covers are
// used unmodified, as the Go module system has it. The first match counts, so a
// licence that contains another's sentence comes first.
var licences = []struct {
	name string
	text string
}{
	{"Apache-2.0", "Apache License Version 2.0, January 2004"},
	// A public domain dedication, with a licence for where that is not to be had. It
	// grants no patents: fine for the hash functions that come with it, look twice at
	// anything else.
	{"CC0-1.0", "This work is released into the public domain with CC0 1.0."},
	// A public domain dedication, too, which disclaims warranties as MIT does.
	{"Unlicense", "This is free and unencumbered software released into the public domain."},
	{"MPL-2.0", "Mozilla Public License, version 2.0"},
	{"MPL-2.0", "Mozilla Public License Version 2.0"},
	{"MIT", "Permission is hereby granted, free of charge, to any person obtaining a copy"},
	{"BSD", "Redistribution and use in source and binary forms, with or without modification, are permitted"},
	{"ISC", "Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee"},
	{"ISC", "Permission to use, copy, modify, and distribute this software for any purpose with or without fee"},
}

var (
	space       = regexp.MustCompile(`[\s>]+`) // some texts are quoted
	licenceName = regexp.MustCompile(`(?i)^(licen[cs]e|copying|unlicense)`)
)

// TestLicences reads the licence of every module that ends up in a binary.
// `make licenses` prints its list.
func TestLicences(t *testing.T) {
	modules := map[string]*goModule{}
	for _, m := range mains {
		for _, p := range linked(t, m) {
			if p.Module != nil && !p.Module.Main {
				modules[p.Module.Path] = p.Module
			}
		}
	}
	if len(modules) == 0 {
		t.Fatal("the binaries link no module at all: is go list right?")
	}
	for _, path := range slices.Sorted(maps.Keys(modules)) {
		m := modules[path]
		name, err := licence(m.Dir)
		if err != nil {
			t.Errorf("%s %s: %v", m.Path, m.Version, err)
			continue
		}
		t.Logf("%-10s %s %s", name, m.Path, m.Version)
	}
}

// licence names the licence of the module in dir.
func licence(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("find its licence: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() || !licenceName.MatchString(e.Name()) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return "", fmt.Errorf("read its licence: %w", err)
		}
		plain := space.ReplaceAllString(string(text), " ")
		for _, l := range licences {
			if strings.Contains(strings.ToLower(plain), strings.ToLower(l.text)) {
				return l.name, nil
			}
		}
		return "", fmt.Errorf("%s is none of the licences that may be linked (Apache-2.0, MIT, BSD, ISC, MPL-2.0, CC0-1.0, Unlicense)", e.Name())
	}
	return "", fmt.Errorf("no licence file in %s", dir)
}
