package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
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

	docker "github.com/fsouza/go-dockerclient"
)

const program = "docker-stats-to-backstop"

// What others say, fit for a log line or an error: one line, bounded, no secrets, and the same text
// for the same trouble.

// Bounds of what is shown, in bytes.
const (
	maxForeign = 200     // of a text of others
	maxShown   = 1 << 10 // of a text with such texts in it
	maxRead    = 2 << 10 // of what is read to find the above
)

// fit makes one line of text, of most bytes at most: without secrets and without what is not
// printable.
func fit(text string, most int) string {
	var b strings.Builder
	blank := false
	for _, r := range secrets.hide(text, max(maxRead, most)) {
		switch {
		case b.Len() >= most:
			return cutTo(b.String(), most)
		case unicode.IsSpace(r):
			blank = b.Len() > 0
		case !isJunk(r):
			if blank {
				b.WriteByte(' ')
			}
			b.WriteRune(r)
			blank = false
		}
	}
	return cutTo(b.String(), most)
}

// cutTo returns the first bytes of text, but no part of a rune.
func cutTo(text string, most int) string {
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

// isJunk reports whether a rune can be left out.
func isJunk(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }

// firstLine returns the first line of text that is not blank, fit for a log.
func firstLine(text string) string {
	for line := range strings.Lines(secrets.hide(text, maxRead)) {
		if line = fit(line, maxForeign); line != "" {
			return line
		}
	}
	return ""
}

// oneLine makes one line of text.
func oneLine(text string) string {
	return strings.Join(strings.Fields(text), " ")
}

// errorText is err in one line that is fit for a log, "" if it is nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return fit(err.Error(), maxShown)
}

// plainly returns why ctx ended, if it did. Else it returns err without what a reader does not
// know or need: pages of HTML, and net/http's URL, which is made up for a socket.
func plainly(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var status *docker.Error
	if errors.As(err, &status) { // a proxy's can be a whole page
		return &docker.Error{Status: status.Status, Message: firstLine(status.Message)}
	}
	var inURL *url.Error
	if errors.As(err, &inURL) {
		err = inURL.Err
	}
	var op *net.OpError
	if errors.As(err, &op) {
		err = op // what net/http puts before it differs from time to time
	}
	return &foreign{err, theirs(err)}
}

// foreign is an error of others with a text that is fit for a log.
type foreign struct {
	error
	text string
}

func (f *foreign) Error() string { return f.text }

func (f *foreign) Unwrap() error { return f.error }

// ourPort matches our end of a connection. Its port is new with each connection, but the log shows
// only trouble that is new.
var ourPort = regexp.MustCompile(`(\S+:\d+|@)->`)

// theirs returns the text of an error of others, fit for a log.
func theirs(err error) string {
	return fit(ourPort.ReplaceAllString(fit(err.Error(), maxRead), ""), maxForeign)
}

// mask stands for a secret.
const mask = "xxxxx"

// minSecret is the length of the shortest secret that is masked, in bytes: a password of three
// letters would mask a part of many words, and so show itself. With its user before it, or in
// Base64, it is longer.
const minSecret = 4

// telling is how many bytes of a longer secret are as good as the whole.
const telling = 8

// minToken is the length of the shortest name without a value, in a query, that counts as a secret.
const minToken = 12

// secretTexts are texts that fit hides, however they are spelled.
type secretTexts []secretText

type secretText struct {
	text string
	open int // the first bytes that are no secret: a user's name may be in other words
}

// secrets are the credentials of --backstop and --docker, which the other side may repeat. They are
// set before anything is asked or logged.
var secrets secretTexts

