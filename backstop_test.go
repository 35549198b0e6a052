package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

var onePoint = encode([]metric{{"", "web.a", whole(1), 1795409680}})

// mustBackstop returns the Backstop at a URL.
func mustBackstop(t testing.TB, url string) *backstop {
	t.Helper()
	b, err := newBackstop(url)
	harness.Must(t, err)
	t.Cleanup(b.transport.CloseIdleConnections)
	return b
}

func TestPost(t *testing.T) {
	s := harness.NewStandIn(t)
	s.Set("user:p@ss/w%rd", nil)
	b := mustBackstop(t, s.At("user:p%40ss%2Fw%25rd", "/publish/docker/"))
	body := encode([]metric{
		{"", "web.a", whole(1), 1795409680},
		{"", "web.b", whole(2), 1795409681},
	})
	harness.Must(t, b.post(t.Context(), body))
	if got, want := s.Lines(), "web.a 1 1795409680\nweb.b 2 1795409681\n"; got != want {
		t.Errorf("arrived:\n%swant\n%s", got, want)
	}
}

// One connection serves all requests, even after a refusal with a long answer.
func TestPostKeepsItsConnection(t *testing.T) {
	s := harness.UnstartedStandIn(t.Errorf)
	var connections atomic.Int32
	s.Server = httptest.NewUnstartedServer(s)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Stop)
	good, bad := mustBackstop(t, s.URL+"/publish/docker"), mustBackstop(t, s.URL+"/nowhere")
	bad.transport = good.transport
	for range 3 {
		if err := good.post(t.Context(), onePoint); err != nil {
			t.Error(err)
		}
		if err := bad.post(t.Context(), []byte("[]")); err == nil {
			t.Error("a 404 with 140 KB was taken for success")
		}
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	if idle := good.transport.IdleConnTimeout; idle <= 0 || idle >= 20*time.Second {
		t.Errorf("idle connections are kept for %s; Backstop closes them after 20 s", idle)
	}
}

func TestPostFailures(t *testing.T) {
	s := harness.NewStandIn(t)
	knowSecretsOf(t, s.At("user:password", ""))
	moved := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://user:password@elsewhere/publish/docker?key=secret", status)
		}
	}
	hungUp := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	badAddress := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://user:password%zz@h/x")
		w.WriteHeader(302)
	}
	answer, docker := harness.AnswerWith, "/publish/docker"
	long, https := strings.Repeat("x", 140<<10), "Client sent an HTTP request to an HTTPS server."
	for _, test := range []struct {
		why, path string
		fault     http.HandlerFunc
		remedy    remedy
		want      string
	}{
		{"no credentials", docker, nil, fixIt,
			`^answer 401 Unauthorized: Not authorized; check user and password in --backstop`},
		{"another prefix", "/publish/doker", nil, fixIt,
			`^answer 404 Not Found: unknown prefix; ` +
				`the path in --backstop must be /publish/ and one of the PREFIXES`},
		{"two segments", "/publish/docker/x", nil, fixIt,
			`^answer 404 Not Found: <!DOCTYPE html>; the path`},
		{"forbidden", docker, answer(403, "Host not permitted"), fixIt,
			`^answer 403 Forbidden: Host not permitted; ` +
				`Backstop in development mode.*RACK_ENV=production`},
		{"bad metric", docker, answer(400, "missing fields"), halveIt,
			`^answer 400 Bad Request: missing fields$`},
		{"not Backstop", docker, answer(400, https), halveIt,
			`^answer 400 Bad Request: ` + https + `; this is not Backstop's answer: ` +
				`check what is at the address in --backstop, and whether it needs https://$`},
		{"too large", docker, answer(413, ""), halveIt, `^answer 413 Request Entity Too Large$`},
		{"slow down", docker, answer(429, ""), tryAgain, `^answer 429 Too Many Requests$`},
		{"stalled", docker, answer(408, ""), tryAgain, `^answer 408 Request Timeout$`},
		{"carbon is down", docker,
			answer(500, "\n  \n<h1>\tErrno::ECONNREFUSED</h1>\n"+long), tryAgain,
			`^answer 500 Internal Server Error: <h1> Errno::ECONNREFUSED</h1>$`},
		{"no content", docker, answer(304, ""), fixIt, `^answer 304 Not Modified$`},
		{"moved", docker, moved(301), fixIt,
			`^answer 301 Moved Permanently; set --backstop to the address that it redirects to: ` +
				`http://elsewhere/publish/docker$`},
		{"moved, method kept", docker, moved(307), fixIt,
			`^answer 307 Temporary Redirect; set --backstop to the address`},
		{"hung up", docker, hungUp, tryAgain, `^EOF$`},
		{"a long line", docker, answer(500, strings.Repeat("ü", 1000)), tryAgain,
			`^answer 500 Internal Server Error: ü{100}$`},
		{"moved to a bad address", docker, badAddress, fixIt, `^answer 302 Found$`},
		{"secrets across the cut", docker, answer(500, long[:195]+"password"), tryAgain,
			`^answer 500 Internal Server Error: x{195}xxxxx$`},
		{"secrets repeated", docker,
			answer(500, "bad: Basic dXNlcjpwYXNzd29yZA== (password)"), tryAgain,
			`^answer 500 Internal Server Error: bad: Basic xxxxx \(xxxxx\)$`},
	} {
		auth := "user:other"
		if test.path != docker {
			auth = ""
		}
		s.Set(auth, test.fault)
		err := mustBackstop(t, s.At("user:password", test.path)).post(t.Context(), onePoint)
		if err == nil {
			t.Errorf("%s: taken for success", test.why)
			continue
		}
		var refused *refusal
		if errors.As(err, &refused) && refused.remedy() != test.remedy {
			t.Errorf("%s: remedy %v, want %v", test.why, refused.remedy(), test.remedy)
		}
		if !regexp.MustCompile(test.want).MatchString(err.Error()) {
			t.Errorf("%s: %v", test.why, err)
		}
	}
	for _, status := range []int{200, 201, 204} {
		s.Set("", harness.AnswerWith(status, ""))
		if err := mustBackstop(t, s.URL+docker).post(t.Context(), []byte("[]")); err != nil {
			t.Errorf("%d: %v", status, err)
		}
	}

}

