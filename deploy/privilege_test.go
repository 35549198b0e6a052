//go:build linux

package deploy_test

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	docker "github.com/fsouza/go-dockerclient"
)

// rulesOfProxy returns what deploy/haproxy.cfg lets through.
func rulesOfProxy(t *testing.T) *regexp.Regexp {
	t.Helper()
	config := harness.ReadFile(t, "deploy/haproxy.cfg")
	m := regexp.MustCompile(`acl ours path_reg (\S+)\n`).FindStringSubmatch(config)
	if m == nil {
		t.Fatal("deploy/haproxy.cfg has no rule")
	}
	return regexp.MustCompile(m[1])
}

// Whatever it does, it only ever reads, and only what the rules for a proxy let through.
func TestLiveOnlyReads(t *testing.T) {
	real := harness.Usual(t)
	real.Run(t, "old", "", docker.HostConfig{NetworkMode: "none"})
	allowed := rulesOfProxy(t)
	var mu sync.Mutex
	seen := map[string]bool{}
	e := harness.Between(t, real, func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		mu.Lock()
		seen[regexp.MustCompile(`[0-9a-f]{64}`).ReplaceAllString(r.URL.Path, "ID")] = true
		mu.Unlock()
		if r.Method != http.MethodGet || !allowed.MatchString(r.URL.Path) {
			t.Errorf("%s %s", r.Method, r.URL.Path)
		}
		forward.ServeHTTP(w, r)
	})
	s := harness.NewStandIn(t)
	daemon := harness.StartDaemon(t, "--docker="+e.Address,
		"--backstop="+s.URL+"/publish/docker", "--poll=1s", "--per=core,interface,device", "--host=h")
	harness.Must(t, s.Await(`^h\.metrics\.sampled `, 1, time.Minute))
	real.Run(t, "young", "", docker.HostConfig{NetworkMode: "none"})
	harness.Must(t, s.Await(`\.young\.cpu\.percent `, 1, time.Minute))
	daemon.End()
	if text, err := exec.Command(harness.Program, "--docker="+e.Address, "--check",
		real.Only(t)).CombinedOutput(); err != nil {
		t.Errorf("--check: %v\n%s", err, text)
	}
	mu.Lock() // a call that was under way at the end may just be noted
	defer mu.Unlock()
	for _, path := range []string{"/_ping", "/info", "/events", "/containers/json",
		"/containers/ID/json", "/containers/ID/stats"} {
		if !seen[path] {
			t.Errorf("%s was not asked for, and is let through for nothing", path)
		}
	}
}

// The proxy of deploy/ is enough for it, and for nothing else.
func TestLiveBehindAProxy(t *testing.T) {
	e := harness.Usual(t)
	if !strings.HasPrefix(e.Address, "unix://") {
		harness.Cannot(t, "the proxy is for an engine with a socket, not %s", e.Address)
	}
	id := e.Run(t, "seen", "", docker.HostConfig{NetworkMode: "none"})
	haproxy, err := exec.LookPath("haproxy")
	if err != nil {
		haproxy = "/usr/sbin/haproxy"
	}
	if _, err := os.Stat(haproxy); err != nil {
		harness.Cannot(t, "no haproxy: %v", err)
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	config := strings.NewReplacer("/run/docker-stats/docker.sock", socket, "/var/run/docker.sock",
		strings.TrimPrefix(e.Address, "unix://")).
		Replace(harness.ReadFile(t, "deploy/haproxy.cfg"))
	harness.Must(t, os.WriteFile(filepath.Join(dir, "cfg"), []byte(config), 0o600))
	var out bytes.Buffer
	proxy := exec.Command(haproxy, "-db", "-f", filepath.Join(dir, "cfg"))
	proxy.Stderr = &out
	harness.Must(t, proxy.Start())
	t.Cleanup(func() {
		proxy.Process.Kill()
		proxy.Wait()
		if strings.Contains(out.String(), "WARNING") {
			t.Errorf("haproxy says\n%s", out.String())
		}
	})
	behind, err := docker.NewClient("unix://" + socket)
	harness.Must(t, err)
	deadline := time.Now().Add(time.Minute)
	for behind.Ping() != nil {
		time.Sleep(20 * time.Millisecond)
		if time.Now().After(deadline) {
			t.Fatal("haproxy does not answer")
		}
	}
	lines, err := exec.Command(harness.Program, "--docker=unix://"+socket, "--once",
		e.Only(t)).Output()
	if err != nil || !strings.Contains(string(lines), ".seen.memory.usage ") ||
		!strings.Contains(string(lines), ".seen.uptime ") ||
		!strings.Contains(string(lines), ".containers.running ") ||
		!strings.Contains(string(lines), ".events.oom 0 ") {
		t.Errorf("%v\n%s", err, lines)
	}

	for _, refused := range [][2]string{
		{"POST", "/containers/" + id + "/kill"}, {"DELETE", "/containers/" + id}, {"POST",
			"/containers/create"}, {"GET", "/images/json"},
		{"GET", "/containers/" + id + "/logs?stdout=1"}, {"GET",
			"/containers/" + id + "/archive?path=/"}, {"GET", "/containers/../images/json"},
		{"GET", "/containers/" + id + "%2Flogs"}, {"GET", "/secrets"}, {"HEAD",
			"/containers/json"}, {"GET", "/info/../containers/" + id + "/logs?stdout=1"},
	} {
		req, err := http.NewRequest(refused[0], "http://engine"+refused[1], nil)
		harness.Must(t, err)
		resp, err := behind.HTTPClient.Do(req) // which dials the socket, whatever the host
		harness.Must(t, err)
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s %s: %s", refused[0], refused[1], resp.Status)
		}
	}
	container, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: id})
	if err != nil || !container.State.Running {
		t.Errorf("the container does not run any more: %v", err)
	}
}
