package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){program: main})
}

// name is the metric's name in Graphite.
func (m metric) name() string { return m.path + m.own }

// flattened returns the metrics of s, as those of c.
func flattened(s *stats, from origin, per details) []metric {
	f := flattener{path: "c", at: 1795409680}
	s.flatten(&f, from, per)
	return f.metrics
}

func asLines(metrics []metric) string {
	var lines []byte
	for _, m := range metrics {
		lines = m.appendLine(lines)
	}
	return string(lines)
}

// renaming is the rule that --prefix={"regexp":…,"into":…} is.
func renaming(re *regexp.Regexp, into string) rules {
	return rules{{from: "name", regexp: re, into: into, rename: true}}
}

func mustRules(t testing.TB, text string) rules {
	t.Helper()
	if text == "" {
		return nil
	}
	rs, err := parseRules(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return rs
}

// collecting returns a collector of an engine whose calls may take as long as timeout, and its log.
func collecting(t testing.TB, address string, timeout time.Duration) (*collector, *harness.Log) {
	t.Helper()
	e, err := newEngine(address, timeout)
	harness.Must(t, err)
	log := &harness.Log{}
	return newCollector(e, nil, log.Logger()), log
}

// small is an engine of a few answers. A path that has none gets 404.
type small struct {
	*harness.Replay
	answers map[string]string // to a path, without its query
}

// container makes a container known by its id.
func (s *small) container(id, inspect, stats string) {
	s.answers["/containers/"+id+"/json"] = inspect
	s.answers["/containers/"+id+"/stats"] = stats
}

// newSmall starts an engine whose list is that text, and returns a collector of it as well.
func newSmall(t *testing.T, list string) (*small, *collector, *harness.Log) {
	t.Helper()
	s := &small{harness.NewReplay(t, "cgroup2"), map[string]string{
		"/_ping": "OK", "/events": "", "/info": `{"Name":"h"}`, "/containers/json": list,
	}}
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, known := s.answers[r.URL.Path]
		if !known {
			w.WriteHeader(http.StatusNotFound)
		}
		io.WriteString(w, answer)
	})
	c, log := collecting(t, s.URL, 10*time.Second)
	return s, c, log
}

const (
	smallStats   = `{"read":"2026-01-01T00:01:00Z","memory_stats":{"usage":1}}`
	smallInspect = `{"State":{"Running":true,"StartedAt":"2026-01-01T00:00:00Z"},"RestartCount":3}`
)

func caseOf(t *testing.T, file string) string {
	t.Helper()
	return harness.ReadFile(t, "testdata/engine/cases/"+file)
}

// wants holds the metrics of a sweep to lines of "name value" or, behind "!", starts of names.
func wants(t *testing.T, why string, result sweepResult, lines ...string) {
	t.Helper()
	got := "\n" + asLines(result.metrics)
	for _, line := range lines {
		name, without := strings.CutPrefix(line, "!")
		if without == strings.Contains(got, "\n"+strings.TrimSpace(name)+" ") &&
			(!without || strings.Contains(got, "\n"+name)) {
			t.Errorf("%s: want %q, got%s", why, line, got)
		}
	}
}

// inBubble is an engine without a network, for tests with a clock of their own.
type inBubble http.HandlerFunc

func (answer inBubble) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	answer(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

// points returns n metrics whose values tell them apart.
func points(from, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		metrics[i] = metric{"", "web.a", whole(uint64(from + i)), 1795409680 + int64(from+i)}
	}
	return metrics
}

// receiver stands in for Backstop. It keeps the values it gets, and fails as a test wants.
type receiver struct {
	fail func(attempt int, values []int) error

	mu    sync.Mutex
	tries int
	at    []time.Duration // of the tries
	start time.Time
	sizes []int // of the requests that were taken
	got   []int // the values
	news  chan struct{}
}

func (r *receiver) destination() destination { return destination{name: "Backstop", post: r.post} }

func (r *receiver) post(_ context.Context, body []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.start.IsZero() {
		r.start = time.Now()
	}
	r.tries++
	r.at = append(r.at, time.Since(r.start))
	var items []struct{ Value int }
	if err := json.Unmarshal(body, &items); err != nil {
		return err
	}
	values := make([]int, len(items))
	for i, item := range items {
		values[i] = item.Value
	}
	if r.fail != nil {
		if err := r.fail(r.tries, values); err != nil {
			return err
		}
	}
	r.sizes = append(r.sizes, len(items))
	r.got = append(r.got, values...)
	select {
	case r.news <- struct{}{}:
	default:
	}
	return nil
}

// sofar returns the number of tries and the values that arrived.
func (r *receiver) sofar() (tries int, got []int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tries, slices.Clone(r.got)
}

