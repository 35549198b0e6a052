package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// postTimeout is how long one request to Backstop may take.
	postTimeout = 30 * time.Second
	// What goes to Carbon at once. A relay takes this much without dropping lines.
	carbonLines = 1_000
	carbonBytes = 64 << 10
)

// destination is where metrics are delivered to.
type destination struct {
	name    string // for the log
	address string // for the log, without secrets
	remote  bool   // whether it may be out of reach, so that a spool is of use

	// post delivers a body from encode.
	post func(ctx context.Context, body []byte) error
	// confirm is nil if a post without an error is delivered. Else it is called, after the time of
	// proof, for all posts since the last call: with an error they have to be posted again.
	confirm func() error
	proof   time.Duration
	// idle is called when there is nothing to post: the end of a connection would wake up the
	// process later. It may be nil.
	idle func()
}

// backstop is the client of one Backstop URL.
// https://github.com/obfuscurity/backstop
type backstop struct {
	url       *url.URL // without the credentials
	auth      *url.Userinfo
	transport transport     // a http.Client would follow redirects, and turn a POST into a GET
	timeout   time.Duration // for a request
	asked     time.Time     // when a request last succeeded, or a lead was last sent
	// leadAfter is for how long we trust Backstop's connection to Carbon: Carbon is not restarted
	// in less. After it, a lead goes ahead.
	leadAfter time.Duration
	// leadPause is longer than the round trip between Backstop and Carbon: by then Backstop knows
	// that the connection is dead.
	leadPause time.Duration
}

// newBackstop prepares for posting to an http or https URL such as
// https://user:password@backstop.server/publish/docker. Its error never shows the URL,
// which may hold a password.
func newBackstop(text string) (*backstop, error) {
	u, err := url.Parse(text)
	const want = "write one such as https://user:password@backstop.server/publish/docker, " +
		"carbon://carbon.server:2003/docker, or - for standard output"
	switch {
	case err != nil:
		return nil, errors.New("not a URL; " + want +
			"; in user and password, write %40 for @, %2F for /, %25 for % and so on")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("not an http://, https:// or carbon:// URL; " + want)
	case strings.Contains(u.Path, "@"):
		return nil, errors.New("there is an @ in the path of the URL; " +
			"in user and password, write %2F for /; " + want)
	case u.Hostname() == "":
		return nil, errors.New("no host in the URL; " + want)
	case u.Port() == "2003" || u.Port() == "2013":
		return nil, errors.New("that is Carbon's port: should the URL begin with " +
			strings.Replace(u.Scheme, "http", "carbon", 1) + "://?")
	case strings.Trim(u.Path, "/") == "":
		return nil, errors.New("no path in the URL; Backstop takes metrics at /publish/PREFIX, " +
			"where PREFIX is one of its PREFIXES; " + want)
	}
	// An error page can have 140 KB, of which one line is used.
	b := &backstop{url: u, auth: u.User, transport: transport{newTransport(postTimeout), 256 << 10},
		timeout: postTimeout, leadAfter: time.Second, leadPause: 50 * time.Millisecond}
	u.User, u.Fragment, u.RawFragment = nil, "", ""
	// Backstop answers 404 to a trailing slash.
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), strings.TrimRight(u.RawPath, "/")
	// Backstop's server closes one after 20 s, and a request sent just then would be lost.
	b.transport.IdleConnTimeout = 15 * time.Second
	return b, nil
}

func (b *backstop) destination() destination {
	return destination{name: "Backstop", address: withoutUser(b.url), remote: true,
		post: b.post, idle: b.transport.CloseIdleConnections}
}

// post delivers a body from encode. It returns nil only when Backstop said that it has taken it
// (2xx), *refusal when it said anything else, and other errors when it could not be asked.
//
// Backstop's word is not enough after a pause: it keeps one connection to Carbon. When Carbon was
// restarted meanwhile, Backstop answers 200 and loses what it writes, up to the whole body, until
// it notices the end of that connection. So after a pause the body's last metric goes ahead, twice:
// the first finds the connection dead, the second makes Backstop open another. The body has that
// metric as well, so nothing is lost with the two.
func (b *backstop) post(ctx context.Context, body []byte) error {
	if time.Since(b.asked) > b.leadAfter {
		for range 2 {
			// What is wrong with the metric is found out with the body.
			if err := b.insist(ctx, lastOf(body)); err != nil && !isToHalve(err) {
				return err
			}
			time.Sleep(b.leadPause)
		}
		b.asked = time.Now()
	}
	return b.insist(ctx, body)
}

// insist sends a request and, if a server error answers it, the same again, up to twice. If one of
// several Backstops behind a balancer is broken, the next one gets it. Waiting first, or beginning
// with the lead again, could meet the same broken one each time.
func (b *backstop) insist(ctx context.Context, body []byte) error {
	for tries := 1; ; tries++ {
		err := b.request(ctx, body)
		var r *refusal
		if !errors.As(err, &r) || r.status/100 != 5 || r.retryAfter > 0 || tries == 3 {
			return err
		}
		time.Sleep(b.leadPause)
	}
}

// request sends one request, as post does, but for the lead.
func (b *backstop) request(ctx context.Context, body []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, b.timeout, noAnswer(b.timeout))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url.String(),
		bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", program)
	if b.auth != nil {
		password, _ := b.auth.Password()
		req.SetBasicAuth(b.auth.Username(), password)
	}
	resp, err := b.transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%w%s", plainly(ctx, err), receiverHint(err, b.url.Scheme))
	}
	defer resp.Body.Close()
	// All of it is read, up to a bound, because only then the connection can be used again.
	defer time.AfterFunc(time.Second, cancel).Stop()
	start, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	io.Copy(io.Discard, resp.Body)
	if resp.StatusCode/100 == 2 {
		b.asked = time.Now()
		return nil
	}
	line := firstLine(string(start))
	return &refusal{
		status:     resp.StatusCode,
		line:       line,
		hint:       hint(resp, line),
		retryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now()),
	}
}

// refusal is an answer of Backstop, or of what stands before it, other than 2xx.
type refusal struct {
	status int
	line   string // the first of the answer
	hint   string // what to do, if that is known

	retryAfter time.Duration // what it asks for, 0 for nothing
}

func (r *refusal) Error() string {
	text := fmt.Sprintf("answer %d %s", r.status, http.StatusText(r.status))
	if r.line != "" && r.line != http.StatusText(r.status) {
		text += ": " + r.line
	}
	if r.hint != "" {
		text += "; " + r.hint
	}
	return text
}

// isTemporary reports whether the same request may be accepted later.
func (r *refusal) isTemporary() bool {
	return r.status/100 == 5 || hasStatus(r, http.StatusRequestTimeout, http.StatusTooEarly,
		http.StatusTooManyRequests)
}

// isToHalve reports whether a part of a request is to blame for err, or its size.
func isToHalve(err error) bool {
	return hasStatus(err, http.StatusBadRequest, http.StatusRequestEntityTooLarge,
		http.StatusUnprocessableEntity)
}

// hasStatus reports whether err is an answer with one of these statuses.
func hasStatus(err error, statuses ...int) bool {
	var r *refusal
	return errors.As(err, &r) && slices.Contains(statuses, r.status)
}

// failing says what a receiver does that fails with err, and what becomes of metrics.
func failing(err error) string {
	var r *refusal
	switch {
	case errors.As(err, &r) && !r.isTemporary():
		return "refuses metrics, keeping them until this is fixed"
	case r != nil:
		return "fails, keeping metrics"
	}
	return "unreachable, keeping metrics"
}

// pauses are the waits between failures: exponential, with jitter.
type pauses struct {
	first, longest time.Duration
	last           time.Duration // but for the jitter; zero: the next one is the first
}

func (p *pauses) reset() { p.last = 0 }

// after returns how long to wait after a failure: the longest if somebody has to fix something.
func (p *pauses) after(err error) time.Duration {
	var r *refusal
	if errors.As(err, &r) && !r.isTemporary() && !isToHalve(err) {
		return p.longest
	}
	p.last = max(p.first, min(2*p.last, p.longest))
	pause := p.last/2 + rand.N(p.last)
	if r != nil && r.retryAfter > 0 { // not everybody at once then
		pause = max(pause, r.retryAfter+rand.N(p.first))
	}
	return pause
}

// retryAfter reads a header of that name, seconds or a date, 0 if it is neither:
// https://www.rfc-editor.org/rfc/rfc9110#field.retry-after.
func retryAfter(text string, now time.Time) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseUint(text, 10, 32); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(text); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), time.Hour)
}