// Errors without an answer say what is wrong, and hide the password.
func TestPostWithoutAnswer(t *testing.T) {
	s := harness.NewStandIn(t)
	b := mustBackstop(t, s.At("user:password", "/publish/docker"))
	b.timeout = 500 * time.Millisecond
	s.Set("", harness.Hang)
	err := b.post(t.Context(), []byte("[]"))
	if err == nil || err.Error() != "no answer within 500ms" {
		t.Errorf("a request that hangs: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("time is up"))
	if err = b.post(ctx, onePoint); err == nil || err.Error() != "time is up" {
		t.Errorf("after the end: %v", err)
	}
	s.Close()
	err = b.post(t.Context(), []byte("[]"))
	if err == nil || !strings.HasSuffix(err.Error(), "connection refused") ||
		strings.Contains(err.Error(), "password") {
		t.Errorf("nobody there: %v", err)
	}
}

func TestBackstopURLs(t *testing.T) {
	for text, shown := range map[string]string{
		"https://user:password@backstop.server/publish/docker": "https://backstop.server/publish/docker",
		"http://[::1]:3000/publish/docker/":                    "http://[::1]:3000/publish/docker",
		"http://token@h/publish/docker?key=secret#x":           "http://h/publish/docker",
		"http://h/x%2Fy/": "http://h/x/y",
	} {
		b, err := newBackstop(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if b.String() != shown || b.url.User != nil {
			t.Errorf("%s is shown as %s and asked at %s", text, b, b.url)
		}
	}
	for text, want := range map[string]string{
		"": "not an http://, https:// or carbon:// URL; " +
			"write one such as https://user:password@backstop.server/publish/docker",
		"backstop.server/publish/docker":     "not an http://, https:// or carbon:// URL",
		"ftp://user:secret@h/publish/docker": "not an http://, https:// or carbon:// URL",
		"http:///publish/docker":             "no host in the URL",
		"https://user:secret@h": "no path in the URL; " +
			"Backstop takes metrics at /publish/PREFIX",
		"https://user:secret@h/":                "no path in the URL",
		"https://user:sec%ret@h/publish/docker": "write %40 for @, %2F for /, %25 for %",
		"https://user:sec/ret@h/publish/docker": "write %40 for @, %2F for /",
		"https://user:secret@h/publish/\x7f":    "not a URL",
		"https://user:12/secret@h/publish": "there is an @ in the path of the URL; " +
			"in user and password, write %2F for /",
	} {
		_, err := newBackstop(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
		if strings.Contains(fmt.Sprint(err), "sec") {
			t.Errorf("the error shows the password: %v", err)
		}
	}
}

func TestReceiverHints(t *testing.T) {
	plain := httptest.NewServer(harness.AnswerWith(http.StatusOK, "ok"))
	defer plain.Close()
	secure := httptest.NewUnstartedServer(harness.AnswerWith(http.StatusOK, "ok"))
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	noHTTP, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	defer noHTTP.Close()
	go func() {
		for {
			conn, err := noHTTP.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1<<10))
			io.WriteString(conn, "\x15\x03\x01\x00\x02\x02\x16") // a TLS alert
			conn.Close()
		}
	}()
	for base, want := range map[string]string{
		strings.Replace(plain.URL, "http:", "https:", 1): "; there is no TLS at that address: " +
			"should --backstop begin with http://?",
		strings.Replace(secure.URL, "https:", "http:", 1): "whether it needs https://",
		"http://" + noHTTP.Addr().String(): "; is this TLS? " +
			"Then --backstop begins with https://",
		secure.URL: "; add the certificate of that authority to this system's",
	} {
		err := mustBackstop(t, base+"/publish/docker").post(t.Context(), onePoint)
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v", base, err)
		}
	}
	unknown := &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Name: "h", IsNotFound: true}}
	if got := receiverHint(unknown); got != "; check the name of the host in --backstop" {
		t.Errorf("unknown host: %s", got)
	}
	proxy := &net.OpError{Op: "proxyconnect", Net: "tcp", Err: unknown}
	if got := receiverHint(proxy); !strings.Contains(got, "HTTPS_PROXY") {
		t.Errorf("unknown proxy: %s", got)
	}
	if got := receiverHint(io.EOF); got != "" {
		t.Errorf("anything else: %s", got)
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "86400": time.Hour,
		"0": 0, "-3": 0, "soon": 0, "1.5": 0, "99999999999999999999": 0,
		"Mon, 23 Nov 2026 09:00:00 GMT": 0,
		"Mon, 23 Nov 2026 10:00:30 GMT": 30 * time.Second,
		"Mon, 23 Nov 2099 10:00:00 GMT": time.Hour,
	} {
		if got := retryAfter(text, now); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
	s := harness.NewStandIn(t)
	s.Set("", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(503)
	})
	err := mustBackstop(t, s.URL+"/publish/docker").post(t.Context(), onePoint)
	var r *refusal
	if !errors.As(err, &r) || r.retryAfter != 2*time.Minute {
		t.Error(err)
	}
}

