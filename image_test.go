//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	docker "github.com/fsouza/go-dockerclient"
	"golang.org/x/sys/unix"
)

// The tests in this file are of the image, and of what is deployed with it: Compose, Swarm.

// command runs a command of a shell, with the docker command for this engine and some variables, and returns what it printed.
func (e *liveEngine) command(t *testing.T, script string, env ...string) string {
	t.Helper()
	out, err := e.tryCommand(t, script, env...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

func (e *liveEngine) tryCommand(t *testing.T, script string, env ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("docker"); err != nil {
		noEngine(t, "no docker command: %v", err)
	}
	command := exec.Command("sh", "-ec", script)
	command.Env = append(append(os.Environ(), "DOCKER_HOST="+e.address), env...)
	out, err := command.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// authority is a certificate authority.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	a.key, a.certificate = certify(t, template, nil)
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
	return a
}

// certify makes a key and a certificate, signed by a, or by itself.
func certify(t *testing.T, template *x509.Certificate, a *authority) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	if a == nil {
		a = &authority{template, key, nil}
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	must(t, err)
	certificate, err := x509.ParseCertificate(raw)
	must(t, err)
	return key, certificate
}

// listening starts a stand-in for Backstop on listener, with TLS where there is an authority to vouch for host.
func listening(t *testing.T, listener net.Listener, a *authority, host string) *standIn {
	t.Helper()
	s := unstartedStandIn(t.Errorf)
	s.Server = httptest.NewUnstartedServer(s)
	s.Listener.Close()
	s.Listener = listener
	if a != nil {
		key, certificate := certify(t, &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.ParseIP(host)}}, a)
		s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}}}
		s.Config.ErrorLog = log.New(io.Discard, "", 0) // a client that does not trust it tells so itself
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.stop)
	return s
}

// goImage makes the image that ours is built in out of what is on this machine: Go, the modules, a shell, and root certificates, a's
// among them.
func (e *liveEngine) goImage(t *testing.T, a *authority) (name string) {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("go", "env", "-json", "GOROOT", "GOMODCACHE", "GOPROXY").Output()
	must(t, err)
	var goEnv struct{ GOROOT, GOMODCACHE, GOPROXY string }
	must(t, json.Unmarshal(out, &goEnv))

	// What go mod download takes, from those that were downloaded already where they were.
	e.command(t, "go mod download", "GOMODCACHE="+dir+"/cache", "GOFLAGS=-modcacherw",
		"GOPROXY=file://"+goEnv.GOMODCACHE+"/cache/download,"+goEnv.GOPROXY)

	root := dir + "/root"
	for _, folder := range []string{"/bin", "/usr/local", "/etc/ssl/certs", "/tmp"} {
		must(t, os.MkdirAll(root+folder, 0o755))
	}
	certificates, _ := os.ReadFile("/etc/ssl/certs/ca-certificates.crt")
	must(t, os.WriteFile(root+"/etc/ssl/certs/ca-certificates.crt", append(certificates, a.pem...), 0o644))
	for from, to := range map[string]string{
		"/bin/busybox":                "/bin/busybox",
		goEnv.GOROOT:                  "/usr/local/go",
		dir + "/cache/cache/download": "/modules",
	} {
		must(t, os.Symlink(from, root+to))
	}
	for _, applet := range []string{"sh", "mkdir"} {
		must(t, os.WriteFile(root+"/bin/"+applet, []byte("#!/bin/busybox sh\nexec /bin/busybox "+applet+` "$@"`+"\n"), 0o755))
	}
	name = e.image + "-go"
	t.Cleanup(func() { e.RemoveImageExtended(name, docker.RemoveImageOptions{Force: true}) })
	e.command(t, `tar -C "$ROOT" --dereference --exclude=testdata --exclude='*_test.go' --exclude=usr/local/go/src/cmd --exclude=usr/local/go/test -c . |
		docker import --change 'ENV PATH=/usr/local/go/bin:/bin GOPROXY=file:///modules GOSUMDB=off GOTOOLCHAIN=local HOME=/tmp' - "$NAME"`,
		"ROOT="+root, "NAME="+name)
	return name
}

