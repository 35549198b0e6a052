package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// sampled returns n metrics of the sweep with that number.
func sampled(sweep, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		name, at := fmt.Sprintf("web.m%d", i), 1795409680+int64(sweep)*60
		metrics[i] = metric{"", name, whole(uint64(sweep)), at}
	}
	return metrics
}

// sometimes is a fault of some requests, counted from 1. well answers the others.
func sometimes(when func(request int) bool, fault, well http.HandlerFunc) http.HandlerFunc {
	var mu sync.Mutex
	n := 0
	return func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n++
		now := when(n)
		mu.Unlock()
		if now {
			fault(w, r)
		} else {
			well(w, r)
		}
	}
}

// resets is a fault: the connection is reset, before or after the body was read.
func resets(afterBody bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if afterBody {
			io.Copy(io.Discard, r.Body)
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		conn.(*net.TCPConn).SetLinger(0) // so that closing it is a reset
		conn.Close()
	}
}

// drips is a fault: an answer, one byte a second.
func drips(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	for _, c := range []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") {
		if _, err := conn.Write([]byte{c}); err != nil {
			return
		}
		select {
		case <-time.After(time.Second):
		case <-r.Context().Done():
			return
		}
	}
}

// deliveringTo returns a rig with short pauses for the stand-in, with or without a spool, and its
// log.
func deliveringTo(t *testing.T, s *harness.StandIn, spooled bool) (*rig, *backstop, *harness.Log) {
	t.Helper()
	b := mustBackstop(t, s.URL+"/publish/docker")
	b.leadPause = time.Millisecond
	dir := ""
	if spooled {
		dir = newDir(t)
	}
	q, log := newRig(t, b.destination(), 8<<20, dir)
	q.pauses = pauses{first: 10 * time.Millisecond, longest: 50 * time.Millisecond}
	return q, b, log
}

// Whatever goes wrong with sockets or answers, everything that was sampled arrives.
func TestEverythingArrives(t *testing.T) {
	first := func(n int) func(int) bool { return func(request int) bool { return request <= n } }
	everyThird := func(request int) bool { return request%3 != 0 }
	const sweeps, size = 6, 50
	type fault struct {
		why  string
		when func(request int) bool
		do   http.HandlerFunc
		// The client ends a request, and may send the next before the server notices.
		overlaps bool
	}
	faults := []fault{
		{"none", first(0), nil, false},
		{"reset before the body was read", first(5), resets(false), true},
		{"reset after the body was read", first(5), resets(true), true},
		{"500 now and then", everyThird,
			harness.AnswerWith(500, "<h1>Errno::ECONNREFUSED</h1>"), false},
		{"503 with Retry-After", first(2), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
		}, false},
		{"429", everyThird, harness.AnswerWith(429, ""), false},
		{"408", everyThird, harness.AnswerWith(408, ""), false},
		{"401, then repaired", first(3), harness.AnswerWith(401, "Not authorized\n"), false},
		{"404, then repaired", first(3), harness.AnswerWith(404, "unknown prefix"), false},
		{"302, then repaired", first(3), harness.AnswerWith(302, ""), false},
		{"400 to everything, then repaired", first(200), harness.AnswerWith(400, "<html>"), false},
		{"hangs", first(2), harness.Hang, true},
		{"one byte a second", first(2), drips, true},
	}
	for _, where := range []string{"memory", "spool"} {
		for _, f := range faults {
			t.Run(f.why+", "+where, func(t *testing.T) {
				t.Parallel()
				s := harness.NewStandIn(t)
				s.Set("", sometimes(f.when, f.do, s.Answer))
				q, b, log := deliveringTo(t, s, where == "spool")
				b.timeout, s.Patient = 2*time.Second, f.overlaps
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- q.deliver(ctx) }()
				want := ""
				for i := range sweeps {
					q.put(sampled(i, size))
					want += asLines(sampled(i, size))
				}
				if err := s.Await(".", strings.Count(want, "\n"), time.Minute); err != nil {
					t.Fatalf("%v\n%s", err, log.Take())
				}
				q.close()
				if err := <-done; err != nil {
					t.Error(err)
				}
				cancel()
				if got := s.Lines(); got != sortedLines(want) {
					t.Errorf("what arrived is not what was sampled")
				}
				own := asLines(q.own("h", time.Unix(1, 0)))
				if !strings.Contains(own, ".spooled 0 ") || !strings.Contains(own, ".dropped 0 ") {
					t.Errorf("in the end\n%s", own)
				}
				if q.spool != nil {
					if left := files(t, q.spool.dir); len(left) != 0 {
						t.Errorf("left %q", left)
					}
				}
			})
		}
	}
}

