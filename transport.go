package main

import (
	"net"
	"net/http"
	"strings"
	"time"
)

// maxHeader bounds the header of an answer, in bytes.
const maxHeader = 64 << 10

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

// lacksTLS reports whether err says that the other side does not speak TLS.
func lacksTLS(err error) bool {
	text := err.Error()
	return strings.Contains(text, "HTTP response to HTTPS client") ||
		strings.Contains(text, "does not look like a TLS handshake")
}

// isNoHTTP reports whether err says that the other side does not speak HTTP; most often it is TLS.
func isNoHTTP(err error) bool { return strings.Contains(err.Error(), "malformed HTTP response") }