// buildImage makes the image as the README says, without a network, and returns its name.
func (e *liveEngine) buildImage(t *testing.T, a *authority) (name string) {
	t.Helper()
	name = e.image + "-built"
	build := readmeCommand(t, "## As a container", "docker build")
	build = strings.Replace(build, "-t docker-stats-to-backstop ", `-t "$NAME" --network none --force-rm --build-arg GO_IMAGE="$GO_IMAGE" `, 1)
	out, err := e.tryCommand(t, build, "NAME="+name, "GO_IMAGE="+e.goImage(t, a))
	t.Cleanup(func() {
		e.RemoveImageExtended(name, docker.RemoveImageOptions{Force: true})
		// A builder that is not BuildKit leaves what it was built in, as far as it came.
		first, _, _ := strings.Cut(out, " : FROM scratch")
		if steps := allInOrder(`---> ([0-9a-f]{12})\b`, first); len(steps) > 0 {
			e.RemoveImageExtended(steps[len(steps)-1], docker.RemoveImageOptions{Force: true})
		}
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return name
}

// readmeCommand returns the command in a section of the README that begins like that.
func readmeCommand(t *testing.T, heading, start string) string {
	t.Helper()
	m := regexp.MustCompile(`\n((?:    .*\\\n)*?    ` + start + `(?:.*\\\n)*.*\n)`).FindStringSubmatch(section(t, heading))
	if m == nil {
		t.Fatalf("the README has no %s under %s", start, heading)
	}
	return m[1]
}

// The image: built, looked into, and run as the README says.
func TestLiveImage(t *testing.T) {
	e := usualEngine(t)
	a := newAuthority(t)
	image := e.buildImage(t, a)
	t.Run("contents", func(t *testing.T) { testContents(t, e, image) })
	t.Run("container", func(t *testing.T) { testContainer(t, e, image, a) })
	t.Run("swarm", func(t *testing.T) { testSwarm(t, e, image) })
}

// What is in the image
func testContents(t *testing.T, e *liveEngine, image string) {
	info, err := e.InspectImage(image)
	must(t, err)
	if user := info.Config.User; user != "65532:65532" {
		t.Errorf("it runs as %q", user)
	}
	if size := info.Size; size > 10<<20 {
		t.Errorf("it has %d bytes", size)
	}
	made, err := e.CreateContainer(docker.CreateContainerOptions{Name: e.name(t, "look"), Config: &docker.Config{Image: image}})
	must(t, err)
	t.Cleanup(func() { e.remove(made.ID) })
	var files []string
	var export bytes.Buffer
	must(t, e.ExportContainer(docker.ExportContainerOptions{ID: made.ID, OutputStream: &export}))
	for archive := tar.NewReader(&export); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		// The engine itself brings these.
		if !regexp.MustCompile(`^(\.dockerenv|dev/.*|proc/|sys/|etc/(hostname|hosts|mtab|resolv\.conf))$`).MatchString(header.Name) {
			files = append(files, fmt.Sprintf("%s %s %d:%d", header.FileInfo().Mode(), header.Name, header.Uid, header.Gid))
		}
	}
	slices.Sort(files)
	if got, want := strings.Join(files, "\n"), strings.TrimSpace(`
-rw-r--r-- LICENSE 0:0
-rw-r--r-- THIRD_PARTY.md 0:0
-rw-r--r-- etc/ssl/certs/ca-certificates.crt 0:0
-rwxr-xr-x docker-stats-to-backstop 0:0
drwxr-xr-x etc/ 0:0
drwxr-xr-x etc/ssl/ 0:0
drwxr-xr-x etc/ssl/certs/ 0:0
dtrwxrwxrwx spool/ 0:0`); got != want {
		t.Errorf("in it is\n%s\nwant\n%s", got, want)
	}
}

// The README's command, with names of this test
func testContainer(t *testing.T, e *liveEngine, image string, a *authority) {
	host := e.gateway(t)
	listener, err := net.Listen("tcp", host+":0")
	must(t, err)
	s := listening(t, listener, a, host)
	s.set("user:password", nil)
	container, volume := e.name(t, "it"), strings.ReplaceAll(e.name(t, "spool"), ".", "-")
	url := strings.Replace(s.URL, "://", "://user:password@", 1) + "/publish/docker"
	run := readmeCommand(t, "## As a container", "docker run")
	for _, r := range [][2]string{
		{"--name docker-stats-to-backstop", "--name " + container},
		{"--volume docker-stats-to-backstop:", "--volume " + volume + ":"},
		{"https://user:password@backstop.server/publish/docker", url},
		{"\n      docker-stats-to-backstop\n", "\n      " + image + "\n"},
	} {
		if strings.Count(run, r[0]) != 1 {
			t.Fatalf("the README's command lacks %q:\n%s", r[0], run)
		}
		run = strings.Replace(run, r[0], r[1], 1)
	}
	t.Cleanup(func() {
		e.remove(container)
		e.RemoveVolumeWithOptions(docker.RemoveVolumeOptions{Name: volume, Force: true})
	})
	engine, err := e.Info()
	must(t, err)
	logs := func() string { out, _ := e.tryCommand(t, "docker logs "+container); return out }
	// The names of both have one dot, so the README's prefix leaves them as they are.
	all := []string{`^` + regexp.QuoteMeta(graphiteNode(engine.Name)) + `\.metrics\.sampled `, `^` + regexp.QuoteMeta(container) + `\.cpu\.total `,
		`^` + regexp.QuoteMeta(e.name(t, "neighbour")) + `\.cpu\.total `}
	await := func() {
		t.Helper()
		for _, pattern := range all {
			if err := s.await(pattern, 1, time.Minute); err != nil {
				t.Fatalf("%v\n%s", err, logs())
			}
		}
	}
	e.command(t, run)
	await()
	it, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: container})
	must(t, err)
	if text := s.lines(); strings.Contains(text, it.ID[:12]) {
		t.Errorf("by its container's id:\n%s", text)
	}

	// It ends when it is told to, and what could not be delivered is in the volume, for the next one.
	s.set("", answerWith(500, ""))
	e.command(t, "docker restart --time 15 "+container)
	awaitText(t, logs, "Backstop fails, keeping metrics", 1)
	e.command(t, "docker stop --time 15 "+container)
	if it, err = e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: container}); err != nil || it.State.ExitCode != 0 {
		t.Errorf("%v, it ended with %d:\n%s", err, it.State.ExitCode, logs())
	}
	must(t, e.remove(container))
	s.set("user:password", nil)
	e.command(t, run)
	awaitText(t, logs, "metrics of the earlier run are delivered", 1)

	// The certificates are what makes https work.
	must(t, e.remove(container))
	out, err := e.tryCommand(t, strings.NewReplacer("--detach", "--env SSL_CERT_FILE=/LICENSE --env SSL_CERT_DIR=/spool", "--restart unless-stopped", "").Replace(strings.TrimSpace(run))+" --once")
	if err == nil || !strings.Contains(out, "certificate signed by unknown authority") || strings.Contains(out, "password") {
		t.Errorf("without them: %v\n%s", err, out)
	}
}

