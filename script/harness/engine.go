//go:build linux

package harness

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"testing"

	docker "github.com/fsouza/go-dockerclient"
)

// Engine is a real engine, and an image to make containers of.
type Engine struct {
	*docker.Client
	Address string
	Image   string
}

// Usual is the engine that the docker command uses.
func Usual(t testing.TB) *Engine {
	t.Helper()
	return Connect(t, UsualAddress())
}

// UsualAddress is the address of the engine that the docker command uses.
func UsualAddress() string {
	return cmp.Or(os.Getenv("DOCKER_HOST"),
		"unix:///var/run/docker.sock")
}

// Connect makes the image on the engine at address.
func Connect(t testing.TB, address string) *Engine {
	t.Helper()
	client, err := docker.NewClientFromEnv()
	if address != os.Getenv("DOCKER_HOST") {
		client, err = docker.NewClient(address)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Ping(); err != nil {
		NoEngine(t, "no Docker engine at %s: %v", address, err)
	}
	e := &Engine{client, address, "docker-stats-to-backstop-test:" + thisRun(t)}
	root, err := os.Open(BusyboxTar(t, t.TempDir()))
	Must(t, err)
	defer root.Close()
	repository, tag, _ := strings.Cut(e.Image, ":")
	Must(t, client.ImportImage(docker.ImportImageOptions{
		Repository: repository, Tag: tag, Source: "-", InputStream: root, OutputStream: io.Discard,
	}))
	made, err := client.InspectImage(e.Image)
	Must(t, err)
	t.Cleanup(func() {
		for _, image := range []string{e.Image, made.ID} { // a newer one may have taken the name
			client.RemoveImageExtended(image, docker.RemoveImageOptions{Force: true})
		}
	})
	return e
}

// BusyboxTar makes a tar of a root with /busybox in it, in dir, and returns its path.
func BusyboxTar(t testing.TB, dir string) string {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		NoEngine(t, "no static busybox to make an image of: %v", err)
	}
	var root bytes.Buffer
	archive := tar.NewWriter(&root)
	archive.WriteHeader(&tar.Header{Name: "busybox", Mode: 0o755, Size: int64(len(busybox))})
	archive.Write(busybox)
	archive.Close()
	path := filepath.Join(dir, "root.tar")
	Must(t, os.WriteFile(path, root.Bytes(), 0o600))
	return path
}

// thisRun names this test in this run of it.
func thisRun(t testing.TB) string {
	return fmt.Sprintf("%s-%d", strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")), os.Getpid())
}

// Name returns the name of a container of this test, in this run of it.
func (e *Engine) Name(t *testing.T, name string) string {
	return fmt.Sprintf("dstb-%s.%s", thisRun(t), name)
}

// Only returns the option that leaves out the containers of other tests, which may run beside, and
// fail.
func (e *Engine) Only(t *testing.T) string {
	return `--prefix=[{"regexp":"^(` + e.Name(t, "") + `.*)$","into":"$1"},{"regexp":"","drop":true}]`
}

// Run starts a container that runs a shell script, "" for one that sleeps. It ends by itself
// after a while, should the test be killed.
func (e *Engine) Run(t *testing.T, name, script string, host docker.HostConfig) string {
	t.Helper()
	if script == "" {
		script = "exec /busybox sleep 600"
	}
	return e.Start(t, name, docker.Config{Cmd: []string{"/busybox", "sh", "-c", script}}, host)
}

// Labelled starts a container that sleeps and has these labels.
func (e *Engine) Labelled(t *testing.T, name string, labels map[string]string) string {
	t.Helper()
	config := docker.Config{Cmd: []string{"/busybox", "sleep", "600"}, Labels: labels}
	return e.Start(t, name, config, docker.HostConfig{NetworkMode: "none"})
}

// Start starts a container of the image, removes it after the test, and returns its id.
func (e *Engine) Start(
	t *testing.T, name string, config docker.Config, host docker.HostConfig,
) string {
	t.Helper()
	config.Image = e.Image
	t.Cleanup(func() { e.Remove(e.Name(t, name)) })
	container, err := e.CreateContainer(docker.CreateContainerOptions{
		Name: e.Name(t, name), Config: &config, HostConfig: &host,
	})
	Must(t, err)
	Must(t, e.StartContainer(container.ID, nil))
	return container.ID
}

// Exec starts a command in a container.
func (e *Engine) Exec(t *testing.T, id string, command ...string) {
	t.Helper()
	made, err := e.CreateExec(docker.CreateExecOptions{Container: id, Cmd: command})
	Must(t, err)
	Must(t, e.StartExec(made.ID, docker.StartExecOptions{Detach: true}))
}

// Remove removes a container, by its name or id.
func (e *Engine) Remove(name string) error {
	return e.RemoveContainer(docker.RemoveContainerOptions{ID: name, Force: true})
}

// Between returns an engine with a proxy before e, which can do things to single calls.
func Between(
	t *testing.T, e *Engine, call func(w http.ResponseWriter, r *http.Request, forward http.Handler),
) *Engine {
	t.Helper()
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "engine"
		},
		Transport: Transport(e.Address),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		call(w, r, proxy)
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return &Engine{e.Client, server.URL, e.Image}
}

// Transport returns a transport to an engine at a unix or TCP address, whatever the host of a URL.
func Transport(address string) *http.Transport {
	network, at, _ := strings.Cut(address, "://")
	if network != "unix" {
		network = "tcp"
	}
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, at)
		},
		MaxIdleConnsPerHost: 128, // as the daemon
	}
}