// hints say what to do about an answer.
var hints = map[int]string{
	http.StatusUnauthorized: "check user and password in --backstop against BACKSTOP_AUTH, " +
		"which Backstop was started with; they cannot have a colon or a comma in them, or be empty",
	http.StatusForbidden: "Backstop in development mode, its default, refuses host names it does " +
		"not know: start it with RACK_ENV=production",
	http.StatusNotFound: "the path in --backstop must be /publish/ and one of the PREFIXES " +
		"that Backstop was started with",
}

// hint says what to do about an answer with that line.
func hint(resp *http.Response, line string) string {
	switch {
	case resp.StatusCode == http.StatusBadRequest &&
		line != "missing fields" && line != "JSON is required":
		return "this is not Backstop's answer: " +
			"check what is at the address in --backstop, and whether it needs https://"
	case resp.StatusCode/100 == 3:
		if to, err := resp.Location(); err == nil {
			return "set --backstop to the address that it redirects to: " +
				fit(withoutUser(to), maxForeign)
		}
	}
	return hints[resp.StatusCode]
}

// What is wrong with a receiver that most likely is none.
var (
	errAnswers = errors.New("it answers, which Carbon's plaintext protocol never does: " +
		"check host and port")
	// errEnds is for a connection with metrics that ends early while the witness does not.
	errEnds = errors.New("it closed the connection before the end of the metrics: " +
		"check that the port is that of Carbon's plaintext protocol")
	errNoTLS = errors.New("it does not answer the TLS handshake")
)

func isNoCarbon(err error) bool { return errors.Is(err, errAnswers) || errors.Is(err, errEnds) }

// receiverHint returns what to do about a receiver that cannot be reached, after "; ", or nothing.
// The scheme is that of --backstop.
func receiverHint(err error, scheme string) string {
	var (
		op    *net.OpError
		name  *net.DNSError
		cause x509.CertificateInvalidError
	)
	plain := strings.TrimSuffix(scheme, "s")
	switch {
	case errors.As(err, &op) && op.Op == "proxyconnect":
		return "; that is the proxy in HTTPS_PROXY or HTTP_PROXY"
	case errors.As(err, &name) && name.IsNotFound:
		return "; check the name of the host in --backstop"
	case name == nil && strings.Contains(err.Error(), "refused"): // Windows has an error of its own
		return "; is it running, and is --backstop its address?"
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return "; add the certificate of that authority to this system's, " +
			"or name its file in SSL_CERT_FILE"
	case errors.As(err, new(x509.HostnameError)):
		return "; the host in --backstop must be a name that the certificate has"
	case errors.As(err, &cause) && cause.Reason == x509.Expired:
		return "; renew the certificate, or set this host's clock"
	case errors.Is(err, errNoTLS):
		return "; is there TLS at that address? If not, --backstop begins with " + plain + "://"
	case lacksTLS(err):
		return "; there is no TLS at that address: should --backstop begin with " + plain + "://?"
	case isNoHTTP(err), scheme == "carbon" && isNoCarbon(err):
		return "; is this TLS? Then --backstop begins with " + plain + "s://"
	}
	return ""
}

// isTooSlow reports whether err is that of a request that was not through in its time.
func isTooSlow(err error) bool {
	var late noAnswer
	return errors.As(err, &late)
}

// inLines returns the metrics of a body as lines with that prefix, in portions for one connection.
func inLines(body []byte, prefix string) (portions [][]byte, err error) {
	metrics, err := decode(body)
	var lines, line []byte
	n := 0
	for _, m := range metrics {
		line = m.appendLine(append(line[:0], prefix...))
		if n == carbonLines || n > 0 && len(lines)+len(line) > carbonBytes {
			portions = append(portions, lines)
			lines, n = nil, 0
		}
		lines, n = append(lines, line...), n+1
	}
	return append(portions, lines), err
}

// printer is what stands in for Backstop with --backstop=-: it writes metrics to w as lines of
// Carbon's plaintext protocol.
func printer(w io.Writer) destination {
	const name = "standard output"
	return destination{name: name, address: name, post: func(_ context.Context, body []byte) error {
		portions, err := inLines(body, "")
		if err != nil {
			return err
		}
		_, err = w.Write(bytes.Join(portions, nil))
		return err
	}}
}
