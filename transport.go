package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 64 << 10
	// maxEntries bounds a list, in containers or events: one of 32 MiB could have 10 million.
	maxEntries = 50_000
	// linger is how long an answer that is whole may take to end, so that its connection can be used
	// again.
	linger = 250 * time.Millisecond
)

// transport holds the connections to the engine or to Backstop. Whatever the other side sends, a
// call ends with its context, and costs little memory. Redirects are not followed.
type transport struct {
	*http.Transport
	most int64 // bytes of an answer's body: reading more is a *http.MaxBytesError
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
	if resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body.Close() // it is the connection, and no context ends reading from it
		resp.Body = http.NoBody
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, t.most)
	return resp, nil
}

// answer is JSON as it comes: a value or, if isStream, values one after the other. Some engines and
// proxies keep the connection open after what was asked for. So an answer is over when it has ended
// or, if it is whole, after linger.
type answer struct {
	text     []byte
	isStream bool
	isOpen   bool // whether it was whole, but had not ended

	whole    int // bytes up to the end of the last whole value
	depth    int // of objects and arrays
	inString bool
	escaped  bool
	entries  int // of the outermost array or object, or of the stream
}

// read reads the answer from r. cancel ends a Read.
func (a *answer) read(r io.Reader, cancel context.CancelFunc) error {
	var late *time.Timer
	for {
		if late == nil && (a.isStream || a.whole > 0) {
			late = time.AfterFunc(linger, cancel)
			defer late.Stop()
		}
		if cap(a.text)-len(a.text) < 512 {
			a.text = slices.Grow(a.text, max(8<<10, len(a.text))) // most have less
		}
		n, err := r.Read(a.text[len(a.text):cap(a.text)])
		a.scan(n)
		if a.isStream && n > 0 {
			late.Reset(linger)
		}
		var long *http.MaxBytesError
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case a.entries > maxEntries:
			return fmt.Errorf("the answer has over %d entries", maxEntries)
		case errors.As(err, &long) && (a.isStream || a.whole == 0):
			return fmt.Errorf("the answer has over %d MiB", long.Limit>>20)
		case err != nil && late != nil:
			a.text, a.isOpen = a.text[:a.whole], true
			return nil
		case err != nil:
			return fmt.Errorf("the answer broke off: %w", err)
		}
	}
}

// scan looks at n bytes more. What follows a value that was asked for is left out.
func (a *answer) scan(n int) {
	start := len(a.text)
	if !a.isStream && a.whole > 0 {
		return
	}
	a.text = a.text[:start+n]
	for i, c := range a.text[start:] {
		if a.take(c) {
			a.whole = start + i + 1
			if a.entries++; !a.isStream {
				break
			}
		}
	}
	if !a.isStream && a.whole > 0 {
		a.text = a.text[:a.whole]
	}
}

// take takes over a byte, and reports whether a value ends with it.
func (a *answer) take(c byte) (isEnd bool) {
	switch {
	case a.escaped:
		a.escaped = false
	case a.inString:
		a.escaped, a.inString = c == '\\', c != '"'
	case c == '"':
		a.inString = true
	case c == '{', c == '[':
		a.depth++
	case c == '}', c == ']':
		a.depth--
		return a.depth == 0
	case c == ',' && a.depth == 1 && !a.isStream:
		a.entries++
	}
	return false
}

// lacksTLS reports whether err says that the other side does not speak TLS.
func lacksTLS(err error) bool {
	text := err.Error()
	return strings.Contains(text, "HTTP response to HTTPS client") ||
		strings.Contains(text, "does not look like a TLS handshake")
}

// isNoHTTP reports whether err says that the other side does not speak HTTP; most often it is TLS.
func isNoHTTP(err error) bool { return strings.Contains(err.Error(), "malformed HTTP response") }
