package kubelet

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/pkg/credentials"
)

const secret = "s3cr3t-canary"

// node is a node's plugins: shell scripts, which find their request in $request and
// count themselves.
type node struct {
	t      *testing.T
	dir    string
	config strings.Builder
	now    time.Time
	mu     sync.Mutex
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), now: time.Unix(1e9, 0)}
	n.config.WriteString("apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n")
	return n
}

func (n *node) plugin(name, images, script string) {
	n.t.Helper()
	text := fmt.Sprintf("#!/bin/sh\necho x >>%s\nread -r request\n%s\n", filepath.Join(n.dir, name+".count"), script)
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(text), 0o700); err != nil {
		n.t.Fatal(err)
	}
	fmt.Fprintf(&n.config, "- name: %s\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: [%s]\n  defaultCacheDuration: 1h\n"+
		"  args: [first, second one]\n  env: [{name: FROM_CONFIG, value: configured}]\n", name, images)
}

func (n *node) runs(name string) int {
	n.t.Helper()
	text, err := os.ReadFile(filepath.Join(n.dir, name+".count"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	return len(text) / 2
}

func (n *node) file(text string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return path
}

func (n *node) clock() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

func (n *node) move(d time.Duration) {
	n.mu.Lock()
	n.now = n.now.Add(d)
	n.mu.Unlock()
}

func (n *node) plugins(timeout time.Duration) *Plugins {
	n.t.Helper()
	p, err := New(Config{File: n.file(n.config.String()), BinDir: n.dir, Environ: []string{"PATH=" + os.Getenv("PATH"), "INHERITED=inherited"},
		Memo: credentials.MemoConfig{Now: n.clock, Timeout: timeout}})
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// answer is a script that answers for a registry.
func answer(cacheKeyType, more, pattern, user, password string) string {
	return fmt.Sprintf(`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"%s"%s,"auth":{"%s":{"username":"%s","password":"'"%s"'"}}}'`,
		cacheKeyType, more, pattern, user, password)
}

func lookup(t *testing.T, p *Plugins, host, repository string) string {
	t.Helper()
	list, err := p.Lookup(t.Context(), host, repository)
	if err != nil {
		t.Fatal(err)
	}
	var logins []string
	for _, c := range list {
		text, err := base64.StdEncoding.DecodeString(c.Auth)
		if err != nil {
			t.Fatal(err)
		}
		logins = append(logins, string(text))
	}
	return strings.Join(logins, " ")
}

// A plugin gets what kubelet gives it.
func TestPluginIsRunAsKubeletDoes(t *testing.T) {
	n := newNode(t)
	n.plugin("p", `"*.example", "docker.io"`, `what=$(echo "$request/$1/$2/$FROM_CONFIG/$INHERITED/$#" | tr -d '"{},'); `+answer("Image", "", "*.example", "u", "$what"))
	p := n.plugins(time.Minute)
	want := "u:kind:CredentialProviderRequestapiVersion:credentialprovider.kubelet.k8s.io/v1image:registry.example/team/a/first/second one/configured/inherited/2"
	if got := lookup(t, p, "registry.example", "team/a"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	list, err := p.Lookup(t.Context(), "registry.example", "team/a")
	if err != nil || list[0].Source != "kubelet's credential provider p" || !list[0].Expires.Equal(n.now.Add(time.Hour)) {
		t.Errorf("%s until %s, %v", list[0].Source, list[0].Expires, err)
	}
	if got := lookup(t, p, "registry-1.docker.io", "library/a"); got != "" || n.runs("p") != 2 {
		t.Errorf("docker.io: %q, %d runs", got, n.runs("p"))
	}
	if got := lookup(t, p, "other.io", "a"); got != "" || n.runs("p") != 2 {
		t.Errorf("an image that is not matched: %q, %d runs", got, n.runs("p"))
	}
}

// Answers count for what, and as long as, the plugin says.
func TestAnswersAreKept(t *testing.T) {
	for name, c := range map[string]struct {
		script string
		// runs after an image, it again, another one of the registry, another registry,
		// and all of them again 31 minutes later.
		want [5]int
	}{
		"Image":    {answer("Image", "", "*.example", "u", "p"), [5]int{1, 1, 2, 3, 3}},
		"Registry": {answer("Registry", "", "*.example", "u", "p"), [5]int{1, 1, 1, 2, 2}},
		"Global":   {answer("Global", "", "*.example", "u", "p"), [5]int{1, 1, 1, 1, 1}},
		"shorter":  {answer("Global", `,"cacheDuration":"30m"`, "*.example", "u", "p"), [5]int{1, 1, 1, 1, 2}},
		"not kept": {answer("Global", `,"cacheDuration":"0s"`, "*.example", "u", "p"), [5]int{1, 2, 3, 4, 8}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.plugin("p", `"*.example"`, c.script)
			p := n.plugins(time.Minute)
			images := [][2]string{{"one.example", "a"}, {"one.example", "a"}, {"one.example", "b"}, {"two.example", "a"}}
			for i, image := range images {
				if got := lookup(t, p, image[0], image[1]); got != "u:p" {
					t.Errorf("%v: %q", image, got)
				}
				if got := n.runs("p"); got != c.want[i] {
					t.Errorf("%v: %d runs, want %d", image, got, c.want[i])
				}
			}
			n.move(31 * time.Minute)
			for _, image := range images {
				lookup(t, p, image[0], image[1])
			}
			if got := n.runs("p"); got != c.want[4] {
				t.Errorf("later: %d runs, want %d", got, c.want[4])
			}
		})
	}
}

// All plugins that match are asked, and the closest entry comes first; one that fails
// is told beside what the others say.
func TestSeveralPlugins(t *testing.T) {
	n := newNode(t)
	n.plugin("wide", `"*.example"`, answer("Image", "", "*.example", "wide", "p"))
	n.plugin("close", `"registry.example/team"`, answer("Image", "", "registry.example/team", "close", "p"))
	n.plugin("bad", `"registry.example/team/bad"`, "exit 7")
	p := n.plugins(time.Minute)
	if got := lookup(t, p, "registry.example", "team/a"); got != "close:p wide:p" {
		t.Errorf("%q", got)
	}
	list, err := p.Lookup(t.Context(), "registry.example", "team/bad")
	if len(list) != 2 || err == nil || !strings.Contains(err.Error(), filepath.Join(n.dir, "bad")) || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("%d, %v", len(list), err)
	}
}

func TestForget(t *testing.T) {
	n := newNode(t)
	n.plugin("p", `"*.example"`, answer("Global", "", "*.example", "u", `$(wc -l <`+filepath.Join(n.dir, "p.count")+` | tr -d " ")`))
	p := n.plugins(time.Minute)
	list, err := p.Lookup(t.Context(), "r.example", "a")
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		p.Forget(list[0])
		if got := lookup(t, p, "r.example", "a"); got != "u:1" {
			t.Fatalf("a plugin that has just been run is run again: %q", got)
		}
	}
	n.move(time.Minute)
	p.Forget(list[0])
	if got := lookup(t, p, "r.example", "a"); got != "u:2" {
		t.Errorf("%q", got)
	}
}

// What a plugin does wrong is said, without what it prints.
func TestPluginsThatFail(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"exit code":       {"echo " + secret + "; echo " + secret + " >&2; exit 3", "exit status 3"},
		"no JSON":         {"echo " + secret, "not JSON"},
		"another kind":    {`echo '{"kind":"` + secret + `"}'`, "CredentialProviderResponse"},
		"another version": {`echo '{"kind":"CredentialProviderResponse","apiVersion":"` + secret + `"}'`, "credentialprovider.kubelet.k8s.io/v1"},
		"cache key":       {answer(secret, "", "*.example", "u", "p"), "cacheKeyType"},
		"negative":        {answer("Image", `,"cacheDuration":"-1s"`, "*.example", "u", "p"), "cacheDuration"},
		"another image":   {answer("Image", "", "/"+secret, "u", "p"), "auth entry"},
		"too much":        {"head -c 2000000 /dev/zero | tr '\\0' x; exec tail -f /dev/null", "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.plugin("p", `"*.example"`, c.script)
			list, err := n.plugins(time.Minute).Lookup(t.Context(), "r.example", "a")
			if list != nil || err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), filepath.Join(n.dir, "p")) {
				t.Fatalf("%v, %v; want %q", list, err, c.want)
			}
			if strings.Contains(err.Error(), secret) {
				t.Fatalf("the error tells the secret: %v", err)
			}
		})
	}
}

func TestPluginMissing(t *testing.T) {
	n := newNode(t)
	n.plugin("p", `"*.example"`, "")
	if err := os.Remove(filepath.Join(n.dir, "p")); err != nil {
		t.Fatal(err)
	}
	if _, err := n.plugins(time.Minute).Lookup(t.Context(), "r.example", "a"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), filepath.Join(n.dir, "p")) {
		t.Errorf("%v", err)
	}
}

// A plugin that hangs, or leaves a child behind that holds its output, ends with its
// time.
func TestPluginHangs(t *testing.T) {
	n := newNode(t)
	n.plugin("p", `"*.example"`, "exec tail -f /dev/null")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := n.plugins(300*time.Millisecond).Lookup(ctx, "r.example", "a"); err == nil || !strings.Contains(err.Error(), "no answer within 300ms") {
		t.Errorf("%v", err)
	}
}

// What a plugin leaves behind ends with it, whether it answers or hangs.
func TestPluginsLeaveNothingBehind(t *testing.T) {
	for name, c := range map[string]struct {
		then    string
		timeout time.Duration
		want    string
	}{
		"hangs":   {"wait", 3 * time.Second, "no answer within 3s"},
		"answers": {answer("Image", "", "*.example", "u", "p"), time.Minute, ""},
		"fails":   {"exit 3", time.Minute, "exit status 3"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			pidFile := filepath.Join(n.dir, "pid")
			n.plugin("p", `"*.example"`, "sleep 1000 &\necho $! >"+pidFile+"\n"+c.then)
			list, err := n.plugins(c.timeout).Lookup(t.Context(), "r.example", "a")
			if c.want == "" && (err != nil || len(list) != 1) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, %v; want %q", list, err, c.want)
			}
			text, err := os.ReadFile(pidFile)
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err != nil {
				t.Fatal(err)
			}
			ended(t, pid)
		})
	}
}