// arrived returns the values that arrived, sorted, each once.
func (r *receiver) arrived() []int {
	_, got := r.sofar()
	slices.Sort(got)
	return slices.Compact(got)
}

// waitFor waits until that many values have arrived.
func (r *receiver) waitFor(t *testing.T, values int) {
	t.Helper()
	r.mu.Lock()
	if r.news == nil {
		r.news = make(chan struct{}, 1)
	}
	r.mu.Unlock()
	late := time.After(time.Minute)
	for {
		if _, got := r.sofar(); len(got) >= values {
			return
		}
		select {
		case <-r.news:
		case <-late:
			_, got := r.sofar()
			t.Fatalf("%d values arrived, want %d", len(got), values)
		}
	}
}

// inOrder checks that the values of [from, to) arrived, each once, oldest first.
func (r *receiver) inOrder(t *testing.T, from, to int) {
	t.Helper()
	if len(r.got) != to-from {
		t.Errorf("%d metrics arrived, want %d", len(r.got), to-from)
		return
	}
	for i, value := range r.got {
		if value != from+i {
			t.Errorf("metric %d arrived in the place of %d", value, from+i)
			return
		}
	}
}

// queue returns a rig for r that holds up to 1 MiB in memory, and its log.
func (r *receiver) queue(t testing.TB) (*rig, *harness.Log) {
	return newRig(t, r.destination(), 1<<20, "")
}

// spooled returns a rig for r with its spool in dir, and its log.
func (r *receiver) spooled(t testing.TB, dir string) (*rig, *harness.Log) {
	return newRig(t, r.destination(), 1<<20, dir)
}

// unreachableWhile is the failure of a receiver that cannot be reached while down is true.
func unreachableWhile(down *bool) func(int, []int) error {
	return func(int, []int) error {
		if *down {
			return errors.New("connection refused")
		}
		return nil
	}
}

// refusing returns a failure for requests with a bad value in them.
func refusing(status int, bad func(value int) bool) func(int, []int) error {
	return func(_ int, values []int) error {
		if slices.ContainsFunc(values, bad) {
			return &refusal{status: status, line: "missing fields"}
		}
		return nil
	}
}

// rig is a queue and what delivers from it.
type rig struct {
	*queue
	*delivery
}

// held returns what is in the queue.
func (r *rig) held() (metrics int, bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.line.size()
}

// settle waits until the disk has nothing to do, or fails.
func (r *rig) settle() {
	for done := r.spool == nil; !done; runtime.Gosched() {
		r.mu.Lock()
		done = r.disk.rests && r.disk.busy.IsZero()
		r.mu.Unlock()
	}
}

// kill lets others have the spool, as it is.
func (r *rig) kill() {
	unlock := r.lock()
	r.disk.ends, r.disk.rests = true, true
	unlock()
	<-r.kept
}

// put queues metrics and waits until the spool, if any, has written them.
func (r *rig) put(metrics []metric) {
	r.queue.put(metrics)
	r.settle()
}

// fill puts batches of about a kilobyte each, numbered from that one on.
func (r *rig) fill(from, batches int) {
	for i := range batches {
		r.put(points(1_000_000+(from+i)*100, 100))
	}
}

// try sends one batch.
func (r *rig) try(t testing.TB) error {
	defer r.settle()
	_, err := r.round(t.Context())
	if err != nil {
		r.logTrouble(err, time.Second)
	}
	return err
}

// deliverNext sends what can be sent now.
func (r *rig) deliverNext(t testing.TB) error {
	b, body := r.next(true)
	return r.send(t.Context(), b, body)
}

// waiting returns how many metrics wait.
func (r *rig) waiting() (metrics int) {
	metrics, _, _, _ = r.backlog()
	return metrics
}

// newRig returns a rig that holds up to limit bytes, in a spool in dir, or in memory if dir is "",
// and its log.
func newRig(t testing.TB, to destination, limit int64, dir string) (*rig, *harness.Log) {
	t.Helper()
	log := &harness.Log{}
	r := &rig{queue: newQueue(limit, log.Logger())}
	if dir != "" {
		harness.Must(t, r.useSpool(&spool{dir: dir, log: log.Logger()}))
		t.Cleanup(r.kill)
		r.settle()
	}
	r.delivery = newDelivery(to, r.queue, func() {}, log.Logger())
	return r, log
}

// delivering runs r until the function it returns is called, which returns the error.
func delivering(t *testing.T, r *rig) (end func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- r.deliver(t.Context()) }()
	end = sync.OnceValue(func() error {
		r.close()
		return <-done
	})
	t.Cleanup(func() { end() })
	return end
}

