package registry_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

// TestNode runs containers on a whole node, with containerd and its databases, from a
// registry that wants a password: through the gateway, where hosts.toml adds a header and
// a mirror that is gone, and without it. Neither success nor failure shows a secret.
func TestNode(t *testing.T) {
	as, header := newLogin("alice"), newLogin("header").password
	r := kit.NewRegistry(t, kit.RegistryOptions{User: as.user, Password: as.password})
	image := kit.SmallImage(t, "node").MustNydus(t, kit.NydusOptions{})
	want, err := image.Tree()
	must(t, err)
	ref := r.MustPush(t, image, "node:1")
	for _, mode := range []string{"always", "never"} {
		t.Run(mode, func(t *testing.T) {
			certs, docker := t.TempDir(), t.TempDir()
			l := &lab{t: t, certs: certs, docker: docker, gw: kit.NewGateway(t)}
			l.login(map[string]login{r.Host: as})
			dir := strings.Replace(r.Host, ":", "_", 1) + "_"
			if mode == "always" {
				l.hosts(dir, fmt.Sprintf("server = %q\n[host.%q]\n[header]\nX-Canary = %q\n", "http://"+r.Host, "http://"+deadHost(t), header))
			}
			n := kit.NewNode(t, kit.NodeConfig{Snapshotter: true, Env: []string{"DOCKER_CONFIG=" + docker}, Config: map[string]any{
				"remote.gateway": mode, "remote.config_path": certs, "remote.gateway_address": l.gw.Address, "log.level": "trace", "daemon.log_level": "trace",
			}})
			l.gw.Start(n.SnapshotterConfig(), 0, "DOCKER_CONFIG="+docker)
			img, err := n.Pull(t.Context(), ref, kit.PullOptions{User: as.user, Password: as.password})
			must(t, err)
			c, err := n.Run(t.Context(), img, "one", kit.RunOptions{})
			must(t, err)
			kit.EqualTrees(t, "the container's view", want, kit.MustWalk(t, c.Root()))
			s := secrets{"header's value": header}
			s.login(as)
			allowed := func(path, find string) bool {
				daemon := mode == "never" && strings.HasPrefix(path, n.RunDir()+"/i/") && filepath.Base(path) == "config.json" && strings.Contains(find, "(mode 0600)")
				return daemon || strings.HasPrefix(path, docker+"/") || strings.HasPrefix(path, certs+"/")
			}
			s.nowhere(t, "running", allowed)
			if name := s.in(daemonAnswers(t)); name != "" {
				t.Errorf("%s shows in what nydusd answers", name)
			}
			must(t, c.Remove(t.Context()))
			must(t, n.WaitDaemons(0, soon))

			said := failures(t, l, n, ref, dir)
			if name := s.in(said); name != "" {
				t.Errorf("%s shows in an error: %s", name, said)
			}
			s.nowhere(t, "after failures", allowed)
			s.found(t)
		})
	}
}

// failures starts a container that cannot be started, and returns what is said of it.
func failures(t *testing.T, l *lab, n *kit.Node, ref, dir string) string {
	t.Helper()
	img, err := n.Client().GetImage(t.Context(), ref)
	must(t, err)
	var want []string
	if strings.Contains(readFile(t, n.SnapshotterConfig()), "gateway = 'always'") {
		must(t, l.gw.End(unix.SIGTERM))
		must(t, l.gw.Close())
		want = []string{"ask the gateway", "connection refused", "systemctl"}
	} else {
		// What takes the gateway, while there is none.
		a := newAuthority(t)
		p := a.issue("client")
		l.hosts(dir, fmt.Sprintf("server = %q\nca = %q\nclient = [[%q, %q]]\n", "https://127.0.0.1:1", a.file, p.cert, p.key))
		want = []string{"(client)", "hosts.toml", `remote.gateway = "auto"`}
	}
	_, err = n.Run(t.Context(), img, "failing", kit.RunOptions{})
	if err == nil {
		t.Fatal("the container has started")
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not have %s: %v", w, err)
		}
	}
	return err.Error()
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return string(text)
}
