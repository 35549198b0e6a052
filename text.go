package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	docker "github.com/fsouza/go-dockerclient"
)

const program = "docker-stats-to-backstop"

// What others say, fit for a log line or an error: one line, no secrets, and the same text for the
// same trouble.

// oneLine makes one line of text.
func oneLine(text string) string {
	return strings.Join(strings.Fields(text), " ")
}

// firstLine returns the first line of text that is not blank, at most 200 bytes of it, without
// control characters.
func firstLine(text string) string {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			line = strings.Map(func(r rune) rune {
				if r < ' ' || r == 0x7f {
					return -1
				}
				return r
			}, line)
			return strings.ToValidUTF8(line[:min(len(line), 200)], "")
		}
	}
	return ""
}

// errorText is err in one line, "" if it is nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return oneLine(err.Error())
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
	return stable(err)
}

// stable returns err without the port at our end. The port is new with each connection, but the
// log shows only trouble that is new.
func stable(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Source != nil {
		same := *op
		same.Source = nil
		return &same
	}
	return err
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
