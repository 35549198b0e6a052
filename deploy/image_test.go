//go:build linux

package deploy_test

import (
	"archive/tar"
	"bytes"
	"cmp"
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
	"maps"
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

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	docker "github.com/fsouza/go-dockerclient"
	"golang.org/x/sys/unix"
)

// The tests in this file are of the image, and of what is deployed with it: Compose, Swarm.

// install is the page that says how to run the image.
const install = "docs/install.md"

// node returns what becomes of a host's name in Graphite.
func node(host string) string {
	return regexp.MustCompile(`[^A-Za-z0-9_-]`).ReplaceAllString(host, "_")
}

// command runs a command of a shell, with the docker command for this engine and some variables,
// and returns what it printed.
func command(t *testing.T, e *harness.Engine, script string, env ...string) string {
	t.Helper()
	out, err := tryCommand(t, e, script, env...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

func tryCommand(t *testing.T, e *harness.Engine, script string, env ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("docker"); err != nil {
		harness.NoEngine(t, "no docker command: %v", err)
	}
	command := exec.Command("sh", "-ec", script)
	command.Dir = harness.Top(t)
	command.Env = append(append(os.Environ(), "DOCKER_HOST="+e.Address), env...)
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
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true}
	a.key, a.certificate = certify(t, template, nil)
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
	return a
}

// certify makes a key and a certificate, signed by a, or by itself.
func certify(t *testing.T, template *x509.Certificate, a *authority) (*ecdsa.PrivateKey,
	*x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	harness.Must(t, err)
	if a == nil {
		a = &authority{template, key, nil}
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	harness.Must(t, err)
	certificate, err := x509.ParseCertificate(raw)
	harness.Must(t, err)
	return key, certificate
}

// listening starts a stand-in for Backstop on listener, with TLS where there is an authority to
// vouch for host.
func listening(t *testing.T, listener net.Listener, a *authority, host string) *harness.StandIn {
	t.Helper()
	s := harness.UnstartedStandIn(t.Errorf)
	s.Server = httptest.NewUnstartedServer(s)
	s.Listener.Close()
	s.Listener = listener
	if a != nil {
		key, certificate := certify(t, &x509.Certificate{SerialNumber: big.NewInt(2),
			NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.ParseIP(host)}}, a)
		s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate.Raw},
			PrivateKey: key}}}
		s.Config.ErrorLog = log.New(io.Discard, "", 0) // a client that does not trust it tells so itself
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Stop)
	return s
}

// goImage makes the image that ours is built in out of what is on this machine: Go, the modules, a
// shell, and root certificates, a's among them.
func goImage(t *testing.T, e *harness.Engine, a *authority) (name string) {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("go", "env", "-json", "GOROOT", "GOMODCACHE", "GOPROXY").Output()
	harness.Must(t, err)
	var goEnv struct{ GOROOT, GOMODCACHE, GOPROXY string }
	harness.Must(t, json.Unmarshal(out, &goEnv))

	// What go mod download takes, from those that were downloaded already where they were.
	command(t, e, "go mod download", "GOMODCACHE="+dir+"/cache", "GOFLAGS=-modcacherw",
		"GOPROXY=file://"+goEnv.GOMODCACHE+"/cache/download,"+goEnv.GOPROXY)

	root := dir + "/root"
	for _, folder := range []string{"/bin", "/usr/local", "/etc/ssl/certs", "/tmp"} {
		harness.Must(t, os.MkdirAll(root+folder, 0o755))
	}
	certificates, _ := os.ReadFile("/etc/ssl/certs/ca-certificates.crt")
	harness.Must(t, os.WriteFile(root+"/etc/ssl/certs/ca-certificates.crt",
		append(certificates, a.pem...), 0o644))
	for from, to := range map[string]string{
		"/bin/busybox":                "/bin/busybox",
		goEnv.GOROOT:                  "/usr/local/go",
		dir + "/cache/cache/download": "/modules",
	} {
		harness.Must(t, os.Symlink(from, root+to))
	}
	for _, applet := range []string{"sh", "mkdir"} {
		harness.Must(t, os.WriteFile(root+"/bin/"+applet,
			[]byte("#!/bin/busybox sh\nexec /bin/busybox "+applet+` "$@"`+"\n"), 0o755))
	}
	name = e.Image + "-go"
	t.Cleanup(func() { e.RemoveImageExtended(name, docker.RemoveImageOptions{Force: true}) })
	env := "PATH=/usr/local/go/bin:/bin HOME=/tmp " +
		"GOPROXY=file:///modules GOSUMDB=off GOTOOLCHAIN=local"
	command(t, e, `tar -C "$ROOT" --dereference --exclude=testdata --exclude='*_test.go' \
			--exclude=usr/local/go/src/cmd --exclude=usr/local/go/test -c . |
		docker import --change "ENV $VARIABLES" - "$NAME"`,
		"ROOT="+root, "NAME="+name, "VARIABLES="+env)
	return name
}

// buildArgs returns what the workflow of a release sets in the Dockerfile, here to x-NAME.
func buildArgs(t *testing.T) (args string) {
	t.Helper()
	for _, name := range harness.AllInOrder(`(?m)^ +([A-Z]+)=\$\{\{`,
		harness.ReadFile(t, ".github/workflows/release.yml")) {
		args += fmt.Sprintf("--build-arg %s=x-%[1]s ", name)
	}
	return args
}

// buildImage makes the image as docs/install.md says, without a network, and returns its name.
func buildImage(t *testing.T, e *harness.Engine, a *authority) (name string) {
	t.Helper()
	name = e.Image + "-built"
	build := documented(t, install, "## As a container", "docker build")
	build = strings.Replace(build, "docker build -t docker-stats-to-backstop ",
		`sed "s|golang:[0-9.]*|$GO_IMAGE|" Dockerfile | docker build -t "$NAME" --file - `+
			`--network none --force-rm `+buildArgs(t), 1)
	out, err := tryCommand(t, e, build, "NAME="+name, "GO_IMAGE="+goImage(t, e, a))
	t.Cleanup(func() {
		e.RemoveImageExtended(name, docker.RemoveImageOptions{Force: true})
		// A builder that is not BuildKit leaves what it was built in, as far as it came.
		first, _, _ := strings.Cut(out, " : FROM scratch")
		if steps := harness.AllInOrder(`---> ([0-9a-f]{12})\b`, first); len(steps) > 0 {
			e.RemoveImageExtended(steps[len(steps)-1], docker.RemoveImageOptions{Force: true})
		}
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return name
}

// documented returns the command in a section of a page that begins like that.
func documented(t *testing.T, page, heading, start string) string {
	t.Helper()
	m := regexp.MustCompile(`\n((?:    .*\\\n)*?    ` + start +
		`(?:.*\\\n)*.*\n)`).FindStringSubmatch(harness.Section(t, page, heading))
	if m == nil {
		t.Fatalf("%s has no %s under %s", page, start, heading)
	}
	return m[1]
}

// The image: built, looked into, and run as docs/install.md says.
func TestLiveImage(t *testing.T) {
	e := harness.Usual(t)
	a := newAuthority(t)
	image := buildImage(t, e, a)
	t.Run("contents", func(t *testing.T) { testContents(t, e, image) })
	t.Run("container", func(t *testing.T) { testContainer(t, e, image, a) })
	t.Run("engine", func(t *testing.T) { testEngineStartedAnew(t, e, image) })
	t.Run("swarm", func(t *testing.T) { testSwarm(t, e, image) })
}

// What is in the image
func testContents(t *testing.T, e *harness.Engine, image string) {
	info, err := e.InspectImage(image)
	harness.Must(t, err)
	if user := info.Config.User; user != "65532:65532" {
		t.Errorf("it runs as %q", user)
	}
	if size := info.Size; size > 10<<20 {
		t.Errorf("it has %d bytes", size)
	}
	labels, where := map[string]string{}, "https://github.com/deliverous/docker-stats-to-backstop"
	for label, value := range map[string]string{
		"title":         harness.Program,
		"description":   "Feeds Graphite with the stats of a host's Docker containers, through Backstop",
		"source":        where,
		"url":           where,
		"documentation": where + "#readme",
		"licenses":      "MIT",
		"version":       "x-VERSION",
		"revision":      "x-REVISION",
		"created":       "x-CREATED",
	} {
		labels["org.opencontainers.image."+label] = value
	}
	if got := info.Config.Labels; !maps.Equal(got, labels) {
		t.Errorf("its labels are\n%q\nwant\n%q", got, labels)
	}
	made, err := e.CreateContainer(docker.CreateContainerOptions{Name: e.Name(t, "look"),
		Config: &docker.Config{Image: image}})
	harness.Must(t, err)
	t.Cleanup(func() { e.Remove(made.ID) })
	var files []string
	var export bytes.Buffer
	harness.Must(t, e.ExportContainer(docker.ExportContainerOptions{ID: made.ID,
		OutputStream: &export}))
	for archive := tar.NewReader(&export); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		harness.Must(t, err)
		// The engine itself brings these.
		if !regexp.MustCompile(`^(\.dockerenv|dev/.*|proc/|sys/|etc/(hostname|hosts|mtab|` +
			`resolv\.conf))$`).MatchString(header.Name) {
			files = append(files, fmt.Sprintf("%s %s %d:%d", header.FileInfo().Mode(), header.Name,
				header.Uid, header.Gid))
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

// The documented command, with names of this test
func testContainer(t *testing.T, e *harness.Engine, image string, a *authority) {
	address := gateway(t, e)
	listener, err := net.Listen("tcp", address+":0")
	harness.Must(t, err)
	s := listening(t, listener, a, address)
	s.Set("user:password", nil)
	container, volume := e.Name(t, "it"), strings.ReplaceAll(e.Name(t, "spool"), ".", "-")
	url := strings.Replace(s.URL, "://", "://user:password@", 1) + "/publish/docker"
	run := documented(t, install, "## As a container", "docker run")
	for _, r := range [][2]string{
		{"--name docker-stats-to-backstop", "--name " + container},
		{"--volume docker-stats-to-backstop:", "--volume " + volume + ":"},
		{"https://user:password@backstop.server/publish/docker", url},
		{"\n      docker-stats-to-backstop\n", "\n      " + image + "\n"},
	} {
		if strings.Count(run, r[0]) != 1 {
			t.Fatalf("the documented command lacks %q:\n%s", r[0], run)
		}
		run = strings.Replace(run, r[0], r[1], 1)
	}
	t.Cleanup(func() {
		e.Remove(container)
		e.RemoveVolumeWithOptions(docker.RemoveVolumeOptions{Name: volume, Force: true})
	})
	engine, err := e.Info()
	harness.Must(t, err)
	logs := func() string { out, _ := tryCommand(t, e, "docker logs "+container); return out }
	host := node(engine.Name)
	all := []string{`^` + regexp.QuoteMeta(host) + `\.metrics\.sampled `,
		`^` + regexp.QuoteMeta(host+"."+container) + `\.cpu\.total `, // by its rule
		`^` + regexp.QuoteMeta(host+"."+e.Name(t, "neighbour")) + `\.cpu\.total `}
	await := func() {
		t.Helper()
		for _, pattern := range all {
			if err := s.Await(pattern, 1, 3*time.Minute); err != nil { // of a poll a minute
				t.Fatalf("%v\n%s", err, logs())
			}
		}
	}
	try := harness.AllOf(`(?m)^    (docker run --rm .* --once)$`, harness.ReadFile(t, "README.md"))
	if len(try) != 1 {
		t.Fatalf("the README tries %q", try)
	}
	only := " '" + e.Only(t) + "'"
	tried := command(t, e, strings.Replace(try[0], " "+harness.Program+" ", " "+image+" ", 1)+only)
	if !strings.Contains(tried, ".metrics.sampled ") {
		t.Errorf("%s prints\n%s", try[0], tried)
	}

	command(t, e, run)
	await()
	exec := "docker exec docker-stats-to-backstop"
	check := strings.Replace(documented(t, "docs/names.md", "## See what rules do", exec), exec,
		"docker exec "+container, 1)
	names := command(t, e, strings.Split(strings.TrimSpace(check), "\n")[0]+only)
	if !strings.Contains(names, container) {
		t.Errorf("%s prints\n%s", check, names)
	}
	it, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: container})
	harness.Must(t, err)
	if text := s.Lines(); strings.Contains(text, it.ID[:12]) {
		t.Errorf("by its container's id:\n%s", text)
	}

	// It stops at SIGTERM, and what could not be delivered is in the volume, for the next one.
	s.Set("", harness.AnswerWith(500, ""))
	command(t, e, "docker restart --time 15 "+container)
	harness.AwaitText(t, logs, "Backstop fails, keeping metrics", 1)
	command(t, e, "docker stop --time 15 "+container)
	it, err = e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: container})
	if err != nil || it.State.ExitCode != 0 {
		t.Errorf("%v, it ended with %d:\n%s", err, it.State.ExitCode, logs())
	}
	harness.Must(t, e.Remove(container))
	s.Set("user:password", nil)
	command(t, e, run)
	harness.AwaitText(t, logs, "metrics of the earlier run are delivered", 1)

	// The certificates are what makes https work.
	harness.Must(t, e.Remove(container))
	out, err := tryCommand(t, e,
		strings.NewReplacer("--detach", "--env SSL_CERT_FILE=/LICENSE --env SSL_CERT_DIR=/spool",
			"--restart unless-stopped", "").Replace(strings.TrimSpace(run))+" --once")
	if err == nil || !strings.Contains(out, "certificate signed by unknown authority") ||
		strings.Contains(out, "password") {
		t.Errorf("without them: %v\n%s", err, out)
	}
}

