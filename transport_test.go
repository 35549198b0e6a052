package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// rawServer answers every request with what answer writes, and counts its open connections.
type rawServer struct {
	net.Listener
	answer func(net.Conn)
	open   atomic.Int32
	served sync.WaitGroup
}

// serve answers the first request, and returns when the client has closed the connection.
func (s *rawServer) serve(conn net.Conn) {
	defer s.open.Add(-1)
	defer conn.Close()
	buf := make([]byte, 64<<10)
	if s.answer != nil {
		if _, err := conn.Read(buf); err != nil {
			return
		}
		go s.answer(conn)
	}
	for {
		if _, err := conn.Read(buf); err != nil {
			return
		}
	}
}

// awaitClosed takes no more connections, and fails the test if some are still open after a while.
func (s *rawServer) awaitClosed(t testing.TB, why string) {
	t.Helper()
	s.Close()
	closed := make(chan struct{})
	go func() { s.served.Wait(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Errorf("%s: %d connections are left behind", why, s.open.Load())
	}
}

// answerRaw starts a server on whose connections answer is called once a request's header is read.
func answerRaw(t testing.TB, answer func(net.Conn)) *rawServer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	s := &rawServer{Listener: listener, answer: answer}
	s.served.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.open.Add(1)
			s.served.Go(func() { s.serve(conn) })
		}
	})
	t.Cleanup(func() { listener.Close() })
	return s
}

// answers writes text.
func answers(text string) func(net.Conn) {
	return func(conn net.Conn) { io.WriteString(conn, text) }
}

// endless writes text, and then more without an end.
func endless(text, more string) func(net.Conn) {
	return func(conn net.Conn) {
		io.WriteString(conn, text)
		for {
			if _, err := io.WriteString(conn, more); err != nil {
				return
			}
		}
	}
}

const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n" +
	"Upgrade: tcp\r\n\r\n"

// Whatever the engine sends, a call ends in its time, costs little memory, and leaves no connection
// in use.
func TestEngineCallsEnd(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	deep := strings.Repeat("[", 2_000_000)
	for _, test := range []struct {
		why    string
		answer func(net.Conn)
		want   string
	}{
		{"another protocol", answers(switching), "API error (101)"},
		{"another protocol that talks", endless(switching, "x"), "API error (101)"},
		{"101 of nothing", answers("HTTP/1.1 101 \r\n\r\n"), "API error (101)"},
		{"silence", answers(""), "no answer within"},
		{"half a header", answers("HTTP/1.1 200 OK\r\nA: "), "no answer within"},
		{"an endless status line", endless("HTTP/1.1 200 ", strings.Repeat("O", 1000)), "exceeded"},
		{"an endless header", endless(ok, "A: "+strings.Repeat("b", 1000)+"\r\n"), "exceeded"},
		{"early hints without an end", endless("", "HTTP/1.1 103 Early Hints\r\n\r\n"), ""},
		{"a body that stops", answers(ok + "Content-Length: 9\r\n\r\n["), "no answer within"},
		{"a body without an end", endless(ok+"\r\n", strings.Repeat(" ", 1000)),
			""}, // it has over 32 MiB, or its time is over
		{"an error without an end", endless("HTTP/1.1 500 No\r\n\r\n", "no "), "API error (500)"},
		{"deep", answers(ok + "Content-Length: 2000000\r\n\r\n" + deep), ""},
		{"packed", answers(ok + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"), ""},
	} {
		t.Run(test.why, func(t *testing.T) {
			t.Parallel()
			s := answerRaw(t, test.answer)
			e, err := newEngine("http://"+s.Addr().String(), time.Second)
			harness.Must(t, err)
			for _, path := range []string{"/containers/json", "/containers/x/stats"} {
				start := time.Now()
				_, err := e.get(t.Context(), path, new(answer))
				if test.why == "packed" || test.why == "deep" {
					continue // it is not JSON, but that shows later
				}
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: error %.300v, want %s", path, err, test.want)
				}
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("%s took %s", path, took)
				}
			}
			e.client.HTTPClient.CloseIdleConnections()
			s.awaitClosed(t, test.why)
		})
	}
}

// bubbleNet is a network in a bubble, with one server.
type bubbleNet struct {
	accepted chan net.Conn
	closed   chan struct{}
	made     atomic.Int32 // connections
	open     atomic.Int32
}

// bubbleConn is the client's end of a connection.
type bubbleConn struct {
	net.Conn
	close func()
}

func (c *bubbleConn) Close() error {
	c.close()
	return c.Conn.Close()
}

func (n *bubbleNet) Accept() (net.Conn, error) {
	select {
	case conn := <-n.accepted:
		return conn, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *bubbleNet) Close() error   { close(n.closed); return nil }
func (n *bubbleNet) Addr() net.Addr { return &net.TCPAddr{} }

func (n *bubbleNet) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	n.accepted <- server
	n.made.Add(1)
	n.open.Add(1)
	return &bubbleConn{client, sync.OnceFunc(func() { n.open.Add(-1) })}, nil
}

// engineInBubble serves an engine until the test ends, and returns a collector of it as well.
func engineInBubble(t *testing.T, limit time.Duration, engine http.HandlerFunc) (
	*bubbleNet, *collector, *harness.Log,
) {
	t.Helper()
	time.Sleep(max(0, time.Until(noClock))) // a bubble's clock begins in 2000
	n := &bubbleNet{accepted: make(chan net.Conn), closed: make(chan struct{})}
	server := &http.Server{Handler: engine}
	go server.Serve(n)
	c, log := collecting(t, "http://engine.test", limit)
	connections := c.engine.client.HTTPClient.Transport.(transport)
	connections.DialContext = n.dial
	t.Cleanup(func() {
		connections.CloseIdleConnections()
		server.Close()
	})
	return n, c, log
}

// An answer is what came, whether its connection stays open or not: it holds up a poll for a
// moment, and no connection is left behind.
func TestAnswersThatStayOpen(t *testing.T) {
	const list = `[{"Id":"1","Names":["/web"],"Status":"Up 1 minute"},` +
		`{"Id":"2","Names":["/x]}\\\""],"Image":"}][{","State":"exited"}]`
	whole := map[string]string{"/_ping": "OK", "/info": `{"Name":"h","Plugins":{"a":["]"]}}`,
		"/containers/json": list, "/containers/1/stats": smallStats,
		"/containers/1/json": smallInspect, "/events": ""}
	blanks := func(send func(string) bool) {
		for send("\r\n") {
			time.Sleep(10 * time.Millisecond)
		}
	}
	once := func(text string) func(func(string) bool) {
		return func(send func(string) bool) { send(text) }
	}
	for why, then := range map[string]func(send func(string) bool){
		"silence": once(""), "blanks": blanks,
		"half a value": once(`{"Id":"`), "no JSON": once("<html>"),
		"another value": once(smallStats), "an end of something": once("]}]}"),
		"more each second, as Docker streams stats": func(send func(string) bool) {
			for send("\n" + smallStats) {
				time.Sleep(time.Second)
			}
		},
	} {
		for path := range whole {
			if path == "/_ping" && why != "silence" && why != "blanks" {
				continue // nobody looks at its text
			}
			t.Run(why+path, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n, c, log := engineInBubble(t, maxCall, func(w http.ResponseWriter, r *http.Request) {
						text := whole[r.URL.Path]
						if r.URL.Path != path {
							io.WriteString(w, text)
							return
						}
						send := func(text string) bool {
							_, err := io.WriteString(w, text)
							w.(http.Flusher).Flush()
							return err == nil && r.Context().Err() == nil
						}
						send(text[:len(text)/2])
						time.Sleep(time.Millisecond)
						send(text[len(text)/2:])
						then(send)
						<-r.Context().Done()
					})
					for range 5 {
						start := time.Now()
						result := c.sweep(t.Context())
						most, events := 2*linger, "h.events.die 0"
						switch {
						case path != "/events":
						case why == "half a value":
							most = maxCall / 4
						case why == "no JSON", why == "an end of something":
							most, events = maxCall/4, "!h.events."
						}
						if took := time.Since(start); took > most+10*time.Millisecond {
							t.Errorf("it took %s", took)
						}
						wants(t, path, result, "web.memory.usage 1", "web.restarts 3", "web.uptime 60",
							"h.containers.total 1", "h.containers.stopped 1", "h.metrics.sampled 1",
							events)
						time.Sleep(time.Minute)
					}
					if made, open := n.made.Load(), n.open.Load(); made > 8 || open > 2 {
						t.Errorf("%d connections, %d of them are still open", made, open)
					}
					got := log.Take()
					if lines := strings.Count(got, "\n"); lines > 2 || path != "/events" && lines > 1 ||
						strings.Contains(got, "level=ERROR") {
						t.Errorf("it logged %s", got)
					}
				})
			})
		}
	}
}

// Ordinary answers leave their connection to the next call.
func TestConnectionsAreUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, c, _ := engineInBubble(t, maxCall, func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/containers/json": // in chunks
				for _, part := range []string{`[{"Id":"1","Names":["/web"]},`, `{"Id":"2","Names":["/db"]}]`} {
					io.WriteString(w, part)
					w.(http.Flusher).Flush()
				}
			case "/containers/1/stats", "/containers/2/stats":
				io.WriteString(w, smallStats+strings.Repeat(" ", 10_000))
			case "/containers/1/json", "/containers/2/json":
				io.WriteString(w, smallInspect)
			case "/info":
				io.WriteString(w, `{"Name":"h"}`)
			}
		})
		for range 20 {
			if result := c.sweep(t.Context()); result.sampled != 2 {
				t.Errorf("%d were sampled", result.sampled)
			}
			time.Sleep(time.Minute)
		}
		if made := n.made.Load(); made > 3 {
			t.Errorf("20 sweeps of two containers made %d connections", made)
		}
	})
}

// The body of an error that does not end is waited for no longer.
func TestErrorsThatStayOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := `[{"Id":"1","Names":["/web"]},{"Id":"2","Names":["/gone"]}]`
		_, c, log := engineInBubble(t, maxCall, func(w http.ResponseWriter, r *http.Request) {
			status, text := http.StatusOK, map[string]string{"/containers/json": list,
				"/containers/1/json": smallInspect, "/info": `{"Name":"h"}`}[r.URL.Path]
			switch {
			case strings.HasSuffix(r.URL.Path, "/stats"):
				status, text = http.StatusConflict, `{"message":"busy"}`
			case strings.HasPrefix(r.URL.Path, "/containers/2/"):
				status, text = http.StatusNotFound, `{"message":"no such container"}`
			}
			w.WriteHeader(status)
			io.WriteString(w, text)
			w.(http.Flusher).Flush()
			if status != http.StatusOK {
				<-r.Context().Done()
			}
		})
		start := time.Now()
		result := c.sweep(t.Context())
		if took := time.Since(start); took > ending+time.Second {
			t.Errorf("it took %s", took)
		}
		wants(t, "errors", result, "web.uptime 0", "web.restarts 3", "h.metrics.failed 1",
			"h.metrics.sampled 0", "h.containers.total 2")
		if got := log.Take(); !strings.Contains(got, `container=web error="API error (409): busy"`) {
			t.Errorf("it logged %s", got)
		}
	})
}

func TestEngineRedirectsAreNotFollowed(t *testing.T) {
	var asked atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
	}))
	t.Cleanup(elsewhere.Close)
	for _, status := range []int{301, 302, 303, 307, 308} {
		r := harness.NewReplay(t, "cgroup2")
		c, _ := collecting(t, r.URL, 10*time.Second)
		away := func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, status)
		}
		for _, path := range []string{"/containers/fx-two/stats", "/containers/fx-two/json",
			"/info", "/containers/json", "/_ping"} {
			r.On(path, away)
			c.sweep(t.Context())
		}
		if _, err := c.engine.hello(t.Context()); err == nil ||
			!strings.Contains(err.Error(), fmt.Sprintf("API error (%d)", status)) {
			t.Errorf("%d: %v", status, err)
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("another server got %d requests", n)
	}
}

// An engine that accepts connections and then stays silent where TLS is wanted.
func TestSilentTLSLeavesNoConnection(t *testing.T) {
	noDockerEnv(t)
	s := answerRaw(t, nil)
	e, err := newEngine("https://"+s.Addr().String(), 200*time.Millisecond)
	harness.Must(t, err)
	for range 5 {
		if _, err := e.hello(t.Context()); err == nil {
			t.Error("a silent engine said hello")
		}
	}
	s.awaitClosed(t, "the engine")

	s = answerRaw(t, nil)
	b := mustBackstop(t, "https://"+s.Addr().String()+"/publish/docker")
	b.timeout, b.transport.TLSHandshakeTimeout = 200*time.Millisecond, 200*time.Millisecond
	for range 5 {
		if err := b.request(t.Context(), onePoint); err == nil {
			t.Error("a silent Backstop took metrics")
		}
	}
	s.awaitClosed(t, "Backstop")
	if limit := mustBackstop(t, "https://h/publish/x").transport.TLSHandshakeTimeout; limit == 0 {
		t.Error("TLS with Backstop has no limit")
	}
}

// What became of a request is in the header of the answer: the body costs a second at most.
func TestBackstopAnswersEnd(t *testing.T) {
	const ok, chunked = "HTTP/1.1 200 OK\r\n", "Transfer-Encoding: chunked\r\n\r\n"
	for _, test := range []struct {
		why    string
		answer func(net.Conn)
		want   string // "" if the metrics are delivered
	}{
		{"a body that stops", answers(ok + "Content-Length: 9\r\n\r\nok"), ""},
		{"a body that does not begin", answers(ok + chunked), ""},
		{"a body without an end", endless(ok+chunked, "1\r\nx\r\n"), ""},
		{"a body that breaks off", func(conn net.Conn) {
			io.WriteString(conn, ok+"Content-Length: 9\r\n\r\no")
			conn.Close()
		}, ""},
		{"a refusal that stops", answers("HTTP/1.1 400 No\r\nContent-Length: 99\r\n\r\nmissing fields\n"),
			"answer 400 Bad Request: missing fields"},
		{"a refusal without an end", endless("HTTP/1.1 400 No\r\n\r\nmissing fields\n", "more "),
			"answer 400 Bad Request: missing fields"},
		{"another protocol", answers(switching), "answer 101 Switching Protocols"},
		{"another protocol that talks", endless(switching, "x"), "answer 101 Switching Protocols"},
		{"an endless status line", endless("HTTP/1.1 200 ", strings.Repeat("O", 1000)), "exceeded"},
		{"an endless header", endless(ok, "A: "+strings.Repeat("b", 1000)+"\r\n"), "exceeded"},
	} {
		t.Run(test.why, func(t *testing.T) {
			t.Parallel()
			s := answerRaw(t, test.answer)
			b := mustBackstop(t, "http://"+s.Addr().String()+"/publish/docker")
			start := time.Now()
			err := b.request(t.Context(), onePoint)
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("it took %s", took)
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %.300v, want %q", err, test.want)
			}
			b.transport.CloseIdleConnections()
			s.awaitClosed(t, test.why)
		})
	}
}

// pipes is a network of one server, which answers as answer says.
func pipes(served *sync.WaitGroup, answer func(request string) []byte) func(
	context.Context, string, string,
) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		served.Go(func() {
			defer server.Close()
			buf := make([]byte, 4<<10)
			n, err := server.Read(buf)
			if err != nil {
				return
			}
			go io.Copy(io.Discard, server)
			server.Write(answer(string(buf[:n])))
		})
		return client, nil
	}
}

// awaitAll fails the test if not all connections end.
func awaitAll(t *testing.T, served *sync.WaitGroup) {
	t.Helper()
	ended := make(chan struct{})
	go func() { served.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("a connection is left behind")
	}
}

// rawSeeds are answers as they are on the wire.
func rawSeeds() []string {
	const ok = "HTTP/1.1 200 OK\r\n"
	return []string{
		ok + "Content-Length: 2\r\n\r\nok", ok + "\r\n", ok + "Content-Length: 9\r\n\r\n[]",
		ok + "Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\nA: b\r\n\r\n",
		ok + "Content-Encoding: gzip\r\n\r\n\x1f\x8b", switching, switching + "x", "", "\x00", "HTTP/1.1",
		"HTTP/1.1 301 Moved\r\nLocation: http://other/x\r\n\r\n", "HTTP/1.0 204 \r\n\r\n",
		"HTTP/1.1 100 Continue\r\n\r\n" + ok + "\r\n[]", "HTTP/1.1 999 \x1b[31m\r\n\r\n\x1b[31m",
		"HTTP/1.1 503 No\r\nRetry-After: 9\r\n\r\n", "HTTP/1.1 413 No\r\n\r\n<html>\r\n",
		ok + "Content-Length: -1\r\n\r\n", ok + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
	}
}

// FuzzEngineHTTP: whatever an engine sends to a question, a sweep ends, its metrics are such, its
// log is of lines, and no connection is left behind.
func FuzzEngineHTTP(f *testing.F) {
	recorded := func(file string) []byte {
		body := harness.ReadFile(f, "testdata/engine/cgroup2/"+file)
		return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: %d\r\n\r\n%s",
			len(body), body)
	}
	ping := []byte("HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 2\r\n\r\nOK")
	info, list := recorded("info.json"), recorded("containers.json")
	stats, inspect := recorded("stats-one-shot-busy.json"), recorded("inspect-busy.json")
	f.Add(ping, info, list, stats, inspect)
	for _, seed := range rawSeeds() {
		raw := []byte(seed)
		f.Add(raw, raw, raw, raw, raw)
		f.Add(ping, raw, list, raw, raw)
		f.Add(ping, info, list, stats, raw)
	}
	const odd = `[{"Names":["\u007f"]},{"Id":"1","Names":["/x/\u001b[31m"]},` +
		`{"Id":"2","Image":"0123456789ab"}]`
	f.Add(ping, info, []byte("HTTP/1.1 200 OK\r\n\r\n"+odd), stats, inspect)
	f.Fuzz(func(t *testing.T, ping, info, list, stats, inspect []byte) {
		var served sync.WaitGroup
		c, log := collecting(t, "http://engine.test", 2*time.Second)
		c.log = newLogger(log, slog.LevelDebug)
		c.containers.log, c.events.log = c.log, c.log
		connections := c.engine.client.HTTPClient.Transport.(transport)
		connections.DialContext = pipes(&served, func(request string) []byte {
			_, path, _ := strings.Cut(request, " ")
			switch path, _, _ = strings.Cut(path, " "); {
			case path == "/_ping":
				return ping
			case path == "/info":
				return info
			case strings.HasPrefix(path, "/containers/json"):
				return list
			case strings.Contains(path, "/stats"):
				return stats
			}
			return inspect
		})
		c.per = details{true, true, true}
		for range 2 {
			for _, m := range c.sweep(t.Context()).metrics {
				if !harness.IsGoodName(m.name()) || !harness.IsGoodValue(string(m.value.append(nil))) {
					t.Errorf("the metric %s", m.appendLine(nil))
				}
			}
		}
		table, _, _ := check(t.Context(), c)
		c.takeInfo(c.engine.timeout) // what it began to ask
		for line := range strings.Lines(log.Take() + table) {
			if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), unicode.IsControl) {
				t.Errorf("the line %q", line)
			}
		}
		connections.CloseIdleConnections()
		awaitAll(t, &served)
	})
}

// FuzzBackstopHTTP: whatever Backstop sends, a request ends, an answer other than 2xx is not taken
// for success, and no connection is left behind.
func FuzzBackstopHTTP(f *testing.F) {
	for _, seed := range rawSeeds() {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var served sync.WaitGroup
		b, err := newBackstop("http://user:password@backstop.test/publish/docker")
		harness.Must(t, err)
		b.transport.DialContext = pipes(&served, func(string) []byte { return raw })
		b.leadPause = time.Nanosecond
		err = b.post(t.Context(), onePoint)
		if err == nil && !bytes.Contains(raw, []byte(" 2")) {
			t.Errorf("%q was taken for success", raw)
		}
		var r *refusal
		if errors.As(err, &r) && (r.status/100 == 2 || r.retryAfter < 0 || len(r.line) > 200) {
			t.Errorf("%q became %+v", raw, r)
		}
		if strings.ContainsAny(errorText(err), "\r\n") {
			t.Errorf("the error %q", err)
		}
		b.transport.CloseIdleConnections()
		awaitAll(t, &served)
	})
}
