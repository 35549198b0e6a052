package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const program = "docker-stats-to-backstop"

// What others say, fit for a log line or an error: one line, bounded, no secrets, and the same text
// for the same trouble.

// Bounds of what is shown, in bytes.
const (
	maxForeign = 200      // of a text of others
	maxShown   = 1 << 10  // of a text with such texts in it
	maxRead    = 64 << 10 // of what is read to find the above
)

// fit makes one line of text, of most bytes at most: without secrets and without what is not
// printable.
func fit(text string, most int) string {
	text = printable(text[:min(len(text), max(maxRead, most))])
	text = oneLine(secrets.hide(text))
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && !unicode.IsSpace(r) {
			return -1
		}
		return r
	}, text)
}

// firstLine returns the first line of text that is not blank, fit for a log.
func firstLine(text string) string {
	for line := range strings.Lines(text[:min(len(text), maxRead)]) {
		if line = fit(line, maxForeign); line != "" {
			return line
		}
	}
	return ""
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// errorText returns "" for nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return fit(err.Error(), maxShown)
}

// plainly returns why ctx ended, if it did. Else it returns err, of a connection, without what a
// reader does not know or need: net/http's URL, which is made up for a socket, and what net/http
// puts before an error, which differs from time to time.
func plainly(ctx context.Context, err error) error {
	var (
		inURL *url.Error
		op    *net.OpError
	)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &op):
		return &foreign{op}
	case errors.As(err, &inURL):
		return &foreign{inURL.Err}
	}
	return &foreign{err}
}

// foreign is an error of a connection, whose text is for others to choose.
type foreign struct{ error }

// passing matches what is new each time: our end of a connection, with its port, and the time at
// which a certificate is out of date. The log shows only trouble that is new.
var passing = regexp.MustCompile(`(\S+:\d+|@)->|current time \S+ `)

func (f *foreign) Error() string {
	return fit(passing.ReplaceAllString(fit(f.error.Error(), maxRead), ""), maxForeign)
}

func (f *foreign) Unwrap() error { return f.error }

const mask = "xxxxx"

// minSecret is the length of the shortest secret that is masked, in bytes: a password of three
// letters would mask a part of many words, and so show itself. With its user before it, or in
// Base64, it is longer.
const minSecret = 4

type secretTexts []string

// secrets are the credentials of --backstop and --docker, which the other side may repeat. They are
// set before anything is asked or logged.
var secrets secretTexts

// addFrom adds the credentials in an address. One that is no URL is refused, and not shown.
func (ss *secretTexts) addFrom(address string) {
	if !strings.Contains(address, "://") { // a proxy's may be so
		address = "http://" + address
	}
	u, err := url.Parse(address)
	if err != nil {
		return
	}
	if u.User != nil {
		password, isPassword := u.User.Password()
		ss.add(u.User.Username() + ":" + password) // so HTTP sends it
		if !isPassword {
			password = u.User.Username() // a token
		}
		ss.add(password)
	}
	isEnd := func(r rune) bool { return r == '&' || r == ';' }
	for _, pair := range strings.FieldsFunc(u.RawQuery, isEnd) {
		key, value, _ := strings.Cut(pair, "=")
		value = cmp.Or(value, key)
		ss.add(value)
		if plain, err := url.QueryUnescape(value); err == nil {
			ss.add(plain)
		}
	}
}

// add adds a secret, as it is and in Base64; the padded forms begin with these.
func (ss *secretTexts) add(secret string) {
	text := []byte(secret)
	for _, text := range []string{secret, base64.RawStdEncoding.EncodeToString(text),
		base64.RawURLEncoding.EncodeToString(text)} {
		if len(text) >= minSecret && !slices.Contains(*ss, text) {
			*ss = append(*ss, text)
		}
	}
}

// hide returns text, or a mask if a secret is in it, as it is or escaped.
func (ss secretTexts) hide(text string) string {
	plain := unescape(text)
	for _, secret := range ss {
		unescaped := unescape(secret) // for it may look like an escape
		if strings.Contains(text, secret) ||
			len(unescaped) >= minSecret && strings.Contains(plain, unescaped) {
			return mask
		}
	}
	return text
}

var escapes = regexp.MustCompile(
	`(%[0-9A-Fa-f]{2})+|\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)`)

// unescape returns text without the escapes of HTML, of URLs, and of Go and JSON, also where one is
// in another: net/http and net/url escape what others have escaped.
func unescape(text string) string {
	for range 4 {
		text = escapes.ReplaceAllStringFunc(html.UnescapeString(text), func(escape string) string {
			if escape[0] == '%' {
				plain, _ := url.PathUnescape(escape) // it always is one
				return plain
			}
			r, isRune, _, err := strconv.UnquoteChar(escape, 0)
			switch {
			case err != nil: // such as \/ and \"
				return escape[1:]
			case isRune:
				return string(r)
			}
			return string([]byte{byte(r)})
		})
	}
	return printable(text)
}

// jsonKind names what err found, in JSON's words.
func jsonKind(err *json.UnmarshalTypeError) string {
	switch word, _, _ := strings.Cut(err.Value, " "); word {
	case "array", "object":
		return "an " + word
	case "bool":
		return "true or false"
	default:
		return "a " + word
	}
}

// withoutUser returns u without the parts that may be secret.
func withoutUser(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// shown quotes user input, or hides it if it may hold a password.
func shown(text string) string {
	if strings.ContainsAny(text, "@") || strings.Contains(text, "://") {
		return "(not shown, as it may hold a password)"
	}
	return fmt.Sprintf("%q", text)
}

// maxText bounds a file with an option's value, in bytes.
const maxText = 1 << 20

// readText returns the content of a file that a user has named, without what editors put around
// it: blanks, line ends, a byte order mark. Its errors hide a path that may be a password: users
// mix up the file and its content.
func readText(path string) (string, error) {
	file, err := os.Open(path)
	if err == nil {
		defer file.Close()
		var body []byte
		if body, err = readAtMost(file, maxText, errors.New("longer than 1 MiB")); err == nil {
			return strings.TrimSpace(strings.TrimPrefix(string(body), "\ufeff")), nil
		}
	}
	if in := new(fs.PathError); errors.As(err, &in) {
		err = in.Err // the PathError repeats the path
	}
	return "", fmt.Errorf("%s: %w", shown(path), err)
}

// fileRemedy says what to do about a file that readText could not read: as a rule, usual.
func fileRemedy(err error, usual string) string {
	if errors.Is(err, fs.ErrPermission) && os.Getuid() >= 0 { // not on Windows
		return fmt.Sprintf("let this user (uid %d) read it", os.Getuid())
	}
	return usual
}

// readAtMost returns tooMuch if r has more than most bytes.
func readAtMost(r io.Reader, most int64, tooMuch error) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(body)) > most {
		err = tooMuch
	}
	return body, err
}

type noAnswer time.Duration

func (n noAnswer) Error() string { return fmt.Sprintf("no answer within %s", time.Duration(n)) }

// inUTC is a time, in Unix seconds, as the log has it.
func inUTC(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }
