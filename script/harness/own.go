//go:build linux

package harness

import (
	"os"
	"os/exec"
	"testing"
	"time"

	docker "github.com/fsouza/go-dockerclient"
)

// OwnEngine is a dockerd of the test's own, which it may kill. It runs in namespaces of its
// own, so that it does not touch the networks of another one, and so that everything it
// started ends with it, as in a power cut.
type OwnEngine struct {
	Address string

	t       *testing.T
	dir     string
	dockerd *exec.Cmd
	ended   chan struct{}
}

// StartOwn starts a dockerd that ends with the test.
func StartOwn(t *testing.T) *OwnEngine {
	t.Helper()
	for _, command := range []string{"dockerd", "unshare"} {
		if _, err := exec.LookPath(command); err != nil || os.Getuid() != 0 {
			NoEngine(t, "a dockerd of the test's own needs root and %s (%v)", command, err)
		}
	}
	dir, err := os.MkdirTemp("", "dstb") // a socket's path is short
	Must(t, err)
	e := &OwnEngine{t: t, dir: dir, Address: "unix://" + dir + "/docker.sock"}
	t.Cleanup(func() {
		e.Kill()
		RemoveEngine(t, dir)
	})
	e.Start()
	return e
}

// RemoveEngine removes the folder of an engine that was ended: some of what it started takes a
// moment longer to end, and writes there.
func RemoveEngine(t testing.TB, dir string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := os.RemoveAll(dir)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("cleaning up: %v", err)
			return
		}
	}
}

// Start starts dockerd, and waits until it answers. After a kill it may take a second try:
// containerd can be busy with what is left for longer than dockerd waits for it.
func (e *OwnEngine) Start() {
	e.t.Helper()
	client, err := docker.NewClient(e.Address)
	Must(e.t, err)
	for range 3 {
		e.spawn()
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			if client.Ping() == nil {
				return
			}
			select {
			case <-e.ended:
				deadline = time.Time{}
			case <-time.After(100 * time.Millisecond):
			}
		}
		e.Kill()
	}
	text, _ := os.ReadFile(e.dir + "/log")
	e.t.Fatalf("dockerd does not start: %s", text)
}

// spawn starts dockerd.
func (e *OwnEngine) spawn() {
	e.t.Helper()
	// In the new namespace these numbers are others', dockerd's own threads for one, which it takes
	// for what still runs.
	os.Remove(e.dir + "/docker.pid")
	os.Remove(e.dir + "/exec/containerd/containerd.pid")
	log, err := os.OpenFile(e.dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	Must(e.t, err)
	defer log.Close()
	dockerd := exec.Command("unshare",
		"--fork", "--pid", "--mount-proc", "--mount", "--net", "--kill-child",
		"sh", "-c", `/bin/busybox ip link set lo up && exec dockerd "$@"`, "sh",
		"--host="+e.Address, "--data-root="+e.dir+"/data",
		"--exec-root="+e.dir+"/exec", "--pidfile="+e.dir+"/docker.pid")
	dockerd.Stdout, dockerd.Stderr = log, log
	Must(e.t, dockerd.Start())
	ended := make(chan struct{})
	e.dockerd, e.ended = dockerd, ended
	go func() {
		dockerd.Wait()
		close(ended)
	}()
}

// Kill ends dockerd and all that it started, without a chance to tidy up.
func (e *OwnEngine) Kill() {
	e.dockerd.Process.Kill()
	<-e.ended
}

// Folder returns the folder of the socket.
func (e *OwnEngine) Folder() string { return e.dir }

// Pid returns the process that leads the namespaces.
func (e *OwnEngine) Pid() int { return e.dockerd.Process.Pid }