// gateway starts a container, called neighbour, and returns the address at which it reaches its host.
func (e *liveEngine) gateway(t *testing.T) string {
	t.Helper()
	neighbour, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: e.run(t, "neighbour", "", docker.HostConfig{})})
	must(t, err)
	gateway := neighbour.NetworkSettings.Networks["bridge"].Gateway
	if gateway == "" {
		t.Fatalf("the engine does not tell the gateway of %+v", neighbour.NetworkSettings)
	}
	return gateway
}

// listenIn listens in the network namespace of a process.
func listenIn(t *testing.T, pid int) net.Listener {
	t.Helper()
	type result struct {
		net.Listener
		error
	}
	made := make(chan result)
	go func() {
		// The thread is spoilt for everybody else: not unlocked, it ends with the goroutine.
		runtime.LockOSThread()
		namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			defer namespace.Close()
			err = unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET)
		}
		if err != nil {
			made <- result{nil, err}
			return
		}
		listener, err := net.Listen("tcp4", "0.0.0.0:0")
		made <- result{listener, err}
	}()
	r := <-made
	must(t, r.error)
	return r.Listener
}

// The stack, on a swarm of one node
func testSwarm(t *testing.T, usual *liveEngine, image string) {
	own := startEngine(t)
	e := connect(t, own.address)
	usual.command(t, `docker save "$IMAGE" | docker --host "$OWN" load`, "IMAGE="+image, "OWN="+own.address)
	e.command(t, "docker swarm init --advertise-addr 127.0.0.1")
	s := listening(t, listenIn(t, own.dockerd.Process.Pid), nil, "")
	s.set("user:password", nil)

	// The node has other services too.
	e.command(t, `docker service create --detach --network host --name web "$IMAGE" /busybox sleep 600
		docker service create --detach --network host --name agent --mode global "$IMAGE" /busybox sleep 600`, "IMAGE="+e.image)

	text := readFile(t, "deploy/stack.yaml")
	if strings.Count(text, "- /var/run/docker.sock:") != 1 {
		t.Fatal("deploy/stack.yaml has no socket to replace by the own engine's")
	}
	file := filepath.Join(t.TempDir(), "stack.yaml")
	must(t, os.WriteFile(file, []byte(strings.Replace(text, "- /var/run/docker.sock:", "- "+strings.TrimPrefix(own.address, "unix://")+":", 1)), 0o600))
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	must(t, err)
	deploy := readmeCommand(t, "## As a container", "printf") + readmeCommand(t, "## As a container", "docker stack deploy")
	deploy = strings.Replace(deploy, "https://user:password@backstop.server/publish/docker", "http://user:password@"+e.gateway(t)+":"+port+"/publish/docker", 1)
	deploy = strings.Replace(deploy, "deploy/stack.yaml", file, 1)
	t.Log(e.command(t, deploy, "IMAGE="+image))

	node := e.command(t, "docker node ls --format '{{.Hostname}}'")
	for _, name := range []string{"metrics.sampled", "web.1.cpu.total", "agent.cpu.total", "metrics_docker-stats-to-backstop.cpu.total"} {
		if err := s.await(`^`+regexp.QuoteMeta(graphiteNode(node)+"."+name)+" ", 1, 2*time.Minute); err != nil {
			log, _ := e.tryCommand(t, "docker service ps --no-trunc metrics_docker-stats-to-backstop; docker service logs --raw metrics_docker-stats-to-backstop")
			t.Fatalf("%v; there are\n%s\n%s", err, s.lines(), log)
		}
	}
}