// After a pause the last metric is sent twice ahead of the batch, and only then.
func TestLead(t *testing.T) {
	s := harness.NewStandIn(t)
	b := mustBackstop(t, s.URL+"/publish/docker")
	b.leadAfter = time.Hour
	body := encode([]metric{
		{"", "web.a", whole(1), 1795409680},
		{"", "web.b", whole(2), 1795409680},
		{"", "web.c", whole(3), 1795409680},
	})
	for range 2 {
		if err := b.post(t.Context(), body); err != nil {
			t.Error(err)
		}
	}
	if got := fmt.Sprint(s.Requests()); got != "[1 1 3 3]" {
		t.Errorf("requests of %s", got)
	}
	b.asked = time.Now().Add(-time.Hour)
	s.Forget()
	s.Set("", nil)
	if err := b.post(t.Context(), onePoint); err != nil {
		t.Error(err)
	}
	if got := fmt.Sprint(s.Requests()); got != "[1 1 3 3 1 1 1]" {
		t.Errorf("requests of %s", got)
	}
	// A refused lead does not end the delivery: the batch gets its own answer.
	b.asked = time.Time{}
	var asked atomic.Int32
	s.Set("", func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		harness.AnswerWith(400, "missing fields")(w, r)
	})
	for range 2 {
		err := b.post(t.Context(), body)
		if err == nil || err.Error() != "answer 400 Bad Request: missing fields" {
			t.Error(err)
		}
	}
	if n := asked.Load(); n != 4 {
		t.Errorf("%d requests, want the lead's two and two", n)
	}
}