// A container that has the folder of the socket mounted finds the engine again that was stopped and
// started, and made another socket.
func testEngineStartedAnew(t *testing.T, e *harness.Engine, image string) {
	own := harness.StartOwn(t)
	container := e.Name(t, "it")
	t.Cleanup(func() { e.Remove(container) })
	volume := harness.AllOf(`--volume (/var/run:\S+)`, documented(t, install, "## As a container",
		"docker run"))
	if len(volume) != 1 {
		t.Fatalf("no folder of the engine's socket is mounted, only %q", volume)
	}
	command(t, e, `docker run --detach --name "$NAME" --user 0:0 --read-only --cap-drop ALL \
		--volume "$VOLUME" "$IMAGE" --backstop=- --poll=1s`, "NAME="+container, "IMAGE="+image,
		"VOLUME="+strings.Replace(volume[0], "/var/run", own.Folder(), 1))
	logs := func() string { out, _ := tryCommand(t, e, "docker logs "+container); return out }
	harness.AwaitText(t, logs, ".metrics.sampled ", 1)
	own.Kill()
	harness.AwaitText(t, logs, "Docker engine does not answer", 1)
	own.Start()
	harness.AwaitText(t, logs, "Docker engine answers", 1)
}

// gateway starts a container, called neighbour, and returns the address at which it reaches its
// host.
func gateway(t *testing.T, e *harness.Engine) string {
	t.Helper()
	id := e.Run(t, "neighbour", "", docker.HostConfig{})
	neighbour, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: id})
	harness.Must(t, err)
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
	harness.Must(t, r.error)
	return r.Listener
}

