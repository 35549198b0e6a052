package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	docker "github.com/fsouza/go-dockerclient"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// noDockerEnv makes the environment one in which nobody has set up the docker command.
func noDockerEnv(t *testing.T) {
	for _, name := range []string{"DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH",
		"DOCKER_CONFIG"} {
		t.Setenv(name, "")
	}
}

func TestEngineAddresses(t *testing.T) {
	noDockerEnv(t)
	for _, test := range []struct{ endpoint, base, shown string }{
		{"unix:///var/run/docker.sock", "http://unix.sock", "unix:///var/run/docker.sock"},
		{"tcp://docker", "http://docker:2375", "http://docker:2375"},
		{"tcp://docker:1234", "http://docker:1234", "http://docker:1234"},
		{"tcp://[::1]", "http://[::1]:2375", "http://[::1]:2375"},
		{"http://docker:2375/", "http://docker:2375", "http://docker:2375/"},
		{"http://proxy/docker", "http://proxy/docker", "http://proxy/docker"},
		{"https://user:secret@docker", "https://user:secret@docker", "https://docker"},
	} {
		e, err := newEngine(test.endpoint, time.Second)
		if err != nil {
			t.Errorf("%s: %v", test.endpoint, err)
			continue
		}
		if e.base != test.base || e.String() != test.shown {
			t.Errorf("%s became %s, shown as %s", test.endpoint, e.base, e)
		}
	}

	for _, test := range []struct{ endpoint, want string }{
		{"docker.sock", "no scheme in it; want one such as unix:///var/run/docker.sock or " +
			"tcp://host:2375"},
		{"docker:2375", "no scheme in it; want one such as"},
		{"127.0.0.1:2375", "no scheme in it; want one such as"},
		{"me:secret@docker:2375", "no scheme in it; want one such as"},
		{"unix://docker.sock", "a unix socket needs an absolute path, with three slashes"},
		{"unix://", "a unix socket needs an absolute path"},
		{"tcp://:2375", "no host in it; the form is tcp://host:port"},
		{"tcp://docker:0", "invalid endpoint; want one such as"},
		{"tcp://docker:65536", "invalid endpoint; want one such as"},
		{"http://user:12/secret@docker", "no host in it"},
		{"ssh://me@docker", "cannot speak ssh://; want unix://, tcp://"},
		{"http://u:secret@%zz", "not a URL; want one such as"},
	} {
		_, err := newEngine(test.endpoint, time.Second)
		if err == nil || !strings.Contains(err.Error(), test.want) ||
			strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: error %v, want %q", test.endpoint, err, test.want)
		}
	}
	_, err := newEngine("npipe:////./pipe/docker_engine", time.Second)
	if (err == nil) != (runtime.GOOS == "windows") {
		t.Errorf("npipe: %v", err)
	}
}

// The engine with TLS, and a folder with its certificate as the authority.
func tlsEngine(t *testing.T) (address, certs string) {
	hello := func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.41") }
	server := httptest.NewUnstartedServer(http.HandlerFunc(hello))
	// it is asked the wrong way on purpose
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.StartTLS()
	t.Cleanup(server.Close)
	certs = t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(certs, "ca.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return server.Listener.Addr().String(), certs
}

func TestTLSAsTheDockerCommandHasIt(t *testing.T) {
	noDockerEnv(t)
	address, certs := tlsEngine(t)
	hello := func(endpoint string) error {
		t.Helper()
		e, err := newEngine(endpoint, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_, err = e.hello(t.Context())
		return err
	}

	// Not asked for: the engine's answer to plain HTTP, with a hint.
	if err := hello("tcp://" + address); err == nil ||
		!strings.Contains(engineHint(err), "DOCKER_TLS_VERIFY=1") {
		t.Errorf("tcp:// without TLS: %v", err)
	}
	// A certificate of an unknown authority is never accepted.
	var unknown *tls.CertificateVerificationError
	if err := hello("https://" + address); !errors.As(err, &unknown) {
		t.Errorf("https:// to an engine nobody vouches for: %v", err)
	}
	t.Setenv("DOCKER_CERT_PATH", certs)
	if err := hello("https://" + address); err != nil {
		t.Errorf("https:// with its ca.pem: %v", err)
	}
	t.Setenv("DOCKER_TLS_VERIFY", "1")
	if err := hello("tcp://" + address); err != nil {
		t.Errorf("tcp:// with DOCKER_TLS_VERIFY: %v", err)
	}
	// Nor one of another name: the certificate is for 127.0.0.1, ::1 and example.com.
	_, port, _ := net.SplitHostPort(address)
	var name x509.HostnameError
	if err := hello("tcp://localhost:" + port); !errors.As(err, &name) {
		t.Errorf("tcp:// to another name: %v", err)
	}
	if e, err := newEngine("tcp://docker", time.Second); err != nil ||
		e.base != "https://docker:2376" {
		t.Errorf("the default port with TLS: %v %v", e, err)
	}
	// On a socket there is nothing to encrypt.
	if e, err := newEngine("unix:///var/run/docker.sock", time.Second); err != nil ||
		e.base != "http://unix.sock" {
		t.Errorf("a socket with DOCKER_TLS_VERIFY: %v %v", e, err)
	}

	refused := func(why, want string) {
		t.Helper()
		if _, err := newEngine("tcp://"+address, time.Second); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", why, err)
		}
	}
	write := func(file, text string) {
		if err := os.WriteFile(filepath.Join(certs, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("cert.pem", "no certificate")
	write("key.pem", "no key")
	refused("a bad client certificate", "the client's certificate, cert.pem and key.pem in "+certs)
	write("ca.pem", "no authority")
	refused("a bad authority", "ca.pem holds no certificate in PEM form")
	t.Setenv("DOCKER_CERT_PATH", t.TempDir())
	refused("no authority", "DOCKER_CERT_PATH names the folder with ca.pem, cert.pem and key.pem")
	t.Setenv("DOCKER_CERT_PATH", "")
	t.Setenv("HOME", t.TempDir())
	refused("no authority at home", filepath.Join(".docker", "ca.pem"))
	t.Setenv("DOCKER_CONFIG", "/nowhere")
	refused("no authority in the configuration", filepath.Join("/nowhere", "ca.pem"))
}

func TestOneShotWhereTheEngineHasIt(t *testing.T) {
	for _, test := range []struct {
		api, query string
	}{
		{"1.40", "stream=false"},
		{"1.41", "stream=false&one-shot=true"},
		{"1.100", "stream=false&one-shot=true"},
		{"2.0", "stream=false&one-shot=true"},
		{"", "stream=false"},
		{"new", "stream=false"},
	} {
		r := harness.NewReplay(t, "cgroup2")
		r.Is(test.api)
		c, _ := collecting(t, r.URL, 10*time.Second)
		c.sweep(t.Context())
		asked := strings.Join(r.Questions(), "\n")
		if !strings.Contains(asked, "/containers/fx-idle/stats?"+test.query+"\n") {
			t.Errorf("API %q: asked %s", test.api, asked)
		}
	}
}

func TestEngineErrorsAreOfTheirKind(t *testing.T) {
	t.Parallel()
	r := harness.NewReplay(t, "cgroup2")
	e, err := newEngine(r.URL, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	const id = "c27b38814f84cb68598dae990b9f83b4c4f4c2f110771c2027cb27debd783fe4" // fx-idle
	for _, test := range []struct {
		why     string
		answer  http.HandlerFunc
		want    string
		connect bool
	}{
		{"hangs", harness.Hang, `^no answer within 5s$`, false},
		{"hangs half-way", func(w http.ResponseWriter, r *http.Request) {
			w.Write([]byte(`{"read":`))
			w.(http.Flusher).Flush()
			harness.Hang(w, r)
		}, `^no answer within 5s$`, false},
		{"breaks off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.Write([]byte(`{"read":`))
		}, `^the answer broke off: unexpected EOF$`, false},
		{"never ends", func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write([]byte(strings.Repeat(" ", 1<<20))); err != nil {
					return
				}
			}
		}, `^the answer has over 33554432 bytes$`, false},
		{"is removed, as it seems", harness.AnswerWith(404, `{"message":"No such container: x"}`),
			`^API error \(404\): No such container: x$`, false},
		{"fails", harness.AnswerWith(500, `{"message":"first\nsecond"}`), `^API error \(500\): first$`,
			false},
		{"fails without JSON", harness.AnswerWith(502, "\n\n<html>\x1b[31m\n"),
			`^API error \(502\): <html>\[31m$`, false},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, `EOF`,
			true},
	} {
		r.On("/containers/fx-idle/stats", test.answer)
		_, err := e.stats(t.Context(), id, new(bytes.Buffer))
		if err == nil || !regexp.MustCompile(test.want).MatchString(err.Error()) ||
			isConnectionError(err) != test.connect {
			t.Errorf("a container that %s: %v", test.why, err)
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := e.list(ctx, false); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
	r.On("/containers/json", harness.Hang)
	if _, _, err := e.list(t.Context(), false); err == nil || err.Error() != "no answer within 5s" {
		t.Errorf("a list that hangs: %v", err)
	}
	r.On("/containers/json", func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte(`["`))
		for {
			if _, err := w.Write([]byte(strings.Repeat("x", 1<<20))); err != nil {
				return
			}
		}
	})
	resp, err := e.client.HTTPClient.Get(r.URL + "/containers/json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); n != maxAnswer || err == nil {
		t.Errorf("of a list that never ends, %d bytes were read, %v", n, err)
	}
}

func TestEngineHints(t *testing.T) {
	e, err := newEngine("unix://"+filepath.Join(t.TempDir(), "docker.sock"), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	_, err = e.hello(t.Context())
	if err == nil || !strings.HasPrefix(err.Error(), "dial unix /") ||
		engineHint(err) != "; is Docker running, and is --docker its address?" {
		t.Errorf("no socket: %v %s", err, engineHint(err))
	}
	if hint := engineHint(os.ErrPermission); !strings.Contains(hint, "usermod -aG docker") {
		t.Errorf("no permission: %s", hint)
	}
	if hint := engineHint(docker.ErrConnectionRefused); !strings.Contains(hint, "is Docker running") {
		t.Errorf("refused: %s", hint)
	}
	if hint := engineHint(errors.New("else")); hint != "" {
		t.Errorf("anything else: %s", hint)
	}
}

// A path that is no socket is told of as what it is.
func TestSocketThatIsNone(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "docker.sock")
	harness.Must(t, os.WriteFile(file, nil, 0o600))
	for path, want := range map[string]string{
		dir:  "; that is a folder, not the engine's socket",
		file: "; that is a plain file, not the engine's socket",
	} {
		e, err := newEngine("unix://"+path, time.Second)
		harness.Must(t, err)
		if _, err = e.hello(t.Context()); err == nil || engineHint(err) != want {
			t.Errorf("%s: %v%s", path, err, engineHint(err))
		}
	}
}

// A proxy that forbids a call is told which one.
func TestForbiddenCallsAreNamed(t *testing.T) {
	for path, want := range map[string]string{
		"/_ping": "GET /_ping", "/containers/json": "GET /containers/json", "/info": "GET /info",
		"/events": "GET /events", "/containers/fx-two/stats": "/stats",
		"/containers/fx-two/json": "/json",
	} {
		r := harness.NewReplay(t, "cgroup2")
		r.On(path, harness.AnswerWith(http.StatusForbidden, "<html>no"))
		c, log := collecting(t, r.URL, time.Second)
		c.sweep(t.Context())
		if got := log.Take(); !strings.Contains(got, "API error (403): <html>no; the engine, or a "+
			"proxy before it, forbids GET /") || !strings.Contains(got, want+`"`) {
			t.Errorf("%s: logged %s", path, got)
		}
	}
}

func TestEnginesThatAnswerInTicks(t *testing.T) {
	for server, want := range map[string]bool{
		"Docker/20.10.24 (linux)": true, "Docker/17.05.0-ce (linux)": true,
		"Docker/23.0.7 (linux)": true, "Docker/23.0.8 (linux)": false,
		"Docker/24.0.6 (linux)": true, "Docker/24.0.7 (linux)": false,
		"Docker/25.0.0-rc.1 (linux)": false, "Docker/29.1.2 (linux)": false,
		"Docker/dev (linux)": false, "Libpod/4.3.1 (linux)": false, "": false,
	} {
		if got := collectsInTicks(server); got != want {
			t.Errorf("%q: %t", server, got)
		}
	}
}

// What others send over the connections.

// rawServer answers every request with what answer writes, and counts its open connections.
type rawServer struct {
	net.Listener
	answer func(net.Conn)
	open   atomic.Int32
	served sync.WaitGroup
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
		{"a body that stops", answers(ok + "Content-Length: 9\r\n\r\n[]"), "no answer within"},
		{"a body without an end", endless(ok+"\r\n", strings.Repeat(" ", 1000)),
			"the answer has over"},
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
				_, err := e.get(t.Context(), path, new(bytes.Buffer))
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

// What is nested deep is refused, or costs itself: no stack overflows.
func TestDeepJSON(t *testing.T) {
	deep := strings.Repeat("[", maxAnswer/2) + strings.Repeat("]", maxAnswer/2-100)
	for _, body := range []string{deep, `{"x":` + deep + `}`, strings.Repeat(`{"x":`, maxAnswer/5)} {
		if err := decodeLoosely([]byte(body), new(info)); err == nil {
			t.Errorf("%.10s is decoded", body)
		}
		if _, err := decodeStats([]byte(body)); err == nil {
			t.Errorf("%.10s is decoded as stats", body)
		}
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
		c.hear(c.engine.timeout) // what it began to ask
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

// fuzzDecoding hands answers to decode as get does.
func fuzzDecoding(f *testing.F, file string, decode func(body []byte)) {
	for _, engine := range []string{"cgroup1", "cgroup2", "podman"} {
		if body, err := os.ReadFile("testdata/engine/" + engine + "/" + file); err == nil {
			f.Add(body)
		}
	}
	for _, body := range []string{``, `null`, `[]`, `{}`, `[{}]`, `[null]`, `{"State":7}`, `[[[[`} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		decode(body)
	})
}

func FuzzList(f *testing.F) {
	fuzzDecoding(f, "containers.json", func(body []byte) {
		var list []listed
		_ = decodeLoosely(body, &list)
		c := &containers{log: (&harness.Log{}).Logger()}
		censusOf(c, list, "h")
	})
}

func FuzzInspect(f *testing.F) {
	fuzzDecoding(f, "inspect-idle.json", func(body []byte) {
		var now inspected
		if decodeLoosely(body, &now) == nil {
			now.cpuLimit()
		}
	})
}

func FuzzInfo(f *testing.F) {
	fuzzDecoding(f, "info.json", func(body []byte) { _ = decodeLoosely(body, new(info)) })
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte(`{"Type":"container","Action":"die","timeNano":1,` +
		`"Actor":{"Attributes":{"exitCode":"1"}}}`))
	fuzzDecoding(f, "events.json", func(body []byte) { _, _ = decodeEvents(body) })
}
