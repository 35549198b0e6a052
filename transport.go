package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Bounds of what others send.
const (
	maxHeader = 64 << 10 // of an answer, in bytes
	// Bounds of JSON. Each value takes memory, however short it is.
	maxNesting = 100
	maxEntries = 50_000   // of a list, or events
	fewValues  = 16 << 10 // an answer with more has to have perValue bytes for each of the others
	perValue   = 8        // real answers have 15 and more
)

// transport holds the connections to the engine or to Backstop. Whatever the other side sends, a
// call ends with its context, and costs little memory. Redirects are not followed.
type transport struct {
	*http.Transport
	most int64 // bytes of an answer's body; what is more is cut
}

// newTransport allows timeout for a connection, and a little more for TLS, so that a call that ends
// with its context always has the same error: a context ends neither of them.
func newTransport(timeout time.Duration) *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: timeout}).DialContext,
		TLSHandshakeTimeout:    timeout + time.Second,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true, // unpacked, an answer could be a thousand times as long
	}
}

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.Transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	body := resp.Body
	if resp.StatusCode == http.StatusSwitchingProtocols {
		body.Close() // it is the connection, and no context ends reading from it
		body = http.NoBody
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(body, t.most), body}
	return resp, nil
}

// lacksTLS reports whether err says that the other side does not speak TLS.
func lacksTLS(err error) bool {
	text := err.Error()
	return strings.Contains(text, "HTTP response to HTTPS client") ||
		strings.Contains(text, "does not look like a TLS handshake")
}

// isNoHTTP reports whether err says that the other side does not speak HTTP; most often it is TLS.
func isNoHTTP(err error) bool { return strings.Contains(err.Error(), "malformed HTTP response") }

// maxConnections returns how many connections to the engine there may be, so that the other files
// that the daemon needs can still be opened.
func maxConnections() int {
	const others = 16 // log, spool, Backstop, names of hosts and what Go needs
	return max(min(maxFiles()-others, maxInFlight), 1)
}

const (
	usualAnswer = 64 << 10 // bytes
	// maxLong is how many longer answers of the engine have their turn at the same time. Hundreds
	// that are as long as one may be would be a gigabyte. Of those that hang, up to four times as
	// many are held.
	maxLong = 24
)

// inTurn reads an answer. If it is long, it waits for its turn.
type inTurn struct {
	io.Reader
	ctx   context.Context
	turns chan struct{}
	most  time.Duration // how long a turn lasts: an answer may hang
	read  int
	end   func() // ends the turn; nil before it
}

func (a *inTurn) Read(p []byte) (n int, err error) {
	if a.read > usualAnswer && a.end == nil {
		select {
		case a.turns <- struct{}{}:
			end := sync.OnceFunc(func() { <-a.turns })
			late := time.AfterFunc(a.most, end)
			a.end = func() { late.Stop(); end() }
		case <-a.ctx.Done():
			return 0, a.ctx.Err()
		}
	}
	n, err = a.Reader.Read(p)
	a.read += n
	return n, err
}

func (a *inTurn) close() {
	if a.end != nil {
		a.end()
	}
}

// checkJSON returns why body is not to be decoded, though it may be JSON: a decoder's stack
// grows with its depth, and memory with its values. What is in strings, such as labels, does not
// count.
func checkJSON(body []byte) error {
	openers := bytes.Count(body, []byte("{")) + bytes.Count(body, []byte("["))
	if openers <= maxNesting && openers+bytes.Count(body, []byte(",")) <= fewValues {
		return nil // as the usual stats answer
	}
	depth, entries, values := 0, 0, 0
	var outermost byte
	for i := 0; i < len(body); i++ {
		switch body[i] {
		case '"':
			i = endOfString(body, i)
		case '[', '{':
			if depth == 0 {
				outermost = body[i]
				entries++ // an event: they follow each other
			}
			depth++
			values++
		case ']', '}':
			depth = max(depth-1, 0)
		case ',':
			values++
			if depth == 1 && outermost == '[' {
				entries++
			}
		}
		if depth > maxNesting {
			return errors.New("is nested too deep")
		}
	}
	switch {
	case entries > maxEntries:
		return fmt.Errorf("has over %d entries", maxEntries)
	case values > fewValues+len(body)/perValue:
		return errors.New("has too many values for its length")
	}
	return nil
}

// endOfString returns where the string ends that begins at i.
func endOfString(body []byte, i int) int {
	for i++; i < len(body) && body[i] != '"'; i++ {
		if body[i] == '\\' {
			i++
		}
	}
	return i
}