// The stack, on a swarm of one node
func testSwarm(t *testing.T, usual *harness.Engine, image string) {
	own := harness.StartOwn(t)
	e := harness.Connect(t, own.Address)
	command(t, usual, `docker save "$IMAGE" | docker --host "$OWN" load`, "IMAGE="+image,
		"OWN="+own.Address)
	command(t, e, "docker swarm init --advertise-addr 127.0.0.1")
	s := listening(t, listenIn(t, own.Pid()), nil, "")
	s.Set("user:password", nil)

	// The node has other services too.
	command(t, e, `create() { docker service create --detach --network host "$@" /busybox sleep 600; }
		create --name web "$IMAGE"
		create --name agent --mode global "$IMAGE"`, "IMAGE="+e.Image)

	text := harness.ReadFile(t, "deploy/stack.yaml")
	if strings.Count(text, "- /var/run:") != 1 {
		t.Fatal("deploy/stack.yaml has no folder to replace by that of the own engine's socket")
	}
	file := filepath.Join(t.TempDir(), "stack.yaml")
	harness.Must(t, os.WriteFile(file,
		[]byte(strings.Replace(text, "- /var/run:", "- "+own.Folder()+":", 1)), 0o600))
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	harness.Must(t, err)
	deploy := documented(t, install, "## As a container", "printf") +
		documented(t, install, "## As a container", "docker stack deploy")
	deploy = strings.Replace(deploy, "https://user:password@backstop.server/publish/docker",
		"http://user:password@"+gateway(t, e)+":"+port+"/publish/docker", 1)
	deploy = strings.Replace(deploy, "deploy/stack.yaml", file, 1)
	t.Log(command(t, e, deploy, "IMAGE="+image))

	host := command(t, e, "docker node ls --format '{{.Hostname}}'")
	for _, name := range []string{"metrics.sampled", "web.1.cpu.total", "agent.cpu.total",
		"metrics_docker-stats-to-backstop.cpu.total"} {
		if err := s.Await(`^`+regexp.QuoteMeta(node(host)+"."+name)+" ", 1, 3*time.Minute); err != nil {
			log, _ := tryCommand(t, e,
				"docker service ps --no-trunc metrics_docker-stats-to-backstop; docker service logs --raw "+
					"metrics_docker-stats-to-backstop")
			t.Fatalf("%v; there are\n%s\n%s", err, s.Lines(), log)
		}
	}
}

// Compose reads the files, and what arrives of it are rules.
func TestComposeTakesTheFiles(t *testing.T) {
	for _, name := range []string{"compose.yaml", "compose.carbon.yaml"} {
		t.Run(name, func(t *testing.T) { composeTakes(t, name) })
	}
}

func composeTakes(t *testing.T, name string) {
	t.Helper()
	// What Compose itself reads its files with.
	compose := exec.Command("go", "run", "github.com/compose-spec/compose-go/v2/cmd@v2.16.2",
		"-format=json", name)
	compose.Dir = filepath.Join(harness.Top(t), "deploy") // where docker compose begins paths
	compose.Env = append(os.Environ(), "GOFLAGS=")
	out, err := compose.Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && strings.Contains(string(exit.Stderr),
		name) {
		t.Fatalf("%s", exit.Stderr)
	} else if err != nil {
		harness.Cannot(t, "compose-go cannot be had: %v", err)
	}
	var file struct {
		Services map[string]struct {
			Environment map[string]string
			Volumes     []struct{ Source, Target string }
		}
	}
	harness.Must(t, json.Unmarshal(out, &file))
	daemon := file.Services[harness.Program].Environment
	// One service's values are what another one wants.
	backstop := file.Services["backstop"].Environment
	want := "http://" + backstop["BACKSTOP_AUTH"] + "@backstop:3000/publish/" + backstop["PREFIXES"]
	if _, there := file.Services["graphite"]; backstop == nil && there {
		want = "carbon://graphite/docker"
	}
	if daemon["SRV_BACKSTOP"] != want {
		t.Errorf("SRV_BACKSTOP is %s, want %s", daemon["SRV_BACKSTOP"], want)
	}
	// Carbon keeps what the daemon sends, as docs/graphite.md has it.
	mounted := map[string]string{} // by target
	for _, v := range file.Services["graphite"].Volumes {
		mounted[v.Target] = v.Source
	}
	for _, conf := range []string{schemasFile, aggregationFile} {
		target := "/opt/graphite/conf/" + filepath.Base(conf)
		if want := filepath.Join(harness.Top(t), conf); mounted[target] != want {
			t.Errorf("graphite has %q at %s, not %s", mounted[target], target, want)
		}
	}
	schemas := confSections(t, harness.ReadFile(t, schemasFile))
	kept := sectionOf(schemas, "docker.").values["retentions"]
	if poll := cmp.Or(daemon["SRV_POLL"], "60s"); !strings.HasPrefix(kept, poll+":") {
		t.Errorf("polls are %s apart, and Carbon keeps %s", poll, kept)
	}
	help, err := exec.Command(harness.Program, "--help").CombinedOutput()
	harness.Must(t, err)
	known := harness.AllOf(`\b(SRV_[A-Z_]+)\b`, string(help))

	engine := harness.NewReplay(t, "cgroup2")
	one := `[{"Id":"` + strings.Repeat("0", 64) + `","Names":["/docker-stats-web-1"]}]`
	engine.On("/containers/json", harness.AnswerWith(200, one))
	check := exec.Command(harness.Program, "--check", "--docker="+engine.URL)
	check.Env = os.Environ()
	for name, value := range daemon {
		check.Env = append(check.Env, name+"="+value)
		if !slices.Contains(known, name) {
			t.Errorf("there is no %s", name)
		}
	}
	names, err := check.CombinedOutput()
	if err != nil || !strings.Contains(string(names), " docker-stats.web.1.*\n") {
		t.Errorf("docker-stats-web-1 becomes %v\n%s", err, names)
	}
}
