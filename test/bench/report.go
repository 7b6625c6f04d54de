package main

import (
	"bytes"
	"cmp"
	_ "embed" // readahead.md
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/demo/show"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// readAhead is what was measured by hand, once, to choose a setting.
//
//go:embed readahead.md
var readAhead string

// report is all that a run measured.
type report struct {
	Date    string    `json:"date"`
	Rounds  int       `json:"rounds"`
	Machine []fact    `json:"machine"`
	Results []*result `json:"results"`
	Binary  *binary   `json:"binary,omitempty"`
	Memory  *memory   `json:"memory,omitempty"`
	Figures []*figure `json:"figures,omitempty"`
}

// fact is something about the machine or the programs, for readers.
type fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// result is one work's. Samples are in seconds, in the order of the rounds.
type result struct {
	Name        string    `json:"name"`
	Target      float64   `json:"target,omitempty"`
	Ours        string    `json:"what"`
	Peer        string    `json:"peer"`
	OursSamples []float64 `json:"seconds"`
	PeerSamples []float64 `json:"peer_seconds"`
}

// binary is what the helper's file is like.
type binary struct {
	Bytes    int64    `json:"bytes"`
	Limit    int64    `json:"limit"`
	Packages int      `json:"packages"`
	Heavy    []string `json:"heavy_packages"`
}

// memory is what the snapshotter takes.
type memory struct {
	RSS       int64 `json:"rss_bytes"`
	PSS       int64 `json:"pss_bytes"`
	Limit     int64 `json:"limit"`
	Images    int   `json:"images"`
	Snapshots int   `json:"snapshots"`
	Daemons   int   `json:"nydusd"`
}

// quantile of the samples, between 0 and 1, interpolated.
func quantile(samples []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(samples))
	at := q * float64(len(s)-1)
	low := int(at)
	if low+1 >= len(s) {
		return s[len(s)-1]
	}
	return s[low] + (at-float64(low))*(s[low+1]-s[low])
}

// ratio of the medians.
func (r *result) ratio() float64 { return quantile(r.OursSamples, 0.5) / quantile(r.PeerSamples, 0.5) }

// pairs are the ratios of the single rounds.
func (r *result) pairs() []float64 {
	var list []float64
	for n := range r.OursSamples {
		list = append(list, r.OursSamples[n]/r.PeerSamples[n])
	}
	return list
}

// verdict compares with the target.
func (r *result) verdict() string {
	switch over := r.ratio()/r.Target - 1; {
	case r.Target == 0:
		return "–"
	case over <= 0:
		return "met"
	default:
		return fmt.Sprintf("**missed** by %.0f %%", max(1, over*100))
	}
}

// spread writes a median with its quartiles.
func spread(samples []float64) string {
	d := func(q float64) string {
		return show.Duration(time.Duration(quantile(samples, q) * float64(time.Second)))
	}
	return fmt.Sprintf("%s (%s – %s)", d(0.5), d(0.25), d(0.75))
}

// describe notes what the figures were measured on. It names no host.
func (l *lab) describe(t kit.TB) error {
	r := &l.report
	r.Date, r.Rounds = time.Now().UTC().Format(time.DateOnly), l.options.rounds
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(kit.Scratch(), &disk); err != nil {
		return err
	}
	tools := kit.MustTools(t)
	// What follows the numbers is the machine's own business.
	r.add("kernel", "Linux "+number.FindString(unix.ByteSliceToString(name.Release[:])))
	r.add("processor", fmt.Sprintf("%s, %d cores used", field("/proc/cpuinfo", "model name"), runtime.NumCPU()))
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		return err
	}
	r.add("memory", fmt.Sprintf("%.0f GiB", float64(memory.Totalram*uint64(memory.Unit))/(1<<30)))
	// The benchmark itself keeps one or two busy; more is somebody else's work.
	r.add("load before", fmt.Sprintf("%.1f (average of 5 minutes)", float64(memory.Loads[1])/(1<<16)))
	r.add("file system", diskName(disk.Type))
	r.add("containerd", version(filepath.Join(tools.ContainerdBin, "containerd"), "--version"))
	r.add("runc", version(tools.Runc, "--version"))
	r.add("nydusd", version(tools.Nydusd, "--version"))
	r.add("Go", strings.TrimPrefix(runtime.Version(), "go"))
	return nil
}

func (r *report) add(name, value string) { r.Machine = append(r.Machine, fact{name, value}) }

// field finds "NAME: VALUE" in a file of /proc.
func field(file, name string) string {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.Join(strings.Fields(v), " ")
		}
	}
	return "unknown"
}

func diskName(magic int64) string {
	switch magic {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	}
	return "type 0x" + strconv.FormatInt(magic, 16)
}

// number finds a version.
var number = regexp.MustCompile(`[0-9]+\.[0-9]+(\.[0-9]+)?`)

// version asks a program. A nydusd built from its crate does not know; the tool
// cache's directory tells then.
func version(path, arg string) string {
	out, err := exec.Command(path, arg).Output()
	line, _, _ := strings.Cut(string(out), "\n")
	if v := number.FindString(line); err == nil && v != "" {
		return v
	}
	if v := number.FindString(filepath.Base(filepath.Dir(filepath.Dir(path)))); v != "" {
		return v
	}
	return "unknown"
}