// After a restart of Carbon, Backstop loses metrics and answers 200. The lead saves those of the
// daemon.
func TestNothingIsLostByARestartOfCarbon(t *testing.T) {
	metrics := make([]metric, 100)
	for i := range metrics {
		metrics[i] = metric{"", fmt.Sprintf("web.m%d", i), whole(uint64(i)), 1795409680}
	}
	for _, test := range []struct {
		roundTrip, pause time.Duration // between Backstop and Carbon; before the batch
		idle             time.Duration
		lost             bool
	}{
		{0, 50 * time.Millisecond, time.Minute, false},
		{20 * time.Millisecond, 50 * time.Millisecond, time.Minute, false},
		// Without the lead, to show that the stand-in loses metrics.
		{0, 50 * time.Millisecond, 0, true},
		{20 * time.Millisecond, 50 * time.Millisecond, 0, true},
	} {
		s := harness.NewStandIn(t)
		b := mustBackstop(t, s.URL+"/publish/docker")
		b.leadPause = test.pause
		harness.Must(t, b.post(t.Context(), onePoint))
		s.RestartCarbon(test.roundTrip)
		b.asked = time.Now().Add(-test.idle)
		if err := b.post(t.Context(), encode(metrics)); err != nil {
			t.Error(err)
		}
		got := strings.Count(s.Lines(), "\n") - 1 // onePoint
		if lost := got < len(metrics); lost != test.lost {
			t.Errorf("%s from Carbon, after %s: %d of %d arrived",
				test.roundTrip, test.idle, got, len(metrics))
		}
	}
}

// The rest is about Carbon.

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

func newFakeCarbon(t testing.TB) *fakeCarbon {
	t.Helper()
	f := &fakeCarbon{}
	f.listen(t, "127.0.0.1:0")
	t.Cleanup(f.die)
	return f
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

// await waits until is returns true.
func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
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

func TestCarbonURLs(t *testing.T) {
	for text, want := range map[string]struct{ shown, prefix string }{
		"carbon://carbon.server":        {"carbon://carbon.server:2003", ""},
		"CARBON://carbon.server:2103/":  {"carbon://carbon.server:2103", ""},
		"carbon://carbon.server/docker": {"carbon://carbon.server:2003/docker", "docker."},
		"carbon://[::1]/web-1.docker/":  {"carbon://[::1]:2003/web-1.docker", "web-1.docker."},
		"carbon://[fe80::1%25eth0]:1/a": {"carbon://[fe80::1%25eth0]:1/a", "a."},
		"carbon://127.0.0.1:65535/a_b":  {"carbon://127.0.0.1:65535/a_b", "a_b."},
	} {
		to, err := parseDestination(text)
		if err != nil || to.address != want.shown || to.name != "Carbon" || !to.remote {
			t.Errorf("%s: %+v %v", text, to, err)
		}
		if c := mustCarbon(t, text); c.prefix != want.prefix {
			t.Errorf("%s has the prefix %q", text, c.prefix)
		}
	}
	for text, want := range map[string]string{
		"carbon:host:2003":               "no host in the URL; write one such as carbon://carbon",
		"carbon://":                      "no host in the URL",
		"carbon://:2003/secret":          "no host in the URL",
		"carbon://host:0":                "the port in the URL is not a number from 1 to 65535",
		"carbon://host:65536/secret":     "the port in the URL is not a number from 1 to 65535",
		"carbon://host:secret":           "not a URL",
		"carbon://user:secret@host/x":    "there is a user or a password in the URL, but Carbon",
		"carbon://secret@host":           "there is a user or a password",
		"carbon://host/x?secret=1":       "there is a ? or a # in the URL, but",
		"carbon://host/x?":               "there is a ? or a # in the URL",
		"carbon://host/x#secret":         "there is a ? or a # in the URL",
		"carbon://host/publish/secret":   "the prefix in the URL is not safe as a name in Graphite: use",
		"carbon://host/secret%0Aforged":  "the prefix in the URL is not safe",
		"carbon://host/secret;tag=v":     "the prefix in the URL is not safe",
		"carbon://host/a..secret":        "the prefix in the URL is not safe",
		"carbon://host/.secret":          "the prefix in the URL is not safe",
		"carbon://host/sécret":           "the prefix in the URL is not safe",
		"carbon://host/sec*":             "the prefix in the URL is not safe",
		"carbon://host/sec%20ret":        "the prefix in the URL is not safe",
		"carbon://host/" + longPath(300): "the prefix in the URL is not safe",
	} {
		_, err := parseDestination(text)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "sec") {
			t.Errorf("%.50s: %v", text, err)
		}
	}
}

// longPath returns a path with so many nodes.
func longPath(nodes int) string { return strings.TrimSuffix(strings.Repeat("nodes.", nodes), ".") }

// Each connection has at most 1,000 lines and 64 KB, all of them whole, and one silent connection
// is there from before the first until the batch is settled.
func TestCarbonPost(t *testing.T) {
	for _, test := range []struct {
		prefix   string
		metrics  []metric
		portions int
	}{
		{"", points(0, 1), 1},
		{"docker.", points(0, 2500), 3},
		{"docker.", points(0, 1000), 1},
		{longPath(170) + ".", points(0, 1000), 17},
	} {
		f := newFakeCarbon(t)
		c := mustCarbon(t, "carbon://"+f.address()+"/"+strings.TrimSuffix(test.prefix, "."))
		harness.Must(t, c.post(t.Context(), encode(test.metrics)))
		var want []byte
		for _, m := range test.metrics {
			want = m.appendLine(append(want, test.prefix...))
		}
		got := f.got()
		if text := strings.Join(got, ""); text != string(want) {
			t.Errorf("%d bytes arrived, want %d: %.200s", len(text), len(want), text)
		}
		for _, portion := range got {
			if n := strings.Count(portion, "\n"); n > 1000 || len(portion) > 64<<10 ||
				!strings.HasSuffix(portion, "\n") {
				t.Errorf("%d lines and %d bytes over one connection", n, len(portion))
			}
		}
		await(t, "the ends", func() bool { open, _ := f.connections(); return open == 1 })
		if _, n := f.connections(); n != test.portions+1 || len(got) != test.portions {
			t.Errorf("%d connections for %d portions", n, len(got))
		}
		harness.Must(t, c.confirm())
		await(t, "no connection is kept", func() bool { open, _ := f.connections(); return open == 0 })
	}
}

// What is not read in an orderly way is an error, and the log has the same text each time.
func TestCarbonTroubles(t *testing.T) {
	frozen := func(*net.TCPConn) { <-t.Context().Done() }
	for _, test := range []struct {
		why, want string
		fault     func(*net.TCPConn)
	}{
		{"reset", "read tcp ADDRESS: read: connection reset by peer", func(conn *net.TCPConn) {
			conn.Read(make([]byte, 1))
			conn.SetLinger(0)
		}},
		{"frozen", "it read nothing for 200ms", frozen},
		{"HTTP", "it answers, which Carbon's plaintext protocol never does: check host and port",
			func(conn *net.TCPConn) {
				io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
				io.Copy(io.Discard, conn)
			}},
	} {
		f := newFakeCarbon(t)
		c := mustCarbon(t, "carbon://"+f.address())
		c.stall = 200 * time.Millisecond
		for range 2 {
			f.fails(1, test.fault)
			err := c.post(t.Context(), onePoint)
			got := strings.ReplaceAll(errorText(err), f.address(), "ADDRESS")
			if got != test.want {
				t.Errorf("%s: %s, want %s", test.why, got, test.want)
			}
		}
		if c.witness != nil {
			t.Errorf("%s: after it there is a witness", test.why)
		}
	}

	f := newFakeCarbon(t)
	c := mustCarbon(t, "carbon://"+f.address())
	f.fails(1, frozen)
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(100*time.Millisecond, func() { cancel(errors.New("time is up")) })
	if err := c.post(ctx, onePoint); errorText(err) != "time is up" {
		t.Errorf("at the end: %v", err)
	}
	f.die()
	if err := c.post(t.Context(), onePoint); err == nil ||
		!strings.HasSuffix(err.Error(), "connection refused") {
		t.Errorf("nobody there: %v", err)
	}
}