// Compose reads the file, and what arrives of it are rules.
func TestComposeTakesTheFile(t *testing.T) {
	// What Compose itself reads its files with.
	compose := exec.Command("go", "run", "github.com/compose-spec/compose-go/v2/cmd@v2.16.2", "-format=json", "deploy/compose.yaml")
	compose.Env = append(os.Environ(), "GOFLAGS=")
	out, err := compose.Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && strings.Contains(string(exit.Stderr), "compose.yaml") {
		t.Fatalf("%s", exit.Stderr)
	} else if err != nil {
		cannot(t, "compose-go cannot be had: %v", err)
	}
	var file struct {
		Services map[string]struct{ Environment map[string]string }
	}
	must(t, json.Unmarshal(out, &file))
	daemon := file.Services["docker-stats-to-backstop"].Environment
	if got := mustRules(t, daemon["SRV_PREFIX"]).apply(subject{name: "docker-stats-web-1"}, "h").path; got != "docker-stats.web.1" {
		t.Errorf("docker-stats-web-1 becomes %s", got)
	}
	// One service's values are what another one wants.
	backstop := file.Services["backstop"].Environment
	if want := "http://" + backstop["BACKSTOP_AUTH"] + "@backstop:3000/publish/" + backstop["PREFIXES"]; daemon["SRV_BACKSTOP"] != want {
		t.Errorf("SRV_BACKSTOP is %s, want %s", daemon["SRV_BACKSTOP"], want)
	}
	known := allOf(`\b(SRV_[A-Z_]+)\b`, usage())
	for name := range daemon {
		if !slices.Contains(known, name) {
			t.Errorf("there is no %s", name)
		}
	}
}