// publish prints the report and writes the files.
func (r *report) publish(o options) error {
	text := r.render()
	if o.json {
		out, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", out)
	} else {
		fmt.Print(strings.Join(r.table(), "\n") + "\n")
	}
	dir := o.out
	if dir == "" {
		if o.only != nil {
			return nil
		}
		top, err := kit.Checkout()
		if err != nil {
			return err
		}
		dir = filepath.Join(top, "docs")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	files := map[string][]byte{"benchmarks.md": text}
	if len(r.Results) > 0 {
		svg, err := r.plot()
		if err != nil {
			return fmt.Errorf("draw the plot: %w", err)
		}
		files["benchmarks.svg"] = svg
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "wrote %s\n", filepath.Join(dir, name))
	}
	return nil
}

// table is in Markdown and readable as it stands.
func (r *report) table() []string {
	rows := [][]string{{"work", "this project", "peer", "ratio", "target", "verdict"}}
	for _, x := range r.Results {
		target := "–"
		if x.Target > 0 {
			target = fmt.Sprintf("≤ %.2f ×", x.Target)
		}
		rows = append(rows, []string{x.Name, spread(x.OursSamples), spread(x.PeerSamples), fmt.Sprintf("%.2f ×", x.ratio()), target, x.verdict()})
	}
	if b := r.Binary; b != nil {
		heavy := "none"
		if len(b.Heavy) > 0 {
			heavy = strings.Join(b.Heavy, " ")
		}
		rows = append(rows, []string{
			binaryName, fmt.Sprintf("%s, %d packages; net/http, TLS, gRPC, Kubernetes: %s", show.Bytes(b.Bytes), b.Packages, heavy),
			"–", "–", "≤ " + show.Bytes(b.Limit) + ", none", limit(b.Bytes, b.Limit, len(b.Heavy) == 0),
		})
	}
	if m := r.Memory; m != nil {
		rows = append(rows, []string{
			memoryName, fmt.Sprintf("RSS %.1f MiB, PSS %.1f MiB, %d nydusd", mebi(m.RSS), mebi(m.PSS), m.Daemons),
			"–", "–", fmt.Sprintf("≤ %.0f MiB, 0", mebi(m.Limit)), limit(m.RSS, m.Limit, m.Daemons == 0),
		})
	}
	for _, f := range r.Figures {
		rows = append(rows, []string{f.Name, f.Text, "–", "–", cmp.Or(f.Target, "–"), f.verdict()})
	}
	return align(rows)
}

func mebi(n int64) float64 { return float64(n) / (1 << 20) }

func limit(is, most int64, ok bool) string {
	switch {
	case !ok:
		return "**missed**"
	case is > most:
		return fmt.Sprintf("**missed** by %.0f %%", max(1, 100*(float64(is)/float64(most)-1)))
	}
	return "met"
}

// align pads the cells of a Markdown table.
func align(rows [][]string) []string {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	var lines []string
	for n, row := range rows {
		var b strings.Builder
		for i, cell := range row {
			fmt.Fprintf(&b, "| %s%s ", cell, strings.Repeat(" ", width[i]-len([]rune(cell))))
		}
		lines = append(lines, b.String()+"|")
		if n == 0 {
			var rule strings.Builder
			for _, w := range width {
				rule.WriteString("| " + strings.Repeat("-", w) + " ")
			}
			lines = append(lines, rule.String()+"|")
		}
	}
	return lines
}

// render is docs/benchmarks.md.
func (r *report) render() []byte {
	var b bytes.Buffer
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("# Benchmarks\n")
	p("<!-- Written by `make bench`; change test/bench instead. -->\n")
	p("What the project costs against what it competes with. Each work was done by the project and by its peer in turn, in one")
	p("run on one machine: A, B, A, B, …, %d rounds after one that does not count. Times are medians with quartiles; the ratio is", r.Rounds)
	p("that of the medians. `make bench` measures again and rewrites this page.\n")
	for _, line := range r.table() {
		p("%s", line)
	}
	if len(r.Results) > 0 {
		p("\n![Ratio to the peer for each work, with targets](benchmarks.svg)\n")
		p("In the plot a bar is the ratio of the medians, a dot the ratio of one round, a red line the target.\n")
	}
	p("## What was measured\n")
	p("The image is the tests' main fixture: Debian packages (python, perl, git, LLVM) and some thousand generated files, as a")
	p("nydus image (RAFS v6, zstd, chunks of 1 MiB) and as a plain one (gzip) with the same content. One containerd has both; no hook is installed.\n")
	for _, x := range r.Results {
		p("- **%s.** This project: %s. Peer: %s.", x.Name, x.Ours, x.Peer)
	}
	if r.Binary != nil {
		p("- **%s.** The file bin/nydus-overlayfs, and `go list -deps ./mount-helper`.", binaryName)
	}
	if m := r.Memory; m != nil {
		p("- **%s.** %d images pulled, %d snapshots in all, the mounts of each active one asked for once, nothing running; read", memoryName, m.Images, m.Snapshots)
		p("  after the process had used no processor time for two seconds, without a forced garbage collection.")
	}
	for _, f := range r.Figures {
		p("- **%s.** %s.", f.Name, f.What)
	}
	p("\n## On what\n")
	p("| | |")
	p("| --- | --- |")
	p("| date | %s |", r.Date)
	for _, f := range r.Machine {
		p("| %s | %s |", f.Name, f.Value)
	}
	p("\n%s", strings.TrimSpace(readAhead))
	return b.Bytes()
}