// logged checks that there are that many new lines in the log, with these texts in this order.
func logged(t testing.TB, log *harness.Log, lines int, texts ...string) {
	t.Helper()
	got := log.Take()
	if n := strings.Count(got, "\n"); n != lines {
		t.Errorf("%d lines logged, want %d:\n%s", n, lines, got)
	}
	rest, found := got, true
	for _, text := range texts {
		if _, rest, found = strings.Cut(rest, text); !found {
			t.Errorf("logged\n%swant %q in this order", got, texts)
			return
		}
	}
}

// deliverAll closes q and delivers all that is in it.
func deliverAll(t *testing.T, q *rig) {
	t.Helper()
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
}

// deliverRest is deliverAll where some were dropped.
func deliverRest(t *testing.T, q *rig) {
	t.Helper()
	q.close()
	if err := q.deliver(t.Context()); err == nil {
		t.Error("no error for what was dropped")
	}
}

// figuresOf returns q's own figures, such as "sent 1, retried 0, dropped 0".
func figuresOf(q *rig) string {
	own := asLines(q.own("h", time.Unix(1, 0)))
	var figures []string
	for _, name := range []string{"sent", "retried", "dropped"} {
		m := regexp.MustCompile(`(?m)^h\.metrics\.` + name + ` (\d+) 1$`).FindStringSubmatch(own)
		figures = append(figures, name+" "+m[1])
	}
	return strings.Join(figures, ", ")
}

// drain measures the delivery of a day's backlog.
func drain(b *testing.B, to destination) {
	const sweeps, size = 24 * 60, 4000
	for b.Loop() {
		b.StopTimer()
		spool, now := &spool{dir: b.TempDir()}, time.Now().Unix()
		var metrics [size]metric
		for i := range sweeps {
			at := now - int64(sweeps-i)*60
			for m := range metrics {
				name := fmt.Sprintf("bench.project%d.service%d.memory.m%d", m/400, m/40, m%40)
				metrics[m] = metric{"", name, whole(uint64(i*m) * 1234567), at}
			}
			start := time.Unix(at, 0).UTC().Format(spoolTime)
			path := filepath.Join(spool.dir, fmt.Sprintf("%s-%010d-%d.json.gz", start, i, size))
			harness.Must(b, os.WriteFile(path, pack(encode(metrics[:])), 0o600))
		}
		b.StartTimer()
		q, _ := newRig(b, to, 256<<20, spool.dir)
		q.close()
		harness.Must(b, q.deliver(b.Context()))
	}
	b.ReportMetric(float64(b.N)*sweeps*size/b.Elapsed().Seconds(), "metrics/s")
}

// files returns the names in a folder, without the lock.
func files(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	harness.Must(t, err)
	var names []string
	for _, e := range entries {
		if e.Name() != lockName {
			names = append(names, e.Name())
		}
	}
	return names
}

// newDir returns the path of a folder that is yet to be made, as the one above it.
func newDir(t testing.TB) string { return filepath.Join(t.TempDir(), "a", "spool") }

var onePoint = encode([]metric{{"", "web.a", whole(1), 1795409680}})

// mustBackstop returns the Backstop at a URL.
func mustBackstop(t testing.TB, url string) *backstop {
	t.Helper()
	b, err := newBackstop(url)
	harness.Must(t, err)
	t.Cleanup(b.transport.CloseIdleConnections)
	return b
}

// knowSecretsOf is what parseOptions does with an address, for the time of a test.
func knowSecretsOf(t *testing.T, address string) {
	t.Helper()
	secrets.addFrom(address)
	t.Cleanup(func() { secrets = nil })
}

// hostile is a server of raw bytes: whatever it is sent, it answers with what answer returns.
func hostile(t *testing.T, answer func(request string) string) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				request, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				io.Copy(io.Discard, request.Body)
				text, _ := httputil.DumpRequest(request, false)
				io.WriteString(conn, answer(string(text)))
			}()
		}
	}()
	return listener.Addr().String()
}

