package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	docker "github.com/fsouza/go-dockerclient"
)

// noDockerEnv makes the environment one in which nobody has set up the docker command.
func noDockerEnv(t *testing.T) {
	for _, name := range []string{"DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH",
		"DOCKER_CONFIG", "DOCKER_CONTEXT"} {
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
		{"breaks off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.Write([]byte(`{"read":`))
		}, `^the answer broke off: unexpected EOF$`, false},
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
		_, err := e.stats(t.Context(), id, new(answer))
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
}

func TestEngineHints(t *testing.T) {
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
		var seen inspected
		if decodeLoosely(body, &seen) == nil {
			seen.cpuLimit()
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

func TestCPULimit(t *testing.T) {
	for _, test := range []struct{ host, want string }{
		{`{}`, ""},
		{`{"NanoCpus":0,"CpuQuota":0,"CpuPeriod":0,"CpusetCpus":""}`, ""},
		{`{"NanoCpus":1500000000}`, "1.5"},
		{`{"CpuQuota":20000,"CpuPeriod":10000}`, "2"},
		{`{"CpuQuota":20000}`, "0.2"},
		{`{"CpusetCpus":"0-2,7"}`, "4"},
		{`{"CpusetCpus":"0","NanoCpus":2000000000}`, "1"},
		{`{"CpusetCpus":"0-","NanoCpus":2000000000}`, "2"},
		{`{"CpusetCpus":"3-1"}`, ""},
	} {
		var seen inspected
		err := decodeLoosely([]byte(`{"HostConfig":`+test.host+`}`), &seen)
		harness.Must(t, err)
		got := ""
		if limit := seen.cpuLimit(); limit > 0 {
			v, _ := decimal(limit)
			got = string(v.append(nil))
		}
		if got != test.want {
			t.Errorf("%s: %s, want %s", test.host, got, test.want)
		}
	}
}

// In a container the remedy is an option of docker run: the image says that it is one.
func TestHintInTheImage(t *testing.T) {
	sets := regexp.MustCompile(`(?m)^ENV .*\bcontainer=docker$`)
	if !sets.MatchString(harness.ReadFile(t, "Dockerfile")) {
		t.Error("the image does not set $container")
	}
	for container, want := range map[string]string{
		"docker": "--group-add $(stat -c %g /var/run/docker.sock)",
		"":       "usermod -aG docker USER",
	} {
		t.Setenv("container", container)
		if hint := engineHint(os.ErrPermission); !strings.HasSuffix(hint, ": "+want) {
			t.Errorf("with container=%s it says %q", container, hint)
		}
	}
}

// Whichever tells that an engine is one for Windows: its CPU time is in 100 ns.
func TestWindowsIsTold(t *testing.T) {
	stats := harness.ReadFile(t, "testdata/engine/windows/stats-web.json")
	inBody := strings.Replace(stats, "{", `{"os_type":"windows",`, 1)
	for _, test := range []struct {
		why, path, header, value string // of the header of that path's answer
		stats, info              string
		windows                  bool
	}{
		{"nothing", "", "", "", stats, `{"Name":"h"}`, false},
		{"Linux", "/containers/1/stats", "Ostype", "linux", stats, `{"Name":"h","OSType":"linux"}`,
			false},
		{"Ostype", "/containers/1/stats", "Ostype", "windows", stats, `{"Name":"h"}`, true},
		{"Ostype of the ping", "/_ping", "Ostype", "windows", stats, `{"Name":"h"}`, true},
		{"the body", "", "", "", inBody, `{"Name":"h"}`, true},
		{"Server of the ping", "/_ping", "Server", "Docker/20.10.9 (windows)", stats, `{"Name":"h"}`,
			true},
		{"/info", "", "", "", stats, `{"Name":"h","OSType":"windows"}`, true},
		{"/info, without a name", "", "", "", stats, `{"OSType":"windows"}`, true},
	} {
		s, c, _ := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 3 hours"}]`)
		s.container("1", smallInspect, test.stats)
		s.answers["/info"] = test.info
		handler := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == test.path {
				w.Header().Set(test.header, test.value)
			}
			handler.ServeHTTP(w, r)
		})
		want := map[bool]string{true: "1421875000", false: "14218750"}[test.windows]
		for range 2 {
			wants(t, test.why, c.sweep(t.Context()), "web.cpu.total "+want, "web.memory.commit 77160448")
		}
	}
}

// The large answers that there are, are read: 35,000 ids of a health check, or as many volumes.
func TestLargeTruths(t *testing.T) {
	many := func(n int) string {
		return `"` + strings.Repeat("0123456789abcdef", 4) + `"` +
			strings.Repeat(`,"`+strings.Repeat("fedcba9876543210", 4)+`"`, n-1)
	}
	for _, n := range []int{35_000, 350_000} {
		s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Labels":{"a":[`+many(n)+`]}}]`)
		s.container("1", strings.Replace(smallInspect, "{", `{"ExecIDs":[`+many(n)+`],`, 1),
			strings.Replace(smallStats, "{", `{"x":[`+many(n)+`],`, 1))
		s.answers["/info"] = `{"Warnings":[` + many(n) + `],"Name":"h","MemTotal":8.388608e+06}`
		wants(t, fmt.Sprint(n), c.sweep(t.Context()), "web.uptime 60", "web.restarts 3",
			"web.memory.usage 1", "h.containers.total 1", "h.metrics.sampled 1")
		if got := log.Take(); strings.Contains(got, "WARN") || strings.Contains(got, "ERROR") {
			t.Errorf("%d: it logged %s", n, got)
		}
	}
}

// An answer of the wrong kind is named in JSON's words, whichever it is.
func TestWrongKinds(t *testing.T) {
	for answer, want := range map[string]string{
		`[]`: "an array", `"x"`: "a string", `7`: "a number", `true`: "true or false",
		`{}`: "an object",
	} {
		for _, path := range []string{"/containers/json", "/info", "/containers/1/json", "/events",
			"/containers/1/stats"} {
			isList := path == "/containers/json"
			if isList == (answer == "[]") || !isList && answer == "{}" {
				continue
			}
			s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"]}]`)
			s.container("1", smallInspect, smallStats)
			s.answers[path] = answer
			c.engine.timeout = 4 * time.Second
			c.sweep(t.Context())
			kind := map[bool]string{true: "an array", false: "an object"}[isList]
			got := log.Take()
			if !strings.Contains(got, want+" instead of "+kind) || strings.Contains(got, "main.") {
				t.Errorf("%s answers %s: it logged %s", path, answer, got)
			}
		}
	}
}
