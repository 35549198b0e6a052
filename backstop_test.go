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
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

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
	const tryAgain, halveIt, fixIt = "try again", "halve it", "fix it"
	remedy := func(r *refusal) string {
		switch {
		case r.isTemporary():
			return tryAgain
		case isToHalve(r):
			return halveIt
		}
		return fixIt
	}
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
		remedy    string
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
			`^answer 500 Internal Server Error: xxxxx$`},
		{"secrets repeated", docker,
			answer(500, "bad: Basic dXNlcjpwYXNzd29yZA== (password)"), tryAgain,
			`^answer 500 Internal Server Error: xxxxx$`},
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
		if errors.As(err, &refused) && remedy(refused) != test.remedy {
			t.Errorf("%s: remedy %v, want %v", test.why, remedy(refused), test.remedy)
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
	if err == nil || !strings.HasSuffix(err.Error(),
		"connection refused; is it running, and is --backstop its address?") ||
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
		if b.destination().address != shown || b.url.User != nil {
			t.Errorf("%s is shown as %s and asked at %s", text, b.destination().address, b.url)
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
		secure.URL: "; add the certificate of that authority to this system's, " +
			"or name its file in SSL_CERT_FILE",
	} {
		err := mustBackstop(t, base+"/publish/docker").post(t.Context(), onePoint)
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v", base, err)
		}
	}
	unknown := &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Name: "h", IsNotFound: true}}
	if got := receiverHint(unknown, "https"); got != "; check the name of the host in --backstop" {
		t.Errorf("unknown host: %s", got)
	}
	proxy := &net.OpError{Op: "proxyconnect", Net: "tcp", Err: unknown}
	if got := receiverHint(proxy, "https"); !strings.Contains(got, "HTTPS_PROXY") {
		t.Errorf("unknown proxy: %s", got)
	}
	if got := receiverHint(io.EOF, "https"); got != "" {
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

// When everything is delivered the connection is closed, so the next poll finds a Backstop whose
// name has another address now, however often that is. What waits goes through one connection.
func TestAddressesThatMove(t *testing.T) {
	for _, every := range []time.Duration{time.Second, 10 * time.Second, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			var asked []string
			newServer := func() *bubbleNet {
				n := &bubbleNet{accepted: make(chan net.Conn), closed: make(chan struct{})}
				server := &http.Server{Handler: harness.AnswerWith(http.StatusOK, "ok")}
				go server.Serve(n)
				t.Cleanup(func() { server.Close() })
				return n
			}
			first, second := newServer(), newServer()
			now := first
			b := mustBackstop(t, "http://backstop.test/publish/docker")
			b.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
				asked = append(asked, address)
				return now.dial(ctx, network, address)
			}
			q, log := newRig(t, b.destination(), 1<<20, "")
			q.fill(0, 20)
			end := delivering(t, q)
			time.Sleep(every)
			if made := first.made.Load(); made != 1 || q.waiting() > 0 {
				t.Errorf("for a backlog it made %d connections, and %d wait", made, q.waiting())
			}
			expect := func(why string, polls int, n *bubbleNet, made int32) {
				t.Helper()
				for range polls {
					q.put(points(0, 1))
					time.Sleep(every)
					if q.waiting() > 0 || n.open.Load() > 0 {
						t.Errorf("%s: %d wait, %d connections are open", why, q.waiting(), n.open.Load())
					}
				}
				if n.made.Load() != made {
					t.Errorf("%s: %d connections were made, want %d", why, n.made.Load(), made)
				}
			}
			expect("at first", 5, first, 6)
			now = second
			expect("moved", 5, second, 5)
			if first.made.Load() != 6 || len(asked) != 11 || asked[10] != "backstop.test:80" {
				t.Errorf("it asked for %q", asked)
			}
			harness.Must(t, end())
			if got := log.Take(); strings.Contains(got, "level=ERROR") {
				t.Errorf("it logged %s", got)
			}
		})
	}
}