// pair returns both ends of a connection, ours first.
func pair(t *testing.T, c *carbon) (ours, theirs *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	defer listener.Close()
	ours, err = c.dial(t.Context(), listener.Addr().String())
	harness.Must(t, err)
	conn, err := listener.Accept()
	harness.Must(t, err)
	t.Cleanup(func() { ours.Close(); conn.Close() })
	return ours, conn.(*net.TCPConn)
}

// A receiver may close its side in order before it has read all.
func TestCarbonEndsTooEarly(t *testing.T) {
	c := mustCarbon(t, "carbon://127.0.0.1")
	portion := c.portions(points(0, carbonLines))[0]

	ours, theirs := pair(t, c)
	harness.Must(t, theirs.CloseWrite())
	await(t, "its end", func() bool {
		if _, err := readNow(ours); err == io.EOF {
			return true
		}
		return false
	})
	if err := c.send(ours, portion); err == nil ||
		!strings.HasPrefix(err.Error(), "it closed the connection before the end of the metrics") {
		t.Errorf("closed at once: %v", err)
	}

	ours, theirs = pair(t, c)
	harness.Must(t, c.send(ours, portion))
	_, err := io.Copy(io.Discard, theirs)
	harness.Must(t, err)
	theirs.Close()
	harness.Must(t, c.awaitEnd(ours))

	if runtime.GOOS == "linux" {
		ours, theirs = pair(t, c)
		harness.Must(t, theirs.SetReadBuffer(1)) // so that its system does not take all
		harness.Must(t, c.send(ours, portion))
		harness.Must(t, theirs.CloseWrite())
		if err := c.awaitEnd(ours); err == nil ||
			err.Error() != "it closed the connection before it had read all metrics" {
			t.Errorf("closed with bytes unread: %v", err)
		}
	}

	// Its end is followed by an RST.
	ours, theirs = pair(t, c)
	_, err = ours.Write(portion)
	harness.Must(t, err)
	harness.Must(t, theirs.CloseWrite())
	theirs.SetLinger(0)
	theirs.Close()
	if err := c.awaitEnd(ours); err == nil {
		t.Error("an RST after the end was taken for an end")
	}
}

// The limit is for the time without progress, not for all.
func TestCarbonIsSlow(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux knows how many bytes are not acknowledged")
	}
	c := mustCarbon(t, "carbon://127.0.0.1")
	c.stall = 300 * time.Millisecond
	ours, theirs := pair(t, c)
	harness.Must(t, theirs.SetReadBuffer(64<<10))
	done := make(chan error, 1)
	go func() {
		err := c.send(ours, make([]byte, 8<<20))
		if err == nil {
			err = c.awaitEnd(ours)
		}
		done <- err
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for err := error(nil); err == nil; <-tick.C {
		_, err = io.ReadFull(theirs, make([]byte, 64<<10))
	}
	theirs.Close()
	harness.Must(t, <-done)
}

