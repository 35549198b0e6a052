//go:build linux

package harness

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Server is a real receiver of metrics, at an address of its own.
type Server struct {
	t       testing.TB
	command []string
	address string
	log     *os.File
	running *exec.Cmd
}

// loopbacks is how many addresses are taken.
var loopbacks atomic.Int32

// NewServer returns a server that is to run a command of a Debian package, and a folder of its
// own. Its address is one of the loopback network that nobody else has.
func NewServer(t testing.TB, command, debian string) (s *Server, dir string) {
	t.Helper()
	path, err := exec.LookPath(command)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + command); err != nil {
			Cannot(t, "no %s: it is in Debian's %s", command, debian)
		}
	}
	dir = t.TempDir()
	log, err := os.Create(filepath.Join(dir, "log"))
	Must(t, err)
	pid := os.Getpid()
	s = &Server{t: t, command: []string{path}, log: log,
		address: fmt.Sprintf("127.%d.%d.%d", 100+loopbacks.Add(1), pid>>8&255, pid&255)}
	t.Cleanup(func() {
		s.Kill()
		log.Close()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("the end of the log of %s:\n%s", command, text[max(0, len(text)-2000):])
		}
	})
	return s, dir
}

// Arguments adds arguments to the command.
func (s *Server) Arguments(args ...string) { s.command = append(s.command, args...) }

// At returns the server's address with a port.
func (s *Server) At(port string) string { return net.JoinHostPort(s.address, port) }

// Plaintext is the port at which a Server takes Carbon's plaintext protocol.
const Plaintext = "22003"

// Start starts the server, and waits until it takes metrics.
func (s *Server) Start() {
	s.t.Helper()
	s.running = exec.Command(s.command[0], s.command[1:]...)
	s.running.Stdout, s.running.Stderr = s.log, s.log
	// When this process ends in a hurry, it ends too.
	s.running.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	Must(s.t, s.running.Start())
	Await(s.t, time.Minute, s.command[0]+" listens", func() bool {
		conn, err := net.Dial("tcp", s.At(Plaintext))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// Kill kills the server, if it runs.
func (s *Server) Kill() {
	if s.running == nil {
		return
	}
	s.running.Process.Kill()
	s.running.Wait()
	s.running = nil
}

// Await waits until something is so.
func Await(t testing.TB, within time.Duration, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}

// Carbon is a carbon-cache with its files in a folder of its own.
type Carbon struct {
	*Server
	Dir string // with its configuration, and the folder whisper
}

// NewCarbon returns a carbon-cache that is not started, with these storage-schemas.conf and
// storage-aggregation.conf.
func NewCarbon(t testing.TB, schemas, aggregation string) *Carbon {
	t.Helper()
	s, dir := NewServer(t, "carbon-cache", "graphite-carbon")
	config := filepath.Join(dir, "carbon.conf")
	s.Arguments("--config="+config, "--nodaemon", "--pidfile="+filepath.Join(dir, "pid"), "start")
	c := &Carbon{s, dir}
	Must(t, os.WriteFile(config, []byte("[cache]\nUSER =\n"+
		"STORAGE_DIR = "+dir+"\nLOCAL_DATA_DIR = "+dir+"/whisper\n"+
		"CONF_DIR = "+dir+"\nLOG_DIR = "+dir+"\nPID_DIR = "+dir+"\n"+
		"MAX_CACHE_SIZE = inf\nMAX_UPDATES_PER_SECOND = inf\nMAX_CREATES_PER_MINUTE = inf\n"+
		"LINE_RECEIVER_INTERFACE = "+s.address+"\nLINE_RECEIVER_PORT = "+Plaintext+"\n"+
		"PICKLE_RECEIVER_PORT = 0\nCACHE_QUERY_INTERFACE = "+s.address+"\n"+
		"CARBON_METRIC_INTERVAL = 0\nENABLE_TAGS = False\nLOG_UPDATES = False\n"+
		"LOG_LISTENER_CONN_SUCCESS = False\n"+
		"WHISPER_SPARSE_CREATE = True\nWHISPER_FALLOCATE_CREATE = False\n"), 0o600))
	c.Configure(schemas, aggregation)
	return c
}

// Configure replaces both files. Carbon reads them when it starts.
func (c *Carbon) Configure(schemas, aggregation string) {
	c.t.Helper()
	Must(c.t, os.WriteFile(filepath.Join(c.Dir, "storage-schemas.conf"), []byte(schemas), 0o600))
	Must(c.t, os.WriteFile(filepath.Join(c.Dir, "storage-aggregation.conf"), []byte(aggregation),
		0o600))
}

// Start starts Carbon anew, after a kill as well.
func (c *Carbon) Start() {
	c.t.Helper()
	os.Remove(filepath.Join(c.Dir, "pid"))
	c.Server.Start()
}

// File returns the path of a metric's Whisper file.
func (c *Carbon) File(metric string) string {
	return filepath.Join(c.Dir, "whisper", strings.ReplaceAll(metric, ".", "/")+".wsp")
}