// Backstop is down for a while.
func TestEverythingArrivesAfterRefusedConnections(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	address := listener.Addr().String()
	listener.Close()
	s := harness.UnstartedStandIn(t.Errorf)
	q, b, log := deliveringTo(t, harness.NewStandIn(t), true)
	b.url.Host = address
	done := make(chan error, 1)
	go func() { done <- q.deliver(t.Context()) }()
	want := ""
	for i := range 5 {
		q.put(sampled(i, 20))
		want += asLines(sampled(i, 20))
	}
	harness.AwaitText(t, log.String, "connection refused", 1)
	if listener, err = net.Listen("tcp", address); err != nil {
		t.Skipf("another process has taken the port: %v", err)
	}
	server := &http.Server{Handler: s}
	go server.Serve(listener)
	defer server.Close()
	harness.Must(t, s.Await(".", strings.Count(want, "\n"), time.Minute))
	q.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s.Lines() != sortedLines(want) {
		t.Error("what arrived is not what was sampled")
	}
}

// One metric of 5,000 is bad: only that one is missing.
func TestEverythingArrivesButTheBad(t *testing.T) {
	for _, where := range []string{"memory", "spool"} {
		s := harness.NewStandIn(t)
		s.Bad = "web.m1234 1795409680"
		q, _, log := deliveringTo(t, s, where == "spool")
		q.put(sampled(0, maxBatch))
		q.put(sampled(1, 20))
		q.close()
		if err := q.deliver(t.Context()); err == nil || err.Error() != "1 metrics not delivered" {
			t.Errorf("%s: %v", where, err)
		}
		all := asLines(sampled(0, maxBatch)) + asLines(sampled(1, 20))
		want := strings.Replace(all, "web.m1234 0 1795409680\n", "", 1)
		if s.Lines() != sortedLines(want) {
			t.Errorf("%s: what arrived is not what was sampled", where)
		}
		bad := `metrics=1 example="[{\"metric\":\"web.m1234\",`
		if got := log.Take(); !strings.Contains(got, bad) {
			t.Errorf("%s: logged %s", where, got)
		}
	}
}

// A proxy before Backstop limits the bytes of a request.
func TestEverythingArrivesInSmallRequests(t *testing.T) {
	s := harness.NewStandIn(t)
	s.Set("", func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 64<<10 {
			w.WriteHeader(413) // and the body is left unread
			return
		}
		s.Answer(w, r)
	})
	q, _, _ := deliveringTo(t, s, true)
	want := ""
	for i := range 3 {
		q.put(sampled(i, maxBatch))
		want += asLines(sampled(i, maxBatch))
	}
	deliverAll(t, q)
	if s.Lines() != sortedLines(want) {
		t.Error("what arrived is not what was sampled")
	}
}

// One of several Backstops behind a load balancer is broken: everything arrives without a failed
// delivery, whichever request meets the broken one.
func TestDeliveryDoesNotKeepStepWithABrokenBackstop(t *testing.T) {
	for name, broken := range map[string]func(request int) bool{
		"every second": func(n int) bool { return n%2 == 0 },
		"every third":  func(n int) bool { return n%3 == 0 },
		"every fourth": func(n int) bool { return n%4 == 0 },
		"two of three": func(n int) bool { return n%3 != 0 },
	} {
		for phase := range 4 {
			s := harness.NewStandIn(t)
			now := func(n int) bool { return broken(n + phase) }
			s.Set("", sometimes(now, harness.AnswerWith(503, ""), s.Answer))
			q, b, log := deliveringTo(t, s, false)
			b.leadAfter = 0 // each batch comes after a pause
			const sweeps = 20
			want := ""
			for i := range sweeps {
				q.put(sampled(i, 10))
				if err := q.try(t); err != nil {
					t.Errorf("%s, phase %d, sweep %d: %v", name, phase, i, err)
				}
				want += asLines(sampled(i, 10))
			}
			if got := s.Lines(); got != sortedLines(want) ||
				strings.Contains(log.Take(), "level=ERROR") {
				t.Errorf("%s, phase %d: %d lines arrived", name, phase, strings.Count(got, "\n"))
			}
		}
	}
}

// ticking counts stats answers. Each has an interface of its own, and so metrics of its own.
type ticking struct {
	mu     sync.Mutex
	ticks  int64
	served []tick
	asked  chan struct{}
}

// tick is one answer.
type tick struct {
	metric string // one of its own
	at     time.Time
}

// metric is that of a tick.
func (c *ticking) metric(tick int64) string {
	return fmt.Sprintf("fx-idle.network.tick%d.rx_bytes", tick)
}

// ended forgets a life that was killed. It returns the metrics that must not be lost, and those
// that may: of the sweep that was under way, and of what may have been on its way to the disk.
func (c *ticking) ended(killed time.Time) (sure, perhaps []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, one := range c.served {
		if i < len(c.served)-1 && killed.Sub(one.at) > time.Second {
			sure = append(sure, one.metric)
		} else {
			perhaps = append(perhaps, one.metric)
		}
	}
	c.served = nil
	select {
	case <-c.asked:
	default:
	}
	return sure, perhaps
}

// stats serves recorded stats with the interface of the tick.
func (c *ticking) stats(r *harness.Replay) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		c.ticks++
		n := c.ticks
		c.served = append(c.served, tick{c.metric(n), time.Now()})
		c.mu.Unlock()
		iface := fmt.Appendf(nil, `"tick%d"`, n)
		w.Write(bytes.ReplaceAll(r.Read("stats-one-shot-idle.json"), []byte(`"eth0"`), iface))
		select {
		case c.asked <- struct{}{}:
		default:
		}
	}
}