// carbonRig returns a rig that delivers to f, and its log. What is read is proven after a while.
func carbonRig(
	t *testing.T, f *fakeCarbon, dir string, proof time.Duration,
) (*rig, *carbon, *harness.Log) {
	t.Helper()
	c := mustCarbon(t, "carbon://"+f.address())
	c.proof = proof
	r, log := newRig(t, c.destination(), 8<<20, dir)
	r.pauses = newPauses(pace{10 * time.Millisecond, 20 * time.Millisecond, 20 * time.Millisecond})
	return r, c, log
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

// Pending batches are kept and hold nobody up; they leave queue and spool when they are proven.
func TestCarbonPending(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		f := newFakeCarbon(t)
		r, _, _ := carbonRig(t, f, dir, time.Second)
		end := delivering(t, r)
		start := time.Now()
		for i := range 3 {
			r.put(points(i*10, 10))
			await(t, "it is read at once", func() bool { return len(f.got()) == i+1 })
		}
		if early := time.Since(start); early < time.Second {
			if n := r.waiting(); n != 30 {
				t.Errorf("%d metrics are kept while they are pending", n)
			}
			if figures := figuresOf(r); !strings.HasPrefix(figures, "sent 0") {
				t.Errorf("figures: %s", figures)
			}
			if dir != "" && len(files(t, dir)) != 3 {
				t.Errorf("in the spool while they are pending: %q", files(t, dir))
			}
		}
		await(t, "they are delivered", func() bool { return r.waiting() == 0 })
		if took := time.Since(start); took < time.Second {
			t.Errorf("delivered after %s", took)
		}
		await(t, "no connection is kept", func() bool { open, _ := f.connections(); return open == 0 })
		harness.Must(t, end())
		if dir != "" && len(files(t, dir)) != 0 {
			t.Errorf("left in the spool: %q", files(t, dir))
		}
		if n := len(f.got()); n != 3 {
			t.Errorf("sent in %d portions", n)
		}
	}
}

// What is pending when Carbon ends, in order or not, is sent again, and nothing else is.
func TestCarbonIsSentAgain(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{"", t.TempDir()} {
		f := newFakeCarbon(t)
		r, _, log := carbonRig(t, f, dir, 0)
		end := delivering(t, r)
		r.put(points(0, 10))
		await(t, "the first is delivered", func() bool { return r.waiting() == 0 })
		r.to.proof = time.Second // delivery waits, and will see it with the next put
		r.put(points(10, 20))    // in one batch: what is put later waits until this one is confirmed
		await(t, "it is read", func() bool {
			return strings.Count(strings.Join(f.got(), ""), "\n") == 30
		})
		address := f.address()
		f.die()
		await(t, "trouble", func() bool { return strings.Contains(log.String(), "keeping metrics") })
		f.mu.Lock()
		f.portions = nil // that Carbon had not written anything
		f.mu.Unlock()
		f.listen(t, address)
		await(t, "they are delivered", func() bool { return r.waiting() == 0 })
		var want []byte
		for _, m := range points(10, 20) {
			want = m.appendLine(want)
		}
		if got := strings.Join(f.got(), ""); sortedLines(got) != sortedLines(string(want)) {
			t.Errorf("after its end it got\n%swant\n%s", got, want)
		}
		harness.Must(t, end())
		for text, times := range map[string]int{
			`level=ERROR msg="Carbon unreachable, keeping metrics" since=`:                   1,
			`level=INFO msg="Carbon reachable again, kept metrics are delivered" metrics=20`: 1,
		} {
			if n := strings.Count(log.String(), text); n < times || n > times+1 {
				t.Errorf("%d times %s in\n%s", n, text, log)
			}
		}
		if figures := figuresOf(r); !strings.HasPrefix(figures, "sent 30") {
			t.Errorf("figures: %s", figures)
		}
	}
}

