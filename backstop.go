package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// postTimeout is how long one request to Backstop may take.
	postTimeout = 30 * time.Second
	// keepAlive is how long an idle connection is kept. Backstop's server closes one
	// after 20 s, and a request sent just then would be lost.
	keepAlive = 15 * time.Second
)

// backstop is the client of one Backstop URL.
// https://github.com/obfuscurity/backstop
type backstop struct {
	url       *url.URL // without the credentials
	auth      *url.Userinfo
	transport *http.Transport // and no http.Client, which would follow redirects: a POST would turn into a GET
	timeout   time.Duration   // for a request
}

// newBackstop prepares for posting to an http or https URL such as
// https://user:password@backstop.server/publish/docker. Its error never shows the URL,
// which may hold a password.
func newBackstop(text string) (*backstop, error) {
	u, err := url.Parse(text)
	const want = "want one such as https://user:password@backstop.server/publish/docker, or - for standard output"
	switch {
	case err != nil:
		return nil, fmt.Errorf("not a URL; %s; in user and password, write %%40 for @, %%2F for /, %%25 for %% and so on", want)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("not an http:// or https:// URL; " + want)
	case strings.Contains(u.Path, "@"):
		return nil, errors.New("there is an @ in the path of the URL; in user and password, write %2F for /; " + want)
	case u.Hostname() == "":
		return nil, errors.New("no host in the URL; " + want)
	case strings.Trim(u.Path, "/") == "":
		return nil, errors.New("no path in the URL; Backstop takes metrics at /publish/PREFIX, where PREFIX is one of its PREFIXES; " + want)
	}
	b := &backstop{url: u, auth: u.User, transport: http.DefaultTransport.(*http.Transport).Clone(), timeout: postTimeout}
	u.User, u.Fragment, u.RawFragment = nil, "", ""
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), strings.TrimRight(u.RawPath, "/") // Backstop answers 404 to a trailing slash
	b.transport.IdleConnTimeout = keepAlive
	b.transport.TLSHandshakeTimeout = postTimeout
	return b, nil
}

// String is the URL as it may be shown: without credentials and without its query, which
// may hold others.
func (b *backstop) String() string {
	return withoutUser(b.url)
}

// passwordTrouble says why Backstop will not take the password, "" if it will, or if there
// is none to take. Backstop compares what it got with the user:password pairs in its
// BACKSTOP_AUTH, which are separated by commas.
func (b *backstop) passwordTrouble() string {
	if b.auth == nil {
		return ""
	}
	password, _ := b.auth.Password()
	switch {
	case password == "":
		return "the password for Backstop is empty, and it answers 401 to that"
	case strings.ContainsAny(b.auth.Username()+password, ":,"):
		return "the user or the password for Backstop has a colon or a comma in it, and it answers 401 to that"
	}
	return ""
}

// post sends one request with a body from encode. It returns nil only when Backstop said
// that it has taken it (2xx), *refusal when it said anything else, and other errors when it
// could not be asked.
func (b *backstop) post(ctx context.Context, body []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, b.timeout, noAnswer(b.timeout))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url.String(), bytes.NewReader(body))
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
		return plainly(ctx, err)
	}
	defer resp.Body.Close()
	// An error page can have 140 KB, of which one line is wanted. The rest is read, up to
	// a bound, because only then the connection can be used again.
	start, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	io.CopyN(io.Discard, resp.Body, 256<<10)
	if resp.StatusCode/100 == 2 {
		return nil
	}
	return &refusal{
		status: resp.StatusCode,
		line:   firstLine(b.withoutSecrets(string(start))),
		hint:   hint(resp),
	}
}

// withoutSecrets masks the credentials in an answer that repeats them.
func (b *backstop) withoutSecrets(text string) string {
	if b.auth == nil {
		return text
	}
	password, _ := b.auth.Password()
	token := base64.StdEncoding.EncodeToString([]byte(b.auth.Username() + ":" + password))
	for _, secret := range []string{token, password} {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "xxxxx")
		}
	}
	return text
}

// refusal is an answer of Backstop, or of what stands before it, other than 2xx.
type refusal struct {
	status int
	line   string // the first of the answer
	hint   string // what to do, if that is known
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

// isFinal tells whether the same metrics would be refused for ever. The other refusals are
// for whoever runs Backstop to mend, or pass.
func (r *refusal) isFinal() bool {
	switch r.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusRequestTimeout,
		http.StatusProxyAuthRequired, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	}
	return r.status/100 == 4
}

// hint says what to do about an answer.
func hint(resp *http.Response) string {
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		return "check user and password in --backstop against BACKSTOP_AUTH, which Backstop was started with"
	case http.StatusForbidden:
		return "Backstop in development mode, its default, refuses host names it does not know: start it with RACK_ENV=production"
	case http.StatusNotFound:
		return "the path in --backstop has to be /publish/ and one of the PREFIXES that Backstop was started with"
	}
	if resp.StatusCode/100 == 3 {
		if to, err := resp.Location(); err == nil {
			return "set --backstop to the address that it redirects to: " + withoutUser(to)
		}
	}
	return ""
}

// printer is what stands in for Backstop with --backstop=-: it writes metrics to w as lines
// of Carbon's plaintext protocol.
func printer(w io.Writer) destination {
	return destination{
		encode: func(metrics []metric) []byte {
			var lines []byte
			for _, m := range metrics {
				lines = m.appendLine(lines)
			}
			return lines
		},
		post: func(_ context.Context, lines []byte) error {
			_, err := w.Write(lines)
			return err
		},
	}
}
