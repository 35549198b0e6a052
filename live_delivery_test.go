//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	docker "github.com/fsouza/go-dockerclient"
)

// Containers come and go all the time, under a fast poll, for 10 s or as long as $SOAK says, and
// engine and Backstop fail now and then, in all ways: nothing is kept of containers that are gone,
// nor of calls that failed, and everything is delivered in the end.
func TestLiveSoak(t *testing.T) {
	e := harness.Usual(t)
	long := 10 * time.Second
	if text := os.Getenv("SOAK"); text != "" {
		var err error
		long, err = time.ParseDuration(text)
		harness.Must(t, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	faults := new(atomic.Int64)
	fault := func() http.HandlerFunc { // nil for none
		fs := []http.HandlerFunc{harness.Hang, harness.AnswerWith(500, "no"),
			harness.AnswerWith(404, "no"), harness.AnswerWith(200, "[[[["),
			harness.AnswerWith(503, ""),
			func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }}
		i := rand.N(len(fs) * 10)
		if i >= len(fs) || ctx.Err() != nil {
			return nil
		}
		faults.Add(1)
		return fs[i]
	}
	unsteady := func(w http.ResponseWriter, r *http.Request, well http.Handler) {
		if fail := fault(); fail != nil {
			well = fail
		}
		well.ServeHTTP(w, r)
	}
	proxied := harness.Between(t, e, unsteady)
	s := harness.NewStandIn(t)
	s.Patient = true
	s.Set("", func(w http.ResponseWriter, r *http.Request) {
		unsteady(w, r, harness.AnswerWith(200, "ok"))
	})
	target := mustBackstop(t, s.URL+"/publish/docker")
	target.timeout = 2 * time.Second
	c, _ := liveCollector(t, proxied)
	c.engine.timeout = 2 * time.Second
	q, log := newRig(t, destination{name: "Backstop", post: target.post}, 1<<20, "")
	sweeps := 0
	sweep := func() {
		sweeps++
		q.put(append(c.sweep(t.Context()).metrics, q.own("h", time.Now())...))
		for q.waiting() > 0 && q.try(t) == nil {
		}
		log.Take()
	}
	// and the client asks for the engine's version now, not from all workers at once
	e.Run(t, "stays", "", docker.HostConfig{NetworkMode: "none"})
	sweep()
	before := held(t)
	churn, started := churnContainers(ctx, t, e)
	for next := time.Now(); ctx.Err() == nil; {
		sweep()
		if time.Now().After(next) {
			next = time.Now().Add(long / 10)
			t.Logf("%d sweeps, %d containers, %d faults: %+v",
				sweeps, started.Load(), faults.Load(), held(t))
		}
	}
	churn.Wait()
	sweep()
	sweep() // after a fault
	for _, known := range c.containers.byID {
		if strings.HasPrefix(known.name, e.Name(t, "soak")) {
			t.Errorf("%s is still known", known.name)
		}
	}
	for path := range c.containers.holders {
		if strings.Contains(path, "soak") {
			t.Errorf("%s is still held", path)
		}
	}
	if left := q.waiting(); left > 0 {
		t.Errorf("%d metrics still wait", left)
	}
	after := held(t)
	// Up to 128 connections are kept. Each is two goroutines and a file at our end, three and two
	// in the proxy, and it has one to the engine.
	if after.files > before.files+400 || after.goroutines > before.goroutines+900 ||
		after.heap > before.heap+16<<20 {
		t.Errorf("after %d containers in %d sweeps: %+v, before: %+v",
			started.Load(), sweeps, after, before)
	}
	t.Logf("%d containers came and went in %d sweeps with %d faults: %+v, before: %+v",
		started.Load(), sweeps, faults.Load(), after, before)
}

// churnContainers starts and removes containers until ctx ends.
func churnContainers(ctx context.Context, t *testing.T, e *harness.Engine) (
	churn *sync.WaitGroup, started *atomic.Int64,
) {
	churn, started = new(sync.WaitGroup), new(atomic.Int64)
	for worker := range 4 {
		churn.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := e.Name(t, fmt.Sprintf("soak%d-%d", worker, i))
				made, err := e.CreateContainer(docker.CreateContainerOptions{Name: name,
					Config:     &docker.Config{Image: e.Image, Cmd: []string{"/busybox", "sleep", "100"}},
					HostConfig: &docker.HostConfig{NetworkMode: "none"}})
				if err == nil {
					err = e.StartContainer(made.ID, nil)
				}
				if err != nil {
					t.Error(err)
				}
				started.Add(1)
				if err := e.Remove(name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	return churn, started
}

type holdings struct{ files, goroutines, heap int }

// held is what this process holds.
func held(t *testing.T) holdings {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	harness.Must(t, err)
	runtime.GC()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	return holdings{len(files), runtime.NumGoroutine(), int(memory.HeapAlloc)}
}

// The rest runs real receivers: carbon-cache, carbon-c-relay and HAProxy.

// server is a real receiver, or something before one.
type server struct {
	t       testing.TB
	command []string
	address string
	log     *os.File
	running *exec.Cmd
	killed  []time.Time
}

func (s *server) hostPort() string { return net.JoinHostPort(s.address, livePort) }

// start starts s and waits until it listens.
func (s *server) start() {
	s.t.Helper()
	s.running = exec.Command(s.command[0], s.command[1:]...)
	s.running.Stdout, s.running.Stderr = s.log, s.log
	// When this process ends in a hurry, it ends too.
	s.running.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	harness.Must(s.t, s.running.Start())
	await(s.t, s.command[0]+" listens", func() bool {
		conn, err := net.Dial("tcp", s.hostPort())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// signal ends s, if it runs.
func (s *server) signal(signal syscall.Signal) {
	if s.running == nil {
		return
	}
	s.killed = append(s.killed, time.Now())
	s.running.Process.Signal(signal)
	s.running.Wait()
	s.running = nil
}

// loopbacks is how many addresses are taken.
var loopbacks atomic.Int32

// newServer returns a server that is to run a command of a Debian package. Its address is one of
// the loopback network that nobody else has.
func newServer(t testing.TB, command, debian string) (s *server, dir string) {
	t.Helper()
	path, err := exec.LookPath(command)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + command); err != nil {
			harness.Cannot(t, "no %s: it is in Debian's %s", command, debian)
		}
	}
	dir = t.TempDir()
	log, err := os.Create(filepath.Join(dir, "log"))
	harness.Must(t, err)
	pid := os.Getpid()
	s = &server{t: t, command: []string{path}, log: log,
		address: fmt.Sprintf("127.%d.%d.%d", 100+loopbacks.Add(1), pid>>8&255, pid&255)}
	t.Cleanup(func() {
		s.signal(syscall.SIGKILL)
		log.Close()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("the end of the log of %s:\n%s", command, text[max(0, len(text)-2000):])
		}
	})
	return s, dir
}

const livePort = "22003"

// carbonCache is a carbon-cache with its files in a folder of its own.
type carbonCache struct {
	*server
	dir string
}

// start starts Carbon anew, after a kill as well.
func (c *carbonCache) start() {
	c.t.Helper()
	os.Remove(filepath.Join(c.dir, "pid"))
	c.server.start()
}

// stored returns the points of a metric in its Whisper file, by their times:
// https://graphite.readthedocs.io/en/latest/whisper.html#database-format.
func (c *carbonCache) stored(name string) map[int64]float64 {
	c.t.Helper()
	path := filepath.Join(c.dir, "whisper", strings.ReplaceAll(name, ".", "/")+".wsp")
	data, err := os.ReadFile(path)
	points := map[int64]float64{}
	if err != nil || len(data) < 28 {
		return points
	}
	const header, point = 28, 12 // of a file with one archive
	for at := header; at+point <= len(data); at += point {
		if time := binary.BigEndian.Uint32(data[at:]); time != 0 {
			points[int64(time)] = math.Float64frombits(binary.BigEndian.Uint64(data[at+4:]))
		}
	}
	return points
}

// newCarbonCache returns one that is not started. It keeps what Whisper calls retentions.
func newCarbonCache(t testing.TB, retentions string) *carbonCache {
	t.Helper()
	s, dir := newServer(t, "carbon-cache", "graphite-carbon")
	config := filepath.Join(dir, "carbon.conf")
	s.command = append(s.command, "--config="+config, "--nodaemon",
		"--pidfile="+filepath.Join(dir, "pid"), "start")
	for name, text := range map[string]string{
		config: "[cache]\nUSER =\n" +
			"STORAGE_DIR = " + dir + "\nLOCAL_DATA_DIR = " + dir + "/whisper\n" +
			"CONF_DIR = " + dir + "\nLOG_DIR = " + dir + "\nPID_DIR = " + dir + "\n" +
			"MAX_CACHE_SIZE = inf\nMAX_UPDATES_PER_SECOND = inf\nMAX_CREATES_PER_MINUTE = inf\n" +
			"LINE_RECEIVER_INTERFACE = " + s.address + "\nLINE_RECEIVER_PORT = " + livePort + "\n" +
			"PICKLE_RECEIVER_PORT = 0\nCACHE_QUERY_INTERFACE = " + s.address + "\n" +
			"CARBON_METRIC_INTERVAL = 0\nENABLE_TAGS = False\nLOG_UPDATES = False\n" +
			"LOG_LISTENER_CONN_SUCCESS = False\n" +
			"WHISPER_SPARSE_CREATE = True\nWHISPER_FALLOCATE_CREATE = False\n",
		filepath.Join(dir, "storage-schemas.conf"): "[all]\npattern = .*\nretentions = " +
			retentions + "\n",
	} {
		harness.Must(t, os.WriteFile(name, []byte(text), 0o600))
	}
	return &carbonCache{s, dir}
}

// fed is a rig with what was put into it, and when that was read.
type fed struct {
	*rig
	log    *harness.Log
	series int
	from   int64 // Unix seconds
	step   int64 // between sweeps

	mu     sync.Mutex
	sweeps int
	read   map[int64]time.Time // when a sweep was read, by its time
}

// sweep puts the next sweep.
func (f *fed) sweep() {
	f.mu.Lock()
	at := f.from + int64(f.sweeps)*f.step
	f.sweeps++
	f.mu.Unlock()
	metrics := make([]metric, f.series)
	for i := range metrics {
		metrics[i] = metric{fmt.Sprintf("live.m%d", i), ".x", whole(uint64(at + int64(i))), at}
	}
	f.put(metrics)
}

// sampling puts a sweep now and then until the function it returns is called.
func (f *fed) sampling(every time.Duration) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			case <-time.After(every):
				f.sweep()
			}
		}
	}()
	return func() { close(end); <-ended }
}