// ended waits until a process that is not our child has ended; a zombie has.
func ended(t *testing.T, pid int) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(20 * time.Second)
	for {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || !strings.Contains(string(text), "(sleep)") || strings.Contains(string(text), ") Z ") {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatal("its child lives on")
		}
	}
}

// The configuration is read strictly, and what is wrong is said with the file's name
// and without values.
func TestConfigErrors(t *testing.T) {
	const head = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"
	const good = "- name: p\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: [\"*.example\"]\n  defaultCacheDuration: 1h\n"
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"empty":         {"", []string{"kubelet.config.k8s.io/v1"}},
		"other version": {strings.Replace(head, "/v1", "/v1beta1", 1) + good, []string{"v1beta1"}},
		"other kind":    {strings.Replace(head, "CredentialProviderConfig", "Secret", 1) + good, []string{`kind "Secret"`}},
		"no providers":  {strings.Replace(head, "providers:", "providers: []", 1), []string{"no providers"}},
		"no YAML":       {head + "- name: [" + secret + "\n", []string{"not YAML"}},
		"unknown":       {head + good + "  surprise: " + secret + "\n", []string{"unknown field", "surprise"}},
		"key twice":     {head + good + "  name: " + secret + "\n", []string{"twice"}},
		"a type":        {head + good + "  env: [{name: A, value: {" + secret + ": 1}}]\n", []string{"another type", "value"}},
		"all of a provider": {head + "- name: ../sh\n  apiVersion: credentialprovider.kubelet.k8s.io/v1beta1\n  matchImages: [\"a[\"]\n  env: [{name: \"A=\", value: " + secret + "}]\n",
			[]string{"../sh", "v1beta1", "matchImages", "defaultCacheDuration", "env"}},
		"nothing matched": {head + strings.Replace(good, `"*.example"`, "", 1), []string{"matchImages is empty"}},
		"negative":        {head + strings.Replace(good, "1h", "-1h", 1), []string{"defaultCacheDuration is -1h"}},
		"twice":           {head + good + good, []string{"provider p is there twice"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			path := n.file(c.text)
			_, err := New(Config{File: path, BinDir: n.dir})
			for _, want := range append(c.want, path) {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("want %q in: %v", want, err)
				}
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("the error has a value: %v", err)
			}
		})
	}
	for _, path := range []string{"/nonexistent/config.yaml", t.TempDir()} {
		if _, err := New(Config{File: path}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%v", err)
		}
	}
}

// A provider that wants a pod's token is left out and said so; the others work.
func TestSkipped(t *testing.T) {
	n := newNode(t)
	n.plugin("p", `"*.example"`, answer("Image", "", "*.example", "u", "w"))
	n.config.WriteString("- name: pods\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: [\"*.example\"]\n  defaultCacheDuration: 1h\n" +
		"  tokenAttributes: {serviceAccountTokenAudience: a, requireServiceAccount: true, cacheType: Token}\n")
	p := n.plugins(time.Minute)
	if got := lookup(t, p, "registry.example", "team/a"); got != "u:w" {
		t.Errorf("got %q", got)
	}
	if said := p.Skipped(); len(said) != 1 || !strings.Contains(said[0], "provider pods of "+n.dir) || !strings.Contains(said[0], "tokenAttributes") {
		t.Errorf("skipped: %q", said)
	}
}
