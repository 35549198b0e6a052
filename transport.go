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
	"sync"
	"time"
)

const (
	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 64 << 10
	// maxEntries bounds a list, in containers or events: one of 32 MiB could have 10 million.
	maxEntries = 50_000
	// linger is the time between two looks at an answer that does not end.
	linger = 125 * time.Millisecond
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
// or, if it does not, when it is whole and, as a stream, when no more comes.
type answer struct {
	text     []byte
	isStream bool
	isOpen   bool // whether it was over, but had not ended

	scanned  int // bytes
	whole    int // bytes up to the end of the first value or, of a stream, of the last one
	depth    int // of objects and arrays
	inString bool
	escaped  bool
	entries  int // values of a stream, or of the outermost array or object
}

// read reads the answer from r. cancel ends a Read.
func (a *answer) read(r io.Reader, cancel context.CancelFunc) error {
	var (
		mu   sync.Mutex  // of a and late
		late *time.Timer // nil when read has returned
	)
	mu.Lock()
	defer mu.Unlock()
	late = time.AfterFunc(linger, func() { // most answers have ended by then
		mu.Lock()
		defer mu.Unlock()
		switch {
		case late == nil:
		case a.isOver():
			a.isOpen = true
			cancel()
		default:
			late.Reset(linger)
		}
	})
	defer func() { late.Stop(); late = nil }()
	for {
		if cap(a.text)-len(a.text) < 512 {
			a.text = slices.Grow(a.text, max(8<<10, len(a.text))) // most have less
		}
		free := a.text[len(a.text):cap(a.text)]
		mu.Unlock()
		n, err := r.Read(free)
		mu.Lock()
		a.text = a.text[:len(a.text)+n]
		var long *http.MaxBytesError
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.As(err, &long):
			return fmt.Errorf("the answer has over %d MiB", long.Limit>>20)
		case err != nil &&
			(a.isOpen || a.scan() > 0 || a.isStream && errors.As(err, new(noAnswer))):
			if a.isOpen = true; !a.isStream || a.depth > 0 {
				a.text = a.text[:a.whole]
			}
			return nil
		case err != nil:
			return fmt.Errorf("the answer broke off: %w", err)
		}
	}
}

// isOver reports whether an answer that has not ended is over.
func (a *answer) isOver() bool {
	before := a.whole
	if whole := a.scan(); !a.isStream {
		return whole > 0
	}
	return a.depth == 0 && a.whole == before // blanks only show that the other side lives
}

// scan looks at what came since the last time, and returns how much is whole.
func (a *answer) scan() int {
	for ; a.scanned < len(a.text) && (a.isStream || a.whole == 0); a.scanned++ {
		if a.take(a.text[a.scanned]) {
			a.whole = a.scanned + 1
			a.entries++
		}
	}
	return a.whole
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
