package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"log/slog"
	"net"
	"net/url"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// The same trouble has the same text, whatever port it met, so that it is logged once.
func TestTheSameTroubleIsTheSameText(t *testing.T) {
	reset := func(port int) error {
		return &url.Error{Op: "Get", URL: "http://engine/_ping",
			Err: fmt.Errorf("readLoop: %w", &net.OpError{
				Op: "read", Net: "tcp", Err: errors.New("connection reset by peer"),
				Source: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1),
					Port: port}, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2375},
			})}
	}
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
		{reset, "read tcp 127.0.0.1:2375: connection reset by peer"},
		{asked, "dial tcp: lookup backstop.server on 10.0.0.53:53: read udp 10.0.0.53:53: i/o timeout"},
		{overIPv6, "read tcp [::1]:2375: reset"},
	} {
		for _, port := range []int{40001, 40002} {
			if got := plainly(t.Context(), test.of(port)).Error(); got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
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
		"URL, each byte":            each("%%%02X"),
		"URL, each byte, lowercase": each("%%%02x"),
		"HTML":                      html.EscapeString(text),
		"HTML, each rune":           eachRune("&#%d;"),
		"HTML, in hex":              eachRune("&#X%x;"),
		"HTML, without ends":        eachRune("&#%d"),
		"HTML, with zeros":          eachRune("&#%020d;"),
		"Go":                        strings.Trim(strconv.Quote(text), `"`),
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
				d := newDelivery(b.destination(), newQueue(1<<20, logger), func() {}, logger)
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
			if isAsked && !strings.Contains(string(out), mask) {
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
		"abcdef, user":              "abcdef, user",
		"user:abc":                  mask,
		"an answer of dXNlcjphYmM=": mask,
		"key=hidden":                mask,
		"me:here":                   "me:here",
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
	if got := fit("token dG9rZW46", maxForeign); got != mask {
		t.Errorf("a token is shown: %q", got)
	}
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
