package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){program: main})
}

// TestScripts holds the command to what testdata/script says of it. Each script has an engine,
// $ENGINE, that answers with what was recorded of one, and a stand-in for Backstop,
// $BACKSTOP (with the path, without credentials), and these commands of its own:
//
//	backstop auth user:password    from here on it wants these credentials
//	backstop answer STATUS TEXT    from here on it answers so
//	backstop hang                  or not at all
//	backstop ok                    as usual again
//	backstop drop                  the same, and the requests it has are cut off
//	[!] arrives REGEXP [N]         N points, by default 1, are or will be there whose name matches
//	engine hang NAME | PATH        from here on that container's stats, or that path, hang
//	engine forget NAME | PATH      … or are there no more
//	engine well NAME | PATH        … or are there again
//	[!] received REGEXP [N]        N lines, by default 1, were written to Carbon, $CARBON
//	awaits FILE REGEXP             the file has, or will have, a line that matches
func TestScripts(t *testing.T) {
	t.Parallel()
	type host struct {
		engine   *harness.Replay
		backstop *harness.StandIn
		carbon   *fakeCarbon
	}
	this := func(ts *testscript.TestScript) host { return ts.Value(host{}).(host) }
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			h := host{harness.NewReplay(t, "cgroup2"), harness.UnstartedStandIn(t.Errorf), newFakeCarbon(t)}
			h.backstop.Server = httptest.NewServer(h.backstop)
			env.Defer(h.backstop.Stop)
			env.Values[host{}] = h
			env.Setenv("ENGINE", h.engine.URL)
			env.Setenv("BACKSTOP", h.backstop.URL+"/publish/docker")
			env.Setenv("CARBON", "carbon://"+h.carbon.address())
			env.Setenv("BACKSTOP_HOST", strings.TrimPrefix(h.backstop.URL, "http://"))
			// A socket that is not there, so that no script meets the real engine by chance.
			env.Setenv("DOCKER_HOST", "unix://"+env.WorkDir+"/docker.sock")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"backstop": func(ts *testscript.TestScript, _ bool, args []string) {
				s := this(ts).backstop
				switch args[0] {
				case "auth":
					s.Set(args[1], nil)
				case "answer":
					status, err := strconv.Atoi(args[1])
					ts.Check(err)
					s.Set("", harness.AnswerWith(status, args[2]))
				case "hang":
					s.Set("", harness.Hang)
				case "ok":
					s.Set("", nil)
				case "drop":
					s.Set("", nil)
					s.Drop()
				default:
					ts.Fatalf("backstop %s?", args[0])
				}
			},
			"engine": func(ts *testscript.TestScript, _ bool, args []string) {
				path := args[1]
				if !strings.HasPrefix(path, "/") {
					path = "/containers/" + path + "/stats"
				}
				answer := map[string]http.HandlerFunc{"hang": harness.Hang,
					"forget": harness.AnswerWith(404, "{}")}[args[0]]
				this(ts).engine.On(path, answer)
				name, isStats := strings.CutSuffix(path, "/stats")
				if isStats && args[0] != "hang" {
					this(ts).engine.On(name+"/json", answer)
				}
			},
			"arrives": func(ts *testscript.TestScript, not bool, args []string) {
				want, within := 1, time.Minute
				if len(args) > 1 {
					var err error
					want, err = strconv.Atoi(args[1])
					ts.Check(err)
				}
				if not {
					within = 0
				}
				if err := this(ts).backstop.Await(args[0], want, within); (err != nil) != not {
					ts.Fatalf("%v; there are\n%s", err, this(ts).backstop.Lines())
				}
			},
			"received": func(ts *testscript.TestScript, not bool, args []string) {
				want := 1
				if len(args) > 1 {
					var err error
					want, err = strconv.Atoi(args[1])
					ts.Check(err)
				}
				text := strings.Join(this(ts).carbon.got(), "")
				n := len(regexp.MustCompile("(?m)"+args[0]).FindAllString(text, -1))
				if (n >= want) == not {
					ts.Fatalf("%d lines match %s in\n%s", n, args[0], text)
				}
			},
			"awaits": func(ts *testscript.TestScript, _ bool, args []string) {
				re := regexp.MustCompile(args[1])
				for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
					text, err := os.ReadFile(ts.MkAbs(args[0]))
					if err == nil && re.Match(text) {
						return
					}
					if time.Now().After(deadline) {
						ts.Fatalf("%s lacks %s: %s %v", args[0], args[1], text, err)
					}
				}
			},
		},
	})
}

