package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"sync/atomic"
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

// maxConnections returns how many connections to the engine there may be, so that the other files
// that the daemon needs can still be opened.
func maxConnections() int {
	const others = 16 // log, spool, Backstop, names of hosts and what Go needs
	limits, _ := os.ReadFile("/proc/self/limits")
	found := regexp.MustCompile(`\nMax open files +(\d+)`).FindSubmatch(limits)
	if found == nil {
		return maxInFlight
	}
	files, err := strconv.Atoi(string(found[1]))
	if err != nil {
		return maxInFlight
	}
	return max(min(files-others, maxInFlight), 1)
}

// Bounds of answers from the engine that are in memory at the same time, in bytes.
const (
	usualAnswer = 64 << 10 // counts for nothing
	maxLong     = 64 << 20 // of all that is longer
)

// metered reads an answer. What is longer than usual needs room, which all answers share: hundreds
// that are as long as one may be would be a gigabyte.
type metered struct {
	io.Reader
	room  *atomic.Int64
	read  int64
	taken int64 // of the room
}

func (m *metered) Read(p []byte) (n int, err error) {
	n, err = m.Reader.Read(p)
	m.read += int64(n)
	if more := m.read - usualAnswer - m.taken; more > 0 {
		m.taken += more
		if m.room.Add(-more) < 0 {
			return n, errNoRoom
		}
	}
	return n, err
}

var errNoRoom = errors.New("too many long answers at the same time")

func (m *metered) release() { m.room.Add(m.taken) }

// checkJSON returns why an answer is not to be decoded, though it may be JSON: a decoder's stack
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
			return errors.New("the answer is nested too deep")
		}
	}
	switch {
	case entries > maxEntries:
		return fmt.Errorf("the answer has over %d entries", maxEntries)
	case values > fewValues+len(body)/perValue:
		return errors.New("the answer has too many values for its length")
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