// repetitions are answers that repeat what the client has sent, or knows.
var repetitions = map[string]string{
	"response":             "%s\r\n\r\n",
	"protocol":             "HTTP/%s 200 OK\r\n\r\n",
	"status":               "HTTP/1.1 %s\r\n\r\n",
	"reason":               "HTTP/1.1 500 %s\r\nContent-Length: 0\r\n\r\n",
	"header without colon": "HTTP/1.1 200 OK\r\n%s\r\n\r\n",
	"header with blanks":   "HTTP/1.1 200 OK\r\nX %s: x\r\n\r\n",
	"continued header":     "HTTP/1.1 200 OK\r\n x\r\n %s\r\n\r\n",
	"location":             "HTTP/1.1 302 Found\r\nLocation: http://h/%s\r\nContent-Length: 0\r\n\r\n",
	"location's host":      "HTTP/1.1 302 Found\r\nLocation: //%s/\r\nContent-Length: 0\r\n\r\n",
	"content length":       "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n",
	"transfer encoding":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n",
	"chunk":                "HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
	"retry after":          "HTTP/1.1 503 No\r\nRetry-After: %s\r\nContent-Length: 0\r\n\r\n",
	"engine":               "HTTP/1.1 200 OK\r\nServer: %s\r\nApi-Version: %[1]s\r\n\r\n{}",
	"body":                 "HTTP/1.1 500 No\r\n\r\n%s",
	"body in a tag":        "HTTP/1.1 401 No\r\n\r\n<p>\n\t%s</p>",
	"message":              "HTTP/1.1 500 No\r\n\r\n{\"message\":\"%s\"}",
	"JSON":                 "HTTP/1.1 200 OK\r\n\r\n[{\"Id\":\"%s\"},{\"Id\":7}]",
	"name":                 "HTTP/1.1 200 OK\r\n\r\n[{\"Id\":\"%s\",\"Names\":[\"/%[1]s\"]}]",
	"number":               "HTTP/1.1 200 OK\r\n\r\n{\"ContainersRunning\":\"%s\"}",
}

// fakeCarbon reads what Carbon reads, or fails as it is set to.
type fakeCarbon struct {
	listener *net.TCPListener

	mu       sync.Mutex
	fault    func(*net.TCPConn) // what it does with a connection instead
	spares   int                // how many more it reads all the same
	open     []*net.TCPConn
	accepted int
	portions []string // one for each connection that was not empty
}

func (f *fakeCarbon) listen(t testing.TB, address string) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	harness.Must(t, err)
	f.listener = listener.(*net.TCPListener)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			f.take(conn.(*net.TCPConn))
		}
	}()
}

// take serves a connection. It decides at once how, as the first is the witness.
func (f *fakeCarbon) take(conn *net.TCPConn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.accepted++
	f.open = append(f.open, conn)
	serve := f.fault
	if serve == nil || f.spares > 0 {
		serve = f.read
	}
	f.spares--
	go func() {
		serve(conn)
		conn.Close()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.open = slices.DeleteFunc(f.open, func(c *net.TCPConn) bool { return c == conn })
	}()
}

func (f *fakeCarbon) read(conn *net.TCPConn) {
	text, err := io.ReadAll(conn)
	if err == nil && len(text) > 0 {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.portions = append(f.portions, string(text))
	}
}

func (f *fakeCarbon) address() string { return f.listener.Addr().String() }

// die ends all connections by RST, as the system does for a process that is killed.
func (f *fakeCarbon) die() {
	f.listener.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, conn := range f.open {
		conn.SetLinger(0)
		conn.Close()
	}
}

// fails sets what happens to new connections, but for the next few.
func (f *fakeCarbon) fails(spares int, fault func(*net.TCPConn)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spares, f.fault = spares, fault
}

// got returns what it has read.
func (f *fakeCarbon) got() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.portions)
}

// connections returns how many are open, and how many there were.
func (f *fakeCarbon) connections() (open, accepted int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.open), f.accepted
}

func newFakeCarbon(t testing.TB) *fakeCarbon {
	t.Helper()
	f := &fakeCarbon{}
	f.listen(t, "127.0.0.1:0")
	t.Cleanup(f.die)
	return f
}

func mustCarbon(t testing.TB, url string) *carbon {
	t.Helper()
	c, err := newCarbon(url)
	harness.Must(t, err)
	t.Cleanup(func() {
		if c.witness != nil {
			c.dismiss()
		}
	})
	return c
}

// await waits until is returns true.
func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// awaitDeliveries waits until 50 more have arrived.
func awaitDeliveries(t *testing.T, s *harness.StandIn) {
	t.Helper()
	deliveries := func() string { return strings.Repeat(".", len(s.Requests())) }
	harness.AwaitText(t, deliveries, ".", len(s.Requests())+50)
}

// interrupt ends a daemon as a user does, and fails the test if that takes long.
func interrupt(t *testing.T, daemon *exec.Cmd) {
	t.Helper()
	harness.Must(t, daemon.Process.Signal(os.Interrupt))
	defer time.AfterFunc(20*time.Second, func() { daemon.Process.Kill() }).Stop()
	harness.Must(t, daemon.Wait())
}

func sortedLines(text string) string {
	return strings.Join(harness.AllOf(`(?m)^(.*\n)`, text), "")
}