func TestReadmeHasTheOptionsOfHelp(t *testing.T) {
	const option, variable = `(?m)^ *\|? *` + "`?" +
		`(--[a-z-]+(?:=[A-Z]+)?)\b`, `(?m)\b(SRV_[A-Z_]+)\b`
	_, help, _ := strings.Cut(usage(), "\nOptions")
	options := harness.Section(t, "README.md", "## Options")
	got, want := harness.AllOf(option, options), harness.AllOf(option, help)
	if !slices.Equal(got, want) {
		t.Errorf("the README has the options %q, --help has %q", got, want)
	}
	got, want = harness.AllOf(variable, options), harness.AllOf(variable, help)
	if !slices.Equal(got, want) {
		t.Errorf("the README has the variables %q, --help has %q", got, want)
	}
	file := harness.ReadFile(t, "deploy/docker-stats-to-backstop.default")
	for _, name := range harness.AllOf(variable, file) {
		if !slices.Contains(harness.AllOf(variable, help), name) {
			t.Errorf("the file for the systemd unit has %s, which --help has not", name)
		}
	}
}

// A reader finds each line of the log in the documents, but those of --verbose and those of a life
// without trouble.
func TestMessagesAreDocumented(t *testing.T) {
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	documented, n := harness.Section(t, "docs/troubleshooting.md", "## Messages"), 0
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		text := harness.ReadFile(t, source)
		for _, message := range append(harness.AllOf(`log\.(?:Warn|Error|Info)\("([^"]+)"`, text),
			harness.AllOf(`return "(.+, keeping .+)"`, text)...) {
			if slices.Contains([]string{"started", "ending", "Docker engine answers"}, message) {
				continue
			}
			n++
			start := regexp.MustCompile(`[:,]`).Split(message, 2)[0] // what follows is explained there
			if !strings.Contains(documented, strings.TrimSpace(start)) {
				t.Errorf("docs/troubleshooting.md lacks %q", message)
			}
		}
	}
	if n < 15 {
		t.Errorf("only %d messages found", n)
	}
}

// The man page has each option with its text word for word as in --help, its examples, and what the
// code and the documents say of exit statuses, variables and files.
func TestManPageSaysTheSame(t *testing.T) {
	fonts := regexp.MustCompile(`\\f.|(?m)^\.(?:[BI]|BR) `)
	page := fonts.ReplaceAllString(harness.ReadFile(t, "deploy/docker-stats-to-backstop.1"), "")
	page = strings.NewReplacer(`\-`, "-", `\e`, `\`, `\(aq`, "'", `\[u2026]`, "…").Replace(page)
	chapter := func(name string) string {
		_, rest, found := strings.Cut(page, "\n.SH "+name+"\n")
		if !found {
			t.Fatalf("no %s", name)
		}
		text, _, _ := strings.Cut(rest, "\n.SH ")
		return text
	}
	// entries returns what the chapter explains, and how, in its order.
	entries := func(name string) (of []string, explained []string) {
		for _, entry := range strings.Split(chapter(name), ".TP\n")[1:] {
			title, text, _ := strings.Cut(entry, "\n")
			of, explained = append(of, title), append(explained, oneLine(text))
		}
		return of, explained
	}

	help := usage()
	examples, help, _ := strings.Cut(help, "\nOptions; ")
	intro, options, _ := strings.Cut(help, "\n\n")
	text, _, _ := strings.Cut(chapter("OPTIONS"), "\n.TP")
	got, want := oneLine(text), strings.Replace(oneLine(intro), "each can", "Each option can", 1)
	if got != want {
		t.Errorf("it says %q of the options, --help %q", got, want)
	}
	var names, texts []string
	option := regexp.MustCompile(`(?m)^  (--\S+)(?: +(SRV_[A-Z_]+))?`)
	for _, option := range option.FindAllStringSubmatch(options, -1) {
		names = append(names, strings.TrimSuffix(option[1]+", "+option[2], ", "))
	}
	for _, text := range regexp.MustCompile(`(?m)^  --\S+(?: +SRV_[A-Z_]+)?`).Split(options, -1)[1:] {
		texts = append(texts, oneLine(text))
	}
	of, explained := entries("OPTIONS")
	if !slices.Equal(of, names) {
		t.Fatalf("it has the options\n%q, --help has\n%q", of, names)
	}
	for i := range of {
		if explained[i] != texts[i] {
			t.Errorf("of %s it says\n%s\n--help says\n%s", of[i], explained[i], texts[i])
		}
	}
	commands := func(pattern, text string) string {
		return oneLine(strings.Join(harness.AllInOrder(pattern, text), "\n"))
	}
	if got, want := commands(`(?s)\.nf\n(.*?)\.fi`, chapter("EXAMPLES")), commands(`(?m)^    +(.*)$`,
		examples); got != want {
		t.Errorf("its examples are\n%s\nthose of --help\n%s", got, want)
	}

	statuses, _ := entries("EXIT STATUS")
	if want := append([]string{"0"},
		harness.AllOf(`os\.Exit\((\d+)\)`,
			harness.ReadFile(t, "main.go"))...); !slices.Equal(statuses, want) {
		t.Errorf("it has the exit statuses %q, the code has %q", statuses, want)
	}
	documents := harness.Documentation(t)
	variables, _ := entries("ENVIRONMENT")
	for _, name := range harness.AllOf(`([A-Z_]+)`, strings.Join(variables, "\n")) {
		if !strings.Contains(documents, name) {
			t.Errorf("README and docs lack %s", name)
		}
	}
	// A path is one that a package brings, or the unit's folder.
	packages := harness.ReadFile(t, "deploy/nfpm.yaml") + "/var/lib/" +
		strings.Join(harness.AllOf(`(?m)^StateDirectory=(.*)$`,
			harness.ReadFile(t, "deploy/docker-stats-to-backstop.service")), "")
	paths, _ := entries("FILES")
	for _, path := range paths {
		if !strings.Contains(packages, path) || !strings.Contains(documents, path) {
			t.Errorf("there is no %s, or neither README nor docs say so", path)
		}
	}
}

func TestScheduleIsAGrid(t *testing.T) {
	s := schedule{every: time.Minute, offset: 7 * time.Second}
	at := func(clock string) time.Time {
		t.Helper()
		at, err := time.Parse("15:04:05.999", clock)
		if err != nil {
			t.Fatal(err)
		}
		return at.AddDate(2026, 0, 0)
	}
	for _, test := range []struct{ now, want string }{
		{"12:00:00", "12:00:07"},
		{"12:00:06.999", "12:00:07"},
		{"12:00:07", "12:01:07"},
		{"12:00:59", "12:01:07"},
	} {
		if got := s.after(at(test.now)); !got.Equal(at(test.want)) {
			t.Errorf("after %s comes %s, want %s", test.now, got, test.want)
		}
	}
	if got := (schedule{every: time.Minute}).after(time.Unix(-90, 0)); !got.Equal(time.Unix(-60, 0)) {
		t.Errorf("after -90 s comes %s", got) // a clock that was never set
	}

	for _, test := range []struct{ why, tick, now, want string }{
		{"as usual", "12:00:07", "12:00:09", "12:01:07"},
		{"overrun", "12:00:07", "12:02:09", "12:03:07"},
		{"the timer was early", "12:01:07", "12:01:06.999", "12:02:07"},
		{"the clock was put back", "12:01:07", "11:30:00", "11:30:07"},
	} {
		if got := s.next(at(test.tick), at(test.now)); !got.Equal(at(test.want)) {
			t.Errorf("%s: after %s at %s comes %s, want %s", test.why, test.tick, test.now, got, test.want)
		}
	}
}

func TestHostsArePlacedInTheFirstHalf(t *testing.T) {
	quarters := [4]int{}
	for i := range 200 {
		host := "web" + strings.Repeat("x", i/10) + string(rune('0'+i%10))
		s := newSchedule(time.Minute, host)
		if s != newSchedule(time.Minute, host) {
			t.Fatalf("%s has two places", host)
		}
		if s.offset < 0 || s.offset >= 30*time.Second {
			t.Fatalf("%s has the offset %s", host, s.offset)
		}
		quarters[s.offset*4/(30*time.Second)]++
	}
	for i, n := range quarters {
		if n < 25 { // of 50; a hash that is worth its name does not miss that
			t.Errorf("%d of 200 hosts in quarter %d of the offsets", n, i)
		}
	}
	newSchedule(time.Nanosecond, "h").after(time.Now()) // has no half
}

// In the time of synctest, which begins at midnight UTC.
func TestPollKeepsToTheGrid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(3 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		s := schedule{every: time.Minute, offset: 10 * time.Second}
		took := []time.Duration{time.Second, time.Second, 130 * time.Second, time.Second}
		midnight := time.Now().Truncate(24 * time.Hour)
		var starts []time.Duration
		log := &harness.Log{}
		poll(ctx, func() schedule { return s }, func(context.Context) {
			starts = append(starts, time.Since(midnight))
			time.Sleep(took[len(starts)-1])
			if len(starts) == len(took) {
				cancel()
			}
		}, log.Logger())
		want := []time.Duration{3 * time.Second, 10 * time.Second, 70 * time.Second, 250 * time.Second}
		for i := range want {
			if starts[i] != want[i] {
				t.Fatalf("sweeps at %v, want %v", starts, want)
			}
		}
		if got := log.Take(); strings.Count(got, "\n") != 1 ||
			!strings.Contains(got, "took=2m10s poll=1m0s skipped=2") {
			t.Errorf("logged: %s", got)
		}
	})
}

// A first sweep is on no tick, so that one may pass without anything being amiss.
func TestPollDoesNotBlameTheFirstSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(59 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		log, sweeps := &harness.Log{}, 0
		poll(ctx, func() schedule { return schedule{every: time.Minute} }, func(context.Context) {
			time.Sleep(2 * time.Second)
			if sweeps++; sweeps == 2 {
				cancel()
			}
		}, log.Logger())
		if got := log.Take(); got != "" {
			t.Errorf("logged: %s", got)
		}
	})
}

func TestErrorsOfOthersArePlain(t *testing.T) {
	reset := func(port int) error {
		return &url.Error{Op: "Get", URL: "http://engine/_ping",
			Err: fmt.Errorf("readLoop: %w", &net.OpError{
				Op: "read", Net: "tcp", Err: errors.New("connection reset by peer"),
				Source: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1),
					Port: port}, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2375},
			})}
	}
	// The same trouble has the same text, whatever port it met, so that it is logged once.
	for _, port := range []int{58006, 58007} {
		if got, want := plainly(t.Context(),
			reset(port)).Error(), "read tcp 127.0.0.1:2375: connection reset by peer"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if plainly(t.Context(), nil) != nil || errorText(nil) != "" {
		t.Error("there is an error where there is none")
	}
}

func TestWhatMayBeSecretIsNotShown(t *testing.T) {
	for text, want := range map[string]string{
		"web":                      `"web"`,
		"two\nlines":               `"two\nlines"`,
		"https://h/publish/docker": "(not shown, as it may hold a password)",
		"user:secret@h":            "(not shown, as it may hold a password)",
	} {
		if got := shown(text); got != want {
			t.Errorf("%q is shown as %s", text, got)
		}
	}
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

// credentials are hard to hide: each of their characters is escaped somewhere.
const (
	hardUser     = "mon&tor"
	hardPassword = `p@ss"w<rd/%+?ü\~>~?`
)

// encodings are the ways to write a text that others have been seen to use, and some more.
func encodings(text string) map[string]string {
	each := func(format string) string {
		var b strings.Builder
		for _, c := range []byte(text) {
			fmt.Fprintf(&b, format, c)
		}
		return b.String()
	}
	inJSON, _ := json.Marshal(text)
	eachRune := func(format string) string {
		var b strings.Builder
		for _, r := range text {
			fmt.Fprintf(&b, format, r)
		}
		return b.String()
	}
	return map[string]string{
		"plain":                     text,
		"base64":                    base64.StdEncoding.EncodeToString([]byte(text)),
		"base64 unpadded":           base64.RawStdEncoding.EncodeToString([]byte(text)),
		"base64 of URLs":            base64.URLEncoding.EncodeToString([]byte(text)),
		"base64 of URLs, unpadded":  base64.RawURLEncoding.EncodeToString([]byte(text)),
		"base64 in a query":         url.QueryEscape(base64.StdEncoding.EncodeToString([]byte(text))),
		"URL":                       url.PathEscape(text),
		"query":                     url.QueryEscape(text),
		"URL, twice":                url.PathEscape(url.PathEscape(text)),
		"URL, each byte":            each("%%%02X"),
		"URL, each byte, lowercase": each("%%%02x"),
		"HTML":                      html.EscapeString(text),
		"HTML, each rune":           eachRune("&#%d;"),
		"HTML, in hex":              eachRune("&#X%x;"),
		"HTML, without ends":        eachRune("&#%d"),
		"HTML, with zeros":          eachRune("&#%020d;"),
		"Go":                        strings.Trim(strconv.Quote(text), `"`),
		"Go, ASCII":                 strings.Trim(strconv.QuoteToASCII(text), `"`),
		"Go, each byte":             each(`\x%02x`),
		"JSON":                      strings.Trim(string(inJSON), `"`),
		"NUL bytes":                 strings.Join(strings.Split(text, ""), "\x00"),
		"cut":                       strings.Repeat("x", maxForeign-len(text)/2) + text,
		"cut before":                strings.Repeat("x ", maxRead/2-len(text)/4) + text,
	}
}

// reveals reports what of the credentials can be read out of a text. It knows nothing of how they
// are masked.
func reveals(text string) string {
	plain := func(text string) []string {
		seen := []string{text}
		for range 3 { // slog quotes what was quoted before
			text = strings.Map(func(r rune) rune {
				if r < ' ' {
					return -1
				}
				return r
			}, text)
			text = html.UnescapeString(text)
			text = regexp.MustCompile(`\\(x[0-9a-f]{2}|u[0-9a-f]{4}|.)`).ReplaceAllStringFunc(text,
				func(escape string) string {
					if r, _, _, err := strconv.UnquoteChar(escape, '"'); err == nil {
						return string(r)
					}
					return escape
				})
			seen = append(seen, text)
			text = regexp.MustCompile(`%[0-9A-Fa-f]{2}`).ReplaceAllStringFunc(text,
				func(escape string) string {
					unescaped, _ := url.PathUnescape(escape)
					return unescaped
				})
			seen = append(seen, text)
		}
		return seen
	}
	both := hardUser + ":" + hardPassword
	for _, seen := range plain(text) {
		for _, secret := range []string{hardPassword,
			base64.RawStdEncoding.EncodeToString([]byte(both)),
			base64.RawURLEncoding.EncodeToString([]byte(both)),
			base64.RawStdEncoding.EncodeToString([]byte(hardPassword)),
			base64.RawURLEncoding.EncodeToString([]byte(hardPassword))} {
			if part := secret[:5]; strings.Contains(seen, part) {
				return part
			}
		}
	}
	return ""
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

// What is logged, at any level, and said to systemd shows no credentials, whatever others repeat.
func TestCredentialsAreShownNowhere(t *testing.T) {
	user := url.UserPassword(hardUser, hardPassword).String()
	knowSecretsOf(t, "http://"+user+"@h/publish/docker")
	said, shown := "", 0
	address := hostile(t, func(string) string { return said })
	both := hardUser + ":" + hardPassword
	for how, encoded := range encodings(both) {
		for place, answer := range repetitions {
			for _, text := range []string{encoded, encodings(hardPassword)[how]} {
				said = fmt.Sprintf(answer, text)
				var out bytes.Buffer
				logger := newLogger(&out, slog.LevelDebug)
				b := mustBackstop(t, "http://"+user+"@"+address+"/publish/docker")
				b.leadAfter, b.leadPause = time.Hour, 0
				b.asked = time.Now()
				d := newDelivery(b.destination(), newQueue(1<<20, logger), logger)
				d.queue.put([]metric{{"", "web.a", whole(1), 1795409680}})
				d.queue.close()
				_ = d.deliver(t.Context())
				e, err := newEngine("http://"+user+"@"+address, time.Minute)
				harness.Must(t, err)
				c := newCollector(e, nil, logger)
				c.flow.limit = 1
				s := &service{queue: d.queue, send: func(state string) { out.WriteString(state + "\n") }}
				s.hasSwept(c.sweep(t.Context()), 0)
				s.hasSwept(c.sweep(t.Context()), 0)
				b.transport.CloseIdleConnections()
				if part := reveals(out.String()); part != "" {
					t.Errorf("%s in %s is shown, %q of it:\n%s", how, place, part, out.String())
				}
				shown += strings.Count(out.String(), mask)
				for line := range strings.Lines(out.String()) {
					if len(line) > 2*maxShown {
						t.Errorf("%s in %s makes a line of %d bytes", how, place, len(line))
					}
				}
			}
		}
	}
	if shown < 500 { // else this tests nothing
		t.Errorf("only %d times something is hidden", shown)
	}
}

// The daemon itself, whose Backstop and engine repeat all that they are sent.
func TestDaemonShowsNoCredentials(t *testing.T) {
	echo := func(request string) string {
		header := regexp.MustCompile(`(?i)authorization: (.*)`).FindStringSubmatch(request)
		if len(header) == 0 {
			return "HTTP/1.1 500 No\r\n\r\nno credentials"
		}
		return "HTTP/1.1 500 No\r\n\r\nas sent: " + header[1] + " " + hardPassword
	}
	user := url.UserPassword(hardUser, hardPassword).String()
	for name, args := range map[string][]string{
		"Backstop": {"--docker=" + harness.NewReplay(t, "cgroup2").URL,
			"--backstop=http://" + user + "@" + hostile(t, echo) + "/publish/docker"},
		"engine": {"--docker=http://" + user + "@" + hostile(t, echo)},
	} {
		for _, more := range []string{"--once", "--check"} {
			out, _ := exec.Command(program, append(args, more, "--verbose")...).CombinedOutput()
			if part := reveals(string(out)); part != "" {
				t.Errorf("%q of the credentials of the %s:\n%s", part, name, out)
			}
			isAsked := more == "--once" || name == "engine"
			if isAsked && !strings.Contains(string(out), "as sent: Basic "+mask) {
				t.Errorf("the %s was sent no credentials:\n%s", name, out)
			}
		}
	}
}

// A password of up to three letters is a part of many words: it is hidden only beside its user.
func TestShortPasswordsAreHiddenBesideTheirUser(t *testing.T) {
	knowSecretsOf(t, "http://user:abc@h/publish/docker?token=a&key=hidden")
	knowSecretsOf(t, "unix:///run/me:here@work/docker.sock")
	for text, want := range map[string]string{
		"abcdef, user":           "abcdef, user",
		"user:abc":               mask,
		"user:abcd dXNlcjphYmM=": mask + "d " + mask,
		"key=hidden":             "key=" + mask,
		"me:here":                "me:here",
	} {
		if got := fit(text, maxForeign); got != want {
			t.Errorf("%q is shown as %q, want %q", text, got, want)
		}
	}
	secrets = nil
	secrets.addFrom("http://backstop:hunter2hunter2@h/publish/docker")
	const path = "/var/lib/docker-stats-to-backstop, backstop:2, backstop"
	if got := fit(path, maxForeign); got != path {
		t.Errorf("the name of a user is hidden: %s", got)
	}
	secrets = nil
	secrets.addFrom("http://token@h/publish/docker")
	if got := fit("token dG9rZW46", maxForeign); got != mask+" "+mask {
		t.Errorf("a token is shown: %q", got)
	}
}

// A file that is named by mistake has a secret in it, most likely.
func TestFilesAreNotShown(t *testing.T) {
	t.Cleanup(func() { secrets = nil })
	for _, opt := range new(options).table() {
		for _, content := range []string{"hidden", "user:hidden", "http://user:hidden@h", "hidden:x",
			`{"hidden":1}`, `"hidden"`, `{"regexp":"hidden("}`, "core,hidden", "@hidden", "hidden://h",
			"[{hidden", "-1\nhidden\n", `{"regexp":"x","into":"hidden","from":"hidden"}`} {
			isAny := opt.name == "spool" || opt.name == "host" // those take any text
			if opt.variable() == "" || isAny && !strings.Contains(content, "://") {
				continue
			}
			path := filepath.Join(t.TempDir(), "file")
			harness.Must(t, os.WriteFile(path, []byte(content), 0o600))
			t.Setenv(opt.variable()+"_FILE", path)
			_, err := parseOptions(nil)
			isGood := opt.name == "docker" && strings.Contains(content, "://")
			if !isGood && (err == nil || strings.Contains(err.Error(), "hidden")) {
				t.Errorf("%s_FILE with %s: %v", opt.variable(), content, err)
			}
			os.Unsetenv(opt.variable() + "_FILE")
		}
	}
}

// Of what others send, a line of the log has 200 bytes, and is made at once.
func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	huge := strings.Repeat("\x00x", 1<<20)
	for place, answer := range repetitions {
		address := hostile(t, func(string) string { return fmt.Sprintf(answer, huge) })
		for _, args := range [][]string{{"--docker=http://" + address}, {"--docker=" +
			harness.NewReplay(t, "cgroup2").URL, "--backstop=http://" + address + "/publish/docker"}} {
			args = append(args, "--once", "--verbose")
			out, _ := exec.Command(program, args...).CombinedOutput()
			for line := range strings.Lines(string(out)) {
				if len(line) > maxShown {
					t.Errorf("%s makes a line of %d bytes: %.500s", place, len(line), line)
				}
			}
		}
	}
}

// A log that nobody reads, or whose reader has ended, holds up neither polls nor the end.
func TestTheLogHoldsUpNothing(t *testing.T) {
	if runtime.GOOS != "linux" {
		harness.Cannot(t, "other systems' pipes differ")
	}
	t.Parallel()
	reader, writer, err := os.Pipe()
	harness.Must(t, err)
	harness.Must(t, writer.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	if _, err := writer.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the pipe is not full: %v", err)
	}
	s := harness.NewStandIn(t)
	daemon := exec.Command(program, "--docker="+harness.NewReplay(t, "cgroup2").URL,
		"--backstop="+s.URL+"/publish/docker", "--poll=10ms", "--verbose")
	daemon.Stderr = writer
	harness.Must(t, daemon.Start())
	t.Cleanup(func() { daemon.Process.Kill() })
	writer.Close()
	awaitDeliveries(t, s)
	reader.Close()
	awaitDeliveries(t, s)
	interrupt(t, daemon)
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

// A systemd that reads nothing from its socket holds up neither polls nor the end.
func TestSystemdHoldsUpNothing(t *testing.T) {
	if runtime.GOOS != "linux" {
		harness.Cannot(t, "systemd is there on Linux only")
	}
	t.Parallel()
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenPacket("unixgram", path)
	harness.Must(t, err)
	defer socket.Close()
	full, err := net.Dial("unixgram", path)
	harness.Must(t, err)
	harness.Must(t, full.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	for err == nil {
		_, err = full.Write([]byte("STATUS=full"))
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the socket is not full: %v", err)
	}
	s := harness.NewStandIn(t)
	daemon := exec.Command(program, "--docker="+harness.NewReplay(t, "cgroup2").URL,
		"--backstop="+s.URL+"/publish/docker", "--poll=10ms")
	daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	harness.Must(t, daemon.Start())
	t.Cleanup(func() { daemon.Process.Kill() })
	awaitDeliveries(t, s)
	interrupt(t, daemon)
}

// The end waits for what is still to be written, but not for long.
func TestTheLogIsFlushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, takes := range []time.Duration{flushWithin / 10, time.Hour} {
			w, written := startLog(func([]byte) (int, error) { time.Sleep(takes); return 0, nil })
			for range 5 {
				fmt.Fprintln(w, "line")
				synctest.Wait()
			}
			start := time.Now()
			w.flush()
			if took := time.Since(start); took > flushWithin ||
				takes < flushWithin && strings.Count(written.String(), "line\n") != 5 {
				t.Errorf("lines that take %s: in %s\n%s", takes, took, written)
			}
			<-w.done
		}
	})
}

// A burst loses nothing. Where nobody takes the lines for long, some are missing, and the log says
// so, at the end as well.
func TestTheLogSaysWhatIsMissing(t *testing.T) {
	const missing = `level=WARN msg="lines are missing in the log, they could not be written" lines=`
	for lines, want := range map[int]string{
		maxUnread / 2: "last\n", 3 * maxUnread: missing + "2001\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			later := time.Now().Add(time.Minute)
			w, written := startLog(func([]byte) (int, error) {
				time.Sleep(time.Until(later))
				return 0, nil
			})
			fmt.Fprintln(w, "busy")
			synctest.Wait()
			for range lines {
				fmt.Fprintln(w, "line")
			}
			fmt.Fprintln(w, "last")
			time.Sleep(time.Until(later) - flushWithin/2)
			w.flush()
			got := written.String()
			if n := strings.Count(got, "line\n"); n != min(lines, maxUnread) ||
				!strings.Contains(got, want) {
				t.Errorf("%d lines: %d were written", lines, n)
			}
			<-w.done
		})
	}
}

// Where the disk of the log is full, the lines that it did not take are counted.
func TestTheLogCountsWhatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := true
		w, written := startLog(func([]byte) (n int, err error) {
			if full {
				err = syscall.ENOSPC
			}
			return 0, err
		})
		for range 2 * maxLines {
			fmt.Fprintln(w, "first")
			synctest.Wait()
		}
		full = false
		fmt.Fprintln(w, "last")
		w.flush()
		want := "last\n" + `level=WARN msg="lines are missing in the log, they could not be written" ` +
			"lines=400\n"
		if got := written.String(); got != want {
			t.Errorf("logged\n%s", got)
		}
	})
}

// startLog starts a log. write is called before something is written; with an error, only so much
// of that is.
func startLog(write func(text []byte) (int, error)) (*logWriter, *harness.Log) {
	written := &harness.Log{}
	w := newLogWriter(writerFunc(func(text []byte) (int, error) {
		n, err := write(text)
		if err == nil {
			n = len(text)
		}
		written.Write(text[:n])
		return n, err
	}))
	go w.run()
	return w, written
}

type writerFunc func(line []byte) (int, error)

func (f writerFunc) Write(line []byte) (int, error) { return f(line) }

// What net/http has to say is one line of the log, and only with --verbose.
func TestComplaintsOfNetHTTPAreLogged(t *testing.T) {
	var answers atomic.Int32
	address := hostile(t, func(string) string {
		answers.Add(1)
		return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 500 \r\n\r\n"
	})
	for _, level := range []string{"--verbose", "--verbose=false"} {
		daemon := exec.Command(program, "--docker=http://"+address, "--poll=100ms", level)
		log := &harness.Log{}
		daemon.Stderr = log
		harness.Must(t, daemon.Start())
		if level == "--verbose" {
			harness.AwaitText(t, log.String, `level=DEBUG msg="Unsolicited`, 2)
		} else {
			answers.Store(0)
			count := func() string { return strings.Repeat(".", int(answers.Load())) }
			harness.AwaitText(t, count, ".", 10)
		}
		harness.Must(t, daemon.Process.Kill())
		_ = daemon.Wait()
		for line := range strings.Lines(log.String()) {
			if !regexp.MustCompile(`^time=\S+ level=\w+ msg=`).MatchString(line) {
				t.Errorf("logged: %s", line)
			}
		}
	}
}

func TestTheSameTroubleIsTheSameText(t *testing.T) {
	asked := func(port int) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Name: "backstop.server",
			Err: fmt.Sprintf("read udp 10.0.0.2:%d->10.0.0.53:53: i/o timeout", port), IsTimeout: true,
			Server: "10.0.0.53:53"}}
	}
	overIPv6 := func(port int) error {
		return fmt.Errorf("readLoop: %w", &net.OpError{Op: "read", Net: "tcp", Err: errors.New("reset"),
			Source: &net.TCPAddr{IP: net.IPv6loopback, Port: port},
			Addr:   &net.TCPAddr{IP: net.IPv6loopback, Port: 2375}})
	}
	for _, test := range []struct {
		of   func(int) error
		want string
	}{
		{asked, "dial tcp: lookup backstop.server on 10.0.0.53:53: read udp 10.0.0.53:53: i/o timeout"},
		{overIPv6, "read tcp [::1]:2375: reset"},
	} {
		for _, port := range []int{40001, 40002} {
			if got := plainly(t.Context(), test.of(port)).Error(); got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
		}
	}
}

// Sweeps that are too slow, all or now and then, are one line of the log, and so is their end.
func TestSlowSweepsAreToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		log, sweeps := &harness.Log{}, 0
		poll(ctx, func() schedule { return schedule{every: time.Second} }, func(context.Context) {
			sweeps++
			switch {
			case sweeps == 2000:
				cancel()
			case sweeps < 1000 && sweeps%3 > 0:
				time.Sleep(2 * time.Second)
			}
		}, log.Logger())
		got := log.Take()
		if strings.Count(got, "\n") != 2 || !strings.Contains(got, "a poll took longer") ||
			!strings.Contains(got, `level=INFO msg="polls are in time again"`) {
			t.Errorf("logged:\n%s", got)
		}
	})
}

// Signs of life are given at what happens, and not more often than is of use: a sweep that hangs
// gives none.
func TestSystemdNoticesAHungSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var signs int
		q, _ := (&receiver{}).queue(t)
		s := &service{watchdog: 2 * time.Minute, queue: q.queue,
			send: func(state string) {
				if state == "WATCHDOG=1" {
					signs++
				}
			}}
		for range 10 * 60 { // answers, one a second
			s.alive()
			time.Sleep(time.Second)
		}
		if signs != 10*60/15 {
			t.Errorf("%d signs of life in 10 minutes", signs)
		}
		signs = 0
		// While sweeps go on, but a delivery hangs, there are none.
		q.put(points(0, 1))
		q.next(true)
		for range 20 * 60 {
			s.alive()
			time.Sleep(time.Second)
		}
		if signs > 5*60/15+1 {
			t.Errorf("%d signs of life in 20 minutes with a delivery that hangs", signs)
		}
	})
	// Each answer is one.
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, time.Minute)
	answers := 0
	c.alive = func() { answers++ }
	c.flow.limit = 1
	if result := c.sweep(t.Context()); answers != result.running || answers == 0 {
		t.Errorf("%d answers of %d containers", answers, result.running)
	}
}

// Without a socket of systemd there is no watchdog, whatever else is set.
func TestNoSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "nonsense")
	if service := newService(time.Second, nil); service.watchdog != 0 {
		t.Errorf("a watchdog of %s, where there is none", service.watchdog)
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

// Very many containers or files with the same trouble do not fill the log, nor hide another line.
func TestTheSameMessageIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		logger := newLogger(&out, slog.LevelDebug)
		for hour := range 2 {
			for i := range 3 * maxLines {
				logger.With("to", i%7).Error("container cannot be read", "container", i)
				logger.Debug("polled")
			}
			logger.Info("container can be read again")
			text := out.String()
			out.Reset()
			if strings.Count(text, `msg="container cannot be read"`) != maxLines ||
				strings.Count(text, "again") != 1 ||
				strings.Count(text, "polled") != 3*maxLines ||
				strings.Count(text, `more="left out for an hour"`) != 1 {
				t.Errorf("hour %d:\n%s", hour, text)
			}
			time.Sleep(time.Hour)
		}
	})
}