// addFrom adds the credentials in an address, in each form that is sent.
func (ss *secretTexts) addFrom(address string) {
	if strings.HasPrefix(address, "unix:") || strings.HasPrefix(address, "npipe:") {
		return // a path may have an @
	}
	address, query, _ := strings.Cut(address, "?")
	query, _, _ = strings.Cut(query, "#")
	for _, pair := range slices.Concat(strings.Split(query, "&"),
		strings.FieldsFunc(query, func(r rune) bool { return r == '&' || r == ';' })) {
		key, value, _ := strings.Cut(pair, "=")
		if value == "" && len(key) >= minToken {
			value = key // a token
		}
		ss.add(value, 0)
		if plain, err := url.QueryUnescape(value); err == nil {
			ss.add(plain, 0)
		}
	}
	if _, rest, found := strings.Cut(address, "//"); found {
		address = rest
	}
	at := strings.LastIndex(address, "@")
	if at < 0 {
		return
	}
	raw := address[:at]
	plain, err := url.PathUnescape(raw)
	if err != nil {
		plain = raw
	}
	for _, user := range []string{raw, plain} {
		name, password, found := strings.Cut(user, ":")
		open := len(name) + 1
		if !found {
			password, user, open = name, user+":", 0 // a token; with the colon it is sent
		}
		ss.add(user, open)
		ss.add(password, 0)
		for _, text := range []string{user, password} {
			for _, coding := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding,
				base64.URLEncoding, base64.RawURLEncoding} {
				ss.add(coding.EncodeToString([]byte(text)), 0)
			}
		}
	}
}

func (ss *secretTexts) add(text string, open int) {
	if s := (secretText{text, open}); len(text) >= minSecret && !slices.Contains(*ss, s) {
		*ss = append(*ss, s)
	}
}

// hide returns text, or its first bytes, with a mask for each secret, also where it is escaped, and
// where only its start is there because somebody has cut the text.
func (ss secretTexts) hide(text string, most int) string {
	isCut := len(text) >= maxForeign // most likely
	text = text[:min(len(text), most)]
	hidden := make([]bool, len(text)) // by byte
	layers, seen := []layer{newLayer(text)}, map[string]bool{text: true}
	for i := 0; i < min(len(layers), maxLayers) && len(ss) > 0; i++ {
		l := layers[i]
		for _, secret := range ss {
			l.mark(secret, isCut, hidden)
		}
		if l.depth == maxDepth {
			continue
		}
		for _, kind := range escapes {
			if !strings.ContainsFunc(l.text, kind.isStart) {
				continue
			}
			if below := l.unescape(kind.read); !seen[below.text] {
				seen[below.text] = true
				layers = append(layers, below)
			}
		}
	}
	if !slices.Contains(hidden, true) {
		return text
	}
	var b strings.Builder
	for i := range hidden {
		if !hidden[i] {
			b.WriteByte(text[i])
		} else if i == 0 || !hidden[i-1] {
			b.WriteString(mask)
		}
	}
	return b.String()
}

const (
	// maxDepth is how many times a text can be escaped for hide to see what is in it.
	maxDepth = 3
	// maxLayers bounds the time for a text with escapes of all kinds.
	maxLayers = 40
)

// layer is a text without some of its escapes.
type layer struct {
	text  string
	at    []int // where each byte begins in the text with all escapes, and where the last one ends
	depth int   // how often it was unescaped
}

func newLayer(text string) layer {
	l := layer{text: text, at: make([]int, len(text)+1)}
	for i := range l.at {
		l.at[i] = i
	}
	return l
}

// unescape returns l without the escapes that read finds. It returns what one at the start of a
// text means, and its size, 0 if there is none.
func (l layer) unescape(read func(text string) (meaning string, size int)) layer {
	var b strings.Builder
	below := layer{depth: l.depth + 1}
	for i := 0; i < len(l.text); {
		meaning, size := read(l.text[i:])
		if size == 0 {
			meaning, size = l.text[i:i+1], 1
		}
		b.WriteString(meaning)
		for range len(meaning) {
			below.at = append(below.at, l.at[i])
		}
		i += size
	}
	below.text, below.at = b.String(), append(below.at, l.at[len(l.text)])
	return below
}