// arrives waits until everything is delivered and stored. What is not stored in the end may be
// Carbon's loss: it had read that long before it was killed.
func (f *fed) arrives(t *testing.T, c *carbonCache) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); f.waiting() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	missing := func() (points map[string]int64) {
		points = map[string]int64{}
		for i := range f.series {
			name := fmt.Sprintf("live.m%d.x", i)
			stored := c.stored(name)
			for n := range f.sweeps {
				at := f.from + int64(n)*f.step
				if stored[at] != float64(at+int64(i)) {
					points[fmt.Sprint(name, " ", at)] = at
				}
			}
		}
		return points
	}
	deadline := time.Now().Add(10 * time.Second) // Carbon writes when it has the time
	left := missing()
	for ; len(left) > 0 && time.Now().Before(deadline); left = missing() {
		time.Sleep(200 * time.Millisecond)
	}
	its := 0
	for point, at := range left {
		for _, killed := range c.killed {
			if after := killed.Sub(f.read[at]); after >= carbonProof {
				its++
				t.Logf("%s is Carbon's own loss: it was killed %s after reading it", point, after)
				delete(left, point)
				break
			}
		}
	}
	for point := range left {
		t.Errorf("%s is lost", point)
	}
	t.Logf("%d sweeps of %d metrics are stored, but %d metrics that Carbon lost in %d ends",
		f.sweeps, f.series, its, len(c.killed))
}

// feed returns a rig that delivers to an address, by way of a spool, all that is sampled.
func feed(t *testing.T, address string, series int, from, step int64) *fed {
	t.Helper()
	return feedTo(t, mustCarbon(t, "carbon://"+address), series, from, step)
}

// feedTo is feed to c.
func feedTo(t *testing.T, c *carbon, series int, from, step int64) *fed {
	t.Helper()
	to, f := c.destination(), &fed{series: series, from: from, step: step, read: map[int64]time.Time{}}
	to.post = func(ctx context.Context, body []byte) error {
		err := c.post(ctx, body)
		if metrics, _ := decode(body); err == nil {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, m := range metrics {
				f.read[m.time] = time.Now()
			}
		}
		return err
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", f.log)
		}
	})
	f.rig, f.log = newRig(t, to, 256<<20, filepath.Join(t.TempDir(), "spool"))
	f.pauses = pauses{first: 100 * time.Millisecond, longest: time.Second}
	return f
}

// Everything that is sampled is in Whisper's files in the end, whatever ends meanwhile.
func TestLiveCarbon(t *testing.T) {
	t.Parallel()
	now := time.Now().Unix()
	// lives ends a server again and again at random moments, while there are sweeps.
	lives := func(t *testing.T, f *fed, n int, s interface {
		start()
		signal(syscall.Signal)
	}, signal syscall.Signal) {
		stop := f.sampling(200 * time.Millisecond)
		for i := range n {
			s.start()
			alive := rand.N(4 * time.Second)
			if i%4 == 0 { // so that something is confirmed
				alive += carbonProof
			}
			time.Sleep(alive) // the random moment
			s.signal(signal)
		}
		s.start()
		stop()
	}
	for name, signal := range map[string]syscall.Signal{
		"killed": syscall.SIGKILL, "stopped": syscall.SIGTERM,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCarbonCache(t, "1s:2h")
			f := feed(t, c.hostPort(), 20, now-3600, 1)
			end := delivering(t, f.rig)
			lives(t, f, 20, c, signal)
			f.arrives(t, c)
			harness.Must(t, end())
		})
	}
	t.Run("away and frozen", func(t *testing.T) {
		t.Parallel()
		c := newCarbonCache(t, "1s:2h")
		f := feed(t, c.hostPort(), 20, now-3600, 1)
		end := delivering(t, f.rig)
		c.start()
		stop := f.sampling(200 * time.Millisecond)
		time.Sleep(3 * time.Second)
		c.signal(syscall.SIGTERM)
		time.Sleep(time.Minute) // that is how long it is away
		c.start()
		time.Sleep(3 * time.Second)
		c.running.Process.Signal(syscall.SIGSTOP)
		time.Sleep(10 * time.Second)
		c.running.Process.Signal(syscall.SIGCONT)
		stop()
		f.arrives(t, c)
		harness.Must(t, end())
		for text, times := range map[string]int{
			`msg="Carbon unreachable, keeping metrics"`:                2,
			`msg="Carbon reachable again, kept metrics are delivered"`: 1,
		} {
			if n := strings.Count(f.log.String(), text); n < 1 || n > times {
				t.Errorf("%d times %s in\n%s", n, text, f.log)
			}
		}
	})
	t.Run("a day's backlog", func(t *testing.T) {
		t.Parallel()
		c := newCarbonCache(t, "60s:2d")
		f := feed(t, c.hostPort(), 200, (now-24*3600)/60*60, 60)
		for range 24 * 60 {
			f.sweep()
		}
		c.start()
		end := delivering(t, f.rig)
		f.arrives(t, c)
		harness.Must(t, end())
	})
	t.Run("a relay that is killed", func(t *testing.T) {
		t.Parallel()
		c := newCarbonCache(t, "1s:2h")
		relay, dir := newServer(t, "carbon-c-relay", "carbon-c-relay")
		config := filepath.Join(dir, "relay.conf")
		harness.Must(t, os.WriteFile(config, fmt.Appendf(nil, "cluster all forward %s;\n"+
			"match * send to all stop;\nlisten type linemode %s proto tcp;\n",
			c.hostPort(), relay.hostPort()), 0o600))
		relay.command = append(relay.command, "-f", config)
		c.start()
		f := feed(t, relay.hostPort(), 20, now-3600, 1)
		end := delivering(t, f.rig)
		lives(t, f, 5, relay, syscall.SIGKILL)
		f.arrives(t, c)
		harness.Must(t, end())
	})
	t.Run("killed behind HAProxy", func(t *testing.T) {
		t.Parallel()
		c := newCarbonCache(t, "1s:2h")
		proxy, dir := newServer(t, "haproxy", "haproxy")
		config := filepath.Join(dir, "haproxy.cfg")
		harness.Must(t, os.WriteFile(config, fmt.Appendf(nil, "defaults\n mode tcp\n"+
			" timeout connect 5s\n timeout client 1m\n timeout server 1m\n"+
			"listen carbon\n bind %s\n server carbon %s\n", proxy.hostPort(), c.hostPort()), 0o600))
		proxy.command = append(proxy.command, "-db", "-f", config)
		proxy.start()
		f := feed(t, proxy.hostPort(), 20, now-3600, 1)
		end := delivering(t, f.rig)
		lives(t, f, 5, c, syscall.SIGKILL)
		f.arrives(t, c)
		harness.Must(t, end())
	})
	t.Run("the daemon is killed", func(t *testing.T) {
		t.Parallel()
		killTheDaemon(t)
	})
}

// killTheDaemon kills the daemon at random moments. Each sweep has a series of its own.
func killTheDaemon(t *testing.T) {
	binary, err := exec.LookPath(program) // see testscript.Main
	harness.Must(t, err)
	c := newCarbonCache(t, "60s:2h")
	c.start()
	engine, clock := harness.NewReplay(t, "cgroup2"), &ticking{asked: make(chan struct{}, 1)}
	engine.On("/containers/fx-idle/stats", clock.stats(engine))
	var log harness.Log
	start := func() *exec.Cmd {
		daemon := exec.Command(binary, "--backstop=carbon://"+c.hostPort()+"/docker", "--per=interface",
			"--docker="+engine.URL, "--poll=500ms", "--spool="+filepath.Join(c.dir, "spool"))
		daemon.Stderr = &log
		harness.Must(t, daemon.Start())
		<-clock.asked
		return daemon
	}
	var sampled []string
	ended := func(at time.Time) {
		sure, _ := clock.ended(at)
		sampled = append(sampled, sure...)
	}
	const lives = 20
	for range lives {
		daemon := start()
		time.Sleep(rand.N(5 * time.Second)) // the random moment
		killed := time.Now()
		daemon.Process.Kill()
		daemon.Wait()
		ended(killed)
	}
	daemon := start()
	<-clock.asked // the first is queued now
	daemon.Process.Signal(syscall.SIGTERM)
	harness.Must(t, daemon.Wait())
	ended(time.Now().Add(time.Minute)) // it had all the time it wanted
	missing := func() []string {
		return slices.DeleteFunc(slices.Clone(sampled), func(metric string) bool {
			return len(c.stored("docker."+metric)) > 0
		})
	}
	left := missing()
	for end := time.Now().Add(30 * time.Second); len(left) > 0 && time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond) // Carbon writes when it has the time
		left = missing()
	}
	if len(left) > 0 {
		t.Errorf("%d of %d are lost: %q\n%s", len(left), len(sampled), left, &log)
	}
	t.Logf("%d sweeps in %d lives", len(sampled), lives+1)
}