// What stands in a query without a name, or with odd separators, is a secret as well, and so are
// the credentials of a proxy.
func TestAllCredentialsAreKnown(t *testing.T) {
	t.Cleanup(func() { secrets = nil })
	t.Setenv("https_proxy", "http://user:proxyword@proxy:3128")
	for _, address := range []string{"http://h/publish/docker?hunter2token",
		"http://h/publish/docker?token=hunter2token;a=b",
		"http://h/publish/docker?token=hunter2%74oken",
		"http://h/publish/docker?token=hunter2token#x"} {
		secrets = nil
		if _, err := parseOptions([]string{"--backstop=" + address}); err != nil {
			t.Error(err)
		}
		for _, said := range []string{"bad token hunter2token", "user proxyword unknown",
			base64.StdEncoding.EncodeToString([]byte("user:proxyword"))} {
			if shown := firstLine(said); !strings.Contains(shown, mask) ||
				strings.Contains(shown, "hunter2token") || strings.Contains(shown, "proxyword") {
				t.Errorf("%s: %s", address, shown)
			}
		}
	}
	secrets = nil
	secrets.addFrom("http://h/publish/docker")
	if len(secrets) > 0 {
		t.Errorf("there are secrets without any: %v", secrets)
	}
}

// A disk that is slow when the time to stop is up still gets its two seconds.
func TestEndWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	log := &harness.Log{}
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, time.Second)
	q := newQueue(1<<20, log.Logger())
	harness.Must(t, q.useSpool(&spool{dir: newDir(t), log: log.Logger()}))
	polling, stop := context.WithCancel(t.Context())
	sending, abort := context.WithCancelCause(t.Context())
	q.works.Lock() // the disk hangs
	to := destination{name: "Backstop", remote: true}
	to.post = func(ctx context.Context, _ []byte) error {
		stop()
		abort(errors.New("time is up"))
		time.AfterFunc(storeWait/4, q.works.Unlock)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	p := &pipeline{collector: c, queue: q, delivery: newDelivery(to, q, log.Logger()),
		service: newService(time.Hour, q), log: log.Logger()}
	p.daemon(polling, sending, time.Hour)
	if got := log.String(); !regexp.MustCompile(`lost=0 kept=[1-9]`).MatchString(got) {
		t.Errorf("logged\n%s", got)
	}
}

// A page full of escapes costs little to search for secrets.
func BenchmarkFirstLine(b *testing.B) {
	secrets.addFrom("http://user:password@h/publish/docker")
	b.Cleanup(func() { secrets = nil })
	for name, page := range map[string]string{
		"html":    strings.Repeat("<p>Bad gateway, please try again</p> ", 500),
		"escapes": strings.Repeat(`%26amp;%2541\u0041+&#37;41`, 700),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				firstLine(page)
			}
		})
	}
}