// wasCut matches what can follow a start of a secret where a text was cut: a part of an escape, and
// dots.
var wasCut = regexp.MustCompile(`^([\\%&]+[#0-9A-Za-z]{0,10})?(\.\.\.|…|$)`)

// mark marks where secret is in l, as far as it is there.
func (l layer) mark(s secretText, isCut bool, hidden []bool) {
	secret := s.text
	for from := 0; ; {
		i := strings.Index(l.text[from:], secret[:minSecret])
		if i < 0 {
			return
		}
		from += i + 1
		n := minSecret
		for rest := l.text[from-1:]; n < len(secret) && n < len(rest) && rest[n] == secret[n]; {
			n++
		}
		end := from - 1 + n
		if n < len(secret) {
			least := telling
			if tail := wasCut.FindStringSubmatch(l.text[end:]); tail != nil {
				end += len(tail[0])
				if isCut || tail[2] != "" { // dots
					least = minSecret
				}
			}
			if s.open > 0 { // with the user before it, less is enough
				least = s.open + minSecret
			}
			if n < least {
				continue
			}
		}
		for at := l.at[from-1]; at < l.at[end]; at++ {
			hidden[at] = true
		}
	}
}

// numericReference matches a character of HTML by its number. Its end may be missing.
var numericReference = regexp.MustCompile(`^&#([0-9]{1,60}|[xX][0-9A-Fa-f]{1,60});?`)

// escapes are those of a URL, a query, HTML, and of Go or JSON, and what is not printable. read
// reads one at the start of a text.
var escapes = []struct {
	isStart func(r rune) bool
	read    func(text string) (meaning string, size int)
}{
	{is('%'), func(text string) (string, int) {
		if len(text) < 3 || text[0] != '%' {
			return "", 0
		}
		b, err := hex.DecodeString(text[1:3])
		if err != nil {
			return "", 0
		}
		return string(b), 3
	}},
	{is('+'), func(text string) (string, int) {
		if text[0] != '+' {
			return "", 0
		}
		return " ", 1
	}},
	{is('&'), func(text string) (string, int) {
		if text[0] != '&' {
			return "", 0
		}
		size := len(numericReference.FindString(text[:min(len(text), 64)]))
		if size == 0 {
			size = strings.IndexByte(text[:min(len(text), 12)], ';') + 1
		}
		return html.UnescapeString(text[:size]), size
	}},
	{is('\\'), func(text string) (string, int) {
		if len(text) < 2 || text[0] != '\\' {
			return "", 0
		}
		if strings.IndexByte(`"'/`, text[1]) >= 0 {
			return text[1:2], 2
		}
		start := text[:min(len(text), 10)]
		r, isRune, rest, err := strconv.UnquoteChar(start, 0)
		switch {
		case err != nil:
			return "", 0
		case isRune:
			return string(r), len(start) - len(rest)
		}
		return string([]byte{byte(r)}), len(start) - len(rest)
	}},
	{isJunk, func(text string) (string, int) {
		r, size := utf8.DecodeRuneInString(text)
		if isJunk(r) {
			return "", size
		}
		return text[:size], size
	}},
}

// is returns a function that reports whether a rune is r.
func is(r rune) func(rune) bool { return func(other rune) bool { return other == r } }

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

// readAtMost returns all of r, or tooMuch if that is more than most bytes.
func readAtMost(r io.Reader, most int64, tooMuch error) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(body)) > most {
		err = tooMuch
	}
	return body, err
}

// kindOf is the name of the type of a JSON value.
func kindOf(value []byte) string {
	switch value[0] {
	case '{':
		return "object"
	case '[':
		return "array"
	case '"':
		return "string"
	case 't', 'f':
		return "boolean"
	case 'n':
		return "null"
	}
	return "number"
}

// noAnswer is the error of a call that timed out.
type noAnswer time.Duration

func (n noAnswer) Error() string { return fmt.Sprintf("no answer within %s", time.Duration(n)) }

// inUTC is a time, in Unix seconds, as the log has it.
func inUTC(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }
