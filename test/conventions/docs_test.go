package conventions

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// link finds [text](target) that is not a URL.
var link = regexp.MustCompile(`\]\(([^)\s:]+)\)`)

// TestDocumentationLinks follows every link within the project.
func TestDocumentationLinks(t *testing.T) {
	for _, page := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(read(t, page), -1) {
			file, anchor, _ := strings.Cut(m[1], "#")
			target := page
			if file != "" {
				target = filepath.Join(filepath.Dir(page), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
				continue
			}
			if anchor != "" && !headings(read(t, target))[anchor] {
				t.Errorf("%s links to %s, but %s has no such heading", page, m[1], target)
			}
		}
	}
}

// makeCall finds `make TARGET` in code.
var makeCall = regexp.MustCompile("(?m)(?:`|^)make ([a-z][a-z0-9-]*)")

// TestDocumentedMakeTargets keeps the commands that people are told to run.
func TestDocumentedMakeTargets(t *testing.T) {
	makefile := read(t, filepath.Join(top, "Makefile"))
	found := 0
	for _, page := range pages(t) {
		for _, m := range makeCall.FindAllStringSubmatch(read(t, page), -1) {
			found++
			if !regexp.MustCompile(`(?m)^` + m[1] + `:.* ## `).MatchString(makefile) {
				t.Errorf("%s names `make %s`, which the Makefile does not list", page, m[1])
			}
		}
	}
	if found == 0 {
		t.Error("no page names a make target: is the pattern right?")
	}
}

// tableHeader and assignment read the configuration sample.
var (
	tableHeader = regexp.MustCompile(`^\[([a-z_.]+)\]$`)
	assignment  = regexp.MustCompile(`^([a-z_]+) = (.*)$`)
)

// TestConfigurationSample keeps sample, program and reference the same.
func TestConfigurationSample(t *testing.T) {
	const sample = top + "/contrib/snapshotter/config.toml"
	text := read(t, sample)
	if out := string(command(t, build(t, "./snapshotter"), "config", "default")); out != text {
		t.Errorf("%s is not what nydus-snapshotter config default prints: write that into it", sample)
	}
	reference := sections(read(t, top+"/docs/configuration.md"))
	table := "Top level"
	for _, line := range strings.Split(text, "\n") {
		if m := tableHeader.FindStringSubmatch(line); m != nil {
			table = "[" + m[1] + "]"
		}
		m := assignment.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		row := "| `" + m[1] + "` | `" + m[2] + "` |"
		if m[1] == "version" {
			row = "| `version` |"
		}
		if !strings.Contains(reference[table], row) {
			t.Errorf("docs/configuration.md, section %q: want a row that begins with %s", table, row)
		}
	}
}

// TestErrorsAreDocumentedAsTheyAre looks up each message that the page on
// troubleshooting quotes in the sources, piece by piece between its dots.
func TestErrorsAreDocumentedAsTheyAre(t *testing.T) {
	var sources strings.Builder
	for _, path := range goFiles(t) {
		if !strings.HasSuffix(path, "_test.go") && !strings.HasPrefix(path, top+"/test/") {
			sources.WriteString(read(t, path))
		}
	}
	rows := 0
	for name, section := range sections(read(t, top+"/docs/troubleshooting.md")) {
		if strings.HasPrefix(name, "From others") {
			continue
		}
		for _, line := range strings.Split(section, "\n") {
			message, ok := strings.CutPrefix(line, "| `")
			if !ok {
				continue
			}
			rows++
			message, _, _ = strings.Cut(message, "` |")
			for _, piece := range strings.Split(message, "…") {
				if !strings.Contains(sources.String(), strings.TrimSpace(piece)) {
					t.Errorf("docs/troubleshooting.md, %q: no source has %q", name, strings.TrimSpace(piece))
				}
			}
		}
	}
	if rows == 0 {
		t.Error("docs/troubleshooting.md has no message")
	}
}

// TestSamplesAgree keeps the samples' addresses and paths equal to the
// configuration's, and the JSON among them well-formed.
func TestSamplesAgree(t *testing.T) {
	const address = "/run/nydus-snapshotter/nydus-snapshotter.sock"
	if !strings.Contains(read(t, top+"/contrib/snapshotter/config.toml"), `address = "`+address+`"`) {
		t.Errorf("the default address is no longer %s: change the samples of containerd's configuration and this test", address)
	}
	for _, path := range []string{"contrib/containerd/config-v2.toml", "contrib/containerd/config-v3.toml", "README.md"} {
		if !strings.Contains(read(t, filepath.Join(top, path)), `address = "`+address+`"`) {
			t.Errorf("%s does not name the snapshotter's default address %s", path, address)
		}
	}
	for _, path := range []string{"contrib/cri/base-runtime-spec.json", "contrib/runc/config.json"} {
		var spec struct {
			Process *json.RawMessage
			Linux   *json.RawMessage
			Hooks   map[string][]struct {
				Path string
				Args []string
			}
		}
		if err := json.Unmarshal([]byte(read(t, filepath.Join(top, path))), &spec); err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if spec.Process == nil || spec.Linux == nil {
			t.Errorf("%s is no complete runtime specification", path)
		}
		for _, stage := range []string{"createRuntime", "poststop"} {
			if h := spec.Hooks[stage]; len(h) != 1 || h[0].Path != "/usr/local/bin/nydus-shim-hook" || len(h[0].Args) != 2 || h[0].Args[1] != stage {
				t.Errorf("%s: hook %s is %v", path, stage, h)
			}
		}
	}
}

// pages lists the project's Markdown files.
func pages(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"*.md", "docs/*.md", "contrib/*/*.md", "docs/changelog/*.md", "docs/changelog/*/*.md", "test/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	if len(all) == 0 {
		t.Fatal("no Markdown file found")
	}
	return all
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// sections splits a page at its headings of the second level.
func sections(page string) map[string]string {
	parts := map[string]string{}
	for _, s := range strings.Split("\n"+page, "\n## ")[1:] {
		title, text, _ := strings.Cut(s, "\n")
		parts[title] = text
	}
	return parts
}

// notInAnchor is what GitHub leaves out of a heading's anchor.
var notInAnchor = regexp.MustCompile(`[^\p{L}\p{N} _-]`)

// headings are the anchors of a page.
func headings(page string) map[string]bool {
	anchors := map[string]bool{}
	for _, line := range strings.Split(page, "\n") {
		if title := strings.TrimLeft(line, "#"); title != line && strings.HasPrefix(title, " ") {
			title = notInAnchor.ReplaceAllString(strings.ToLower(strings.TrimSpace(title)), "")
			anchors[strings.ReplaceAll(title, " ", "-")] = true
		}
	}
	return anchors
}
