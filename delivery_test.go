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
)

// Delivery through real sockets and files, with everything between the queue and Carbon that can go wrong: what is
// there in the end is what was sampled, all of it.

// sampled returns a sweep of n metrics, the time of which is that of the sweep's number.
func sampled(sweep, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		metrics[i] = metric{"", fmt.Sprintf("web.m%d", i), whole(uint64(sweep)), 1795409680 + int64(sweep)*60}
	}
	return metrics
}

// sometimes is a fault of some of the requests, counted from 1.
func sometimes(when func(request int) bool, fault http.HandlerFunc, else_ http.Handler) http.HandlerFunc {
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
			else_.ServeHTTP(w, r)
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

func TestEverythingArrives(t *testing.T) {
	first := func(n int) func(int) bool { return func(request int) bool { return request <= n } }
	everyThird := func(request int) bool { return request%3 != 0 }
	const sweeps, size = 6, 50
	type fault struct {
		why  string
		when func(request int) bool
		do   http.HandlerFunc
		// The client gives a request up and may be back before the server has noticed.
		overlaps bool
	}
	faults := []fault{
		{"none", first(0), nil, false},
		{"reset before the body was read", first(5), resets(false), true},
		{"reset after the body was read", first(5), resets(true), true},
		{"500 now and then", everyThird, answerWith(500, "<h1>Errno::ECONNREFUSED</h1>"), false},
		{"503 with Retry-After", first(2), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
		}, false},
		{"429", everyThird, answerWith(429, ""), false},
		{"408", everyThird, answerWith(408, ""), false},
		{"401, then mended", first(3), answerWith(401, "Not authorized\n"), false},
		{"404, then mended", first(3), answerWith(404, "unknown prefix"), false},
		{"302, then mended", first(3), answerWith(302, ""), false},
		{"400 to everything, then mended", first(200), answerWith(400, "<html>"), false},
		{"hangs", first(2), hang, true},
		{"one byte a second", first(2), drips, true},
	}
	for _, where := range []string{"memory", "spool"} {
		for _, f := range faults {
			t.Run(f.why+", "+where, func(t *testing.T) {
				t.Parallel()
				s := newStandIn(t)
				s.set("", sometimes(f.when, f.do, http.HandlerFunc(s.answer)))
				q, b, log := deliveringTo(t, s, where == "spool")
				b.timeout, s.patient = 2*time.Second, f.overlaps
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- q.deliver(ctx) }()
				want := ""
				for i := range sweeps {
					q.put(sampled(i, size))
					want += asLines(sampled(i, size))
				}
				if err := s.await(".", strings.Count(want, "\n"), time.Minute); err != nil {
					t.Fatalf("%v\n%s", err, log.take())
				}
				q.close()
				if err := <-done; err != nil {
					t.Error(err)
				}
				cancel()
				if got := s.lines(); got != sortedLines(want) {
					t.Errorf("what arrived is not what was sampled")
				}
				if held := asLines(q.own("h", time.Unix(1, 0))); !strings.Contains(held, ".spooled 0 ") || !strings.Contains(held, ".dropped 0 ") {
					t.Errorf("in the end\n%s", held)
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

// deliveringTo returns a queue for the stand-in, in memory or with a spool, that does not wait for long, and its log.
func deliveringTo(t *testing.T, s *standIn, spooled bool) (*queue, *backstop, *logged) {
	t.Helper()
	b := mustBackstop(t, s.URL+"/publish/docker")
	b.leadPause = time.Millisecond
	log := &logged{}
	q := newQueue(destination{"Backstop", encode, b.post}, 8<<20, log.logger())
	q.pace = pace{10 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond}
	if spooled {
		if err := q.useSpool(&spool{dir: filepath.Join(t.TempDir(), "spool"), log: log.logger()}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(q.spool.close)
	}
	return q, b, log
}

// Nobody listens for a while.
func TestEverythingArrivesAfterRefusedConnections(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	s := unstartedStandIn(t.Errorf)
	q, b, log := deliveringTo(t, newStandIn(t), true)
	b.url.Host = address
	done := make(chan error, 1)
	go func() { done <- q.deliver(t.Context()) }()
	want := ""
	for i := range 5 {
		q.put(sampled(i, 20))
		want += asLines(sampled(i, 20))
	}
	awaitText(t, log.String, "connection refused", 1)
	if listener, err = net.Listen("tcp", address); err != nil {
		t.Skipf("somebody else has taken the port: %v", err)
	}
	server := &http.Server{Handler: s}
	go server.Serve(listener)
	defer server.Close()
	if err := s.await(".", strings.Count(want, "\n"), time.Minute); err != nil {
		t.Fatal(err)
	}
	q.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s.lines() != sortedLines(want) {
		t.Error("what arrived is not what was sampled")
	}
}

// One item in 5,000 is bad: it alone is missing.
func TestEverythingArrivesButTheBad(t *testing.T) {
	for _, where := range []string{"memory", "spool"} {
		s := newStandIn(t)
		s.bad = "web.m1234 1795409680"
		q, _, log := deliveringTo(t, s, where == "spool")
		q.put(sampled(0, maxBatch))
		q.put(sampled(1, 20))
		q.close()
		if err := q.deliver(t.Context()); err == nil || err.Error() != "1 metrics not delivered" {
			t.Errorf("%s: %v", where, err)
		}
		want := strings.Replace(asLines(sampled(0, maxBatch))+asLines(sampled(1, 20)), "web.m1234 0 1795409680\n", "", 1)
		if s.lines() != sortedLines(want) {
			t.Errorf("%s: what arrived is not what was sampled", where)
		}
		if got := log.take(); !strings.Contains(got, `metrics=1 such_as="[{\"metric\":\"web.m1234\",`) {
			t.Errorf("%s: logged %s", where, got)
		}
	}
}

// Too large for what stands before Backstop, in bytes.
func TestEverythingArrivesInSmallRequests(t *testing.T) {
	s := newStandIn(t)
	s.set("", func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 64<<10 {
			w.WriteHeader(413) // and the body is left unread
			return
		}
		s.answer(w, r)
	})
	q, _, _ := deliveringTo(t, s, true)
	want := ""
	for i := range 3 {
		q.put(sampled(i, maxBatch))
		want += asLines(sampled(i, maxBatch))
	}
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	if s.lines() != sortedLines(want) {
		t.Error("what arrived is not what was sampled")
	}
}

// ticking is an engine's clock: every stats answer is a minute after the one before, so that each is a point of its own.
type ticking struct {
	mu     sync.Mutex
	ticks  int64
	served []string // points of what was asked for, "name time"
	asked  chan struct{}
}

// stats serves recorded stats of a container with the time of the tick.
func (c *ticking) stats(r *replay, container, file string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		c.ticks++
		at := time.Unix(1795409680+c.ticks*60, 0).UTC()
		c.served = append(c.served, fmt.Sprintf("%s.pids.current %d", container, at.Unix()))
		c.mu.Unlock()
		body, _ := os.ReadFile(filepath.Join(r.dir, file))
		w.Write(regexp.MustCompile(`"read":"[^"]*"`).ReplaceAll(body, []byte(`"read":"`+at.Format(time.RFC3339)+`"`)))
		select {
		case c.asked <- struct{}{}:
		default:
		}
	}
}

// Killed at any moment, it loses at most the sweep that was under way; all others arrive in the next life, or a later one.
func TestEverythingArrivesInSpiteOfKills(t *testing.T) {
	binary, err := exec.LookPath(program) // see testscript.Main
	if err != nil {
		t.Fatal(err)
	}
	engine, clock := newReplay(t, "cgroup2"), &ticking{asked: make(chan struct{}, 1)}
	engine.on("/containers/fx-idle/stats", clock.stats(engine, "fx-idle", "stats-one-shot-idle.json"))
	s := newStandIn(t)
	s.patient = true // it is killed in the middle of requests, too
	dir := filepath.Join(t.TempDir(), "spool")
	var log bytes.Buffer
	start := func() *exec.Cmd {
		daemon := exec.Command(binary, "--backstop="+s.URL+"/publish/docker", "--docker="+engine.URL, "--poll=500ms", "--spool="+dir)
		daemon.Stderr = &log
		if err := daemon.Start(); err != nil {
			t.Fatal(err)
		}
		return daemon
	}
	seed := time.Now().UnixNano()
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	sure, perhaps := map[string]bool{}, map[string]bool{}
	const lives = 20
	for range lives {
		faults := []http.HandlerFunc{nil, nil, answerWith(503, ""), hang, resets(true), sometimes(func(n int) bool { return n%4 == 0 }, resets(true), http.HandlerFunc(s.answer))}
		s.set("", faults[random.IntN(len(faults))])
		daemon := start()
		select {
		case <-clock.asked:
		case <-time.After(time.Minute):
			t.Fatalf("it does not poll:\n%s", &log)
		}
		time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond) // the random moment
		daemon.Process.Kill()
		daemon.Wait()
		clock.mu.Lock()
		for i, point := range clock.served {
			if i < len(clock.served)-1 {
				sure[point] = true
			} else {
				perhaps[point] = true
			}
		}
		clock.served = nil
		clock.mu.Unlock()
		select {
		case <-clock.asked:
		default:
		}
	}
	if len(sure) < lives/4 {
		t.Errorf("only %d sweeps", len(sure))
	}

	s.set("", nil)
	daemon := start()
	next := fmt.Sprintf(`^fx-idle\.pids\.current %d$`, 1795409680+(clock.ticks+1)*60)
	if err := s.await(next, 1, time.Minute); err != nil {
		t.Errorf("%v\n%s", err, &log)
	}
	daemon.Process.Signal(syscall.SIGTERM)
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for point := range sure {
		if _, ok := s.points[point]; !ok {
			t.Errorf("%s is lost (seed %d)\n%s", point, seed, &log)
		}
	}
	for _, point := range clock.served {
		sure[point] = true
	}
	for point := range s.points {
		if strings.HasPrefix(point, "fx-idle.pids.current ") && !sure[point] && !perhaps[point] {
			t.Errorf("%s was never sampled", point)
		}
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
	t.Logf("%d sweeps in %d lives, %d of them perhaps lost", len(sure)+len(perhaps), lives, len(perhaps))
}

func sortedLines(text string) string {
	return strings.Join(allOf(`(?m)^(.*\n)`, text), "")
}

// awaitText waits until what read returns, a log mostly, has text in it so many times.
func awaitText(t *testing.T, read func() string, text string, times int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		all := read()
		if strings.Count(all, text) >= times {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not %d times %s in\n%s", times, text, all)
		}
	}
}