// A daemon killed at any moment loses at most the sweep in progress. A later run delivers all
// others.
func TestEverythingArrivesInSpiteOfKills(t *testing.T) {
	t.Parallel()
	binary, err := exec.LookPath(program) // see testscript.Main
	harness.Must(t, err)
	engine, clock := harness.NewReplay(t, "cgroup2"), &ticking{asked: make(chan struct{}, 1)}
	engine.On("/containers/fx-idle/stats", clock.stats(engine))
	s := harness.NewStandIn(t)
	s.Patient = true // it is killed in the middle of requests, too
	dir := filepath.Join(t.TempDir(), "spool")
	var log bytes.Buffer
	start := func() *exec.Cmd {
		daemon := exec.Command(binary, "--backstop="+s.URL+"/publish/docker",
			"--docker="+engine.URL, "--poll=500ms", "--spool="+dir, "--per=interface")
		daemon.Stderr = &log
		harness.Must(t, daemon.Start())
		return daemon
	}
	seed := time.Now().UnixNano()
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	sure, perhaps := map[string]bool{}, map[string]bool{}
	everyFourth := func(n int) bool { return n%4 == 0 }
	const lives = 20
	for range lives {
		faults := []http.HandlerFunc{nil, nil, harness.AnswerWith(503, ""), harness.Hang,
			resets(true), sometimes(everyFourth, resets(true), s.Answer)}
		s.Set("", faults[random.IntN(len(faults))])
		daemon := start()
		select {
		case <-clock.asked:
		case <-time.After(time.Minute):
			t.Fatalf("it does not poll:\n%s", &log)
		}
		time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond) // the random moment
		killed := time.Now()
		daemon.Process.Kill()
		daemon.Wait()
		kept, lost := clock.ended(killed)
		for _, name := range kept {
			sure[name] = true
		}
		for _, name := range lost {
			perhaps[name] = true
		}
	}
	if len(sure) < lives/4 {
		t.Errorf("only %d sweeps", len(sure))
	}

	s.Set("", nil)
	daemon := start()
	next := "^" + regexp.QuoteMeta(clock.metric(clock.ticks+1)) + " "
	if err := s.Await(next, 1, time.Minute); err != nil {
		t.Errorf("%v\n%s", err, &log)
	}
	daemon.Process.Signal(syscall.SIGTERM)
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
	arrived := map[string]bool{}
	for point := range s.Points() {
		name, _, _ := strings.Cut(point, " ")
		arrived[name] = true
	}
	for name := range sure {
		if !arrived[name] {
			t.Errorf("%s is lost (seed %d)\n%s", name, seed, &log)
		}
	}
	for _, one := range clock.served {
		sure[one.metric] = true
	}
	for name := range arrived {
		if strings.HasPrefix(name, "fx-idle.network.tick") &&
			strings.HasSuffix(name, ".rx_bytes") && !sure[name] && !perhaps[name] {
			t.Errorf("%s was never sampled", name)
		}
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
	t.Logf("%d sweeps in %d lives, %d of them perhaps lost",
		len(sure)+len(perhaps), lives, len(perhaps))
}

// On a disk that takes 3 s for each file, a backlog is delivered one file after the other, not one
// a poll.
func TestEverythingArrivesFromASlowDisk(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		harness.Cannot(t, "strace makes the disk slow: %v", err)
	}
	binary, err := exec.LookPath(program)
	harness.Must(t, err)
	const backlog = 8
	dir := t.TempDir()
	harness.Must(t, os.Chmod(dir, 0o700))
	command := []string{"-D", "-f", "-qq", "-o", os.DevNull, "-e", "inject=openat:delay_enter=3s"}
	for i := range backlog {
		path := filepath.Join(dir, fmt.Sprintf("20261123T04544%dZ-%010d-1.json.gz", i, i+1))
		harness.Must(t, os.WriteFile(path, pack(encode(points(i, 1))), 0o600))
		command = append(command, "-P", path, "-P", filepath.Base(path))
	}
	s, engine := harness.NewStandIn(t), harness.NewReplay(t, "cgroup2")
	daemon := exec.Command(strace, append(command, binary, "--backstop="+s.URL+"/publish/docker",
		"--docker="+engine.URL, "--poll=1h", "--host=h", "--spool="+dir)...)
	log := &harness.Log{}
	daemon.Stderr = log
	harness.Must(t, daemon.Start())
	t.Cleanup(func() {
		daemon.Process.Kill() // with -D, it is the daemon
		hasEnded(daemon, time.Minute)
	})
	start := time.Now()
	if err := s.Await(`^web\.a `, backlog, 2*time.Minute); err != nil {
		t.Errorf("%v\n%s", err, log)
	}
	if took := time.Since(start); took < (backlog-1)*3*time.Second {
		t.Errorf("the disk was not slow: it took %s", took)
	}
}