// A proxy ends its connections in order, whatever happened behind it.
func TestCarbonBehindAProxy(t *testing.T) {
	f := newFakeCarbon(t)
	f.fails(0, func(conn *net.TCPConn) { <-t.Context().Done() })
	address := f.address()
	proxy := newFakeCarbon(t)
	proxy.fails(0, func(in *net.TCPConn) {
		to, err := net.Dial("tcp", address)
		if err != nil {
			return
		}
		defer to.Close()
		go func() {
			io.Copy(to, in)
			to.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(io.Discard, to) // until its end, or its RST
	})
	r, _, log := carbonRig(t, proxy, "", time.Second)
	end := delivering(t, r)
	r.put(points(0, 10))
	await(t, "the witness and the metrics", func() bool { _, n := f.connections(); return n == 2 })
	f.die()
	await(t, "trouble", func() bool { return strings.Contains(log.String(), "keeping metrics") })
	f.fails(0, nil)
	f.listen(t, address)
	await(t, "they are delivered", func() bool { return r.waiting() == 0 })
	harness.Must(t, end())
	if n := strings.Count(strings.Join(f.got(), ""), "\n"); n < 10 {
		t.Errorf("%d lines arrived", n)
	}
}

// A long backlog does not depend on one witness: receivers close what is silent for long.
func TestCarbonReplacesTheWitness(t *testing.T) {
	f := newFakeCarbon(t)
	c := mustCarbon(t, "carbon://"+f.address())
	for range 2 {
		harness.Must(t, c.post(t.Context(), onePoint))
		harness.Must(t, c.post(t.Context(), onePoint))
		harness.Must(t, c.confirm())
	}
	if _, n := f.connections(); n != 6 {
		t.Errorf("%d connections", n)
	}
	await(t, "all end", func() bool { open, _ := f.connections(); return open == 0 })
}

// At the end the proof is waited for, as long as there is time. What the spool has stays there.
func TestCarbonEnds(t *testing.T) {
	t.Parallel()
	const soon = 300 * time.Millisecond
	for _, test := range []struct {
		why     string
		spooled bool
		proof   time.Duration
		kept    int
		failed  bool
	}{
		{"in memory", false, soon, 0, false},
		{"in memory, no time", false, time.Hour, 0, true},
		{"in the spool", true, soon, 0, false},
		{"in the spool, no time", true, time.Hour, 1, true},
	} {
		f := newFakeCarbon(t)
		dir := ""
		if test.spooled {
			dir = t.TempDir()
		}
		r, _, log := carbonRig(t, f, dir, test.proof)
		r.put(points(0, 10))
		r.close()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		err := r.deliver(ctx)
		cancel()
		if (err != nil) != test.failed ||
			strings.Contains(log.String(), "level=ERROR") != test.failed {
			t.Errorf("%s: %v\n%s", test.why, err, log)
		}
		if test.spooled && len(files(t, dir)) != test.kept {
			t.Errorf("%s: in the spool is %q", test.why, files(t, dir))
		}
		if got := strings.Join(f.got(), ""); strings.Count(got, "\n") != 10 {
			t.Errorf("%s: it got %s", test.why, got)
		}
	}
}

// What an earlier run left pending is sent again.
func TestCarbonStartsWithWhatWasPending(t *testing.T) {
	f, dir := newFakeCarbon(t), t.TempDir()
	first, _, _ := carbonRig(t, f, dir, time.Hour)
	first.put(points(0, 10))
	first.close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := first.deliver(ctx); err == nil {
		t.Error("no error for what is pending")
	}
	second, _, _ := carbonRig(t, f, dir, 0)
	second.close()
	harness.Must(t, second.deliver(t.Context()))
	if got := f.got(); len(got) != 2 || got[0] != got[1] || len(files(t, dir)) != 0 {
		t.Errorf("it got %q; left %q", got, files(t, dir))
	}
}

// What is pending may be dropped when there is no room; nothing else is lost.
func TestCarbonPendingIsBounded(t *testing.T) {
	f := newFakeCarbon(t)
	r, _, _ := carbonRig(t, f, "", 500*time.Millisecond)
	r.limit = 4 << 10
	end := delivering(t, r)
	for i := range 30 {
		r.put(points(i*20, 20))
		await(t, "it is read", func() bool { return len(f.got()) == i+1 })
		if _, bytes := r.held(); bytes > r.limit {
			t.Errorf("%d bytes are held", bytes)
		}
	}
	f.die()
	end()
	if n := r.waiting(); n == 0 {
		t.Error("nothing was pending")
	}
}

// held returns what is in the queue.
func (r *rig) held() (metrics int, bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.line.size()
}

// BenchmarkDrainToCarbon is BenchmarkDrain to a fake Carbon, or to the one at $BENCH_CARBON, a URL
// as in --backstop. It does not wait for the proof of the last batches.
func BenchmarkDrainToCarbon(b *testing.B) {
	url := os.Getenv("BENCH_CARBON")
	if url == "" {
		f := newFakeCarbon(b)
		f.fails(0, func(conn *net.TCPConn) { io.Copy(io.Discard, conn) })
		url = "carbon://" + f.address()
	}
	drain(b, mustCarbon(b, url).destination())
}
